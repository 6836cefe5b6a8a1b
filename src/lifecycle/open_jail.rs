//! The jail as the supervisor has it: made, recorded, watched, ended, and no trace of it left in the image root.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::thread::CapabilitySet;

use crate::error::{Attempt, Error, Result};
use crate::jail::link::{Link, Message};
use crate::jail::mount_points::{self, Made, ResolvConf};
use crate::jail::mount_table::mount_table;
use crate::jail::record::Record;
use crate::lifecycle::state::StateFolder;
use crate::sys::process::{Entry, Handle};
use crate::sys::tree::Tree;

/// What a jail is made of, as the supervisor knows it.
pub struct Wanted<'a> {
    /// The image root's path, in this mount namespace.
    pub path: &'a Path,
    /// The same, open.
    pub image_root: &'a Tree,
    /// Where mount points that the image lacks are noted: the image root's parent.
    pub note_folder: &'a Tree,
    /// Whether the job builds kernel modules.
    pub dkms: bool,
    /// The IMS job.
    pub job: Option<&'a str>,
    /// Variables that sessions keep.
    pub keep: Vec<String>,
    /// sshd's sftp-server with what it needs; none if there are no sftp sessions.
    pub sftp: &'a [(String, PathBuf)],
}

/// An open jail.
#[derive(Debug)]
pub struct OpenJail {
    init: Handle,
    link: Link,
    /// The container's resolv.conf when the jail was made, if a copy of it is mounted.
    resolv_conf: Option<Vec<u8>>,
}

/// A jail is made in milliseconds, or never.
const TIME_TO_MAKE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

impl OpenJail {
    /// Makes the jail and writes down in `state` where it is. This process has to be a subreaper (or PID 1).
    pub fn open(wanted: &Wanted<'_>, state: &StateFolder) -> Result<Self> {
        check_entrance()?;
        let mut points = mount_points::missing(wanted.image_root, mount_table(wanted.dkms))?;
        let text = std::fs::read(Path::new("/").join(mount_points::RESOLV_CONF)).ok();
        let decision = mount_points::resolv_conf(wanted.image_root, text.as_deref())?;
        if decision == ResolvConf::Made {
            points.push(mount_points::MountPoint { path: mount_points::RESOLV_CONF.into(), folder: false });
        }
        let text = text.filter(|_| decision != ResolvConf::AsItIs);
        if let Some(text) = &text {
            // A copy: what a session writes into it must not reach the container's.
            std::fs::write(state.resolv_conf(), text).attempt(|| format!("write {}", state.resolv_conf().display()))?;
        }
        let made = Made::make(wanted.image_root, wanted.note_folder, points)?;
        match start(wanted, text.is_some().then(|| state.resolv_conf())) {
            Ok((init, link)) => {
                let ended = || Error::new("make the jail").because("its init ended at once");
                let entry = Entry::read(init).ok_or_else(ended)?;
                let init = Handle::open(init, entry.start).map_err(|_| ended())?;
                let jail = Self { init, link, resolv_conf: text };
                jail.record(wanted, entry.start, state).inspect_err(|_| jail.end())?;
                Ok(jail)
            }
            Err(e) => {
                let _ = made.remove();
                Err(e)
            }
        }
    }

    fn record(&self, wanted: &Wanted<'_>, start: u64, state: &StateFolder) -> Result<()> {
        let record = Record {
            init: self.init.pid.as_raw(),
            start,
            dkms: wanted.dkms,
            job: wanted.job.map(Into::into),
            keep: wanted.keep.clone(),
        };
        let attempted = || format!("write {}", state.jail().display());
        Tree::open(state.path()).and_then(|t| t.replace("jail", record.to_text().as_bytes())).attempt(attempted)
    }

    /// The jail's first process.
    pub fn init(&self) -> Pid {
        self.init.pid
    }

    /// Readable when [`OpenJail::told`] has something.
    pub fn link(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// What the init tells; to be called when the link is readable. `None` if the init has ended.
    pub fn told(&self) -> Option<Message> {
        self.link.receive().ok().flatten()
    }

    /// Ends every process in the jail. When this returns, none is left: the kernel lets the init end only after all others.
    pub fn end(&self) {
        let _ = self.init.signal(Signal::SIGKILL);
        while waitpid(self.init.pid, None) == Err(nix::errno::Errno::EINTR) {}
    }

    /// Removes the jail's traces from the image root, after its end: keeps an edited resolv.conf, removes mount points.
    pub fn clear(self, image_root: &Tree, note_folder: &Tree, state: &StateFolder) -> Result<()> {
        let edited = match &self.resolv_conf {
            Some(text) => mount_points::keep_edited_resolv_conf(image_root, &state.resolv_conf(), text),
            None => Ok(false),
        };
        if matches!(edited, Ok(true)) {
            tracing::info!("a session edited /etc/resolv.conf: its text is kept in the image");
        }
        clear_mount_points(image_root, note_folder)?;
        edited.map(|_| ())
    }
}

/// Removes the mount points that were noted, by this environment or by an earlier one that was killed. Returns whether there were
/// any.
pub fn clear_mount_points(image_root: &Tree, note_folder: &Tree) -> Result<bool> {
    let made = Made::left_over(image_root, note_folder);
    let found = made.is_some();
    if let Some(made) = made {
        for path in made.remove()? {
            tracing::info!(
                "/{} was made for the jail and stays in the image, since something was put into it",
                path.display()
            );
        }
    }
    Ok(found)
}

/// The jail's init is hidden from those inside (not dumpable), and by the same rule of ptrace(2) from us, whose sessions name it to
/// enter its namespaces.
fn check_entrance() -> Result<()> {
    let attempted = || "make a jail that sessions can enter";
    if rustix::thread::capabilities(None).attempt(attempted)?.effective.contains(CapabilitySet::SYS_PTRACE) {
        return Ok(());
    }
    Err(Error::new(attempted())
        .because("root may not look at the jail's init")
        .advise("the container needs CAP_SYS_PTRACE beside CAP_SYS_ADMIN, or has to be privileged"))
}

fn start(wanted: &Wanted<'_>, resolv_conf: Option<PathBuf>) -> Result<(Pid, Link)> {
    let program = program()?;
    let attempted = || format!("start {}", program.display());
    let (ours, theirs) = Link::pair().attempt(|| "make a socket to the jail's init")?;
    let mut command = Command::new(&program);
    command
        .arg("init")
        .arg("--root")
        .arg(wanted.path)
        .stdin(Stdio::from(theirs.into_fd()))
        .current_dir("/")
        .env_clear();
    if wanted.dkms {
        command.arg("--dkms");
    }
    if let Some(file) = resolv_conf {
        command.arg("--resolv-conf").arg(file);
    }
    for (name, file) in wanted.sftp {
        let mut pair = std::ffi::OsString::from(format!("{name}="));
        pair.push(file);
        command.arg("--sftp").arg(pair);
    }
    let status = command.status().attempt(attempted)?;
    // Its end of the socket is now the init's alone: it closes when that one ends.
    drop(command);
    let (mut init, mut ready) = (None, false);
    let failed = |init: Option<Pid>, why: String| {
        if let Some(init) = init {
            let _ = kill(init, Signal::SIGKILL);
            let _ = waitpid(init, None);
        }
        // The init's own sentence begins with "cannot".
        let why = why.strip_prefix("cannot ").map(str::to_owned).unwrap_or(why);
        Err(Error::new(why))
    };
    // The init and the process that started it speak in any order.
    loop {
        if let (Some(init), true) = (init, ready) {
            return Ok((init, ours));
        }
        let mut sources = [PollFd::new(&ours, PollFlags::IN)];
        let timely = rustix::event::poll(&mut sources, Some(&TIME_TO_MAKE));
        if matches!(timely, Ok(0)) {
            return failed(init, format!("make the jail within {} s", TIME_TO_MAKE.tv_sec));
        }
        match ours.receive().attempt(|| "hear from the jail's init")? {
            Some(Message::Started(pid)) => init = Some(Pid::from_raw(pid)),
            Some(Message::Ready) => ready = true,
            Some(Message::Failed(why)) => return failed(init, why),
            // Not lost: it stands in the image's /tmp.
            Some(Message::Marked(_)) => {}
            None => {
                return failed(init, format!("make the jail: {} ended without a word ({status})", program.display()));
            }
        }
    }
}

/// `ims-jail-shell`, which is installed beside this program.
pub fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().attempt(|| "find this program's own file")?;
    let beside = own.with_file_name("ims-jail-shell");
    if beside.exists() {
        Ok(beside)
    } else {
        Err(Error::new("find ims-jail-shell")
            .because(format!("{} does not exist", beside.display()))
            .advise("install both programs into one folder"))
    }
}

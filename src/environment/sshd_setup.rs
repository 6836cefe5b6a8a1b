//! What makes a build environment out of an image root: everything that can fail, before sshd listens.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;

use crate::environment::processes;
use crate::environment::settings::Settings;
use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::tier::Tier;
use crate::jailer::open::{self, OpenJail, Wanted};
use crate::jailer::trial::{self, Choice};
use crate::sshd::accept_env;
use crate::sshd::config;
use crate::sshd::daemon::Daemon;
use crate::sshd::effective::{Effective, Question};
use crate::sshd::login_shell::LoginShell;
use crate::sshd::sftp_server;
use crate::sys::architecture::Architecture;
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::verdict::{Verdict, is_mark};
use crate::volume::layout::SSHD_LISTENING;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::StateFolder;

/// What does not depend on the image, and is done while one waits for it.
pub struct Groundwork {
    /// sftp-server with all it needs.
    pub sftp: Vec<(String, PathBuf)>,
    /// What kind of jail is made; nothing in plain mode.
    pub jail: Option<Choice>,
}

impl Groundwork {
    /// Makes host keys where they are missing (an RSA key takes its time), finds sshd's parts, and finds out which jail can be had.
    pub fn lay(settings: &Settings, state: &StateFolder) -> Result<Self> {
        crate::sshd::program()?;
        crate::sshd::check_rights()?;
        let sftp = if settings.jailed { sftp_server::files()? } else { Vec::new() };
        make_host_keys()?;
        // sshd does not start without it, and in a container nobody else makes it.
        std::fs::create_dir_all("/run/sshd").attempt(|| "make the folder /run/sshd")?;
        if !settings.jailed && !settings.binds.is_empty() {
            tracing::warn!("IMS_JAIL_BINDS is of no use in plain mode: sessions see what the container sees");
        }
        let choose = || trial::choose(&settings.tiers, settings.dkms, state);
        Ok(Self { sftp, jail: settings.jailed.then(choose).transpose()? })
    }
}

fn make_host_keys() -> Result<()> {
    let attempted = || "make sshd's host keys with ssh-keygen -A";
    let output = Command::new("ssh-keygen").arg("-A").stdin(Stdio::null()).output().attempt(attempted)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', ", ");
    Err(Error::new(attempted()).because(said))
        .advise("/etc/ssh has to be writable; give a read-only container a tmpfs there")
}

/// Opens the image root. It has to be a directory of the parent and not a link.
pub fn open_image_root(files: &SignalFiles, name: &str) -> Result<Tree> {
    let shown = files.path().join(name);
    let attempted = || format!("open the image root {}", shown.display());
    // The descriptor that was looked at is the one that is used: what was a directory a moment ago may be a link now.
    let found = match files.parent().handle_without_links(name) {
        Err(e) if Errno::from_io_error(&e) == Some(Errno::LOOP) => {
            return Err(Error::new(attempted()).because("a directory on the way to it is a symbolic link"))
                .advise("it has to be a directory of the volume");
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(attempted()).because("it does not exist"))
                .advise("whoever creates 'ready' has to unpack the image there first");
        }
        other => other.attempt(attempted)?,
    };
    match FileKind::of(&rustix::fs::fstat(&found).attempt(attempted)?) {
        FileKind::Directory => Ok(Tree::from_fd(found)),
        other => Err(Error::new(attempted()).because(format!("it is {other}"))).advise("it has to be a directory"),
    }
}

/// Removes marks that came with the image: a job must not end before it began. A link or fifo of that name is removed too.
pub fn remove_old_marks(image_root: &Tree) -> Result<()> {
    for verdict in Verdict::ALL {
        let name = mark_of(verdict);
        remove_directory(image_root, &name)?;
        if image_root.remove(&name).attempt(|| removing(&name))? {
            tracing::info!("removed /{}, which came with the image", name.display());
        }
    }
    Ok(())
}

fn mark_of(verdict: Verdict) -> PathBuf {
    Path::new("tmp").join(verdict.signal_file())
}

fn removing(mark: &Path) -> String {
    format!("remove /{} of the image", mark.display())
}

/// Removes an empty directory in the place of a mark: with it in the way, no session could make the mark. One that is not empty is an error.
fn remove_directory(image_root: &Tree, name: &Path) -> Result<()> {
    let attempted = || removing(name);
    if image_root.look(name).attempt(attempted)?.as_ref().map(FileKind::of) != Some(FileKind::Directory) {
        return Ok(());
    }
    match image_root.remove_folder(name) {
        Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            // No advice, in whose place there may be the caller's.
            let why = "it is a directory that is not empty, in the place of a mark: remove it from the image";
            return Err(Error::new(attempted()).because(why));
        }
        other => other.attempt(attempted)?,
    };
    tracing::warn!("removed the empty directory /{} of the image, which has the name of a mark", name.display());
    Ok(())
}

/// Removes the mark from the image's /tmp, and an empty directory in its place. Returns whether the mark stood there. What else is no
/// regular file is no mark, and stays.
pub fn take_mark(image_root: &Tree, verdict: Verdict) -> Result<bool> {
    let name = mark_of(verdict);
    let attempted = || removing(&name);
    remove_directory(image_root, &name)?;
    if !image_root.look(&name).attempt(attempted)?.is_some_and(|found| is_mark(&found)) {
        return Ok(false);
    }
    image_root.remove(&name).attempt(attempted)
}

/// Returns whether `failed` stands in the parent or, for a jailed job, in the image's /tmp. A place that cannot be looked at is an error: an
/// image whose verdict is not known is not packed.
pub fn is_marked_failed(files: &SignalFiles, image_root: Option<&Tree>) -> Result<bool> {
    let name = mark_of(Verdict::Failed);
    let in_image = |root: &Tree| {
        let found = root.look(&name).attempt(|| format!("look for /{} in the image", name.display()))?;
        Ok(found.is_some_and(|found| is_mark(&found)))
    };
    Ok(files.stands(Verdict::Failed.signal_file())? || image_root.map_or(Ok(false), in_image)?)
}

/// Makes the image's own mark as a sidecar expects it after a jailed job: a failure stands in its /tmp too, a success leaves
/// nothing there.
pub fn mark_in_image(files: &SignalFiles, image_root: &Tree, verdict: Verdict) -> Result<()> {
    let failed = mark_of(Verdict::Failed);
    remove_directory(image_root, &failed)?;
    if verdict == Verdict::Failed {
        files.create(image_root, &failed).attempt(|| "create /tmp/failed in the image")?;
    }
    match take_mark(image_root, Verdict::Complete) {
        Err(e) if verdict == Verdict::Failed => tracing::warn!("{e}"),
        taken => drop(taken?),
    }
    Ok(())
}

/// Writes the settings into sshd's configuration and has sshd itself say what they come to. With a jail, refuses a configuration that
/// would let a session land outside.
pub fn configure_sshd(settings: &Settings, state: &StateFolder) -> Result<Effective> {
    let fragment = state.fragment();
    let options = &settings.sshd.asking;
    let shown = settings.sshd_config.display();
    // Without the fragment, whose Include sshd passes over as long as it does not exist: what the configuration says by itself.
    let _ = std::fs::remove_file(&fragment);
    let base = Effective::ask(options, "root")?;
    let force_command = settings.jailed.then(|| force_command(state)).transpose()?;
    let text = config::fragment(&settings.session_variables, &base, settings.agent, force_command.as_deref());
    std::fs::write(&fragment, &text).attempt(|| format!("write {}", fragment.display()))?;
    let before = std::fs::read(&settings.sshd_config).attempt(|| format!("read {shown}"))?;
    let after = config::including(&before, &fragment);
    if after != before {
        config::write(&settings.sshd_config, &after)?;
    }
    // The two are asked at once, since a pod waits for the answers, and both are heard, whatever the first one is.
    let nobodys = force_command.is_some().then(|| Question::put(options, "nobody")).transpose()?;
    let roots = Effective::ask(options, "root");
    let nobodys = nobodys.map(Question::answer);
    let effective = roots?;
    if let (Some(command), Some(nobodys)) = (&force_command, nobodys) {
        accept_env::check(&settings.sshd_config, &settings.sshd)?;
        effective.check_jail(command)?;
        nobodys?.check_denied()?;
    }
    Ok(effective)
}

/// Takes the settings out of sshd's configuration again. Returns whether there were any.
pub fn unconfigure_sshd(settings: &Settings) -> Result<bool> {
    let shown = settings.sshd_config.display();
    let before = match std::fs::read(&settings.sshd_config) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        other => other.attempt(|| format!("read {shown}"))?,
    };
    let after = config::without_include(&before);
    if after == before {
        return Ok(false);
    }
    config::write(&settings.sshd_config, &after).map(|()| true)
}

fn force_command(state: &StateFolder) -> Result<String> {
    let program = open::program()?;
    // `exec`: the login shell makes way, so that sshd sees the helper's end as its own, a death by signal too.
    let words = ["exec", &program.to_string_lossy(), "session", &state.jail().to_string_lossy()].map(str::to_owned);
    Ok(shell_words::join(words))
}

/// The shell that sshd is to find for root, so that no shell of the container has part in a session in a jail of this kind; `None` where
/// no mount namespace can be made for sshd.
pub fn login_shell(jail: &Choice, state: &StateFolder) -> Result<Option<LoginShell>> {
    let shell = || Ok(LoginShell { program: open::program()?, passwd: state.passwd() });
    (jail.tier == Tier::Namespace).then(shell).transpose()
}

/// Makes the jail.
pub fn make_jail(
    settings: &Settings,
    files: &SignalFiles,
    image_root: &Tree,
    (kind, sftp): (&Choice, &[(String, PathBuf)]),
    emulated: Option<Architecture>,
    effective: &Effective,
    state: &StateFolder,
) -> Result<OpenJail> {
    let names = effective.set_env().into_iter().map(|(name, _)| name);
    let wanted = Wanted {
        tier: kind.tier,
        proc: kind.proc,
        path: &files.path().join(settings.image_root()),
        image_root,
        note_folder: files.parent(),
        dkms: settings.dkms,
        emulated,
        job: settings.job.as_deref(),
        in_place: settings.in_place,
        image: settings.image.as_deref(),
        hostname: settings.hostname.as_deref(),
        keep: names.chain(effective.accept_env().map(str::to_owned)).collect(),
        binds: &settings.binds,
        programs: sftp,
        bare: kind.bare.as_ref().map(AsFd::as_fd),
    };
    OpenJail::open(&wanted, state)
}

/// Ends the sshd of an earlier environment that was killed, with its sessions; one that was not noted is known by its log. Returns what was
/// found, in words.
pub fn end_left_over(state: &StateFolder, log: Option<&Path>) -> Result<Vec<&'static str>> {
    let mut found = Vec::new();
    if let Some(listener) = Daemon::noted(&state.sshd()) {
        processes::end_tree(&listener)?;
        found.push("a listening sshd, with its sessions");
    }
    // A listener that was killed before it was noted, or connections that had lost theirs.
    let others = log.map(Daemon::with_log).unwrap_or_default();
    for other in &others {
        processes::end_tree(other)?;
    }
    if !others.is_empty() {
        found.push("sshd of its connections, with its sessions");
    }
    Ok(found)
}

/// Puts right what an earlier environment on this image root left behind when it was killed. Returns whether there was one.
pub fn recover(settings: &Settings, files: &SignalFiles, image_root: &Tree, state: &StateFolder) -> Result<bool> {
    let mut found = end_left_over(state, settings.sshd.log.as_deref())?;
    // Its init ended with it: the kernel closed its end of their socket.
    match std::fs::remove_file(state.jail()) {
        Ok(()) => found.push("the record of its jail"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).attempt(|| format!("remove {}", state.jail().display())),
    }
    if unconfigure_sshd(settings)? {
        found.push("its line in sshd's configuration");
    }
    if open::clear_image_root(image_root, files.parent())? {
        found.push("what it had added to the image");
    }
    let was_open = files.stands(SSHD_LISTENING)?;
    if was_open {
        files.remove(SSHD_LISTENING)?;
        found.push("'sshd_listening'");
    }
    if !found.is_empty() {
        tracing::warn!(
            "cleaned up after an environment that was killed here: {}; what was changed in the image is kept",
            found.join("; ")
        );
    }
    Ok(was_open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_marked_failed_outside_or_inside_or_where_one_cannot_look() {
        let dir = tempfile::tempdir().unwrap();
        let files = SignalFiles::open(dir.path()).unwrap().unwrap();
        let root = dir.path().join("image-root");
        std::fs::create_dir(&root).unwrap();
        let tree = open_image_root(&files, "image-root").unwrap();
        let is_marked = |tree: Option<&Tree>| is_marked_failed(&files, tree);
        assert!(!is_marked(Some(&tree)).unwrap(), "without a /tmp");
        std::os::unix::fs::symlink("tmp", root.join("tmp")).unwrap();
        let told = is_marked(Some(&tree)).unwrap_err().to_string();
        assert!(told.contains("look for /tmp/failed in the image: Too many levels"), "{told}");
        assert!(!is_marked(None).unwrap());
        std::fs::remove_file(root.join("tmp")).unwrap();
        std::fs::create_dir_all(root.join("tmp/failed")).unwrap();
        assert!(!is_marked(Some(&tree)).unwrap(), "a directory is no mark");
        std::fs::write(root.join("tmp/failed/file"), "").unwrap();
        let told = take_mark(&tree, Verdict::Failed).unwrap_err().to_string();
        assert!(told.ends_with("in the place of a mark: remove it from the image"), "{told}");
        std::fs::remove_file(root.join("tmp/failed/file")).unwrap();
        assert!(!take_mark(&tree, Verdict::Failed).unwrap() && !root.join("tmp/failed").exists());
        std::fs::write(root.join("tmp/failed"), "").unwrap();
        assert!(is_marked(Some(&tree)).unwrap());
        assert!(take_mark(&tree, Verdict::Failed).unwrap());
        std::fs::write(dir.path().join("failed"), "").unwrap();
        assert!(is_marked(None).unwrap());
    }
}

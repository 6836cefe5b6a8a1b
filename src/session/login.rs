//! `ims-jail-shell` as forced command: a client's request carried out inside the jail, as sshd would on the booted image.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Gid;
use rustix::fs::{Access, Mode, OFlags};

use crate::error::{Attempt, Error, Result};
use crate::jail::agent::Outside;
use crate::jail::enter;
use crate::jail::mount_table::SFTP_FOLDER;
use crate::jail::record::Record;
use crate::jail::tier::Tier;
use crate::printable::Printable;
use crate::session::account::{Account, DEFAULT_SHELL};
use crate::session::environment::{LOGIN_PATH, session_environment};
use crate::session::etc_environment;
use crate::session::report::{Beginning, Report};
use crate::session::request::Request;
use crate::session::terminfo;
use crate::sys::process::Exec;
use crate::sys::tree::{Tree, kind_of};

/// Enters the jail that the record at `jail` tells of and carries out `request` there. This process ends as that does.
pub fn run(jail: &Path, request: &Request) -> Result<Infallible> {
    let record = &Record::read(jail)?;
    let at_terminal = std::io::stdin().is_terminal();
    // Told before the container's sockets are out of sight.
    let told = Report::begin(jail, &Beginning::of_this_session(request, at_terminal));
    let beside = outside_sftp_folder(jail, record, request)?;
    let agent = agent_outside(record, request);
    let init = enter::join(record)?;
    // `/` is the image root from here on.
    let image_root = Tree::open(Path::new("/")).attempt(|| "open the image root")?;
    let account = Account::root_of(&image_root);
    let transfer = matches!(request, Request::Sftp(_));
    if transfer && let Err(error) = check_what_sftp_server_opens(&image_root) {
        told.end(&WaitStatus::Exited(nix::unistd::getpid(), 255), Some(&error.to_string()));
        return Err(error);
    }
    let agent = agent.and_then(|agent| agent.show(&image_root).ok());
    // The container's sftp-server needs none of the image's settings, and could be kept from starting by them.
    let of_image = if transfer { Vec::new() } else { etc_environment::read(&image_root) };
    let mut environment = session_environment(std::env::vars_os(), &account, &record.keep, of_image);
    if record.tier == Tier::Chroot && !environment.iter().any(|(name, _)| name == OFFLINE) {
        environment.push((OFFLINE.into(), "1".into()));
    }
    environment.extend(agent.as_ref().map(|agent| ("SSH_AUTH_SOCK".into(), agent.path().into())));
    let mut programs = programs(request, &account);
    if beside.is_some() {
        programs = sftp_programs(Path::new("."), &beginning_at_home(request, &account, &image_root));
    }
    let programs = programs.iter().map(|program| program.prepared(&environment)).collect::<nix::Result<Vec<_>>>();
    let programs = programs.attempt(|| "put the arguments of the program together")?;
    let ended = |status: &WaitStatus| {
        // Of what an sftp-server says on standard error, sshd passes nothing on.
        let nobody = transfer && !account.known && matches!(status, WaitStatus::Exited(_, 1));
        told.end(status, nobody.then_some("/etc/passwd of the image has no user number 0, whom sftp-server looks for"));
        if matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)) && init.ends_within(TIME_TO_FOLLOW) {
            eprintln!(
                "ims-jail-shell: the jail has ended: the environment is closing, or its init was killed; {LOG_IN_AGAIN}"
            );
        }
    };
    if matches!(request, Request::Shell) && at_terminal {
        greet(&image_root, &account, record);
    }
    enter::run(record, agent, ended, || {
        become_root(&account);
        if let Some(folder) = &beside {
            // Outside the root, where no path leads: its loader and libraries are found there, and then it goes where it is told.
            if let Err(e) = rustix::process::fchdir(folder) {
                eprintln!("ims-jail-shell: cannot go to the folder of sftp-server: {e}");
                return 1;
            }
        }
        report(run_first(&programs))
    })
}

/// Tells systemctl that no systemd runs. Without /proc, older versions do not notice that by themselves.
const OFFLINE: &str = "SYSTEMD_OFFLINE";

/// A killed init ends after all others in the jail, once the last of those was waited for: after this session's process.
const TIME_TO_FOLLOW: Duration = Duration::from_millis(200);

const LOG_IN_AGAIN: &str = "if it is not closing, log in again in a moment";

/// A program to try, with its arguments.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
    is_shell: bool,
}

impl Program {
    fn prepared(&self, environment: &[(OsString, OsString)]) -> nix::Result<Exec> {
        let environment = environment.iter().map(|(name, value)| {
            // $SHELL is the shell that really runs.
            let value = if name == "SHELL" && self.is_shell { self.path.as_os_str() } else { value };
            (name.as_os_str(), value)
        });
        Exec::new(&self.path, &self.arguments, environment)
    }
}

/// What may carry out `request`, best first.
fn programs(request: &Request, account: &Account) -> Vec<Program> {
    let in_shell = |shell: &Path| {
        let name = shell.file_name().unwrap_or(OsStr::new("sh"));
        let arguments = match request {
            Request::Command(command) => vec![name.to_owned(), "-c".into(), command.clone()],
            _ => {
                // A name that begins with a dash makes it a login shell.
                let mut dashed = OsString::from("-");
                dashed.push(name);
                vec![dashed]
            }
        };
        Program { path: shell.to_owned(), arguments, is_shell: true }
    };
    match request {
        Request::Sftp(options) => return sftp_programs(&Path::new("/").join(SFTP_FOLDER), options),
        Request::Program(words) if !words.is_empty() => return on_path(words),
        _ => {}
    }
    let mut programs = vec![in_shell(&account.shell)];
    if account.shell != Path::new(DEFAULT_SHELL) {
        programs.push(in_shell(Path::new(DEFAULT_SHELL)));
    }
    programs
}

/// The places of the login path where the program could be; itself if it is a path.
fn on_path(words: &[OsString]) -> Vec<Program> {
    let name = Path::new(&words[0]);
    let folders = if name.components().count() > 1 { "" } else { LOGIN_PATH };
    let candidate = |folder| Program { path: Path::new(folder).join(name), arguments: words.to_vec(), is_shell: false };
    folders.split(':').map(candidate).collect()
}

/// The client's agent, for who can use one. The chroot tier has no /run that does not belong to the image.
fn agent_outside(record: &Record, request: &Request) -> Option<Outside> {
    let wanted = record.tier != Tier::Chroot && matches!(request, Request::Shell | Request::Command(_));
    wanted.then(Outside::of_this_session)?
}

/// In the chroot tier, the folder in which the container's sftp-server stands, open. Where nothing can be mounted, it is not seen in the
/// image.
fn outside_sftp_folder(jail: &Path, record: &Record, request: &Request) -> Result<Option<Tree>> {
    if record.tier != Tier::Chroot || !matches!(request, Request::Sftp(_)) {
        return Ok(None);
    }
    let folder = jail.with_file_name("sftp");
    Tree::open(&folder).attempt(|| format!("open {}", folder.display())).map(Some)
}

/// sftp-server's options with the folder it begins in, which has to exist: else it would stay where it was started.
fn beginning_at_home(request: &Request, account: &Account, image_root: &Tree) -> Vec<OsString> {
    let mut options = match request {
        Request::Sftp(options) => options.clone(),
        _ => Vec::new(),
    };
    let home = account.home.as_path();
    let is_there = image_root.folder(home).is_ok();
    options.extend(["-d".into(), if is_there { home.as_os_str() } else { OsStr::new("/") }.to_owned()]);
    options
}

/// The container's sftp-server in `folder`, by the container's loader: nothing of it is looked up in the image.
fn sftp_programs(folder: &Path, options: &[OsString]) -> Vec<Program> {
    let server = folder.join("sftp-server");
    let loader = folder.join("ld.so");
    let mut arguments: Vec<OsString> =
        vec![loader.clone().into(), "--library-path".into(), folder.into(), server.clone().into()];
    arguments.extend_from_slice(options);
    let mut direct: Vec<OsString> = vec![server.clone().into()];
    direct.extend_from_slice(options);
    // A server that is linked statically comes without a loader.
    vec![
        Program { path: loader, arguments, is_shell: false },
        Program { path: server, arguments: direct, is_shell: false },
    ]
}

/// What the container's sftp-server, its loader and its libc read of the image.
const READ_BY_SFTP_SERVER: [&str; 5] =
    ["etc/ld.so.preload", "etc/nsswitch.conf", "etc/passwd", "etc/group", "etc/localtime"];

/// They would wait for ever for somebody to write to a fifo, and the client with them. And of what sftp-server says before it ends, sshd
/// passes nothing on.
fn check_what_sftp_server_opens(image_root: &Tree) -> Result<()> {
    let attempted = || "start sftp-server in this image";
    open_null(image_root).attempt(|| "open its /dev/null").map_err(|e| {
        Error::new(attempted())
            .because(e)
            .advise("only an empty /dev of the image is furnished where nothing can be mounted")
    })?;
    for name in READ_BY_SFTP_SERVER {
        let found = image_root.open_at(name, OFlags::PATH, Mode::empty()).and_then(|fd| Ok(rustix::fs::fstat(fd)?));
        if found.is_ok_and(|found| kind_of(&found) == "a fifo") {
            return Err(Error::new(attempted()).because(format!("/{name} is a fifo")));
        }
    }
    Ok(())
}

/// Opens /dev/null as sftp-server does. Another device of that name, which the image may have brought, is not opened.
fn open_null(image_root: &Tree) -> std::io::Result<()> {
    let found = rustix::fs::fstat(image_root.open_at("dev/null", OFlags::PATH, Mode::empty())?)?;
    if kind_of(&found) == "a character device" && found.st_rdev != rustix::fs::makedev(1, 3) {
        return Err(std::io::Error::other("it is another device"));
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY;
    image_root.open_at("dev/null", flags, Mode::empty()).map(|_| ())
}

/// Replaces this process with the first of `programs` that can be started; returns why the last one could not.
fn run_first(programs: &[Exec]) -> (&Path, Errno) {
    let mut failed = (Path::new(""), Errno::ENOENT);
    for program in programs {
        let error = match rustix::fs::access(program.path(), Access::EXEC_OK) {
            Ok(()) => {
                let Err(error) = program.replace_this_process();
                error
            }
            Err(error) => Errno::from_rustix(error),
        };
        failed = (program.path(), error);
    }
    failed
}

/// Says why nothing could be started, and gives the exit code that shells use for it.
fn report((program, error): (&Path, Errno)) -> u8 {
    let missing = error == Errno::ENOENT;
    eprintln!(
        "ims-jail-shell: cannot start {} in this image: {}; {}",
        Printable(program.to_string_lossy()),
        error.desc(),
        if missing {
            "it, or the loader it names, is not there"
        } else {
            "is it built for this architecture and executable?"
        },
    );
    if missing { 127 } else { 126 }
}

fn become_root(account: &Account) {
    // What the image lacks is not worth losing the session over: one can still mend it from inside.
    let groups: Vec<Gid> = account.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    let _ = nix::unistd::setgroups(&groups);
    let _ = nix::unistd::setgid(Gid::from_raw(account.group));
    if rustix::process::chdir(&account.home).is_err() {
        let _ = rustix::process::chdir("/");
    }
}

fn greet(image_root: &Tree, account: &Account, record: &Record) {
    let mut out = std::io::stdout();
    let home = account.home.strip_prefix("/").unwrap_or(&account.home);
    if image_root.look(home.join(".hushlogin")).is_ok_and(|found| found.is_some()) {
        return;
    }
    let _ = out.write_all(&image_root.read("etc/motd", 64 << 10).unwrap_or_default());
    let job = record.job.as_ref().map_or(String::new(), |job| format!(" of IMS job {}", Printable(job)));
    let _ = writeln!(out, "You are in the image root{job}. When done: touch /tmp/complete");
    let _ = writeln!(out, "To give the changes up instead:           touch /tmp/failed");
    if let Some(terminal) = std::env::var_os("TERM").filter(|terminal| terminfo::is_unknown(terminal, image_root)) {
        let terminal = terminal.display();
        let _ = writeln!(
            out,
            "The image knows no terminal '{terminal}' (terminfo). Most work as: export TERM=xterm-256color"
        );
    }
    let _ = out.flush();
}

/// One errno type's value in the other's.
trait FromRustix {
    fn from_rustix(errno: rustix::io::Errno) -> Self;
}

impl FromRustix for Errno {
    fn from_rustix(errno: rustix::io::Errno) -> Self {
        Self::from_raw(errno.raw_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(request: &Request, shell: &str) -> Vec<(String, Vec<String>)> {
        let passwd = format!("root:x:0:0::/root:{shell}\n");
        programs(request, &Account::parse(passwd.as_bytes(), b""))
            .into_iter()
            .map(|p| {
                let arguments = p.arguments.into_iter().map(|a| a.into_string().unwrap()).collect();
                (p.path.display().to_string(), arguments)
            })
            .collect()
    }

    #[test]
    fn a_program_is_looked_up_on_the_images_path() {
        let tried = tried(&Request::Program(vec!["id".into(), "-u".into()]), "/bin/zsh");
        assert_eq!(tried.len(), LOGIN_PATH.split(':').count());
        assert!(tried.contains(&("/bin/id".into(), vec!["id".into(), "-u".into()])));
    }

    #[test]
    fn a_shell_is_a_login_shell_and_a_command_is_not() {
        let shell =
            |path: &str, arguments: &[&str]| (path.to_owned(), arguments.iter().map(ToString::to_string).collect());
        assert_eq!(tried(&Request::Shell, "/bin/zsh"), [shell("/bin/zsh", &["-zsh"]), shell("/bin/sh", &["-sh"])]);
        assert_eq!(
            tried(&Request::Command("id; true".into()), "/bin/sh"),
            [shell("/bin/sh", &["sh", "-c", "id; true"])]
        );
    }
}

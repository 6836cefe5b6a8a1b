//! `ims-jail-shell inside`, the inner stage: the jail's copy of this program, started in the jail by
//! [`crate::session::front`]. The inner stage first closes every descriptor but the three streams, and only then reads
//! the image: passwd, group, /etc/environment, home, shell and greeting. So no path in the image can lead the inner
//! stage out of the jail.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, IsTerminal, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Gid;
use rustix::fs::{Mode, OFlags};

use crate::error::{Attempt, Error, Result};
use crate::jail::arguments::Arguments;
use crate::jail::mount_table::PROGRAMS;
use crate::printable::Printable;
use crate::session::account::{Account, DEFAULT_SHELL};
use crate::session::etc_environment;
use crate::session::request::Request;
use crate::session::terminfo;
use crate::session::variables::{LOGIN_PATH, session_environment};
use crate::sys::file_kind::FileKind;
use crate::sys::process::{Exec, close_all_but_streams};
use crate::sys::signals::default_disposition;
use crate::sys::tree::Tree;
use crate::sys::umask;

/// Instructions for the inner stage: the words of its command line. Its environment has the client's variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errand {
    /// Request to carry out.
    pub(crate) request: Request,
    /// True if sftp-server is in the working directory, which is then outside the root (chroot tier).
    pub(crate) beside: bool,
    /// IMS job, for the greeting.
    pub(crate) job: Option<String>,
    /// Name of the image, for greeting and prompt.
    pub(crate) image: Option<String>,
    /// True if changes stay in the image however the environment ends.
    pub(crate) in_place: bool,
}

impl Errand {
    /// Program, command line and environment of an inner stage with this errand, for [`Exec::replace_this_process_by`].
    /// EINVAL for a string with a NUL byte.
    pub(crate) fn program(&self, environment: &[(OsString, OsString)]) -> nix::Result<Exec> {
        let words = Arguments::Inside(self.to_words()).to_argv();
        let environment = environment.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str()));
        Exec::new(Path::new(""), &words, environment)
    }

    fn to_words(&self) -> Vec<OsString> {
        let flags = [(self.beside, "--beside"), (self.in_place, "--in-place")];
        let names = [("--job", &self.job), ("--image", &self.image)];
        let mut words: Vec<OsString> =
            flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag.into()).collect();
        words.extend(
            names.into_iter().filter_map(|(name, value)| Some([name.into(), value.as_ref()?.into()])).flatten(),
        );
        let (kind, further): (_, &[OsString]) = match &self.request {
            Request::Shell => ("shell", &[]),
            Request::Command(line) => ("command", std::slice::from_ref(line)),
            Request::Sftp(options) => ("sftp", options),
            Request::Program(program) => ("program", program),
        };
        words.push(kind.into());
        words.extend_from_slice(further);
        words
    }

    /// Parses the words after `inside`; `None` if they are invalid.
    pub fn from_words(words: &[OsString]) -> Option<Self> {
        let (mut beside, mut in_place, mut job, mut image) = (false, false, None, None);
        let mut words = words.iter();
        let request = loop {
            match words.next()?.to_str()? {
                "--beside" => beside = true,
                "--in-place" => in_place = true,
                "--job" => job = Some(words.next()?.to_str()?.to_owned()),
                "--image" => image = Some(words.next()?.to_str()?.to_owned()),
                "shell" => break Request::Shell,
                "command" => break Request::Command(words.next()?.clone()),
                "sftp" => break Request::Sftp(words.cloned().collect()),
                "program" => break Request::Program(words.cloned().collect()),
                _ => return None,
            }
        };
        Some(Self { request, beside, job, image, in_place })
    }
}

/// Carries out `errand`. Returns the exit code if no program could be started.
pub fn run(errand: &Errand) -> Result<u8> {
    close_all_but_streams().attempt(|| "close the inherited descriptors")?;
    let image_root = Tree::open(Path::new("/")).attempt(|| "open the image root")?;
    let account = Account::root_of(&image_root);
    let request = &errand.request;
    let transfer = matches!(request, Request::Sftp(_));
    if transfer {
        check_what_sftp_server_opens(&image_root)?;
    }
    // The container's sftp-server needs no variable from the image, and such a variable could keep it from starting.
    let of_image = if transfer { Vec::new() } else { etc_environment::read(&image_root) };
    let mut environment = session_environment(std::env::vars_os().collect(), &account, of_image);
    let is_entered = matches!(request, Request::Program(words) if words.is_empty());
    if (is_entered || *request == Request::Shell) && std::io::stdin().is_terminal() {
        greet(&image_root, &account, errand);
        environment.extend(errand.image.as_deref().and_then(|image| prompt(image, &account.shell)));
    }
    let programs = match request {
        Request::Sftp(options) if errand.beside => {
            sftp_programs(Path::new("."), &beginning_in_image(options, &account.home, &image_root))
        }
        _ => programs(request, &account),
    };
    become_root(&account);
    if !errand.beside {
        go_home(&image_root, &account.home);
    }
    // This program ignores SIGPIPE. If `yes` in `yes | head` inherited that, it would not end.
    default_disposition(Signal::SIGPIPE).attempt(|| "restore SIGPIPE")?;
    umask::restore_callers();
    let programs = programs.iter().map(|program| Ok((program, program.prepared(&environment)?)));
    let programs = programs.collect::<nix::Result<Vec<_>>>();
    let programs = programs.attempt(|| "build the program's command line")?;
    let (program, error) = run_first(&programs, &image_root);
    Ok(report(program, error, interpreter(&image_root, program).as_deref()))
}

/// Reason why sftp-server cannot work in this image, if a reason can be found.
pub(crate) fn why_no_transfer(image_root: &Tree) -> Option<String> {
    if let Err(error) = check_what_sftp_server_opens(image_root) {
        return Some(error.to_string());
    }
    let missing = "/etc/passwd of the image has no entry with user ID 0, which sftp-server needs";
    (!Account::root_of(image_root).known).then(|| missing.to_owned())
}

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

/// Programs that can carry out `request`, best first.
fn programs(request: &Request, account: &Account) -> Vec<Program> {
    let in_shell = |shell: &Path| {
        let name = shell.file_name().unwrap_or(OsStr::new("sh"));
        let arguments = match request {
            Request::Command(command) => vec![name.to_owned(), "-c".into(), command.clone()],
            _ => {
                // An argv[0] that begins with a dash makes the shell a login shell.
                let mut dashed = OsString::from("-");
                dashed.push(name);
                vec![dashed]
            }
        };
        Program { path: shell.to_owned(), arguments, is_shell: true }
    };
    match request {
        Request::Sftp(options) => return sftp_programs(&Path::new("/").join(PROGRAMS), options),
        Request::Program(words) if !words.is_empty() => return on_path(words),
        _ => {}
    }
    let mut programs = vec![in_shell(&account.shell)];
    if account.shell != Path::new(DEFAULT_SHELL) {
        programs.push(in_shell(Path::new(DEFAULT_SHELL)));
    }
    programs
}

/// Programs that the first word may mean: for a name, candidates in the directories of the login path; for a path, only
/// the path itself.
fn on_path(words: &[OsString]) -> Vec<Program> {
    let name = Path::new(&words[0]);
    let directories = if name.components().count() > 1 { "" } else { LOGIN_PATH };
    let candidate =
        |directory| Program { path: Path::new(directory).join(name), arguments: words.to_vec(), is_shell: false };
    directories.split(':').map(candidate).collect()
}

/// sftp-server's options where it is started in a working directory outside the root. sftp-server must leave that
/// directory, but stays there if it cannot change to its start directory. So anything that could override our `-d`
/// (another `-d`, the end of options) is dropped, the start directory must exist, and a `%`, which sftp-server expands,
/// is doubled.
fn beginning_in_image(options: &[OsString], home: &Path, image_root: &Tree) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut wanted = None;
    let mut words = options.iter();
    while let Some(word) = words.next() {
        // Options of sftp-server(8). Each has to be a word of its own, with its value in the next word; at any other
        // word, the rest is dropped.
        match word.as_encoded_bytes() {
            b"-c" | b"-e" | b"-h" | b"-R" => kept.push(word.clone()),
            b"-f" | b"-l" | b"-P" | b"-p" | b"-Q" | b"-u" => {
                kept.extend([Some(word), words.next()].into_iter().flatten().cloned());
            }
            b"-d" => wanted = words.next(),
            _ => break,
        }
    }
    let expanded = wanted.map(|wanted| expand(wanted.as_bytes(), home));
    let candidates = [expanded.as_deref(), Some(home)].into_iter().flatten();
    let begins = candidates.into_iter().find(|path| path.is_absolute() && image_root.directory(path).is_ok());
    let begins = begins.unwrap_or(Path::new("/")).as_os_str().as_bytes();
    let escaped = begins.iter().flat_map(|&b| std::iter::repeat_n(b, if b == b'%' { 2 } else { 1 })).collect();
    kept.extend(["-d".into(), OsString::from_vec(escaped)]);
    kept
}

/// Expands `%` in a start directory as sftp-server(8) does.
fn expand(wanted: &[u8], home: &Path) -> PathBuf {
    let mut path = Vec::new();
    let mut bytes = wanted.iter();
    while let Some(&byte) = bytes.next() {
        match (byte, if byte == b'%' { bytes.next() } else { None }) {
            (b'%', Some(b'd')) => path.extend_from_slice(home.as_os_str().as_bytes()),
            (b'%', Some(b'u')) => path.extend_from_slice(b"root"),
            (b'%', Some(b'U')) => path.push(b'0'),
            (_, other) => path.push(*other.unwrap_or(&byte)),
        }
    }
    OsString::from_vec(path).into()
}

/// The container's sftp-server in `directory`, started by the container's loader, which looks up nothing in the image.
fn sftp_programs(directory: &Path, options: &[OsString]) -> Vec<Program> {
    let server = directory.join("sftp-server");
    let loader = directory.join("ld.so");
    let mut arguments: Vec<OsString> =
        vec![loader.clone().into(), "--library-path".into(), directory.into(), server.clone().into()];
    arguments.extend_from_slice(options);
    let mut direct: Vec<OsString> = vec![server.clone().into()];
    direct.extend_from_slice(options);
    // A statically linked server comes without a loader.
    vec![
        Program { path: loader, arguments, is_shell: false },
        Program { path: server, arguments: direct, is_shell: false },
    ]
}

/// Files of the image that the container's sftp-server, its loader and its libc read.
const READ_BY_SFTP_SERVER: [&str; 5] =
    ["etc/ld.so.preload", "etc/nsswitch.conf", "etc/passwd", "etc/group", "etc/localtime"];

/// Refuses an image in which sftp-server cannot work: it would wait forever on a fifo, and sshd does not forward its
/// standard error.
fn check_what_sftp_server_opens(image_root: &Tree) -> Result<()> {
    let attempted = || "start sftp-server in this image";
    open_null(image_root).attempt(|| "open its /dev/null").map_err(|e| {
        Error::new(attempted()).because(e).advise("in the tier 'chroot' only an empty /dev of the image is filled")
    })?;
    for name in READ_BY_SFTP_SERVER {
        let found = image_root.open_at(name, OFlags::PATH, Mode::empty()).and_then(|fd| Ok(rustix::fs::fstat(fd)?));
        if found.is_ok_and(|found| FileKind::of(&found) == FileKind::Fifo) {
            return Err(Error::new(attempted()).because(format!("/{name} is a fifo")));
        }
    }
    Ok(())
}

/// Opens /dev/null as sftp-server does, but refuses any other device that the image may have at that path.
fn open_null(image_root: &Tree) -> std::io::Result<()> {
    let found = rustix::fs::fstat(image_root.open_at("dev/null", OFlags::PATH, Mode::empty())?)?;
    if FileKind::of(&found) == FileKind::CharacterDevice && found.st_rdev != rustix::fs::makedev(1, 3) {
        return Err(std::io::Error::other("it is another device"));
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY;
    image_root.open_at("dev/null", flags, Mode::empty()).map(|_| ())
}

/// Replaces this process with the first of `programs` that can be started; returns why the last one could not.
///
/// The path is first resolved below the root without magic links (/proc/self/exe). The kernel resolves it again, and a
/// session may change it in between, but the path can no longer lead to anything outside.
fn run_first<'a>(programs: &[(&'a Program, Exec)], image_root: &Tree) -> (&'a Path, Errno) {
    let mut failed = (Path::new(""), Errno::ENOENT);
    for (program, prepared) in programs {
        let found = if program.path.is_absolute() {
            image_root.open_at(&program.path, OFlags::PATH, Mode::empty()).map(drop)
        } else {
            Ok(())
        };
        let error = match found {
            Ok(()) => {
                let Err(error) = prepared.replace_this_process();
                error
            }
            Err(error) => Errno::from_raw(error.raw_os_error().unwrap_or(0)),
        };
        failed = (&program.path, error);
    }
    failed
}

/// Prints why nothing could be started, and returns the exit code that shells use for this error.
fn report(program: &Path, error: Errno, interpreter: Option<&str>) -> u8 {
    let program = program.to_string_lossy();
    let advice = advice(error, interpreter);
    eprintln!("ims-jail-shell: cannot start {} in this image: {}; {advice}", Printable(program), error.desc());
    if error == Errno::ENOENT { 127 } else { 126 }
}

fn advice(error: Errno, interpreter: Option<&str>) -> String {
    let missing = error == Errno::ENOENT;
    match interpreter {
        Some(line) if missing && line.ends_with('\r') => {
            "its first line has Windows line ends, which 'dos2unix' converts".to_owned()
        }
        Some(line) if missing => format!("its first line names {}, which the image lacks", Printable(line)),
        _ if missing => "the program or its loader does not exist".to_owned(),
        // The kernel returns ELOOP for scripts that interpret each other (binfmt_script), and for a cycle of links.
        Some(line) if error == Errno::ELOOP => {
            format!("its first line names {}, which leads to itself", Printable(line))
        }
        _ if error == Errno::ELOOP => "it, or its interpreter, is a link that leads to itself".to_owned(),
        _ => "is it built for this architecture and executable?".to_owned(),
    }
}

/// The interpreter in a script's first line, with a trailing carriage return if the line ends with one.
fn interpreter(image_root: &Tree, program: &Path) -> Option<String> {
    let file = image_root.open_regular(program, OFlags::RDONLY).ok()?;
    let mut line = String::new();
    // The kernel reads no more (execve(2)).
    std::io::BufReader::new(file.take(256)).read_line(&mut line).ok()?;
    let line = line.strip_prefix("#!")?.trim_end_matches('\n').trim_start_matches([' ', '\t']);
    Some(line.split([' ', '\t']).next().unwrap_or_default().to_owned())
}

fn become_root(account: &Account) {
    // Ignore a group that cannot be set: somebody may need the session to repair the image.
    let groups: Vec<Gid> = account.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    let _ = nix::unistd::setgroups(&groups);
    let _ = nix::unistd::setgid(Gid::from_raw(account.group));
}

/// Changes to root's home directory by descriptor, resolved below the root without magic links; changes to `/` if the
/// image has no such directory.
fn go_home(image_root: &Tree, home: &Path) {
    let went = image_root.directory(home).and_then(|home| Ok(rustix::process::fchdir(home)?));
    if went.is_err() {
        let _ = rustix::process::fchdir(image_root);
    }
}

/// Shells that take their prompt from $PS1 and expand variables in it. Other shells show the host name by default, or
/// have another syntax.
const POSIX_SHELLS: [&str; 6] = ["sh", "bash", "dash", "ash", "ksh", "mksh"];

/// A prompt that names the image, for shells whose default prompt is `#` or their version. Profiles in the image, for
/// all users or for root, override it.
fn prompt(image: &str, shell: &Path) -> Option<(OsString, OsString)> {
    let is_posix = shell.file_name().is_some_and(|name| POSIX_SHELLS.iter().any(|posix| name == *posix));
    is_posix.then(|| ("PS1".into(), format!("root@{image}:$PWD# ").into()))
}

fn greet(image_root: &Tree, account: &Account, errand: &Errand) {
    let mut out = std::io::stdout();
    let home = account.home.strip_prefix("/").unwrap_or(&account.home);
    if image_root.look(home.join(".hushlogin")).is_ok_and(|found| found.is_some()) {
        return;
    }
    let _ = out.write_all(&image_root.read("etc/motd", 64 << 10).unwrap_or_default());
    let of = match (&errand.image, &errand.job) {
        (Some(image), _) => format!(" of {}", Printable(image)),
        (None, Some(job)) => format!(" of IMS job {}", Printable(job)),
        (None, None) => String::new(),
    };
    if errand.request == Request::Shell {
        let _ = writeln!(out, "You are in the image root{of}. When done: touch /tmp/complete");
        if !errand.in_place {
            let width = 38 + of.chars().count();
            let _ = writeln!(out, "{:<width$}touch /tmp/failed", "To give the changes up instead:");
        }
    } else {
        let _ = writeln!(out, "You are in the image root{of}. When done: exit");
    }
    if let Some(terminal) = std::env::var_os("TERM").filter(|terminal| terminfo::is_unknown(terminal, image_root)) {
        let terminal = terminal.display();
        let _ = writeln!(
            out,
            "The image has no terminfo entry for '{terminal}'. Most terminals work with: export TERM=xterm-256color"
        );
    }
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

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
    fn advice_names_an_interpreter_that_leads_to_itself() {
        assert_eq!(advice(Errno::ELOOP, Some("/bin/x")), "its first line names /bin/x, which leads to itself");
        assert!(advice(Errno::ELOOP, None).contains("leads to itself"));
        assert!(advice(Errno::ENOEXEC, None).contains("architecture"));
    }

    #[test]
    fn program_is_looked_up_on_the_login_path() {
        let tried = tried(&Request::Program(vec!["id".into(), "-u".into()]), "/bin/zsh");
        assert_eq!(tried.len(), LOGIN_PATH.split(':').count());
        assert!(tried.contains(&("/bin/id".into(), vec!["id".into(), "-u".into()])));
    }

    #[test]
    fn only_a_session_without_a_command_gets_a_login_shell() {
        let shell =
            |path: &str, arguments: &[&str]| (path.to_owned(), arguments.iter().map(ToString::to_string).collect());
        assert_eq!(tried(&Request::Shell, "/bin/zsh"), [shell("/bin/zsh", &["-zsh"]), shell("/bin/sh", &["-sh"])]);
        assert_eq!(
            tried(&Request::Command("id; true".into()), "/bin/sh"),
            [shell("/bin/sh", &["sh", "-c", "id; true"])]
        );
    }

    fn errand() -> impl Strategy<Value = Errand> {
        let word = || vec(1..=255_u8, 0..6).prop_map(OsString::from_vec);
        let request = prop_oneof![
            Just(Request::Shell),
            word().prop_map(Request::Command),
            vec(word(), 0..4).prop_map(Request::Sftp),
            vec(word(), 0..4).prop_map(Request::Program),
        ];
        let name = || prop::option::of("-{0,2}[a-z]{0,4}");
        let errand = (request, any::<bool>(), name(), name(), any::<bool>());
        errand.prop_map(|(request, beside, job, image, in_place)| Errand { request, beside, job, image, in_place })
    }

    proptest! {
        #[test]
        fn errand_round_trips_through_its_words(errand in errand()) {
            prop_assert_eq!(Errand::from_words(&errand.to_words()), Some(errand));
        }
    }

    #[test]
    fn sftp_server_outside_the_root_starts_in_an_existing_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a%%b", "srv/root", "there"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let image_root = Tree::open(dir.path()).unwrap();
        for (options, home, meant) in [
            ("", "/there", "-d /there"),
            ("", "/a%%b", "-d /a%%%%b"),
            ("", "/missing", "-d /"),
            ("--", "/there", "-d /there"),
            ("-- -d /missing", "/there", "-d /there"),
            ("-l INFO -e file -R", "/there", "-l INFO -e -d /there"),
            ("-R -d /srv/%u", "/there", "-R -d /srv/root"),
            ("-d /missing -d /srv", "/there", "-d /srv"),
            ("-d /missing", "/there", "-d /there"),
            ("-d there", "/there", "-d /there"),
            ("-d", "/there", "-d /there"),
            ("-Rd/missing", "/there", "-d /there"),
            ("-u 0022 -d %d", "/there", "-u 0022 -d /there"),
        ] {
            let options: Vec<OsString> = options.split_ascii_whitespace().map(Into::into).collect();
            let got = beginning_in_image(&options, Path::new(home), &image_root);
            assert_eq!(got.join(OsStr::new(" ")), OsStr::new(meant), "{options:?} {home}");
        }
    }
}

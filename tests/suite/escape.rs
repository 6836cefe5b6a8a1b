//! Escapes from the jail: every known one is tried first where it works, and then in the jail.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use ims_sshd::sys::process::{Entry, descendants};
use testbed::*;

/// Attempts that SECURITY.md does not claim to defend against, with the sentence that says so.
const NOT_DEFENDED: [(&str, &str); 1] = [("abstract-socket", "**The network** is the container's")];

/// Path of the program in tests/attempts.
/// Copies the program by another process: a child that another test starts meanwhile would inherit a descriptor that
/// is open for writing, and the program could not be run (ETXTBSY).
pub fn copy_attempts(to: &Path) {
    succeed(Command::new("cp").arg(attempts()).arg(to));
}

pub fn attempts() -> PathBuf {
    let program = Path::new(&IMS_SSHD).with_file_name("examples").join("attempts");
    assert!(program.exists(), "no attempts: 'cargo build --example attempts' makes them");
    program
}

struct Attempt {
    name: String,
    bites: String,
}

fn all_attempts() -> Vec<Attempt> {
    let list = succeed(Command::new(attempts()).arg("list"));
    let parse = |line: &str| {
        let mut fields = line.split('\t').map(str::to_owned);
        let attempt = Attempt { name: fields.next().unwrap(), bites: fields.next().unwrap() };
        assert!(fields.next().is_some_and(|source| !source.is_empty()), "{line}: it names no source");
        attempt
    };
    list.lines().map(parse).collect()
}

/// Targets outside the jail: a file, a process at a terminal, sockets, memory, a queue, a key.
pub struct Decoys {
    program: Child,
    pub variables: Vec<(String, String)>,
    pub secret: String,
}

impl Decoys {
    pub fn lay_out(volume: &Volume, name: &str) -> Self {
        let directory = volume.dir.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        let mut program = Command::new(attempts())
            .arg("decoys")
            .arg(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(program.stdout.take().unwrap()).lines().map(Result::unwrap);
        let variable = |line: String| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut variables: Vec<_> = lines.take_while(|line| !line.is_empty()).filter_map(variable).collect();
        let control = ims_sshd::volume::state_directory::StateDirectory::place(&volume.parent).join("control");
        variables.push(("OUTSIDE_CONTROL".into(), control.display().to_string()));
        let secret = std::fs::read_to_string(directory.join("file")).unwrap();
        Self { program, variables, secret }
    }

    pub fn value(&self, name: &str) -> &str {
        &self.variables.iter().find(|(known, _)| known == name).unwrap().1
    }

    /// `attempts with-session-key …`; the caller adds a program, which gets a keyring of the environment.
    fn with_session_key(&self) -> Command {
        let mut command = Command::new(attempts());
        command.args(["with-session-key", self.value("OUTSIDE_KEY"), &self.secret]);
        command
    }

    /// Asserts that the targets are unchanged.
    pub fn assert_unharmed(&self) {
        assert_eq!(std::fs::read_to_string(self.value("OUTSIDE_FILE")).unwrap(), self.secret);
        let line = std::fs::read_to_string(format!("/proc/{}/cmdline", self.value("OUTSIDE_PROCESS"))).unwrap();
        assert!(line.contains("victim"), "the process outside has ended");
    }
}

impl Drop for Decoys {
    fn drop(&mut self) {
        drop(self.program.stdin.take());
        let _ = self.program.wait();
    }
}

/// Adds to an image root the program `attempts` and a device node of a disk.
fn prepare(image_root: &Path) {
    copy_attempts(&image_root.join("attempts"));
    // Other tests attach and detach loop devices.
    let opens = |disk: &Path| {
        let name = disk.file_name().unwrap().to_str().unwrap();
        !name.starts_with("loop") && std::fs::File::open(Path::new("/dev").join(name)).is_ok()
    };
    let disks = std::fs::read_dir("/sys/block").unwrap().map(|disk| disk.unwrap().path());
    let disk = disks.into_iter().find(|disk| opens(disk)).expect("a disk that can be opened");
    let number = std::fs::read_to_string(disk.join("dev")).unwrap();
    let (major, minor) = number.trim().split_once(':').unwrap();
    succeed(Command::new("mknod").arg(image_root.join("planted-disk")).args(["b", major, minor]));
}

/// A chroot with every capability and everything that a jail hides. Its mounts vanish with it.
const CHROOT: &str = r#"
    set -e
    cd "$1"
    mount --bind . .
    cd "$1"
    mkdir -p proc sys dev run/.ims-sshd
    for directory in proc sys dev; do mount --rbind /$directory $directory; done
    mount --bind /dev/null proc/keys
    touch run/.ims-sshd/server run/.ims-sshd/read-only run/.ims-sshd/unopened
    mount --bind "$OUTSIDE_FILE" run/.ims-sshd/server
    mount --bind -o ro "$OUTSIDE_FILE" run/.ims-sshd/read-only
    cp "$OUTSIDE_FILE" "$OUTSIDE_FILE.unopened"
    mount --bind -o ro "$OUTSIDE_FILE.unopened" run/.ims-sshd/unopened
    exec 9</
    exec chroot . /attempts "$2"
"#;

/// Runs the attempt where it must succeed.
fn weakly(attempt: &Attempt, image_root: &Path, decoys: &Decoys) -> Output {
    let mut command = decoys.with_session_key();
    // The leader of this test's own session may have ended, so start one that lives.
    command.args(["setsid", "--fork", "--wait", "sh", "-c", r#""$@"; exit $?"#, "sh"]);
    command.args(["unshare", "--mount", "--propagation", "private"]).envs(decoys.variables.iter().cloned());
    if attempt.bites.starts_with("Chroot") {
        command.args(["sh", "-c", CHROOT, "sh"]).arg(image_root).arg(&attempt.name);
    } else {
        command.arg(attempts()).arg(&attempt.name);
    }
    command.stdin(Stdio::null()).output().unwrap()
}

fn kernel_settings() -> Vec<String> {
    let read = |name| std::fs::read_to_string(Path::new("/proc/sys/kernel").join(name)).unwrap_or_default();
    ["core_pattern", "modprobe", "poweroff_cmd", "sysrq", "hostname"].map(read).into()
}

#[test]
fn attempts_escape_where_they_must_and_never_from_the_jail() {
    let settings = kernel_settings();
    for (tier, masked) in [("namespace", false), ("user", false), ("user", true)] {
        let weak = Volume::new(Image::Busybox);
        prepare(&weak.image_root);

        let volume = Volume::new(Image::Busybox);
        prepare(&volume.image_root);
        let outside = Decoys::lay_out(&volume, "outside");
        let decoys = Decoys::lay_out(&volume, "decoys");
        let variables = outside.variables.iter().map(|(name, value)| format!("export {name}={value}\n"));
        std::fs::write(volume.image_root.join("variables"), variables.collect::<String>()).unwrap();
        let mut command = outside.with_session_key();
        if masked {
            command.args(MASKING_PROC);
        }
        command.args([&*IMS_SSHD, "entrypoint"]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.envs(volume.variables(Mode::Jailed)).env("IMS_JAIL_TIER", tier);
        let log = std::fs::File::create(volume.log()).unwrap();
        let entrypoint = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut environment = Environment { entrypoint, volume, status: None }.ready();
        assert!(environment.log_text().contains(&format!("tier=\"{tier}\"")), "{}", environment.log_text());
        assert_eq!(
            environment.log_text().contains("/proc is the container's, read-only"),
            masked,
            "{}",
            environment.log_text()
        );
        let master = environment.master();

        let mut wrong = Vec::new();
        let mut bitten = 0;
        for attempt in all_attempts() {
            let name = &attempt.name;
            let output = weakly(&attempt, &weak.image_root, &decoys);
            match output.status.code() {
                Some(0) => bitten += 1,
                Some(3) if attempt.bites.ends_with("IfBuilt") => {}
                _ => wrong.push(format!("{name}: did not escape where it must: {output:?}")),
            }

            let output = master.ssh().arg(format!(". /variables; /attempts {name}")).output().unwrap();
            let expected = NOT_DEFENDED.iter().any(|(known, _)| known == name);
            match output.status.code() {
                Some(0) if expected => {}
                Some(1 | 3) if !expected => {}
                _ => wrong.push(format!("{name}: in the jail ({tier}, the container's /proc: {masked}): {output:?}")),
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        println!(
            "{bitten} attempts escaped where they must, none of them from a jail of tier {tier} (the container's /proc: {masked})"
        );
        assert!(bitten >= 70, "only {bitten} attempts were shown to work anywhere");

        drop(master);
        outside.assert_unharmed();
        assert_eq!(environment.complete(), 0);
    }
    assert_eq!(kernel_settings(), settings);
}

/// Partly refused calls: the uses that programs of an image need, and the errors of the refused ones.
const SOCKETS: &str = r#"
import asyncio, errno, os, socket, struct

async def main():
    async def answer(reader, writer):
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()
    for start, connect, place in [
        (asyncio.start_unix_server, asyncio.open_unix_connection, ["/tmp/socket"]),
        (asyncio.start_server, asyncio.open_connection, ["127.0.0.1", 0]),
    ]:
        server = await start(answer, *place)
        place = ["127.0.0.1", server.sockets[0].getsockname()[1]] if len(place) > 1 else place
        reader, writer = await connect(*place)
        writer.write(b"hello\n")
        assert await reader.readline() == b"HELLO\n"
        writer.close()
        server.close()
    process = await asyncio.create_subprocess_exec("true")
    assert await process.wait() == 0

asyncio.run(main())
a, b = socket.socketpair()
a.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
assert struct.unpack("3i", a.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] == 0
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
# These options have the numbers of those that ask for handles, at another level.
six.getsockopt(socket.IPPROTO_IPV6, 76)
six.getsockopt(socket.IPPROTO_IPV6, 77)
for protocol in [0, 4, 15]:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol).bind((0, 0))
ping = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMP)
ping.sendto(b"\x08\x00\xf7\xff" + bytes(4), ("127.0.0.1", 0))
assert ping.recv(100)[20] in (0, 8)
socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
for arguments, told in [
    ((socket.AF_PACKET, socket.SOCK_RAW), errno.EAFNOSUPPORT),
    ((socket.AF_VSOCK, socket.SOCK_STREAM), errno.EAFNOSUPPORT),
    ((socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP), errno.EPERM),
    ((socket.AF_NETLINK, socket.SOCK_RAW, 11), errno.EPROTONOSUPPORT),
    ((socket.AF_NETLINK, socket.SOCK_DGRAM, 16), errno.EPROTONOSUPPORT),
]:
    try:
        socket.socket(*arguments)
    except OSError as error:
        assert error.errno == told, (arguments, error)
    else:
        raise SystemExit(f"{arguments} was allowed")
print("all as it should be")
"#;

#[test]
fn needed_socket_calls_work_and_others_fail_as_if_unsupported() {
    let environment = Environment::open(Image::Managed, Mode::Jailed);
    std::fs::write(environment.image_root.join("sockets.py"), SOCKETS).unwrap();
    assert_eq!(environment.says("python3 /sockets.py"), "all as it should be");
}

#[test]
fn security_md_names_what_is_not_defended() {
    let said = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("SECURITY.md")).unwrap();
    for (attempt, sentence) in NOT_DEFENDED {
        assert!(said.contains(sentence), "{attempt}");
    }
}

/// CVE-2016-2568, CVE-2017-5226: a program pushes a line into its own terminal (TIOCSTI), and the shell that started it
/// reads the line next.
#[test]
fn pushed_terminal_input_reaches_no_shell_outside() {
    let volume = Volume::new(Image::Busybox);
    prepare(&volume.image_root);
    let marker = |name: &str| volume.dir.path().join(name);
    let types = |name: &str| format!("/attempts type 'touch {}'", marker(name).display());

    let mut terminal = own_shell();
    terminal.line(&format!("chroot {} {}", volume.image_root.display(), types("chroot")));
    wait_until("the shell to read the line pushed in a chroot", || marker("chroot").exists());
    terminal.line("exit");
    terminal.end();

    let mut terminal = own_shell();
    terminal.line(&format!("{IMS_SSHD} enter {} -- {}", volume.image_root.display(), types("enter")));
    // Commands that the shell read before this line have run when the answer comes.
    terminal.line("true");
    assert_eq!(terminal.ask("echo over"), "over");
    assert!(!marker("enter").exists(), "the shell read the line pushed in the jail");
    terminal.line("exit");
    terminal.end();

    let mut environment = volume.start(Mode::Jailed).ready();
    let marker = environment.dir.path().join("session");
    Terminal::running(&environment, &format!("/attempts type 'touch {}'", marker.display())).end();
    assert_eq!(environment.complete(), 0);
    assert!(!marker.exists(), "somebody outside read the line pushed in a session");
}

#[test]
fn helper_cannot_be_inspected_while_it_enters_the_jail() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Busybox);
        prepare(&volume.image_root);
        let weak = Volume::new(Image::Busybox);
        prepare(&weak.image_root);
        let environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        let master = environment.master();
        let while_sessions_come = |mut ambush: Command| {
            let mut ambush = Ended::new(ambush.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
            while ambush.try_wait().unwrap().is_none() {
                succeed(master.ssh().arg("true"));
            }
            let said = std::io::read_to_string(ambush.stdout.take().unwrap()).unwrap();
            (ambush.wait().unwrap().code(), said)
        };

        let mut chroot = Command::new("unshare");
        chroot.args(["--mount", "--propagation", "private", "sh", "-c"]);
        chroot.arg("mkdir -p $1/proc; mount --rbind /proc $1/proc; exec chroot $1 /attempts ambush").arg("sh");
        chroot.arg(&weak.image_root);
        let (code, said) = while_sessions_come(chroot);
        assert_eq!(code, Some(0), "in a chroot with the machine's processes it must get one: {said}");

        let mut jailed = master.ssh();
        jailed.arg("/attempts ambush");
        let (code, said) = while_sessions_come(jailed);
        assert_eq!(code, Some(1), "{tier}: {said}");
    }
}

/// The network is the container's, and so are abstract sockets. None of them may be ours: we listen at a path.
#[test]
fn supervisor_socket_is_reachable_only_by_root_outside() {
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    let _session = environment.master();
    let supervisor = environment.pid();
    let processes: Vec<_> = descendants(&Entry::all(), supervisor).iter().map(|entry| entry.pid).collect();
    assert!(processes.len() >= 3, "sshd, the jail's init, a session");
    let sockets: Vec<String> = processes
        .iter()
        .chain([&supervisor])
        .flat_map(|process| {
            let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
            descriptors.filter_map(|d| {
                Some(
                    std::fs::read_link(d.path())
                        .ok()?
                        .to_str()?
                        .strip_prefix("socket:[")?
                        .trim_end_matches(']')
                        .to_owned(),
                )
            })
        })
        .collect();
    // proc_net_unix(5): the seventh field is the socket's inode, the eighth its name.
    let listed = std::fs::read_to_string("/proc/net/unix").unwrap();
    let fields = listed.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let names: Vec<&str> =
        fields.filter(|f| sockets.iter().any(|s| *s == f[6])).filter_map(|f| f.get(7).copied()).collect();
    let control = environment.state_directory().join("control");
    assert!(names.contains(&control.to_str().unwrap()), "{names:?}");
    assert!(names.iter().all(|name| !name.starts_with('@')), "{names:?}");

    let ask = |program: &mut Command| program.env("OUTSIDE_CONTROL", &control).arg("supervisor").output().unwrap();
    assert_eq!(ask(&mut Command::new(attempts())).status.code(), Some(0));
    // A directory that another user can reach: the test's own belong to root.
    let shared = tempfile::tempdir().unwrap();
    std::fs::set_permissions(shared.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let program = shared.path().join("attempts");
    copy_attempts(&program);
    let other = ask(Command::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program));
    assert_eq!(other.status.code(), Some(1), "{other:?}");
}

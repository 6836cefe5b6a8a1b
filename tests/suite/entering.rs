//! Entering the jail: no path in the image leads to the container, whatever descriptors the session's parent has open.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use testbed::*;

use crate::agent::Agent;
use crate::escape::{Decoys, copy_attempts};

/// Leads to the container's root from any of its directories.
const UP: &str = "/../../../../../../../../../../../../..";

/// True if the session is outside: a path up from its working directory reaches the file there.
const STANDS_OUTSIDE: &str = ". /variables; exec /attempts inherited-working-directory";

/// Programs outside, which are busybox: as root's shell they print a command, and as a login shell `Linux`.
const FOR_A_COMMAND: &str = "echo";
const FOR_A_LOGIN: &str = "uname";

/// A command that the image's shell lacks, and that a program outside prints.
const SAID: &str = "said-by-a-program-outside";

/// Prepares the image and the targets outside.
fn lay_out(volume: &Volume, tier: &str) -> Decoys {
    let outside = Decoys::lay_out(volume, "outside");
    for program in [FOR_A_COMMAND, FOR_A_LOGIN] {
        std::fs::copy(cache().join("busybox/bin/busybox"), volume.dir.path().join("outside").join(program)).unwrap();
    }
    let root = &volume.image_root;
    copy_attempts(&root.join("attempts"));
    let variables = outside.variables.iter().map(|(name, value)| format!("export {name}={value}\n"));
    std::fs::write(root.join("variables"), variables.collect::<String>()).unwrap();
    for number in 0..50 {
        symlink(format!("/proc/self/fd/{number}"), root.join(format!("root/link-{number}"))).unwrap();
        symlink(format!("link-{number}"), root.join(format!("root/far-{number}"))).unwrap();
    }
    symlink("/root", root.join("srv/home")).unwrap();
    symlink("/bin/bash", root.join("usr/local/bin/linked")).unwrap();
    let script = root.join("usr/local/bin/script");
    std::fs::write(&script, "#!/bin/sh\nexec /bin/bash \"$@\"\n").unwrap();
    std::fs::set_permissions(script, PermissionsExt::from_mode(0o755)).unwrap();
    if tier == "chroot" {
        // The chroot tier mounts nothing, but the image may have a mounted /proc already.
        mount(&["-t", "proc", "proc"], &root.join("proc"));
        let _ = symlink("/proc/self/fd", root.join("dev/fd"));
    }
    outside
}

/// Paths by which an image can refer to descriptor `number`.
fn names_of(number: u32) -> [String; 5] {
    ["/proc/self/fd/", "/proc/thread-self/fd/", "/dev/fd/", "/root/link-", "/root/far-"]
        .map(|name| format!("{name}{number}"))
}

/// Other magic links, which the kernel resolves without using their text.
const FURTHER_NAMES: [&str; 4] = ["/proc/self/cwd", "/proc/self/root/..", "/proc/thread-self/cwd", "/proc/1/cwd"];

fn set_root(volume: &Volume, home: &str, shell: &str) {
    std::fs::write(volume.image_root.join("etc/passwd"), format!("root:x:0:0:root:{home}:{shell}\n")).unwrap();
}

/// A program outside, through a directory of the container.
fn program_by(volume: &Volume, directory: &str, program: &str) -> String {
    format!("{directory}{UP}{}/outside/{program}", volume.dir.path().display())
}

/// Harmless homes, and the directory in which a session then starts.
const HOMES: [(&str, &str); 8] = [
    ("/root", "/root"),
    ("/root/", "/root"),
    ("/srv/home", "/root"),
    ("/root/../srv", "/srv"),
    ("/../../srv", "/srv"),
    ("/a%%b", "/"),
    ("/missing", "/"),
    ("/etc/hostname", "/"),
];

const SHELLS: [&str; 4] = ["/bin/bash", "/usr/local/bin/linked", "/usr/local/bin/script", "/bin/../bin/sh"];

/// A client of an environment, with or without an agent.
struct Client<'a> {
    environment: &'a Environment,
    outside: &'a Decoys,
    tier: &'a str,
    master: Master<'a>,
}

impl Client<'_> {
    /// File of the client for received data.
    fn got(&self) -> std::path::PathBuf {
        let got = self.environment.dir.path().join("got");
        let _ = std::fs::remove_file(&got);
        got
    }

    /// Path of the file outside, from any directory of the container.
    fn file_outside(&self) -> String {
        format!("{}{}", &UP[1..], self.outside.value("OUTSIDE_FILE"))
    }

    fn is_secret(&self, file: &Path) -> bool {
        std::fs::read_to_string(file).is_ok_and(|text| text == self.outside.secret)
    }

    fn out_by_command(&self) -> bool {
        self.master.ssh().arg(STANDS_OUTSIDE).output().unwrap().status.success()
    }

    /// Kinds of sessions that reach the file outside.
    fn out(&self) -> Vec<&'static str> {
        let terminal = self.master.ssh_with(&["-tt"]).arg(STANDS_OUTSIDE).output().unwrap();
        let shell = feed(&mut self.master.ssh(), format!("{STANDS_OUTSIDE}\n").as_bytes());
        // Options that could keep sftp-server in its start directory.
        let options = ["sftp-server", "sftp-server --", "sftp-server -R -d /missing", "sftp-server x"];
        let sftp = options.map(|options| {
            let got = self.got();
            let mut client = self.master.sftp_with(&["-s", &format!("/usr/lib/openssh/{options}")]);
            feed(&mut client, format!("get {} {}\n", self.file_outside(), got.display()).as_bytes());
            self.is_secret(&got)
        });
        let got = self.got();
        let from = format!("root@127.0.0.1:{}", self.file_outside());
        self.master.scp().arg("-O").arg(from).arg(&got).output().unwrap();
        let kinds = [
            ("command", self.out_by_command()),
            ("terminal", terminal.status.success()),
            ("shell", shell.status.success()),
            ("sftp", sftp.contains(&true)),
            ("scp -O", self.is_secret(&got)),
        ];
        kinds.into_iter().filter(|(_, out)| *out).map(|(kind, _)| kind).collect()
    }

    /// True if a program outside becomes the shell of a command or of a login.
    fn out_by_shell(&self, directory: &str) -> bool {
        set_root(self.environment, "/root", &program_by(self.environment, directory, FOR_A_COMMAND));
        let command = self.master.ssh().arg(SAID).output().unwrap();
        set_root(self.environment, "/root", &program_by(self.environment, directory, FOR_A_LOGIN));
        let login = feed(&mut self.master.ssh(), b"");
        text(command.stdout).contains(SAID) || text(login.stdout).contains("Linux")
    }

    fn asserts_honest_ones_work(&self) {
        let said = |command: &str| {
            let output = self.master.ssh().arg(command).output().unwrap();
            assert!(output.status.success(), "{}: {command}: {output:?}", self.tier);
            text(output.stdout)
        };
        for (home, stands) in HOMES {
            set_root(self.environment, home, "/bin/sh");
            assert_eq!(said("pwd -P; echo $HOME"), format!("{stands}\n{home}\n"), "{}", self.tier);
            let sftp = feed(&mut self.master.sftp(), b"pwd\n");
            assert!(text(&sftp.stdout).contains(&format!("directory: {stands}\n")), "{}: {home}: {sftp:?}", self.tier);
            let (here, got) = (self.environment.dir.path().join("here"), self.got());
            std::fs::write(&here, home).unwrap();
            for copy in
                [[here.to_str().unwrap(), "root@127.0.0.1:copy"], ["root@127.0.0.1:copy", got.to_str().unwrap()]]
            {
                succeed(self.master.scp().arg("-O").args(copy));
            }
            assert_eq!(std::fs::read_to_string(&got).unwrap(), home);
            assert!(self.environment.image_root.join(&stands[1..]).join("copy").exists());
        }
        for shell in SHELLS {
            set_root(self.environment, "/root", shell);
            assert_eq!(said("echo $SHELL; [ -n \"$PS1\" ] || cd; pwd"), format!("{shell}\n/root\n"), "{}", self.tier);
        }
    }
}

/// Descriptors that may be open in the process that enters a jail for sshd.
const NUMBERS: std::ops::RangeInclusive<u32> = 3..=11;

#[test]
fn home_and_shell_in_passwd_cannot_lead_a_session_outside() {
    let (mut tried, mut wrong) = (0, Vec::new());
    for tier in TIERS {
        let volume = Volume::new(Image::Debian);
        let outside = lay_out(&volume, tier);
        let environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        let agent = Agent::start(&environment);
        for socket in [Some(agent.socket.as_path()), None] {
            let master = environment.master_with(socket);
            let client = Client { environment: &environment, outside: &outside, tier, master };
            // With an agent, a directory of the container is open under some number.
            let spellings = if socket.is_some() { usize::MAX } else { 1 };
            let names = NUMBERS.flat_map(|number| names_of(number).into_iter().take(spellings));
            for name in names.chain(FURTHER_NAMES.map(str::to_owned)) {
                tried += 2;
                set_root(&environment, &name, "/bin/sh");
                // The kinds of sessions differ in their descriptors, but not in how paths are resolved.
                let out = if name.contains("self") { client.out() } else { Vec::new() };
                if !out.is_empty() || client.out_by_command() {
                    wrong.push(format!("{tier}: home {name}: {out:?}"));
                }
                if client.out_by_shell(&name) {
                    wrong.push(format!("{tier}: shell below {name}"));
                }
            }
            client.asserts_honest_ones_work();
            if socket.is_some() && tier != "chroot" {
                assert_eq!(text(client.master.ssh().arg("ssh-add -l").output().unwrap().stdout), agent.keys);
            }
        }
        outside.assert_unharmed();
        // No other descriptor takes the place of a closed stream.
        let jail = environment.state_directory().join("jail");
        for (closed, number) in [("<&-", 0), (">&-", 1), ("2>&-", 2), ("<&- >&- 2>&-", 1)] {
            let mut helper = Command::new("sh");
            helper.args(["-c", &format!("exec \"$@\" {closed}"), "sh", &*IMS_JAIL_SHELL, "enter"]).arg(&jail);
            let look = format!("[ /proc/self/fd/{number} -ef /dev/null ]");
            let status = helper.args(["--", "/bin/sh", "-c", &look]).status().unwrap();
            assert!(tier == "chroot" || status.success(), "{tier}: {closed}: {status}");
        }
    }
    assert!(wrong.is_empty(), "{} of {tried} fields lead outside: {wrong:#?}", wrong.len());
    println!("{tried} fields of passwd, each by two kinds of sessions or five: none leads outside");
}

/// `ims-sshd enter`, from a shell with this many open directories of the container.
fn enter(volume: &Volume, tier: &str, open: u32, program: &[&str]) -> Command {
    let mut enter = Command::new("bash");
    let script = "for ((n = 3; n < 3 + $1; n++)); do eval \"exec $n</\"; done; shift; exec \"$@\"";
    enter.args(["-c", script, "bash", &open.to_string(), &*IMS_SSHD, "enter"]).arg(&volume.image_root);
    enter.args(program).env("IMS_JAIL_TIER", tier).stdin(Stdio::null());
    enter
}

#[test]
fn home_and_shell_in_passwd_cannot_lead_enter_outside() {
    let (mut tried, mut wrong) = (0, Vec::new());
    for tier in TIERS {
        let volume = Volume::new(Image::Debian);
        let outside = lay_out(&volume, tier);
        let few = [(0, 3), (1, 3), (7, 9)].map(|(open, number)| (open, vec![format!("/proc/self/fd/{number}")]));
        let many = [3, 9, 42].map(|number| (40, names_of(number).to_vec()));
        for (open, names) in few.into_iter().chain(many) {
            for name in names {
                tried += 2;
                set_root(&volume, &name, "/bin/sh");
                let home = enter(&volume, tier, open, &["--", "/bin/sh", "-c", STANDS_OUTSIDE]).output().unwrap();
                if home.status.success() {
                    wrong.push(format!("{tier}: {open} open, home {name}"));
                }
                set_root(&volume, "/root", &program_by(&volume, &name, FOR_A_LOGIN));
                let shell = enter(&volume, tier, open, &[]).output().unwrap();
                if text(shell.stdout).contains("Linux") {
                    wrong.push(format!("{tier}: {open} open, shell below {name}"));
                }
            }
        }
        // A directory as a stream would enter the jail, whatever passwd says.
        set_root(&volume, "/root", "/bin/sh");
        let script = format!("cd /proc/self/fd/0 && {STANDS_OUTSIDE}");
        let mut command = enter(&volume, tier, 0, &["--", "/bin/sh", "-c", &script]);
        let directory = command.stdin(std::fs::File::open("/").unwrap()).output().unwrap();
        if !text(&directory.stderr).contains("standard input is a directory") {
            wrong.push(format!("{tier}: a directory as standard input: {:?}", directory.status));
        }

        for (home, stands) in HOMES {
            set_root(&volume, home, "/bin/sh");
            let said = succeed(&mut enter(&volume, tier, 40, &["--", "pwd", "-P"]));
            assert_eq!(said, format!("{stands}\n"), "{tier}");
        }
        for shell in SHELLS {
            set_root(&volume, "/root", shell);
            let said = feed(&mut enter(&volume, tier, 40, &[]), b"echo $SHELL; pwd\n");
            assert_eq!(text(&said.stdout), format!("{shell}\n/root\n"), "{tier}: {said:?}");
        }
        outside.assert_unharmed();
    }
    assert!(wrong.is_empty(), "{} of {tried} fields lead outside: {wrong:#?}", wrong.len());
    println!("{tried} fields of passwd: none leads outside");
}

/// Operations on a file that need no access to its content; each successful one prints its name. They really change
/// only the inode change time.
const MEDDLE: &str = r#"
import fcntl, os, sys
path = sys.argv[1]
def attempt(name, change):
    try:
        change()
    except OSError as error:
        # No such attribute: it could have been removed.
        if error.errno != 61:
            return
    print(name)
found = os.stat(path)
attempt('mode', lambda: os.chmod(path, found.st_mode & 0o7777))
attempt('owner', lambda: os.chown(path, found.st_uid, found.st_gid))
attempt('attribute', lambda: os.removexattr(path, 'user.ims-sshd'))
attempt('time', lambda: os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns)))
attempt('content', lambda: open(path, 'r+b').close())
attempt('truncated', lambda: os.truncate(path, found.st_size))
with open(path, 'rb') as file:
    attempt('lease', lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK))
"#;

/// State of files of the container. Changing anything but the content changes the inode change time.
fn state_of(files: &[std::path::PathBuf]) -> Vec<(u64, i64, i64)> {
    use std::os::unix::fs::MetadataExt;
    let state = |file: &std::path::PathBuf| {
        let found = std::fs::metadata(file).unwrap();
        (found.ino(), found.ctime(), found.ctime_nsec())
    };
    files.iter().map(state).collect()
}

/// Those of `files` that have a lease (proc_locks(5): the sixth field is device and inode).
fn leased(files: &[std::path::PathBuf]) -> Vec<&Path> {
    use std::os::unix::fs::MetadataExt;
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let leases: Vec<_> = locks.lines().filter(|line| line.contains("LEASE")).collect();
    let is_leased = |file: &&std::path::PathBuf| {
        let inode = format!(":{}", std::fs::metadata(file).unwrap().ino());
        leases.iter().any(|lease| lease.split_ascii_whitespace().any(|field| field.ends_with(&inode)))
    };
    files.iter().filter(is_leased).map(|file| file.as_path()).collect()
}

/// Finds processes in the jail whose program is not the image's: those of the helper, sftp-server and QEMU.
const OURS: &str = "for process in /proc/[0-9]*; do program=$(readlink $process/exe) || continue; \
    case $program in */ims-jail-shell|*/ld.so|*/sftp-server|*/qemu-*|*/ld-linux*) echo $process/exe;; esac; done";

#[test]
fn programs_of_the_container_cannot_be_changed_from_inside() {
    let qemu = Path::new("/usr/bin/qemu-aarch64-static");
    let mut files = vec![std::path::PathBuf::from(&*IMS_JAIL_SHELL), qemu.to_owned()];
    files.extend(ims_sshd::sshd::sftp_server::files().unwrap().into_iter().map(|program| program.file));
    let (mut tried, mut wrong) = (0, Vec::new());
    for (tier, image) in [
        ("namespace", Image::Debian),
        ("user", Image::Debian),
        ("namespace", Image::DebianArm64),
        ("user", Image::DebianArm64),
    ] {
        let volume = Volume::new(image);
        std::fs::write(volume.image_root.join("root/meddle"), MEDDLE).unwrap();
        let architecture = if image == Image::Debian { "x86_64" } else { "aarch64" };
        let environment =
            volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier), ("BUILD_ARCH", architecture)]).ready();
        let before = state_of(&files);
        let master = environment.master();
        let mut meddle_with = |path: &str| {
            tried += 7;
            let said = environment.run(&format!("python3 /root/meddle {path}"));
            let said = text(said.stdout).replace('\n', " ");
            if !said.is_empty() {
                wrong.push(format!("{tier} {image:?}: {path}: {said}"));
            }
        };
        environment.says("mkfifo /root/fifo");
        // Before any of them runs: the kernel grants no write lease on a running program.
        for name in environment.says("ls /run/.ims-sshd").lines() {
            meddle_with(&format!("/run/.ims-sshd/{name}"));
        }
        // A transfer in progress, and the helper itself as root's shell, which waits for a writer of the fifo.
        let sftp = master.sftp().stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut waiting = vec![Ended::new(sftp)];
        let mut wait = |line: &str| {
            let mut ssh = master.ssh();
            ssh.arg(line).stdout(Stdio::null()).stderr(Stdio::null());
            waiting.push(Ended::new(ssh.spawn().unwrap()));
        };
        wait("exec sleep 1000");
        wait("exec /run/.ims-sshd/ims-jail-shell session /root/fifo");
        set_root(&environment, "/root", "/proc/self/exe");
        wait("exec x session /root/fifo");
        wait_until("sftp-server", || !processes_with("/run/.ims-sshd/sftp-server").is_empty());
        set_root(&environment, "/root", "/bin/sh");
        let found = || {
            let said = environment.says(OURS);
            said.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let helper = || environment.says("readlink /proc/[0-9]*/exe; true").contains("ims-jail-shell");
        wait_until("the helper inside", helper);
        if image == Image::DebianArm64 {
            assert!(environment.says("readlink /proc/[0-9]*/exe; true").contains("qemu-aarch64"), "none is emulated");
        }
        for path in found().iter().map(String::as_str).chain(["/proc/1/exe"]) {
            meddle_with(path);
        }
        assert!(leased(&files).is_empty(), "{tier} {image:?}: {:?}", leased(&files));
        if state_of(&files) != before {
            wrong.push(format!("{tier} {image:?}: a file of the container has changed"));
        }
        drop(waiting);
        assert_eq!(environment.says("uname -m"), architecture);
        assert!(text(environment.sftp("pwd\n").stdout).contains("directory: /root"));
    }
    assert!(wrong.is_empty(), "of {tried} changes: {wrong:#?}");
    println!("{tried} changes of programs: none is possible");
}

//! Differences between a jail and a plain login to the same image. OpenSSH's clients must see the same exit code,
//! standard error and output for the same command; where they do not, the table has the reason, and the difference is
//! tested too.

use std::fmt;
use std::os::unix::process::ExitStatusExt;

use crate::clients::Place;

use Client::{Scp, Sftp, Shell, Ssh, Terminal};
use Column::{Namespace, Original, User};
use testbed::*;

/// OpenSSH client that runs a line.
#[derive(Clone, Copy, Debug)]
enum Client {
    /// Command of `ssh`, which gets two lines on standard input.
    Ssh,
    /// Command of `ssh -tt`.
    Terminal,
    /// Standard input of the login shell.
    Shell,
    /// Batch of `sftp -b`.
    Sftp,
    /// Arguments of `scp`, in a directory with the file `sent` and the directory `tree`; `host` is the environment.
    Scp,
}

/// Kind of environment that is compared with the plain login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Namespace,
    User,
    /// sshd's own `ChrootDirectory`, which opened image roots formerly.
    Original,
}

const JAILED: &[Column] = &[Namespace, User];

/// Columns in which a line behaves differently, and the reason.
type But = (&'static [Column], &'static str);

const OWN_PROCESSES: But =
    (&[Namespace, User, Original], "a jail has processes of its own, and `ChrootDirectory` alone has no /proc");
const NO_VARIABLES: But = (&[Original], "with `ChrootDirectory` alone, sshd sets no variables of the job");
const NO_PROC: But = (&[Original], "nothing is mounted on /proc");
const NO_DEV: But = (&[Original], "/dev has no links into /proc");
const NO_DEVPTS: But = (&[Original], "nothing is mounted on /dev/pts");

const TABLE: &[(Client, &str, &[But])] = &[
    // Exit codes and signals.
    (Ssh, "true", &[]),
    (Ssh, "false", &[]),
    (Ssh, "exit 0", &[]),
    (Ssh, "exit 3", &[]),
    (Ssh, "exit 126", &[]),
    (Ssh, "exit 127", &[]),
    (Ssh, "exit 128", &[]),
    (Ssh, "exit 255", &[]),
    (Ssh, "exit 256", &[]),
    (Ssh, "exit -1", &[]),
    (Ssh, "(exit 9)", &[]),
    (Ssh, "exec sh -c 'exit 5'", &[]),
    (Ssh, "kill -HUP $$", &[]),
    (Ssh, "kill -INT $$", &[]),
    (Ssh, "kill -QUIT $$", &[]),
    (Ssh, "kill -TERM $$", &[]),
    (Ssh, "kill -KILL $$", &[]),
    (Ssh, "kill -PIPE $$", &[]),
    (Ssh, "kill -USR1 $$", &[]),
    (Ssh, "kill -SEGV $$", &[]),
    (Ssh, "kill -ABRT $$", &[]),
    (Ssh, "kill 0", &[]),
    (Ssh, "exec sh -c 'kill -TERM $$'", &[]),
    (Ssh, "sh -c 'kill -TERM $$'; echo $?", &[]),
    (Ssh, "trap 'echo bye >&2' EXIT; exit 9", &[]),
    (Ssh, "trap '' TERM; kill -TERM $$; echo lived", &[]),
    (Ssh, "set -e; false; echo not here", &[]),
    (Ssh, "true & wait $!; echo $?", &[]),
    // Commands that cannot be run.
    (Ssh, "no-such-program", &[]),
    (Ssh, "/nowhere/at/all", &[]),
    (Ssh, "/etc/passwd", &[]),
    (Ssh, "/", &[]),
    (Ssh, "exec no-such-program", &[]),
    (Ssh, "if", &[]),
    (Ssh, "echo 'unfinished", &[]),
    (Ssh, "(", &[]),
    (Ssh, "cd /nowhere", &[]),
    (Ssh, "cat /nowhere", &[]),
    (Ssh, "ls -l /nowhere /etc/hostname", &[]),
    (Ssh, "env -i /bin/nothing", &[]),
    // Quoting, bytes and streams.
    (Ssh, "", &[]),
    (Ssh, " ", &[]),
    (Ssh, "#", &[]),
    (Ssh, "echo \"a  b\" 'c\nd' $((1+1)) \\$HOME", &[]),
    (Ssh, "echo first\necho second; exit 4", &[]),
    (Ssh, "printf '%s\\n' \"$0\" \"$#\"", &[]),
    (Ssh, "printf '\\377\\000\\001'", &[]),
    (Ssh, "echo äöü", &[]),
    (Ssh, "echo *", &[]),
    (Ssh, "echo ~ ~root ~nobody ~no-such-user", &[]),
    (Ssh, "echo ~root && sleep 0", &[]),
    (Ssh, "echo {a,b}c", &[]),
    (Ssh, "cat", &[]),
    (Ssh, "head -n 1", &[]),
    (Ssh, "read a; read b; read c; echo $a.$b.$c.$?", &[]),
    (Ssh, "echo out; echo err >&2; exit 3", &[]),
    (Ssh, "exec >&-; echo x", &[]),
    (Ssh, "exec 2>&-; no-such-program", &[]),
    (Ssh, "exec <&-; cat", &[]),
    (Ssh, "yes | head -n 2; echo ${PIPESTATUS[*]}", &[]),
    (Ssh, "head -c 300000 /dev/zero | wc -c", &[]),
    (Ssh, "cat <<END\nhere $HOME\nEND", &[]),
    (Ssh, "diff <(echo a) <(echo b)", &[NO_DEV]),
    // User, directory and environment.
    (Ssh, "id", &[]),
    (Ssh, "whoami; pwd; umask", &[]),
    (Ssh, "echo $HOME $SHELL $USER $LOGNAME $MAIL", &[]),
    (Ssh, "echo $PATH", &[]),
    (Ssh, "echo $- $SHLVL $0", &[]),
    (Ssh, "echo $IMS_JOB_ID $IMS_ARCH $IMS_DKMS_ENABLED ${REMOTE_BUILD_NODE-unset}", &[NO_VARIABLES]),
    (Ssh, "echo $LC_ALL ${TERM-no terminal} ${SSH_TTY-none} ${SSH_AUTH_SOCK-no agent}", &[]),
    (Ssh, "echo ${SSH_ORIGINAL_COMMAND-none}", &[]),
    (Ssh, "shopt -q login_shell; echo $?", &[]),
    (Ssh, "ulimit -n; ulimit -c; ulimit -s; ulimit -u", &[]),
    (Ssh, "trap; jobs; set -o | head -n 3", &[]),
    (Ssh, "tty", &[]),
    (Ssh, "[ -t 0 ] || [ -t 1 ] || [ -t 2 ]", &[]),
    (Ssh, "stty size", &[]),
    (Ssh, "hostname; uname -sm; arch", &[]),
    (Ssh, "getent passwd root; getent group tty; getent passwd nobody", &[]),
    (Ssh, "su - nobody -s /bin/sh -c 'id -un; exit 6'", &[]),
    (Ssh, "sudo -n -u nobody sh -c 'id -un; exit 7' 2> /dev/null", &[]),
    (Ssh, "su no-such-user", &[]),
    (Ssh, "python3 -c 'import os; os.kill(os.getpid(), 6)'", &[]),
    (Ssh, "python3 -c 'import sys; print(sys.version); sys.exit(42)'", &[]),
    (Ssh, "python3 -c 'raise SystemExit(\"a message\")'", &[]),
    (Ssh, "/usr/bin/env python3 -c 'import pty; print(pty.openpty()[0] > 2)'", &[NO_DEVPTS]),
    // Files.
    (Ssh, "echo text > /root/f && cat /root/f && stat -c '%a %u:%g %s' /root/f", &[]),
    (Ssh, "mkdir /root/d && rmdir /root/f", &[]),
    (Ssh, "ln -s f /root/l; readlink -f /root/l; rm -r /root/d /root/l; ls /root", &[]),
    (Ssh, "chmod 4755 /root/f; chown nobody /root/f; stat -c %a:%U /root/f", &[]),
    (Ssh, "mkfifo /root/p && stat -c %F /root/p && rm /root/p", &[]),
    (Ssh, "mktemp -d /tmp/XXXXXX > /dev/null; df / > /dev/null", &[NO_PROC]),
    (Ssh, "echo x > /dev/null; stat -c %F /dev/null", &[]),
    (Ssh, "echo x > /dev/full", &[]),
    (Ssh, "echo x > /dev/stderr", &[NO_DEV]),
    (Ssh, "cat /dev/stdin", &[NO_DEV]),
    (Ssh, "echo x > /dev/tty", &[]),
    (Ssh, "head -c 4 /dev/urandom | wc -c", &[]),
    (Ssh, "touch /dev/shm/x && rm /dev/shm/x", &[]),
    (Ssh, "chroot / /bin/echo inside", &[]),
    // The purpose of a jail: these must differ.
    (Ssh, "cat /proc/1/comm", &[OWN_PROCESSES]),
    (Ssh, "ps -e -o comm= | wc -l", &[OWN_PROCESSES]),
    (Ssh, "mknod /root/n c 1 3 && rm /root/n", &[(&[User], "a user namespace may make no device nodes")]),
    (Ssh, "mount -t tmpfs tmpfs /mnt && umount /mnt", &[(JAILED, "no CAP_SYS_ADMIN in a jail")]),
    (Ssh, "nice -n -5 true", &[(JAILED, "no CAP_SYS_NICE in a jail")]),
    (Ssh, "chmod 666 /dev/null", &[(JAILED, "the node is the container's, and read-only")]),
    // On a terminal.
    (Terminal, "true", &[]),
    (Terminal, "exit 3", &[]),
    (Terminal, "kill -TERM $$", &[]),
    (Terminal, "kill -KILL $$", &[]),
    (Terminal, "no-such-program", &[]),
    (Terminal, "echo out; echo err >&2; exit 8", &[]),
    (Terminal, "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo $TERM", &[]),
    (Terminal, "stty size; stty -a | tail -n 2", &[]),
    (Terminal, "tty | sed 's/[0-9]*$//'", &[NO_DEV]),
    (Terminal, "echo x > /dev/tty", &[]),
    (Terminal, "set -m; sleep 0 & wait; fg", &[]),
    (Terminal, "trap 'echo int; exit 1' INT; kill -INT $$", &[]),
    (Terminal, "su - nobody -s /bin/sh -c 'exit 6'", &[]),
    // A shell that reads its input.
    (Shell, "echo $0; exit 5\n", &[]),
    (Shell, "echo one\nfalse\n", &[]),
    (Shell, "no-such-program\n", &[]),
    (Shell, "shopt -q login_shell; echo $?; echo $-\n", &[]),
    (Shell, "kill -TERM $$\n", &[]),
    (Shell, "cat\nthe rest of the input\n", &[]),
    (Shell, "", &[]),
    // sftp.
    (Sftp, "pwd\n", &[]),
    (Sftp, "ls /etc/passwd\nls -n /etc/passwd\n", &[]),
    (Sftp, "ls /nowhere\n", &[]),
    (Sftp, "cd /nowhere\n", &[]),
    (Sftp, "cd /etc\npwd\n", &[]),
    (Sftp, "put sent\nls sent\nget sent got\nrm sent\n", &[]),
    (Sftp, "put -p sent\nls -n sent\n", &[]),
    (Sftp, "put sent /nowhere/sent\n", &[]),
    (Sftp, "put sent /etc\nrm /etc/sent\n", &[]),
    (Sftp, "get /nowhere\n", &[]),
    (Sftp, "get /root\n", &[]),
    (Sftp, "put -r tree\nls -1 tree\nget -r tree back\nrm tree/*\nrmdir tree\n", &[]),
    (Sftp, "reput sent\nreget sent\n", &[]),
    (Sftp, "mkdir d\nmkdir d\n", &[]),
    (Sftp, "rmdir d\nrmdir d\n", &[]),
    (Sftp, "rename sent other\nrename nothing other\n", &[]),
    (Sftp, "symlink other link\nls -1\nrm link\n", &[]),
    (Sftp, "ln other hard\nls -n hard\nrm hard\n", &[]),
    (Sftp, "chmod 600 other\nchown 65534 other\nchgrp 65534 other\nls -n other\n", &[]),
    (Sftp, "ls /proc/version\n", &[NO_PROC]),
    (Sftp, "rm nothing\n", &[]),
    (Sftp, "rm /\n", &[]),
    (Sftp, "-rm nothing\npwd\n", &[]),
    (Sftp, "copy other copied\nls -1 copied\nrm copied\n", &[]),
    (Sftp, "no-such-command\n", &[]),
    (Sftp, "get /etc/shadow\n", &[]),
    (Sftp, "version\n", &[]),
    // scp with the SFTP protocol and with the old one.
    (Scp, "sent host:/root/sent", &[]),
    (Scp, "host:/root/sent back", &[]),
    (Scp, "-p sent host:", &[]),
    (Scp, "-r tree host:/root/t", &[]),
    (Scp, "-r host:/root/t got.tree", &[]),
    (Scp, "tree host:/root/u", &[]),
    (Scp, "sent host:/nowhere/sent", &[]),
    (Scp, "host:/nowhere back", &[]),
    (Scp, "host:/root back", &[]),
    (Scp, "host:/root/t/* .", &[]),
    (Scp, "nothing host:", &[]),
    (Scp, "host:sent host:sent2", &[]),
    (Scp, "-O sent host:/root/old", &[]),
    (Scp, "-O host:/root/old back", &[]),
    (Scp, "-O -r tree host:/root/v", &[]),
    (Scp, "-O host:/nowhere back", &[]),
    (Scp, "-O sent host:/nowhere/sent", &[]),
    (Scp, "-O tree host:/root/w", &[]),
];

/// Exit, standard error and standard output of the client.
#[derive(PartialEq, Eq)]
struct Seen(i32, String, String);

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {:#x}, stderr {:?}, stdout {:?}", self.0, self.1, self.2)
    }
}

#[test]
fn jail_differs_from_a_plain_login_only_as_documented() {
    assert!(TABLE.len() >= 100);
    let columns: [fn() -> Environment; 4] = [
        || Place::Plain.open_in_container(),
        || Place::Namespace.open_in_container(),
        || Place::User.open_in_container(),
        || Volume::new(Image::Managed).chroot_directory(),
    ];
    let seen = columns.map(|open| {
        std::thread::spawn(move || {
            let environment = open();
            let directory = client_directory();
            let master = environment.master();
            TABLE.iter().map(|(client, line, _)| try_line(&master, directory.path(), *client, line)).collect::<Vec<_>>()
        })
    });
    let [plain, namespace, user, original] = seen.map(|column| column.join().unwrap());
    let mut wrong = String::new();
    for (i, (client, line, but)) in TABLE.iter().enumerate() {
        for (column, seen) in [(Namespace, &namespace[i]), (User, &user[i]), (Original, &original[i])] {
            let reason = but.iter().find(|(columns, _)| columns.contains(&column));
            if reason.is_none() != (*seen == plain[i]) {
                let meant = reason.map_or("the same", |(_, reason)| reason);
                wrong += &format!(
                    "{client:?} {line:?}\n   plain: {:?}\n   {column:?}: {seen:?}\n   meant: {meant}\n",
                    plain[i]
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The differences, as a part of docs/CLIENTS.md.
pub fn page() -> String {
    let mut page = format!(
        "\n## The same command, jailed and plain\n\n\
         {} commands of OpenSSH's `ssh`, `sftp` and `scp` are run in a jail of either tier, under sshd's own `ChrootDirectory`,\n\
         and on a plain login to the same image (`tests/suite/commands.rs`). Exit code, standard error and standard output are\n\
         the same, with these exceptions:\n\n\
         | client | command | differs in | why |\n|---|---|---|---|\n",
        TABLE.len()
    );
    for (client, line, but) in TABLE {
        for (columns, why) in *but {
            let places: Vec<_> = columns.iter().map(|column| column.name()).collect();
            let line = line.trim_end().replace('|', "\\|").replace('\n', "; ");
            page += &format!("| {} | `{line}` | {} | {why} |\n", client.name(), places.join(", "));
        }
    }
    page
}

impl Client {
    fn name(self) -> &'static str {
        match self {
            Ssh => "`ssh`",
            Terminal => "`ssh -tt`",
            Shell => "`ssh`, a shell",
            Sftp => "`sftp`",
            Scp => "`scp`",
        }
    }
}

impl Column {
    fn name(self) -> &'static str {
        match self {
            Namespace => "namespace",
            User => "user",
            Original => "ChrootDirectory",
        }
    }
}

fn client_directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("sent"), "text that is sent\n").unwrap();
    std::fs::create_dir(directory.path().join("tree")).unwrap();
    std::fs::write(directory.path().join("tree/leaf"), "leaf\n").unwrap();
    directory
}

fn try_line(master: &Master<'_>, directory: &std::path::Path, client: Client, line: &str) -> Seen {
    let (mut command, input) = match client {
        Ssh => (master.ssh(), "first\nsecond\n"),
        Terminal => (master.ssh(), ""),
        Shell => (master.ssh(), line),
        Sftp => (master.sftp(), line),
        Scp => (master.scp(), ""),
    };
    match client {
        Ssh => command.arg(line),
        Terminal => command.args(["-tt", line]).env("TERM", "xterm"),
        Shell | Sftp => &mut command,
        Scp => command.args(line.split(' ').map(|word| word.replace("host:", "root@127.0.0.1:"))),
    };
    let output = feed(command.current_dir(directory).env_remove("SSH_AUTH_SOCK"), input.as_bytes());
    Seen(output.status.into_raw(), text(output.stderr), text(output.stdout))
}

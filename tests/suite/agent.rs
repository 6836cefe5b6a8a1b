//! The client's ssh-agent in sessions.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use testbed::node::POD;
use testbed::*;

use crate::clients::Place;

crate::clients::shown! {
    "OpenSSH ssh", "`-A`: the client's agent lists its keys and signs" => client_agent_lists_keys_and_signs;
    "git", "fetches over ssh with the client's agent" => git_fetches_with_the_clients_agent;
}

/// An agent with the key of all tests.
pub struct Agent {
    _program: Ended,
    pub socket: PathBuf,
    pub keys: String,
}

impl Agent {
    pub fn start(environment: &Environment) -> Self {
        let socket = environment.dir.path().join("agent");
        let program = Command::new("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).spawn().unwrap();
        let program = Ended::new(program);
        wait_until("the agent to listen", || UnixStream::connect(&socket).is_ok());
        let add = |argument: &std::ffi::OsStr| {
            succeed(Command::new("ssh-add").arg("-q").arg(argument).env("SSH_AUTH_SOCK", &socket))
        };
        add(environment.key.as_os_str());
        let keys = add("-l".as_ref());
        Self { _program: program, socket, keys }
    }

    /// Output of a command over `ssh -A` with further options.
    fn bring(&self, environment: &Environment, options: &[&str], command: &str) -> std::process::Output {
        let mut ssh = environment.ssh(&[&["-A"], options].concat());
        ssh.env("SSH_AUTH_SOCK", &self.socket).arg(command).output().unwrap()
    }
}

fn client_agent_lists_keys_and_signs(place: Place) {
    let environment = place.open(Image::Debian);
    let agent = Agent::start(&environment);
    let says = |command: &str| {
        let output = agent.bring(&environment, &[], command);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{command}");
        text(output.stdout)
    };
    assert_eq!(says("ssh-add -l"), agent.keys);
    says(
        "ssh-add -L > /tmp/ims-sshd-$$.pub; ssh-add -T /tmp/ims-sshd-$$.pub; code=$?; rm /tmp/ims-sshd-$$.pub; exit $code",
    );
    // More connections than are served at once.
    let many = says("for i in $(seq 40); do ssh-add -l & done; wait");
    assert_eq!(many, agent.keys.repeat(40));
    // More data than all buffers hold, sent without waiting for answers.
    assert_eq!(says(&format!("timeout 20 python3 -c \"{ASK_MANY}\"")), "60000\n");
    // A program that hangs up does not end other connections.
    let open =
        "import os, socket; s = socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK']); s.send(b'\\0')";
    assert_eq!(says(&format!("python3 -c \"{open}\"; ssh-add -l")), agent.keys);
    let socket = says("echo $SSH_AUTH_SOCK");
    assert!(environment.run(&format!("test -e {socket}")).status.code() == Some(1), "{socket} was left");
    // Only root can connect, as to sshd's own socket.
    let others = agent.bring(&environment, &[], "setpriv --reuid 65534 --clear-groups ssh-add -l");
    assert_eq!(others.status.code(), Some(2), "{others:?}");
    // The socket's umask does not stay in the session.
    assert_eq!(says("umask"), environment.says("umask") + "\n");
}

fn git_fetches_with_the_clients_agent(place: Place) {
    let environment = place.open(Image::Node);
    let volume = Volume::new(Image::Busybox);
    // Sessions reach the pod by an address of its network if they are on a node.
    let config = std::fs::read_to_string(&volume.config).unwrap().replace("ListenAddress 127.0.0.1\n", "");
    std::fs::write(&volume.config, config).unwrap();
    let forge = volume.start(Mode::Plain).ready();
    let repository = forge.dir.path().join("repository");
    let git = |line: &str| succeed(Command::new("git").arg("-C").arg(forge.dir.path()).args(line.split(' ')));
    git("init -q repository");
    std::fs::write(repository.join("file"), "text").unwrap();
    git("-C repository add file");
    git("-C repository -c user.name=n -c user.email=n@example.org commit -q -m message");

    let agent = Agent::start(&environment);
    let options =
        "-F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR";
    let address = if place == Place::Node { POD } else { "127.0.0.1" };
    let url = format!("ssh://root@{address}:{}{}", forge.port, repository.display());
    let clone = format!(
        "d=$(mktemp -d) && GIT_SSH_COMMAND='ssh {options}' git clone -q {url} $d/clone && cat $d/clone/file && rm -r $d"
    );
    let output = agent.bring(&environment, &[], &clone);
    assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("text", ""));
    let without = environment.ssh(&["-a"]).arg(clone).output().unwrap();
    assert!(text(&without.stderr).contains("Permission denied (publickey)"), "{without:?}");
}

/// Requests the keys (draft-ietf-sshm-ssh-agent: a length of 4 bytes, then 11) and counts the answers.
const ASK_MANY: &str = "
import os, socket, struct, threading
s = socket.socket(socket.AF_UNIX)
s.connect(os.environ['SSH_AUTH_SOCK'])
asked, sent = b'\\0\\0\\0\\1\\x0b' * 60000, 0
try:
    while sent < len(asked):
        sent += s.send(asked[sent:], socket.MSG_DONTWAIT)
except BlockingIOError:
    threading.Thread(target=s.sendall, args=(asked[sent:],)).start()
answers = s.makefile('rb')
kinds = [answers.read(struct.unpack('>I', answers.read(4))[0])[0] for _ in range(60000)]
print(kinds.count(12))
";

#[test]
fn files_planted_at_the_agents_socket_path_are_not_followed() {
    for place in [Place::Namespace, Place::User] {
        let environment = place.open(Image::Debian);
        let agent = Agent::start(&environment);
        // At every name that the socket may get, which contains a process ID.
        let plant = |what: &str| {
            let next = succeed(Command::new("sh").args(["-c", "echo $$"]));
            let most = std::fs::read_to_string("/proc/sys/kernel/pid_max").unwrap();
            // Process IDs wrap around to this number: RESERVED_PIDS of Linux.
            let numbers =
                format!("(n if n < {most} else n - {most} + 300 for n in range({0}, {0} + 20000))", next.trim());
            let names = format!("f'/run/ssh-agent.{{n}}' for n in {}", numbers.replace('\n', ""));
            environment.says(&format!("python3 -c \"import os; [{what} for name in ({names})]\""));
        };
        plant("os.symlink('/root/made', name)");
        let ask = "ssh-add -l; test -S $SSH_AUTH_SOCK && test ! -L $SSH_AUTH_SOCK && echo so";
        assert_eq!(text(agent.bring(&environment, &[], ask).stdout), format!("{}so\n", agent.keys), "{place:?}");
        assert!(!environment.image_root.join("root/made").exists());
        // If its name is taken, the session has no agent.
        plant("(os.path.lexists(name) and os.unlink(name), os.makedirs(name + '/in-it'))");
        let said = agent.bring(&environment, &[], "echo ${SSH_AUTH_SOCK-none}; exit 7");
        let (code, out, err) = (said.status.code(), text(said.stdout), text(said.stderr));
        assert_eq!((code, out.as_str(), err.as_str()), (Some(7), "none\n", ""), "{place:?}");
    }
}

#[test]
fn agent_is_not_forwarded_unless_requested() {
    let ask = "echo ${SSH_AUTH_SOCK-none}; ls -d /run/ssh-agent.* 2>/dev/null; true";
    let with = |config: &str, mode: Mode, variables: &[(&str, &str)]| {
        let volume = Volume::new(Image::Busybox);
        let text = std::fs::read_to_string(&volume.config).unwrap();
        std::fs::write(&volume.config, text + config).unwrap();
        volume.start_with(mode, variables).ready()
    };
    let no = ("IMS_AGENT_FORWARDING", "False");
    for (environment, options) in [
        (with("", Mode::Jailed, &[]), &["-a"][..]),
        (with("", Mode::Jailed, &[no]), &[]),
        (with("", Mode::Plain, &[no]), &[]),
        (with("Match User root\nAllowAgentForwarding yes\n", Mode::Jailed, &[no]), &[]),
        (with("AllowAgentForwarding no\n", Mode::Jailed, &[("IMS_AGENT_FORWARDING", "true")]), &[]),
        (with("", Mode::Jailed, &[("IMS_JAIL_TIER", "chroot")]), &[]),
    ] {
        let agent = Agent::start(&environment);
        assert_eq!(text(agent.bring(&environment, options, ask).stdout), "none\n", "{}", environment.log_text());
    }
    let environment = with("", Mode::Jailed, &[]);
    let agent = Agent::start(&environment);
    assert!(text(agent.bring(&environment, &[], ask).stdout).starts_with("/run/ssh-agent."));
    // A file transfer does not get the agent either.
    let sftp = feed(environment.sftp_client(&["-A"]).env("SSH_AUTH_SOCK", &agent.socket), b"ls /run/ssh-agent.*\n");
    assert!(text(&sftp.stderr).contains("not found"), "{sftp:?}");
}

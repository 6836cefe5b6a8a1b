//! Attempts of an SSH client, outside any program in the jail: each one works in plain mode, and none in the jail.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testbed::*;

use crate::escape::{Decoys, copy_attempts};

/// A client with a key that knows the names of the targets outside.
struct Client {
    /// The machine's /etc/passwd, replaced.
    _passwd: Mounted,
    environment: Environment,
    decoys: Decoys,
}

/// Name of an attempt, its source, and the function that makes it and returns whether it escaped.
type Attempt = (&'static str, &'static str, fn(&Client) -> bool);

const ATTEMPTS: &[Attempt] = &[
    ("ssh -L to a socket", "ssh(1), AllowStreamLocalForwarding", Client::reaches_socket),
    ("ssh -R with a socket", "ssh(1), AllowStreamLocalForwarding", Client::makes_socket),
    ("SSH_AUTH_SOCK", "ssh-agent(1); sshd_config(5), AcceptEnv", Client::is_given_other_agent),
    ("LD_PRELOAD", "ld.so(8); sshd_config(5), AcceptEnv", Client::is_preloaded),
    // A bash started by sshd reads ~/.bashrc instead; the next bash reads this.
    ("BASH_ENV", "bash(1); sshd_config(5), AcceptEnv", |c| {
        c.starts(&["-o", "SetEnv=BASH_ENV=SCRIPT"], "bash -c true; true")
    }),
    ("~/.ssh/environment", "sshd(8), FILES; PermitUserEnvironment", |c| c.starts(&[], "bash -c true; true")),
    ("~/.ssh/rc", "sshd(8), SSHRC; PermitUserRC", Client::starts_rc),
    ("a key with a command", "sshd(8), AUTHORIZED_KEYS", Client::starts_command_of_key),
    ("a subsystem of the environment", "sshd_config(5), Subsystem", |c| c.starts(&["-s"], "mark")),
    ("a command", "sshd_config(5), ForceCommand", |c| c.starts(&[], "sh SCRIPT")),
    ("a command after a command", "bash(1), quoting", |c| c.starts(&[], "true; sh SCRIPT")),
    ("a command in quotes", "bash(1), quoting", |c| c.starts(&[], "''$(sh SCRIPT)''")),
    ("a command that ends quotes", "bash(1), quoting", |c| c.starts(&[], "true '' ; sh SCRIPT ; ''")),
    ("a command in backticks", "bash(1), quoting", |c| c.starts(&[], "`sh SCRIPT`")),
    ("a command in the next line", "bash(1), quoting", |c| c.starts(&[], "true\nsh SCRIPT")),
    ("a command after sftp's", "SSH_ORIGINAL_COMMAND", |c| c.starts(&[], "internal-sftp </dev/null; sh SCRIPT")),
    ("sftp: a path", "sftp(1)", |c| c.sftp_reads("FILE")),
    ("sftp: ..", "sftp(1); path_resolution(7)", |c| c.sftp_reads("/usr/../../../../../../../..FILE")),
    ("sftp: the root of its own process", "proc_pid_root(5)", |c| c.sftp_reads("/proc/self/root/../../..FILE")),
    ("sftp: the root of a process", "proc_pid_root(5)", Client::sftp_reads_by_process),
    ("sftp: the directory it was started in", "proc_pid_cwd(5)", |c| {
        c.sftp_reads("/proc/self/cwd/../../../../../..FILE")
    }),
    ("sftp: a link", "sftp(1), symlink", Client::sftp_reads_link),
    ("scp", "scp(1)", |c| c.scp_reads(&[])),
    ("scp -O", "scp(1)", |c| c.scp_reads(&["-O"])),
];

impl Client {
    /// `ssh -N` with forwarding. It ends by SIGKILL, because ssh can miss a SIGTERM that arrives just before it waits
    /// again.
    fn forwarding(&self, options: &[&str]) -> Ended {
        let options = [&["-N", "-o", "ExitOnForwardFailure=yes"], options].concat();
        Ended::killed(self.environment.ssh(&options).stderr(Stdio::null()).spawn().unwrap())
    }

    /// An environment whose sshd allows everything it can, and whose root has files that sshd runs.
    fn of(mode: Mode) -> Self {
        let volume = Volume::new(Image::Busybox);
        let decoys = Decoys::lay_out(&volume, "decoys");
        let dir = volume.dir.path();
        let script = |name: &str| std::fs::write(dir.join(name), format!("touch {}/mark\n", dir.display())).unwrap();
        script("script");
        copy_attempts(&volume.image_root.join("attempts"));

        // A home directory for root, so that the real one is left alone.
        let home = dir.join("home");
        std::fs::create_dir_all(home.join(".ssh")).unwrap();
        replace_root(&volume, &home, "/bin/bash");
        let variables = format!("BASH_ENV={}/script\n", dir.display());
        std::fs::write(home.join(".ssh/environment"), variables).unwrap();
        std::fs::write(home.join(".ssh/rc"), format!("touch {}/rc\n", dir.display())).unwrap();

        let key = dir.join("key");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        let public = std::fs::read_to_string(key.with_extension("pub")).unwrap();
        let mut keys = std::fs::File::options().append(true).open(dir.join("authorized_keys")).unwrap();
        write!(keys, "command=\"touch {}/mark-of-key\" {public}", dir.display()).unwrap();

        let mut config = std::fs::File::options().append(true).open(&volume.config).unwrap();
        write!(
            config,
            "AcceptEnv SSH_AUTH_SOCK\nPermitUserEnvironment yes\nPermitUserRC yes\nAllowStreamLocalForwarding yes\nSubsystem mark sh {}/script\n",
            dir.display()
        )
        .unwrap();
        if mode == Mode::Plain {
            // A jailed environment that accepts these variables is not opened: see refusals.rs.
            writeln!(config, "AcceptEnv LD_* BASH_ENV").unwrap();
        }
        Self { _passwd: Mounted("/etc/passwd".into()), environment: volume.start(mode).ready(), decoys }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.environment.dir.path().join(name)
    }

    /// `text` with the placeholders replaced by the script and by the file outside.
    fn names(&self, text: &str) -> String {
        let script = self.path("script").display().to_string();
        text.replace("SCRIPT", &script).replace("FILE", self.decoys.value("OUTSIDE_FILE"))
    }

    /// True if a session with these options and this command runs the script outside.
    fn starts(&self, options: &[&str], command: &str) -> bool {
        let mark = self.path("mark");
        let _ = std::fs::remove_file(&mark);
        let options: Vec<_> = options.iter().map(|option| self.names(option)).collect();
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        self.environment.ssh(&options).arg(self.names(command)).output().unwrap();
        mark.exists()
    }

    fn starts_rc(&self) -> bool {
        self.environment.run("true");
        self.path("rc").exists()
    }

    fn starts_command_of_key(&self) -> bool {
        let mut ssh = self.environment.ssh(&[]);
        let key = self.environment.key.as_os_str();
        let other = self.path("key");
        let arguments: Vec<_> =
            ssh.get_args().map(|a| if a == key { other.as_os_str() } else { a }.to_owned()).collect();
        ssh = Command::new("ssh");
        ssh.args(arguments).arg("true").output().unwrap();
        self.path("mark-of-key").exists()
    }

    fn is_preloaded(&self) -> bool {
        let output = self.environment.ssh(&["-o", "SetEnv=LD_PRELOAD=/outside.so"]).arg("true").output().unwrap();
        text(output.stderr).contains("/outside.so")
    }

    fn reaches_socket(&self) -> bool {
        let socket = self.path("local");
        let forward = format!("{}:{}", socket.display(), self.decoys.value("OUTSIDE_SOCKET"));
        let _ssh = self.forwarding(&["-L", &forward]);
        wait_until("ssh to listen", || UnixStream::connect(&socket).is_ok());
        let mut said = String::new();
        let heard = UnixStream::connect(&socket).unwrap().read_to_string(&mut said);
        heard.is_ok() && said == self.decoys.secret
    }

    fn makes_socket(&self) -> bool {
        let socket = self.path("remote");
        let forward = format!("{}:{}", socket.display(), self.decoys.value("OUTSIDE_SOCKET"));
        let mut ssh = self.forwarding(&["-R", &forward]);
        wait_until("the socket, or that it is refused", || socket.exists() || ssh.try_wait().unwrap().is_some());
        socket.exists()
    }

    /// True if a socket that the client names is used as its agent's.
    fn is_given_other_agent(&self) -> bool {
        let named = format!("SetEnv=SSH_AUTH_SOCK={}", self.decoys.value("OUTSIDE_SOCKET"));
        let image_root = self.environment.image_root.display();
        let listens =
            format!("cd /; test -x attempts || cd {image_root}; OUTSIDE_SOCKET=$SSH_AUTH_SOCK ./attempts socket");
        let output = self.environment.ssh(&["-o", &named]).arg(listens).output().unwrap();
        assert!(matches!(output.status.code(), Some(0 | 1)), "the attempt did not run: {output:?}");
        output.status.success()
    }

    /// True if `run`, called with a path for a copy, leaves the secret in it.
    fn gets_secret(&self, run: impl FnOnce(&Path)) -> bool {
        let copy = self.path("copy");
        let _ = std::fs::remove_file(&copy);
        run(&copy);
        std::fs::read_to_string(copy).is_ok_and(|copied| copied == self.decoys.secret)
    }

    fn sftp_reads(&self, path: &str) -> bool {
        self.gets_secret(|copy| {
            self.environment.sftp(&format!("get {} {}\n", self.names(path), copy.display()));
        })
    }

    fn sftp_reads_by_process(&self) -> bool {
        self.sftp_reads(&format!("/proc/{}/rootFILE", self.decoys.value("OUTSIDE_PROCESS")))
    }

    fn sftp_reads_link(&self) -> bool {
        let link = format!("/tmp/link-to-{}", self.decoys.value("OUTSIDE_KEY"));
        let file = self.decoys.value("OUTSIDE_FILE");
        self.gets_secret(|copy| {
            self.environment.sftp(&format!("symlink {file} {link}\n-get {link} {}\nrm {link}\n", copy.display()));
        })
    }

    fn scp_reads(&self, options: &[&str]) -> bool {
        let from = format!("root@127.0.0.1:{}", self.decoys.value("OUTSIDE_FILE"));
        self.gets_secret(|copy| {
            let mut scp = Command::new("scp");
            scp.args(self.environment.ssh_options()).args(options);
            scp.args(["-P", &self.environment.port.to_string(), &from]).arg(copy).output().unwrap();
        })
    }
}

#[test]
fn client_attempts_work_in_plain_mode_and_fail_in_a_jail() {
    for mode in [Mode::Plain, Mode::Jailed] {
        let mut client = Client::of(mode);
        let wrong = ATTEMPTS.iter().filter(|(_, _, gets_out)| gets_out(&client) != (mode == Mode::Plain));
        let wrong: Vec<_> = wrong.map(|(name, source, _)| format!("{name} ({source})")).collect();
        assert!(wrong.is_empty(), "{mode:?}: {wrong:?}");
        client.decoys.assert_unharmed();
        assert_eq!(client.environment.complete(), 0);
    }
}

/// Asks a SOCKS 5 proxy for a host by name (RFC 1928). The reply code 0 means connected.
fn ask_proxy(proxy: u16, host: &str, port: u16) -> (TcpStream, Option<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", proxy)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut request = vec![5, 1, 0, 5, 1, 0, 3, u8::try_from(host.len()).unwrap()];
    request.extend_from_slice(host.as_bytes());
    request.extend_from_slice(&port.to_be_bytes());
    stream.write_all(&request).unwrap();
    let mut answer = [0; 12];
    let answered = stream.read_exact(&mut answer);
    (stream, answered.is_ok().then_some(answer[3]))
}

#[test]
fn proxy_reaches_the_network_but_no_unix_socket() {
    for mode in MODES {
        let client = Client::of(mode);
        let proxy = free_port();
        let _ssh = client.forwarding(&["-D", &proxy.to_string()]);
        wait_until("ssh to listen", || TcpStream::connect(("127.0.0.1", proxy)).is_ok());

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut stream, answer) = ask_proxy(proxy, "127.0.0.1", listener.local_addr().unwrap().port());
        assert_eq!(answer, Some(0), "{mode:?}");
        listener.accept().unwrap().0.write_all(b"here").unwrap();
        let mut said = [0; 4];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"here", "{mode:?}");

        // ssh reports a connection before it has one; then the stream must end.
        let (mut stream, _) = ask_proxy(proxy, client.decoys.value("OUTSIDE_SOCKET"), 0);
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        assert!(said.is_empty(), "{mode:?}: {}", text(said));
    }
}

#[test]
fn signal_files_that_are_links_are_not_followed() {
    for (links, verdict) in [
        (&[("tmp/failed", "made")][..], "failed"),
        (&[("tmp/complete", "made")], "complete"),
        (&[("tmp/complete", "file"), ("tmp/failed", "made")], "failed"),
        (&[("tmp", "")], "failed"),
        (&[("tmp", "")], "complete"),
    ] {
        let volume = Volume::new(Image::Busybox);
        let outside = volume.dir.path().join("outside");
        let lay_out = || {
            let _ = std::fs::remove_dir_all(&outside);
            std::fs::create_dir(&outside).unwrap();
            std::fs::write(outside.join("complete"), "text").unwrap();
            std::fs::write(outside.join("file"), "text").unwrap();
            walk(&outside)
        };
        let plant = |(link, target): &(&str, &str)| {
            format!("[ ! -d {link} ] || mv {link} {link}.old; ln -s {}/{target} {link}", outside.display())
        };
        let plant = links.iter().map(plant).collect::<Vec<_>>().join("; ");

        // A program that follows the links changes the files outside.
        let before = lay_out();
        let naive = volume.dir.path().join("naive");
        std::fs::create_dir_all(naive.join("tmp")).unwrap();
        let mark = "touch tmp/failed tmp/complete; rm tmp/complete";
        succeed(Command::new("sh").args(["-c", &format!("{plant}; {mark}")]).current_dir(&naive));
        assert_ne!(walk(&outside), before, "{links:?}");

        let before = lay_out();
        let mut environment = volume.start(Mode::Jailed).ready();
        environment.says(&format!("cd /; {plant}; readlink {}", links[0].0));
        environment.touch(verdict);
        environment.end();
        assert_eq!(walk(&outside), before, "{links:?} {verdict}: {}", environment.log_text());
        assert_eq!(std::fs::read_to_string(outside.join("file")).unwrap(), "text");
    }
}

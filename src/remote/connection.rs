//! The ssh connection to a node, established by this machine's OpenSSH client. Everything that a job does on the node
//! uses a channel of this one connection.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use nix::unistd::Pid;
use ring::digest::{SHA256, digest};

use crate::error::{Attempt, Error, Result};
use crate::printable::Printable;
use crate::remote::node_log::log_all;
use crate::sys::process::{Handle, Identity, end_with_us};
use crate::sys::signals::unblock_signals;
use crate::sys::tree::Tree;

/// Timeout for connecting, including the login.
const TIME_TO_CONNECT: Duration = Duration::from_secs(30);

/// Timeout for an answer of ssh's master process, and for sshd's greeting through a forwarded port.
const TIME_TO_ANSWER: Duration = Duration::from_secs(10);

/// Time that the last lines from a node get to reach the log.
const TIME_TO_LOG: Duration = Duration::from_secs(1);

/// Maximum number of bytes of ssh's output that a message contains: a node can make ssh print anything.
const LONGEST_SAID: u64 = 4096;

/// Interval at which a wait checks whether it is still needed.
const TICK: Duration = Duration::from_millis(20);

/// Interval of ssh's own keepalive messages.
const ALIVE: Duration = Duration::from_secs(5);

/// Address of a node, and how to log in on it.
#[derive(Debug, Clone)]
pub(crate) struct Destination {
    /// `HOST` or `USER@HOST`, as [`is_host`] accepts it.
    pub(crate) host: String,
    /// Private key. If there is a file `known_hosts` next to it, that file has the accepted host keys. If `None`, ssh
    /// uses the user's own configuration.
    pub(crate) key: Option<PathBuf>,
}

impl Destination {
    /// The node of a job, as `REMOTE_BUILD_NODE` names it, accessed with the pod's key.
    pub(crate) fn of_job(host: &str, key: PathBuf) -> Result<Self> {
        if !is_host(host) || host.contains('@') {
            let why = format!("REMOTE_BUILD_NODE is '{host}': expected the name or address of a host");
            return Err(Error::bad_input(why));
        }
        Ok(Self { host: format!("root@{host}"), key: Some(key) })
    }

    /// The node that the user has named on the command line.
    pub(crate) fn named(host: &str) -> Result<Self> {
        // ssh takes an IPv6 address without the brackets that URLs need.
        let address = host.strip_suffix(']').and_then(|rest| rest.split_once('['));
        let host = address.map_or_else(|| host.to_owned(), |(user, address)| format!("{user}{address}"));
        if !is_host(&host) {
            return Err(Error::bad_input(format!("--node is '{host}': expected HOST or USER@HOST")));
        }
        Ok(Self { host, key: None })
    }
}

/// Returns whether `text` is a host, with or without a user. A text that ssh could take for an option is none.
fn is_host(text: &str) -> bool {
    let (user, host) = text.split_once('@').unwrap_or(("root", text));
    let is_word = |word: &str, further: &[char]| {
        !word.is_empty()
            && !word.starts_with('-')
            && word.chars().all(|c| c.is_ascii_alphanumeric() || further.contains(&c))
    };
    host.len() <= 253 && is_word(user, &['-', '_', '.']) && is_word(host, &['-', '_', '.', ':'])
}

/// Called repeatedly during a wait. Fails when the wait should end early.
pub(crate) type Heed<'a> = &'a dyn Fn() -> Result<()>;

/// An established connection.
#[derive(Debug)]
pub(crate) struct Connection {
    host: String,
    master: Child,
    control: PathBuf,
    log: PathBuf,
    /// For each command a receiver that is disconnected when the command's standard error ends.
    commands: RefCell<Vec<Receiver<()>>>,
}

impl Connection {
    /// Connects. `directory` must be private, and gets a copy of the key, the host keys and the socket of the master
    /// process. If the node does not answer for `silence`, the connection counts as lost.
    pub(crate) fn open(to: &Destination, directory: &Path, silence: Duration, heed: Heed<'_>) -> Result<Self> {
        let attempted = || format!("connect to the build node {}", to.host);
        let log = directory.join("ssh.log");
        let control = directory.join("ssh");
        let known_hosts = directory.join("known_hosts");
        // Remove the socket that a killed run left behind: the socket's presence shows that the connection is
        // established.
        match std::fs::remove_file(&control) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::new(attempted()).because(e)),
            _ => {}
        }
        let mut options = Vec::new();
        if let Some(key) = &to.key {
            let own = Tree::open(directory).attempt(attempted)?;
            let strict = copy_keys(key, &own)?;
            options.extend(["-F", "none", "-i"].map(str::to_owned));
            options.push(directory.join(KEY).display().to_string());
            let checking = if strict { "yes" } else { "accept-new" };
            options.extend(set("StrictHostKeyChecking", checking));
            options.extend(set("UserKnownHostsFile", &known_hosts.display().to_string()));
            options.extend(
                [("GlobalKnownHostsFile", "/dev/null"), ("IdentitiesOnly", "yes")].map(|(n, v)| set(n, v)).concat(),
            );
        }
        let count = silence.as_secs().div_ceil(ALIVE.as_secs()).max(1).to_string();
        let fixed = [
            ("BatchMode", "yes"),
            ("ConnectTimeout", "10"),
            ("ServerAliveInterval", "5"),
            ("ServerAliveCountMax", &count),
            ("ForwardAgent", "no"),
            ("ForwardX11", "no"),
            ("PermitLocalCommand", "no"),
            ("ClearAllForwardings", "yes"),
        ];
        options.extend(fixed.map(|(name, value)| set(name, value)).concat());
        let mut ssh = Command::new("ssh");
        ssh.args(&options).args(["-M", "-N", "-T", "-S"]).arg(&control).args(["--", &to.host]);
        let said = File::create(&log).attempt(attempted)?;
        ssh.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        // ssh gets its own process group, so that Ctrl-C does not reach it: this process ends the node's part cleanly.
        let master =
            end_with_us(unblock_signals(ssh.process_group(0))).spawn().map_err(|e| missing(&attempted(), e))?;
        let commands = RefCell::default();
        let mut connection = Self { host: to.host.clone(), master, control, log, commands };
        connection.await_master(heed).map_err(|said| match changed_key(&said) {
            Some(why) => Error::new(attempted()).because(why).advise(
                "compare it with what 'ssh-keygen -lf' prints for the keys /etc/ssh/ssh_host_*.pub on the node: if it is \
                 the node's, replace the known one, else somebody is in its place",
            ),
            None => Error::new(attempted()).because(&said).advise(advice(&said, to)),
        })?;
        if to.key.is_some() {
            tell_host_keys(&to.host, &known_hosts);
        }
        Ok(connection)
    }

    /// Waits until the master process has logged in. Its socket appears at that time.
    fn await_master(&mut self, heed: Heed<'_>) -> std::result::Result<(), String> {
        let began = Instant::now();
        while !self.control.exists() {
            heed().map_err(|e| e.to_string())?;
            if let Ok(Some(status)) = self.master.try_wait() {
                let said = self.last_words();
                return Err(if said.is_empty() { status.to_string() } else { said });
            }
            if began.elapsed() > TIME_TO_CONNECT {
                return Err(format!("it took longer than {} s; {}", TIME_TO_CONNECT.as_secs(), self.last_words()));
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    /// Returns the output of the master process, on one line.
    pub(crate) fn last_words(&self) -> String {
        File::open(&self.log).map(said).unwrap_or_default()
    }

    /// Returns an `ssh` command that uses this connection. It reads no configuration, which might request additional
    /// forwardings. If the master process is gone, `ProxyCommand=false` keeps ssh from opening a new connection.
    fn ssh(&self) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-o", "BatchMode=yes", "-o", "ProxyCommand=false", "-S"])
            .arg(&self.control)
            .process_group(0);
        unblock_signals(&mut ssh);
        end_with_us(&mut ssh);
        ssh
    }

    /// Returns a command that runs `words` on the node. The words are quoted, so that the node's shell does not change
    /// them.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut ssh = self.ssh();
        ssh.args(["-T", "--", &self.host]).arg(shell_words::join(words));
        ssh
    }

    /// Starts a [`Connection::command`], and logs its standard error on this side.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        if let Some(stderr) = child.stderr.take() {
            let (host, (until, end)) = (self.host.clone(), mpsc::channel());
            std::thread::Builder::new().spawn(move || {
                log_all(&host, stderr);
                drop(until);
            })?;
            self.commands.borrow_mut().push(end);
        }
        Ok(child)
    }

    /// Makes the master process forward ports of this machine to the port `there` of the node's loopback address.
    /// `listen` has the ports, each with the address to listen on or `None` for all. Returns the address at which this
    /// process reaches the first of these ports.
    pub(crate) fn forward(&self, listen: &[(Option<IpAddr>, u16)], there: u16, heed: Heed<'_>) -> Result<SocketAddr> {
        listen.iter().try_for_each(|&here| self.forward_one(here, there, heed))?;
        let (address, port) = listen.first().copied().unwrap_or((None, 22));
        Ok(SocketAddr::new(address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), port))
    }

    fn forward_one(&self, (listen, port): (Option<IpAddr>, u16), there: u16, heed: Heed<'_>) -> Result<()> {
        let attempted = || format!("forward port {port} to the build node {}", self.host);
        let mut ssh = self.ssh();
        // Use `*` for all addresses of IPv4 and IPv6; for "[::]" ssh would listen on IPv6 only.
        let here = match listen {
            None => format!("*:{port}"),
            Some(address) => SocketAddr::new(address, port).to_string(),
        };
        ssh.args(["-O", "forward", "-L", &format!("{here}:127.0.0.1:{there}"), "--", &self.host]);
        let child = ssh.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().attempt(attempted)?;
        let output = finish(child, TIME_TO_ANSWER, heed).map_err(|e| Error::new(attempted()).because(e))?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::new(attempted())
            .because(said(&output.stderr[..]))
            .advise("see whether something else listens there"))
    }

    /// Waits for sshd's greeting at `address`. An open port is not enough: if the node's sshd forbids forwarding, ssh
    /// still opens the port, and closes each connection to it.
    pub(crate) fn await_greeting(&self, address: SocketAddr, heed: Heed<'_>) -> Result<()> {
        let attempted = || format!("reach the environment on {} through the connection", self.host);
        if greets(address, heed).map_err(|e| Error::new(attempted()).because(e.reason()))? {
            return Ok(());
        }
        let said = self.last_words();
        let why = if said.is_empty() { "it does not greet".into() } else { said };
        Err(Error::new(attempted())
            .because(why)
            .advise("AllowTcpForwarding of the node's sshd has to be 'yes' or 'local'"))
    }

    /// Returns the name of the node, as the user or IMS gave it.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }
}

/// Returns whether an sshd sends its greeting at `address`, which is an address of this machine.
pub(crate) fn greets(address: SocketAddr, heed: Heed<'_>) -> Result<bool> {
    let attempted = || format!("reach {address}");
    let mut stream = TcpStream::connect_timeout(&address, TIME_TO_ANSWER).attempt(attempted)?;
    stream.set_read_timeout(Some(TICK)).attempt(attempted)?;
    let began = Instant::now();
    let mut greeting = Vec::new();
    let mut bytes = [0; 4];
    while greeting.len() < bytes.len() {
        heed()?;
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(length) => greeting.extend(&bytes[..length]),
            Err(e) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&e.kind()) => {}
            Err(e) => return Err(e).attempt(attempted),
        }
        if began.elapsed() > TIME_TO_ANSWER {
            return Err(Error::new(attempted()).because(format!("no greeting within {} s", TIME_TO_ANSWER.as_secs())));
        }
    }
    Ok(greeting.starts_with(b"SSH-"))
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.master.kill();
        let _ = self.master.wait();
        let _ = std::fs::remove_file(&self.control);
        // Wait for the last lines, which may say why a job has failed. The pipes end now, since the master process held
        // their other ends.
        let limit = Instant::now() + TIME_TO_LOG;
        for end in self.commands.take() {
            let _ = end.recv_timeout(limit.saturating_duration_since(Instant::now()));
        }
    }
}

/// Name of the copy of the key.
const KEY: &str = "id";

/// Copies the key, since ssh refuses a key that others can read. Also copies the file `known_hosts` next to the key.
/// Returns whether that file exists.
fn copy_keys(key: &Path, directory: &Tree) -> Result<bool> {
    let copy = |from: &Path, name: &str| {
        let text = std::fs::read(from).attempt(|| format!("read {}", from.display()))?;
        directory.replace(name, &text).attempt(|| format!("copy {}", from.display()))?;
        let path = directory.path().join(name);
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .attempt(|| format!("copy {}", from.display()))
    };
    copy(key, KEY)?;
    let known = key.with_file_name("known_hosts");
    if known.exists() {
        return copy(&known, "known_hosts").map(|()| true);
    }
    directory.remove("known_hosts").attempt(|| "remove an old known_hosts")?;
    Ok(false)
}

/// Reads output of ssh or of a node, and returns it on one line.
pub(super) fn said(from: impl Read) -> String {
    let mut text = Vec::new();
    let _ = from.take(LONGEST_SAID).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", ")
}

fn set(name: &str, value: &str) -> Vec<String> {
    vec!["-o".into(), format!("{name}={value}")]
}

fn missing(attempted: &str, why: io::Error) -> Error {
    let error = Error::new(attempted);
    if why.kind() == io::ErrorKind::NotFound {
        return error.because("ssh is not installed").advise("install the package openssh-client (openssh on SUSE)");
    }
    error.because(why)
}

/// Logs the host keys that ssh has accepted, with their fingerprints in the format of ssh-keygen.
fn tell_host_keys(host: &str, known_hosts: &Path) {
    for line in std::fs::read_to_string(known_hosts).unwrap_or_default().lines() {
        let mut words = line.split_whitespace().skip(1);
        let (Some(kind), Some(Ok(key))) = (words.next(), words.next().map(|key| STANDARD.decode(key))) else {
            continue;
        };
        let print = STANDARD_NO_PAD.encode(digest(&SHA256, &key));
        tracing::info!("the build node {host} has the host key {} SHA256:{print}", Printable(kind));
    }
}

/// Condenses ssh's warning that a host key has changed, which has a dozen lines, to one sentence. Returns `None` for
/// other output.
fn changed_key(said: &str) -> Option<String> {
    if !said.contains("REMOTE HOST IDENTIFICATION HAS CHANGED") {
        return None;
    }
    let words = || said.split_whitespace();
    let shown = words().find(|word| word.starts_with("SHA256:"))?.trim_end_matches(['.', ',']);
    let place = words().skip_while(|word| *word != "Offending").nth(4).unwrap_or("known_hosts");
    // If ssh names the job's copy of `known_hosts`, name the original file, which is next to the key.
    let (file, line) = place.trim_end_matches([',', '.']).rsplit_once(':').unwrap_or((place, "?"));
    let file =
        if file.ends_with("/known_hosts") && file.starts_with("/run/") { "known_hosts beside the key" } else { file };
    Some(format!(
        "its host key has changed: the key that it shows now is {shown}, and line {line} of {file} has another one"
    ))
}

/// Advice for the reader of ssh's last words.
fn advice(said: &str, to: &Destination) -> String {
    let host = to.host.split_once('@').map_or(&*to.host, |(_, host)| host);
    if said.contains("Could not resolve hostname") {
        return "name a host that ssh knows: 'ssh -G HOST' shows what it makes of a name".into();
    }
    if said.contains("Host key verification failed") {
        let adding = match to.key {
            Some(_) => format!("add the line of 'ssh-keyscan {host}' to the file known_hosts beside the key"),
            None => format!("'ssh {}' by hand asks whether to add it to known_hosts", to.host),
        };
        return format!(
            "its host key is not known here: {adding}; compare it with what 'ssh-keygen -lf' prints for the keys \
             /etc/ssh/ssh_host_*.pub on the node"
        );
    }
    if said.contains("Permission denied") {
        return "see that the key is in authorized_keys of that user on the node".into();
    }
    "see that the node is up and can be reached".into()
}

/// Waits for `child` and returns its output. Kills it and fails after `limit`, or as soon as `heed` fails.
pub(crate) fn finish(mut child: Child, limit: Duration, heed: Heed<'_>) -> Result<Output> {
    let began = Instant::now();
    let wait = || {
        // This is `None` if the child has already ended.
        let process = Identity::of(Pid::from_raw(child.id().cast_signed())).and_then(|id| Handle::open(id).ok());
        while let Some(process) = &process
            && !process.ends_within(TICK)
        {
            heed()?;
            if began.elapsed() > limit {
                return Err(Error::new("wait any longer").because(format!("it took longer than {} s", limit.as_secs())));
            }
        }
        Ok(())
    };
    if let Err(error) = wait() {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    child.wait_with_output().attempt(|| "read the output of ssh")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warning_of_ssh_about_a_changed_host_key_becomes_one_sentence() {
        let banner = "@@@@@@@@@@, @    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @, @@@@@@@@@@, IT IS POSSIBLE \
            THAT SOMEONE IS DOING SOMETHING NASTY!, The fingerprint for the ECDSA key sent by the remote host is, \
            SHA256:0X8jcPQ2ZbLy., Please contact your system administrator., Add correct host key in \
            /run/ims-sshd/mnt-image/known_hosts to get rid of this message., Offending ECDSA key in \
            /run/ims-sshd/mnt-image/known_hosts:3, Host key for 198.51.100.2 has changed and you have requested strict \
            checking., Host key verification failed.";
        let wanted = "its host key has changed: the key that it shows now is SHA256:0X8jcPQ2ZbLy, and line 3 of known_hosts \
                      beside the key has another one";
        assert_eq!(changed_key(banner).as_deref(), Some(wanted));
        assert_eq!(changed_key("Host key verification failed."), None);
    }

    #[test]
    fn advice_fits_what_ssh_says() {
        let to = |key: Option<&str>| Destination { host: "root@n1".into(), key: key.map(PathBuf::from) };
        let unknown = "No ED25519 host key is known for n1 and you have requested strict checking., Host key \
                       verification failed.";
        for (said, key, wanted) in [
            ("ssh: Could not resolve hostname n1: Name or service not known", None, "'ssh -G HOST'"),
            (unknown, None, "'ssh root@n1' by hand asks whether to add it to known_hosts"),
            (unknown, Some("/etc/keys/id"), "'ssh-keyscan n1' to the file known_hosts beside the key"),
            ("root@n1: Permission denied (publickey).", None, "authorized_keys"),
            ("ssh: connect to host n1 port 22: Connection timed out", None, "the node is up"),
        ] {
            assert!(advice(said, &to(key)).contains(wanted), "{said}");
        }
    }

    #[test]
    fn wait_for_a_greeting_heeds_what_else_has_to_be_done() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let asked = std::cell::Cell::new(0);
        let heed = || {
            asked.set(asked.get() + 1);
            if asked.get() < 10 { Ok(()) } else { Err(Error::new("go on")) }
        };
        assert!(greets(address, &heed).is_err());
        assert_eq!(asked.get(), 10);
    }

    #[test]
    fn brackets_around_an_ipv6_address_are_left_out() {
        for (named, expected) in [("root@[::1]", "root@::1"), ("[fe80::1]", "fe80::1"), ("admin@n1", "admin@n1")] {
            assert_eq!(Destination::named(named).unwrap().host, expected);
        }
        for wrong in ["n1]", "[n1", "[]", "a[b]c"] {
            assert!(Destination::named(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn host_is_a_name_or_an_address_and_never_an_option() {
        for host in ["x3000c0s17b1n0", "nid001.local", "root@192.0.2.2", "me@fd00::1", "a_b"] {
            assert!(is_host(host), "{host}");
        }
        for wrong in
            ["", "-oProxyCommand=x", "root@-x", "-x@host", "a b", "a;b", "@host", "root@", "a\n", "$(id)", "a/b"]
        {
            assert!(!is_host(wrong), "{wrong}");
        }
    }
}

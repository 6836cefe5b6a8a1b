//! Remote build nodes: each is a set of namespaces with a root, a /tmp, a network and an sshd of its own. A further
//! network, in which the pod's programs run, connects them.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, OnceLock, Weak};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{Ended, Image, directory, ssh_options, succeed, wait_until};

/// A network with nodes.
pub struct Lab {
    holder: Ended,
    pub dir: TempDir,
    /// The key that logs in as root on each node, with the mode of the one that IMS mounts.
    pub key: PathBuf,
    pub nodes: Vec<Node>,
}

/// IP address of the pod for the first node.
pub const POD: &str = "198.51.100.1";

/// A node.
pub struct Node {
    holder: Ended,
    number: usize,
    /// The node's changes to the root directory, which it shares with other nodes, or with this machine.
    upper: PathBuf,
    /// PID of the node's first process, which is its sshd.
    pub pid: i32,
    /// IP address of the node.
    pub address: String,
}

/// Makes a node's root and becomes its sshd. Arguments: a directory, the root directory to put below the overlay, the
/// public key, mount options of the node's /tmp, lines for its sshd's configuration, a directory of host keys.
const BOOT: &str = r#"
cd "$1"
mkdir upper work root
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay root
cd root
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
umount -R -l dev/shm
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=0755 tmpfs run
mount -t tmpfs -o "mode=1777,$4" tmpfs tmp
mkdir -p run/sshd root/.ssh .old
cp "$3" root/.ssh/authorized_keys
chmod 700 root/.ssh
cp "$6"/ssh_host_* etc/ssh
printf 'nameserver 192.0.2.53\n' >etc/resolv.conf
printf 'PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\nMaxStartups 100\n%s\n' "$5" >etc/ssh/sshd_config
ip link set lo up
pivot_root . .old
umount -l /.old
rmdir /.old
echo up
exec /usr/sbin/sshd -D -E /run/sshd.log -f /etc/ssh/sshd_config
"#;

/// Starts a program in namespaces, and waits for its first line.
fn hold(command: &mut Command) -> Ended {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n", "{command:?}");
    Ended::killed(child)
}

/// Writes host keys into a directory; all nodes of a run have the same.
fn put_host_keys(place: &Path) {
    static KEYS: OnceLock<Vec<(OsString, Vec<u8>)>> = OnceLock::new();
    let made = KEYS.get_or_init(|| {
        let dir = directory();
        std::fs::create_dir_all(dir.path().join("etc/ssh")).unwrap();
        succeed(Command::new("ssh-keygen").arg("-A").arg("-f").arg(dir.path()));
        let entries = std::fs::read_dir(dir.path().join("etc/ssh")).unwrap().flatten();
        entries.map(|entry| (entry.file_name(), std::fs::read(entry.path()).unwrap())).collect()
    });
    for (name, key) in made {
        std::fs::write(place.join(name), key).unwrap();
        succeed(Command::new("chmod").arg("600").arg(place.join(name)));
    }
}

/// Options of a node.
#[derive(Default, Clone, Copy)]
pub struct NodeOptions<'a> {
    /// Mount options of the node's /tmp.
    pub tmp: &'a str,
    /// Additional lines of the sshd's configuration.
    pub sshd: &'a str,
    /// True for a node that has everything of this machine, such as kiwi-ng and its package managers.
    pub can_build: bool,
}

impl Lab {
    /// A network with one node.
    pub fn new() -> Self {
        Self::with(&[NodeOptions::default()])
    }

    pub fn with(nodes: &[NodeOptions]) -> Self {
        let dir = directory();
        let key = dir.path().join("remote-keys/id_ecdsa");
        std::fs::create_dir(key.parent().unwrap()).unwrap();
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f"]).arg(&key));
        // Give the key the mode that a file of a ConfigMap has.
        succeed(Command::new("chmod").arg("644").arg(&key));
        let holder = hold(Command::new("unshare").args([
            "--net",
            "--kill-child",
            "sh",
            "-ec",
            "ip link set lo up; echo up; exec sleep infinity",
        ]));
        let mut lab = Self { holder, dir, key, nodes: Vec::new() };
        for (number, options) in nodes.iter().enumerate() {
            lab.add(number, *options);
        }
        lab
    }

    /// The network, with one node, that this thread and its children are in from now on. Environments that are open at
    /// the same time share it.
    pub fn around_this_thread() -> Arc<Self> {
        thread_local! {
            static LAB: RefCell<Weak<Lab>> = RefCell::default();
        }
        LAB.with_borrow_mut(|around| {
            around.upgrade().unwrap_or_else(|| {
                let lab = Arc::new(Self::new());
                let network = std::fs::File::open(format!("/proc/{}/ns/net", lab.holder.id())).unwrap();
                setns(network, CloneFlags::CLONE_NEWNET).unwrap();
                *around = Arc::downgrade(&lab);
                lab
            })
        })
    }

    fn add(&mut self, number: usize, options: NodeOptions) {
        let place = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let keys = place.join("keys");
        std::fs::create_dir(&keys).unwrap();
        put_host_keys(&keys);
        let public = self.key.with_extension("pub");
        let tmp = if options.tmp.is_empty() { "size=4G" } else { options.tmp };
        let root = if options.can_build { PathBuf::from("/") } else { Image::Managed.root() };
        let namespaces = "--net --mount --pid --fork --kill-child --uts --ipc --propagation private";
        let mut command = Command::new("unshare");
        command.args(namespaces.split(' ')).args(["sh", "-ec", BOOT, "sh"]).arg(&place).arg(root);
        let holder = hold(command.arg(public).arg(tmp).arg(options.sshd).arg(keys));
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let pid: i32 = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
        let (interface, [here, there]) =
            (format!("v{number}"), [1, 2].map(|end| format!("198.51.100.{}", 4 * number + end)));
        let node = Node { holder, number, upper: place.join("upper"), pid, address: there.clone() };
        let (ours, theirs) = (self.network(), node.network());
        let ip = |network: &str, words: &str| {
            succeed(Command::new("nsenter").arg(network).arg("ip").args(words.split(' ')));
        };
        ip(&ours, &format!("link add {interface} type veth peer name {interface} netns {pid}"));
        for (network, address) in [(&ours, here), (&theirs, there)] {
            ip(network, &format!("addr add {address}/30 dev {interface}"));
            ip(network, &format!("link set {interface} up"));
        }
        self.nodes.push(node);
        let node = self.nodes.last().unwrap();
        wait_until("sshd of the node", || self.ssh(node, "true").status.success());
    }

    /// Ends a node as a power cut does, and boots it again.
    pub fn reboot(&mut self, number: usize) {
        drop(self.nodes.remove(number));
        let interface = format!("v{number}");
        let gone = || !succeed(Command::new("nsenter").arg(self.network()).args(["ip", "link"])).contains(&interface);
        wait_until("the node's interface to go", gone);
        self.add(number, NodeOptions::default());
    }

    fn network(&self) -> String {
        format!("--net=/proc/{}/ns/net", self.holder.id())
    }

    /// Makes a server of this machine's network, which listens on the loopback address, answer in the pod's network too.
    pub fn lend(&self, server: SocketAddr) {
        let network = File::open(format!("/proc/{}/ns/net", self.holder.id())).unwrap();
        // A socket stays in the network of the thread that made it.
        let made = std::thread::spawn(move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            TcpListener::bind(server).unwrap()
        });
        let listener = made.join().unwrap();
        let copy = |mut from: TcpStream, mut to: TcpStream| {
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        };
        std::thread::spawn(move || {
            for there in listener.incoming().map_while(Result::ok) {
                let Ok(here) = TcpStream::connect(server) else { continue };
                copy(there.try_clone().unwrap(), here.try_clone().unwrap());
                copy(here, there);
            }
        });
    }

    /// Starts a command line for a program in the pod's network.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(self.network()).arg(program);
        command
    }

    /// The command `given`, in the pod's network.
    pub fn moved(&self, given: &Command) -> Command {
        let mut command = self.command(given.get_program().to_str().unwrap());
        command.args(given.get_args()).env_clear();
        command.envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command
    }

    /// Runs a command line on a node over SSH.
    pub fn ssh(&self, node: &Node, command: &str) -> Output {
        let own = self.dir.path().join("own-key");
        if !own.exists() {
            std::fs::copy(&self.key, &own).unwrap();
            succeed(Command::new("chmod").arg("600").arg(&own));
        }
        let mut ssh = self.command("ssh");
        ssh.args(ssh_options(&own)).arg(format!("root@{}", node.address)).arg(command).output().unwrap()
    }

    /// Drops every packet between the pod and a node, in both directions, without either being notified.
    pub fn cut(&self, node: &Node) {
        self.neighbours(node, "replace", " lladdr 02:00:00:00:00:99 nud permanent");
    }

    /// Undoes [`Lab::cut`].
    pub fn mend(&self, node: &Node) {
        self.neighbours(node, "del", "");
    }

    fn neighbours(&self, node: &Node, what: &str, further: &str) {
        let ends = [1, 2].map(|end| format!("198.51.100.{}", 4 * node.number + end));
        for (network, other) in [(self.network(), &ends[1]), (node.network(), &ends[0])] {
            let words = format!("neigh {what} {other} dev v{}{further}", node.number);
            succeed(Command::new("nsenter").arg(network).arg("ip").args(words.split(' ')));
        }
    }
}

/// Everything that a job may leave on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub processes: Vec<String>,
    pub mounts: Vec<String>,
    pub loops: usize,
    pub listening: BTreeSet<String>,
    pub files: BTreeSet<PathBuf>,
}

impl Node {
    fn network(&self) -> String {
        format!("--net=/proc/{}/ns/net", self.pid)
    }

    /// Path of a file on the node, as seen from this process.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// Names of the jobs' directories on the node, which IMS counts.
    pub fn jobs(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.path("/tmp")).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with("ims_")).collect()
    }

    /// Processes of the node: PID in the node's namespace, and command line.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let all = std::fs::read_dir(self.path("/proc")).unwrap().flatten();
        let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        numbers
            .filter_map(|number| {
                let line = std::fs::read(self.path(&format!("/proc/{number}/cmdline"))).ok()?;
                Some((number, String::from_utf8_lossy(&line).replace('\0', " ").trim().to_owned()))
            })
            .collect()
    }

    /// Path of the image root of an open job, as seen from this process.
    pub fn image_root(&self, job: &str) -> PathBuf {
        let identity = |path: &str| std::fs::metadata(self.path(path)).ok().map(|found| (found.dev(), found.ino()));
        let parent = identity(&format!("/tmp/ims_{job}/image"));
        // Processes of other jobs have another directory there, or none.
        let roots = self.processes().into_iter().map(|(number, _)| format!("/proc/{number}/root/mnt/image"));
        let root = roots.into_iter().find(|path| parent.is_some() && identity(path) == parent);
        self.path(&format!("{}/image-root", root.expect("a process of the job")))
    }

    /// Kills a process of the node, by its PID in the node's namespace.
    pub fn kill(&self, number: i32) {
        self.send(number, "KILL");
    }

    /// Sends a signal to a process of the node.
    pub fn send(&self, number: i32, signal: &str) {
        let mut kill = Command::new("nsenter");
        kill.args(["-t", &self.pid.to_string(), "--pid", "--mount", "kill", "-s", signal, &number.to_string()]);
        succeed(&mut kill);
    }

    /// State of the node. Leaves out processes of sshd's connections, which end only when their peer answers again.
    pub fn state(&self) -> State {
        let mut processes: Vec<_> = self.processes().into_iter().map(|(_, line)| line).collect();
        processes.retain(|line| {
            !line.is_empty() && !line.starts_with("sshd: root") && !line.starts_with("sshd: [accepted]")
        });
        processes.sort();
        let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", self.pid)).unwrap();
        let mounts = mounts.lines().map(|line| line.split(' ').skip(3).collect::<Vec<_>>().join(" ")).collect();
        // Loop devices belong to the whole machine; those of this node show files of its /tmp.
        let device = std::fs::metadata(self.path("/tmp")).unwrap().dev();
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let shown = succeed(Command::new("losetup").args(["--noheadings", "--list", "-O", "BACK-MAJ:MIN"]));
        let loops = shown.lines().filter(|line| line.trim() == device);
        let mut listening = BTreeSet::new();
        for table in ["tcp", "tcp6"] {
            let text = std::fs::read_to_string(format!("/proc/{}/net/{table}", self.pid)).unwrap();
            let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            listening.extend(words.filter(|words| words[3] == "0A").map(|words| words[1].to_owned()));
        }
        let mut files = BTreeSet::new();
        for top in ["/tmp", "/run"] {
            gather(&self.path(top), Path::new(top), &mut files);
        }
        for top in ["var/lib", "etc", "root", "mnt"] {
            gather(&self.upper.join(top), &Path::new("/").join(top), &mut files);
        }
        State { processes, mounts, loops: loops.count(), listening, files }
    }

    /// Waits until the node is in the state `before`. Programs that were copied to it may stay.
    pub fn is_as_before(&self, before: &State) {
        let is_program =
            |path: &PathBuf| path.starts_with("/var/lib/ims-sshd") && !path.to_string_lossy().contains(".new.");
        let same = || {
            let mut now = self.state();
            now.files.retain(|path| before.files.contains(path) || !is_program(path));
            (now != *before).then_some(now)
        };
        let mut last = None;
        let began = std::time::Instant::now();
        while began.elapsed() < crate::LIMIT {
            last = same();
            if last.is_none() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let now = last.unwrap();
        let files: Vec<_> = now.files.symmetric_difference(&before.files).collect();
        let shown = |state: &State| format!("{:#?}", State { files: BTreeSet::new(), ..state.clone() });
        panic!("the node is not as it was: {files:#?}\n{}\nbefore:\n{}", shown(&now), shown(before));
    }
}

fn gather(real: &Path, shown: &Path, files: &mut BTreeSet<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(real) else { return };
    for entry in entries.flatten() {
        let shown = shown.join(entry.file_name());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            gather(&entry.path(), &shown, files);
        }
        files.insert(shown);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // End the nodes before the directory is removed in which their overlays lie.
        self.nodes.clear();
    }
}

/// Sends a signal to a child.
pub fn signal(child: &Child, signal: Signal) {
    let _ = kill(Pid::from_raw(child.id().cast_signed()), signal);
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        wait_until("the node to end", || {
            // The benchmarks are the first process of a PID namespace, to which it falls now.
            let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
            !Path::new(&format!("/proc/{}", self.pid)).exists()
        });
    }
}

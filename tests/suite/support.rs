//! Build environments for tests: the real programs, a real sshd, real image roots, in folders and mounts of their own.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use ims_sshd::sys::mounts::mount_points;
use tempfile::TempDir;

pub const IMS_SSHD: &str = env!("CARGO_BIN_EXE_ims-sshd");
pub const IMS_JAIL_SHELL: &str = env!("CARGO_BIN_EXE_ims-jail-shell");

/// Nothing here takes longer unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Where `make test` keeps what is costly to make.
pub fn cache() -> PathBuf {
    let path = std::env::var_os("IMS_SSHD_CACHE")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/ims-sshd"), PathBuf::from);
    assert!(
        path.join("debian/etc/passwd").exists(),
        "no image roots in {}: run the tests with 'make test'",
        path.display()
    );
    path
}

/// Which image root an environment gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// Debian, as an overlay over the cached one: `upper` then holds just what was changed.
    Debian,
    /// A static busybox and a passwd file, copied.
    Busybox,
    /// Debian for aarch64, as an overlay too, as are the following.
    DebianArm64,
    /// An image of rpm packages.
    Rpm,
    /// Busybox and musl, in the manner of Alpine's.
    Musl,
    /// One static program.
    Distroless,
    /// Debian with what people use at a terminal and tools use over SSH.
    Node,
    /// Debian as Ansible manages it, as an overlay too.
    Managed,
}

impl Image {
    /// The name of its folder, and of its recipe in tests/image-roots.d.
    fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Busybox => "busybox",
            Self::DebianArm64 => "debian-arm64",
            Self::Rpm => "rpm",
            Self::Musl => "musl",
            Self::Distroless => "distroless",
            Self::Node => "node",
            Self::Managed => "managed",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Jailed,
    Plain,
}

pub const MODES: [Mode; 2] = [Mode::Jailed, Mode::Plain];

/// How strong a jail can be, best first.
pub const TIERS: [&str; 3] = ["namespace", "user", "chroot"];

/// Words before a command that start it where a file of /proc is masked.
pub const MASKING_PROC: [&str; 8] = [
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "sh",
    "-ec",
    "mount --bind /dev/null /proc/keys; exec \"$@\"",
    "sh",
];

/// A folder laid out as a pod's volume, before an environment opens on it. Its mounts are this thread's own and vanish with it.
pub struct Volume {
    pub dir: TempDir,
    pub parent: PathBuf,
    pub image_root: PathBuf,
    pub port: u16,
    pub config: PathBuf,
    pub key: PathBuf,
}

impl Volume {
    pub fn new(image: Image) -> Self {
        Self::laid_out(image, "image-root")
    }

    pub fn laid_out(image: Image, below: &str) -> Self {
        Self::in_folder(Self::folder(), image, below)
    }

    /// On no disk, for those who open many: each environment has what it changed written to its disk, with all that others did there.
    pub fn in_memory(image: Image) -> Self {
        let dir = Self::folder();
        succeed(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=0755", "tmpfs"]).arg(dir.path()));
        Self::in_folder(dir, image, "image-root")
    }

    fn folder() -> TempDir {
        own_mounts();
        // Not below /tmp: sshd refuses keys in a folder that everybody can write to.
        let base = cache().join("tests");
        std::fs::create_dir_all(&base).unwrap();
        tempfile::tempdir_in(base).unwrap()
    }

    fn in_folder(dir: TempDir, image: Image, below: &str) -> Self {
        let parent = dir.path().join("parent");
        let image_root = parent.join(below);
        std::fs::create_dir_all(&image_root).unwrap();
        let original = cache().join(image.name());
        match image {
            Image::Busybox => {
                succeed(Command::new("cp").arg("-aT").arg(original).arg(&image_root));
            }
            _ => {
                let (upper, work) = (dir.path().join("upper"), dir.path().join("work"));
                std::fs::create_dir(&upper).unwrap();
                std::fs::create_dir(&work).unwrap();
                let options =
                    format!("lowerdir={},upperdir={},workdir={}", original.display(), upper.display(), work.display());
                succeed(Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay"]).arg(&image_root));
            }
        }
        let key = client_key();
        let keys = dir.path().join("authorized_keys");
        std::fs::copy(key.with_extension("pub"), &keys).unwrap();
        let port = free_port();
        let config = dir.path().join("sshd_config");
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nPidFile none\nLogLevel INFO\nPermitRootLogin yes\nPubkeyAuthentication yes\n\
             AuthorizedKeysFile {}\nPasswordAuthentication no\nChallengeResponseAuthentication no\nMaxStartups 200\n\
             AcceptEnv LANG LC_*\nSubsystem sftp internal-sftp\n",
            keys.display()
        );
        std::fs::write(&config, text).unwrap();
        Self { dir, parent, image_root, port, config, key }
    }

    /// What an overlay over the cached image holds: the changes, as paths.
    pub fn changes(&self) -> Vec<PathBuf> {
        let upper = self.dir.path().join("upper");
        let mut found: Vec<_> = walk(&upper).into_iter().map(|p| p.strip_prefix(&upper).unwrap().to_owned()).collect();
        found.retain(|p| !p.as_os_str().is_empty());
        found
    }

    pub fn signal(&self, name: &str) -> PathBuf {
        self.parent.join(name)
    }

    pub fn touch(&self, name: &str) {
        std::fs::write(self.signal(name), "").unwrap();
    }

    pub fn sshd_log(&self) -> PathBuf {
        self.dir.path().join("sshd.log")
    }

    /// The variables that a pod gives a customize job.
    pub fn variables(&self, mode: Mode) -> Vec<(String, String)> {
        [
            ("IMS_ACTION", "customize".to_owned()),
            ("IMAGE_ROOT_PARENT", self.parent.display().to_string()),
            ("ENABLE_DEBUG", "False".to_owned()),
            ("SSHD_OPTIONS", format!("-E {} -f {}", self.sshd_log().display(), self.config.display())),
            ("SSHD_CONFIG_FILE", self.config.display().to_string()),
            ("IMS_JOB_ID", "5ec3b0a1-job".to_owned()),
            ("SSH_JAIL", if mode == Mode::Jailed { "True".to_owned() } else { "False".to_owned() }),
            ("JOB_ENABLE_DKMS", "False".to_owned()),
            ("BUILD_ARCH", "x86_64".to_owned()),
            ("REMOTE_BUILD_NODE", String::new()),
            ("IMS_CLOSE_GRACE", "5".to_owned()),
        ]
        .map(|(n, v)| (n.to_owned(), v))
        .into()
    }

    /// Starts the entrypoint; nothing listens before `ready`.
    pub fn start(self, mode: Mode) -> Environment {
        self.start_with(mode, &[])
    }

    /// The same with further variables; an empty one unsets.
    pub fn start_with(self, mode: Mode, further: &[(&str, &str)]) -> Environment {
        self.start_by(Path::new(IMS_SSHD), mode, further)
    }

    /// The same by another build of `ims-sshd`.
    pub fn start_by(self, ims_sshd: &Path, mode: Mode, further: &[(&str, &str)]) -> Environment {
        let mut command = Command::new(ims_sshd);
        self.equip(command.arg("entrypoint"), mode, further);
        let entrypoint = command.spawn().unwrap();
        Environment { entrypoint, volume: self, status: None }
    }

    /// The same in a container whose /proc is masked: the kernel then gives a user namespace no procfs of its own.
    pub fn start_where_proc_is_masked(self, mode: Mode, further: &[(&str, &str)]) -> Environment {
        let mut command = Command::new(MASKING_PROC[0]);
        command.args(&MASKING_PROC[1..]);
        self.equip(command.args([IMS_SSHD, "entrypoint"]), mode, further);
        Environment { entrypoint: command.spawn().unwrap(), volume: self, status: None }
    }

    pub fn log(&self) -> PathBuf {
        self.dir.path().join("entrypoint.log")
    }

    pub fn entrypoint(&self, mode: Mode, further: &[(&str, &str)]) -> Command {
        let mut command = Command::new(IMS_SSHD);
        self.equip(command.arg("entrypoint"), mode, further);
        command
    }

    /// Starts the entrypoint in a container of its own, made of the same image: what a plain session changes is that container's, and
    /// nothing but the jail tells it from a jailed one.
    pub fn start_in_container(self, mode: Mode, further: &[(&str, &str)]) -> Environment {
        const CONTAINER: &str = "mkdir -p \"$1/container\" \"$1/container.work\"\n\
            mount -t overlay -o \"lowerdir=$2,upperdir=$1/container,workdir=$1/container.work\" overlay /mnt\n\
            for place in /dev /proc /sys \"$1\" \"$3\"; do mkdir -p \"/mnt$place\"; mount --rbind \"$place\" \"/mnt$place\"; done\n\
            cp /etc/resolv.conf /mnt/etc; cp /etc/ssh/ssh_host_* /mnt/etc/ssh || true\n\
            mkdir /mnt/.outside && cd /mnt && pivot_root . .outside && umount -l /.outside && rmdir /.outside\n\
            shift 3; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", CONTAINER, "sh"]).arg(self.dir.path());
        command.arg(cache().join(Image::Managed.name())).arg(Path::new(IMS_SSHD).parent().unwrap());
        self.equip(command.args([IMS_SSHD, "entrypoint"]), mode, further);
        let entrypoint = command.spawn().unwrap();
        Environment { entrypoint, volume: self, status: None }
    }

    /// The image root opened by sshd alone, with its `ChrootDirectory`.
    pub fn chroot_directory(self) -> Environment {
        let file = self.dir.path().join("pid");
        let chroot = format!("ChrootDirectory {}\nPidFile {}\n", self.image_root.display(), file.display());
        let config = std::fs::read_to_string(&self.config).unwrap().replace("PidFile none\n", &chroot);
        let keys = self.dir.path().join("host_key");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&keys));
        std::fs::write(&self.config, format!("HostKey {}\n{config}", keys.display())).unwrap();
        std::fs::create_dir_all("/run/sshd").unwrap();
        let mut sshd = Command::new(ims_sshd::sshd::program().unwrap());
        sshd.arg("-D").arg("-E").arg(self.sshd_log()).arg("-f").arg(&self.config);
        let environment = Environment { entrypoint: sshd.spawn().unwrap(), volume: self, status: None };
        wait_until("sshd to listen", || file.exists());
        environment
    }

    fn equip(&self, command: &mut Command, mode: Mode, further: &[(&str, &str)]) {
        let log = std::fs::File::options().create(true).append(true).open(self.log()).unwrap();
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.envs(self.variables(mode)).envs(further.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // A folder with a mount on it cannot be removed, and would stay behind.
        for place in [self.image_root.as_path(), &self.parent, self.dir.path()] {
            let _ = Command::new("umount").arg("--lazy").arg(place).stderr(Stdio::null()).status();
        }
    }
}

/// An environment that was started.
pub struct Environment {
    pub entrypoint: Child,
    pub volume: Volume,
    pub status: Option<ExitStatus>,
}

impl std::ops::Deref for Environment {
    type Target = Volume;
    fn deref(&self) -> &Volume {
        &self.volume
    }
}

impl Environment {
    /// A ready environment in which one can log in.
    pub fn open(image: Image, mode: Mode) -> Self {
        Volume::new(image).start(mode).ready()
    }

    /// Says `ready` and waits until sshd listens.
    pub fn ready(self) -> Self {
        self.touch("ready");
        self.wait_for("sshd_listening");
        self
    }

    /// Waits for a signal file.
    pub fn wait_for(&self, name: &str) {
        let path = self.signal(name);
        wait_until(&format!("'{name}' to appear; the log:\n{}", self.log_text()), || path.exists());
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.volume.log()).unwrap_or_default()
    }

    /// The end of the entrypoint, as its exit code.
    pub fn end(&mut self) -> i32 {
        let began = Instant::now();
        while self.status.is_none() {
            self.status = self.entrypoint.try_wait().unwrap();
            assert!(began.elapsed() < LIMIT, "the entrypoint does not end; its log:\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = self.status.unwrap();
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }

    /// Marks the image from outside and waits for the end.
    pub fn complete(&mut self) -> i32 {
        self.touch("complete");
        self.end()
    }

    pub fn ssh_options(&self) -> Vec<String> {
        let mut options = ssh_options(&self.key);
        // The default one takes longer than all the rest of a session.
        options.extend(["-o", "KexAlgorithms=curve25519-sha256"].map(Into::into));
        options
    }

    /// `ssh` with further options; the command is to be added after the host, which is the last argument here.
    pub fn ssh(&self, options: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.ssh_options()).args(options).args(["-p", &self.port.to_string(), "root@127.0.0.1"]);
        command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
        command
    }

    /// The output of a command line over ssh.
    pub fn run(&self, command: &str) -> Output {
        self.ssh(&[]).arg(command).output().unwrap()
    }

    /// Standard output of a command line that has to succeed.
    pub fn says(&self, command: &str) -> String {
        let output = self.run(command);
        assert!(output.status.success(), "{command}: {output:?}\nlog:\n{}", self.log_text());
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// A batch of sftp commands, with its output.
    pub fn sftp(&self, batch: &str) -> Output {
        feed(&mut self.sftp_client(&[]), batch.as_bytes())
    }

    /// `sftp` with further options, reading its commands from standard input.
    pub fn sftp_client(&self, options: &[&str]) -> Command {
        let mut command = Command::new("sftp");
        command.args(self.ssh_options()).args(options);
        command.args(["-b", "-", "-P", &self.port.to_string(), "root@127.0.0.1"]);
        command
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        if self.status.is_none() {
            let pid = nix::unistd::Pid::from_raw(self.entrypoint.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = self.entrypoint.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the end of the entrypoint's log\n{}", last_lines(&self.log_text()));
            let sshd = std::fs::read_to_string(self.sshd_log()).unwrap_or_default();
            eprintln!("--- the end of sshd's log\n{}", last_lines(&sshd));
        }
    }
}

/// So few that what a test itself says above them is still seen where the end of its output is shown.
fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// For a client that knows nobody.
pub fn ssh_options(key: &Path) -> Vec<String> {
    let mut options: Vec<String> = vec!["-F".into(), "none".into(), "-i".into(), key.display().to_string()];
    for option in [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "BatchMode=yes",
        "ConnectTimeout=10",
    ] {
        options.extend(["-o".to_owned(), option.to_owned()]);
    }
    options
}

/// Runs `command` with `input`.
pub fn feed(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// Waits for something that no event tells of in this process.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "waited {} s in vain for {what}", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A port that nobody is given for the next minute, but who asks for it: the kernel remembers a connection to it that has just ended.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).unwrap();
    // The side that closes first is the one that is remembered.
    drop(listener.accept().unwrap());
    drop(client);
    address.port()
}

/// Gives apt in the image what this machine's apt needs to reach its mirrors, such as a proxy.
pub fn share_apts_settings(environment: &Environment) {
    let settings = succeed(Command::new("apt-config").arg("dump"));
    let of_mirrors = |line: &&str| line.starts_with("Acquire::http") || line.starts_with("Acquire::Check-");
    let mut kept: String = settings.lines().filter(of_mirrors).flat_map(|line| [line, "\n"]).collect();
    // Half of what an update fetches, and nothing that is read here.
    kept += "Acquire::Languages \"none\";\n";
    std::fs::write(environment.image_root.join("etc/apt/apt.conf.d/99mirrors"), kept).unwrap();
}

/// All paths below `folder`, itself included, in order.
pub fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// All that one can see of a tree, but for times of access and of change of the inode, which nobody can put back: of each path a
/// description, and the content.
pub type Digest = BTreeMap<PathBuf, (String, Vec<u8>)>;

pub fn digest(root: &Path) -> Digest {
    let mut read = HashSet::new();
    let mut describe = |path: &Path| {
        let m = std::fs::symlink_metadata(path).unwrap();
        let content = match m.file_type() {
            t if t.is_symlink() => std::fs::read_link(path).unwrap().into_os_string().into_encoded_bytes(),
            // Of a file with many names, once.
            t if t.is_file() && read.insert(m.ino()) => std::fs::read(path).unwrap(),
            _ => Vec::new(),
        };
        let size = if m.is_dir() { 0 } else { m.size() };
        let owner = format!("{}:{}", m.uid(), m.gid());
        let times = format!("{}.{}", m.mtime(), m.mtime_nsec());
        (format!("{} {:o} {owner} {} {:x} {size} {times}", m.ino(), m.mode(), m.nlink(), m.rdev()), content)
    };
    walk(root).into_iter().map(|path| (path.strip_prefix(root).unwrap().to_owned(), describe(&path))).collect()
}

/// In what two digests differ, for a person.
pub fn differences(before: &Digest, after: &Digest) -> Vec<String> {
    let describe = |seen: Option<&(String, Vec<u8>)>| seen.map_or("nothing".to_owned(), |(text, _)| text.clone());
    let paths: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    paths
        .into_iter()
        .filter(|path| before.get(*path) != after.get(*path))
        .map(|path| format!("/{}: {} -> {}", path.display(), describe(before.get(path)), describe(after.get(path))))
        .collect()
}

/// What this thread, and what it starts, sees mounted that was not there `before`, as numbers and places. What vanishes is no matter:
/// mounts go with the folder that they are on, whoever removes that, as they go along where it is moved.
pub fn new_mounts(before: &[(u32, PathBuf)]) -> Vec<(u32, PathBuf)> {
    let mountinfo = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let numbers = mountinfo.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap());
    let mut now: Vec<(u32, PathBuf)> = numbers.zip(mount_points(mountinfo.as_bytes())).collect();
    now.retain(|(number, _)| !before.iter().any(|(known, _)| known == number));
    now
}

/// Runs each case in a thread of its own, whose mounts are the case's, a few at a time. Returns the names of those that failed.
pub fn run_each<T: Sync>(
    cases: &[T],
    at_once: usize,
    name: impl Fn(&T) -> String + Sync,
    run: impl Fn(&T) + Sync,
) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    std::thread::scope(|scope| {
                        let builder = std::thread::Builder::new().name(name(case));
                        if builder.spawn_scoped(scope, || run(case)).unwrap().join().is_err() {
                            failed.lock().unwrap().push(name(case));
                        }
                    });
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

/// Mounts made from here on belong to this test's thread and to what it starts; they are gone with it.
fn own_mounts() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("the tests need root");
    succeed(Command::new("mount").args(["--make-rprivate", "/"]));
    // A container's root has no profile of a person who works on this machine, which every session would run, and wait for.
    if Path::new("/root/.bashrc").exists() {
        succeed(Command::new("mount").args(["--bind", "/dev/null", "/root/.bashrc"]));
    }
}

/// Gives root of this machine, as this thread and what it starts see it, another home and shell.
pub fn replace_root(volume: &Volume, home: &Path, shell: &str) {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let root = passwd.lines().find(|line| line.starts_with("root:")).unwrap();
    let mut fields: Vec<_> = root.split(':').collect();
    let home = home.display().to_string();
    (fields[5], fields[6]) = (&home, shell);
    let file = volume.dir.path().join("passwd");
    std::fs::write(&file, passwd.replacen(root, &fields.join(":"), 1)).unwrap();
    succeed(Command::new("mount").arg("--bind").arg(&file).arg("/etc/passwd"));
}

/// One key pair for all tests of a run.
fn client_key() -> PathBuf {
    static KEY: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, key) = KEY.get_or_init(|| {
        let base = cache().join("tests");
        std::fs::create_dir_all(&base).unwrap();
        let dir = tempfile::tempdir_in(base).unwrap();
        let key = dir.path().join("id_ed25519");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        (dir, key)
    });
    key.clone()
}

/// Numbers of processes whose command line holds `text`.
pub fn processes_with(text: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).replace('\0', " ").contains(text) {
            found.push(pid);
        }
    }
    found
}

pub fn text(bytes: impl AsRef<[u8]>) -> String {
    String::from_utf8_lossy(bytes.as_ref()).into_owned()
}

/// A connection that stays open, on which sessions cost little.
pub struct Master<'a> {
    environment: &'a Environment,
    socket: TempDir,
    agent: Option<PathBuf>,
}

impl Environment {
    pub fn master(&self) -> Master<'_> {
        self.master_with(None)
    }

    /// The same, with this agent in each of its sessions.
    pub fn master_with(&self, agent: Option<&Path>) -> Master<'_> {
        let master =
            Master { environment: self, socket: tempfile::tempdir().unwrap(), agent: agent.map(Path::to_owned) };
        let mut ssh = master.ssh_with(&["-M", "-o", "ControlPersist=60", "-f", "-N"]);
        succeed(ssh.stdout(Stdio::null()));
        master
    }

    /// The jail's first process.
    pub fn jails_init(&self) -> nix::unistd::Pid {
        let record = ims_sshd::jail::record::Record::read(&self.state_folder().join("jail")).unwrap();
        nix::unistd::Pid::from_raw(record.init.pid)
    }

    /// Where the environment has its own files.
    pub fn state_folder(&self) -> PathBuf {
        ims_sshd::volume::state_directory::StateFolder::place(&self.parent)
    }
}

impl Master<'_> {
    fn control(&self) -> String {
        self.socket.path().join("s").display().to_string()
    }

    /// `ssh` over the open connection; the command is to be added.
    pub fn ssh(&self) -> Command {
        self.ssh_with(&[])
    }

    /// The same with further options.
    pub fn ssh_with(&self, options: &[&str]) -> Command {
        let control = self.control();
        let agent = if self.agent.is_some() { "-A" } else { "-a" };
        let mut ssh = self.environment.ssh(&[&["-S", &control, agent], options].concat());
        ssh.envs(self.agent.iter().map(|socket| ("SSH_AUTH_SOCK", socket)));
        ssh
    }

    /// `sftp` over it, reading its commands from standard input.
    pub fn sftp(&self) -> Command {
        self.sftp_with(&[])
    }

    /// The same with further options.
    pub fn sftp_with(&self, options: &[&str]) -> Command {
        let control = format!("ControlPath={}", self.control());
        self.environment.sftp_client(&[&["-o", &control], options].concat())
    }

    /// `scp` over it; what is to be copied is to be added.
    pub fn scp(&self) -> Command {
        let mut command = Command::new("scp");
        command.args(self.environment.ssh_options()).args(["-o", &format!("ControlPath={}", self.control())]);
        command.args(["-P", &self.environment.port.to_string()]);
        command
    }
}

impl Drop for Master<'_> {
    fn drop(&mut self) {
        let _ = self.environment.ssh(&["-S", &self.control(), "-O", "exit"]).output();
    }
}

/// A program that ends with its test, however that ends.
pub struct Ended(pub Child);

impl std::ops::Deref for Ended {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for Ended {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = self.0.wait();
        }
    }
}

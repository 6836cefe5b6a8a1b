//! A pod's volume, and the ways to start an environment on it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use crate::node::Lab;
use crate::{
    Environment, IMS_SSHD, IMS_SSHD_TO_SEND, Image, cache, directory, free_port, mount, succeed, unmount, wait_until,
    wait_within, walk,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Jailed,
    Plain,
}

pub const MODES: [Mode; 2] = [Mode::Jailed, Mode::Plain];

/// Tiers of a jail, best first.
pub const TIERS: [&str; 3] = ["namespace", "user", "chroot"];

/// Tiers whose jails have namespaces, and thus mounts and processes of their own.
pub const NAMESPACE_TIERS: [&str; 2] = [TIERS[0], TIERS[1]];

/// Prefix of a command that runs the rest with a file of /proc masked.
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

/// The squashfs of an image, compressed as quickly as possible: all of it is sent to a node.
fn packed(image: Image) -> Arc<File> {
    static PACKED: Mutex<Vec<(Image, Arc<File>)>> = Mutex::new(Vec::new());
    let mut packed = PACKED.lock().unwrap();
    if let Some((_, file)) = packed.iter().find(|(of, _)| *of == image) {
        return file.clone();
    }
    let dir = directory();
    let squashfs = dir.path().join("packed.sqsh");
    let quickly = ["-comp", "gzip", "-Xcompression-level", "1", "-quiet", "-no-progress"];
    succeed(Command::new("mksquashfs").arg(image.root()).arg(&squashfs).args(quickly));
    // A static's directory would not be removed, so keep the file without its name.
    let file = Arc::new(File::open(squashfs).unwrap());
    packed.push((image, file.clone()));
    file
}

/// ID of the IMS job.
const JOB: &str = "5ec3b0a1-job";

/// A directory laid out as a pod's volume, before an environment opens on it. Mounts on it belong to this thread and
/// vanish with it.
pub struct Volume {
    pub dir: TempDir,
    pub parent: PathBuf,
    pub image_root: PathBuf,
    pub port: u16,
    pub config: PathBuf,
    pub key: PathBuf,
    image: Image,
    /// The network around a job on a build node.
    pub(crate) lab: Option<Arc<Lab>>,
}

impl Volume {
    pub fn new(image: Image) -> Self {
        Self::laid_out(image, "image-root")
    }

    pub fn laid_out(image: Image, below: &str) -> Self {
        own_mounts();
        Self::within(directory(), image, below)
    }

    /// A volume in memory, for tests that open many environments. Closing each one syncs the file system, which on a
    /// shared disk includes everything that other tests wrote.
    pub fn in_memory(image: Image) -> Self {
        own_mounts();
        let dir = directory();
        mount(&["-t", "tmpfs", "-o", "mode=0755", "tmpfs"], dir.path());
        Self::within(dir, image, "image-root")
    }

    fn within(dir: TempDir, image: Image, below: &str) -> Self {
        let parent = dir.path().join("parent");
        let image_root = parent.join(below);
        std::fs::create_dir_all(&image_root).unwrap();
        let original = image.root();
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
                mount(&["-t", "overlay", "-o", &options, "overlay"], &image_root);
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
        Self { dir, parent, image_root, port, config, key, image, lab: None }
    }

    /// Paths changed in the overlay over the cached image.
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
            ("IMS_JOB_ID", JOB.to_owned()),
            ("SSH_JAIL", if mode == Mode::Jailed { "True".to_owned() } else { "False".to_owned() }),
            ("JOB_ENABLE_DKMS", "False".to_owned()),
            ("BUILD_ARCH", "x86_64".to_owned()),
            ("REMOTE_BUILD_NODE", String::new()),
            ("IMS_CLOSE_GRACE", "5".to_owned()),
        ]
        .map(|(n, v)| (n.to_owned(), v))
        .into()
    }

    /// Starts the entrypoint; nothing listens until `ready` is created.
    pub fn start(self, mode: Mode) -> Environment {
        self.start_with(mode, &[])
    }

    /// Starts the entrypoint with additional variables; an empty value unsets one.
    pub fn start_with(self, mode: Mode, further: &[(&str, &str)]) -> Environment {
        self.start_by(Path::new(&IMS_SSHD), mode, further)
    }

    /// Starts the entrypoint of another build of `ims-sshd`.
    pub fn start_by(self, ims_sshd: &Path, mode: Mode, further: &[(&str, &str)]) -> Environment {
        let mut command = Command::new(ims_sshd);
        self.equip(command.arg("entrypoint"), mode, further);
        let entrypoint = command.spawn().unwrap();
        Environment { entrypoint, volume: self, status: None }
    }

    /// Opens the image on a build node, through the port of a pod whose network this thread and its children are in from
    /// now on. The volume's `image_root` is then the one on the node.
    pub fn open_on_a_node(mut self, further: &[(&str, &str)]) -> Environment {
        let lab = Lab::around_this_thread();
        let node = &lab.nodes[0];
        // A file without a name is reached by its descriptor.
        let packed = format!("/proc/self/fd/{}", packed(self.image).as_raw_fd());
        std::fs::copy(packed, self.parent.join("image.sqsh")).unwrap();
        unmount(&self.image_root);
        std::fs::remove_dir_all(&self.image_root).unwrap();
        // A node takes each ID once at a time.
        let further_job = format!("further-job-{}", self.port);
        let job = if node.jobs().is_empty() { JOB } else { &further_job };
        let key = lab.key.display().to_string();
        let variables = [
            ("REMOTE_BUILD_NODE", node.address.as_str()),
            ("IMS_REMOTE_KEY", &key),
            ("IMS_JOB_ID", job),
            // The image has no boot files.
            ("KERNEL_FILENAME", "auto"),
        ];
        self.lab = Some(lab.clone());
        let all = [&variables[..], further].concat();
        let mut environment = self.start_by(Path::new(&IMS_SSHD_TO_SEND), Mode::Jailed, &all);
        environment.touch("ready");
        let listening = environment.signal("sshd_listening");
        wait_within(environment.limit(), "the environment on the node", || listening.exists());
        environment.volume.image_root = node.image_root(job);
        // Nobody has looked yet, and packing an image for each test would take longer than the test.
        let changes = environment.dir.path().join("upper/.");
        succeed(
            Command::new("cp").args(["-rP", "--preserve=mode,ownership"]).arg(changes).arg(&environment.image_root),
        );
        environment
    }

    /// Starts the entrypoint in a container whose /proc is masked. The kernel then refuses a user namespace a procfs of
    /// its own.
    pub fn start_where_proc_is_masked(self, mode: Mode, further: &[(&str, &str)]) -> Environment {
        let mut command = Command::new(MASKING_PROC[0]);
        command.args(&MASKING_PROC[1..]);
        self.equip(command.args([&*IMS_SSHD, "entrypoint"]), mode, further);
        Environment { entrypoint: command.spawn().unwrap(), volume: self, status: None }
    }

    pub fn log(&self) -> PathBuf {
        self.dir.path().join("entrypoint.log")
    }

    pub fn entrypoint(&self, mode: Mode, further: &[(&str, &str)]) -> Command {
        let mut command = Command::new(&IMS_SSHD);
        self.equip(command.arg("entrypoint"), mode, further);
        command
    }

    /// Starts the entrypoint in a container made of the same image. So a plain session changes only that container, and
    /// differs from a jailed one only by the jail.
    pub fn start_in_container(self, mode: Mode, further: &[(&str, &str)]) -> Environment {
        const CONTAINER: &str = "mkdir -p \"$1/container\" \"$1/container.work\"\n\
            mount -t overlay -o \"lowerdir=$2,upperdir=$1/container,workdir=$1/container.work\" overlay /mnt\n\
            for place in /dev /proc /sys \"$1\" \"$3\"; do mkdir -p \"/mnt$place\"; mount --rbind \"$place\" \"/mnt$place\"; done\n\
            cp /etc/resolv.conf /mnt/etc; cp /etc/ssh/ssh_host_* /mnt/etc/ssh || true\n\
            mkdir /mnt/.outside && cd /mnt && pivot_root . .outside && umount -l /.outside && rmdir /.outside\n\
            shift 3; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", CONTAINER, "sh"]).arg(self.dir.path());
        command.arg(Image::Managed.root()).arg(Path::new(&IMS_SSHD).parent().unwrap());
        self.equip(command.args([&*IMS_SSHD, "entrypoint"]), mode, further);
        let entrypoint = command.spawn().unwrap();
        Environment { entrypoint, volume: self, status: None }
    }

    /// Opens the image root with sshd alone, by its `ChrootDirectory`.
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
        // A directory with a mount on it cannot be removed.
        for place in [self.image_root.as_path(), &self.parent, self.dir.path()] {
            // One on a node is not this thread's to unmount.
            if place.starts_with(self.dir.path()) {
                unmount(place);
            }
        }
    }
}

/// Copies to the image's apt the settings by which this machine's apt reaches its mirrors, such as a proxy.
pub fn share_apts_settings(environment: &Environment) {
    let settings = succeed(Command::new("apt-config").arg("dump"));
    let of_mirrors = |line: &&str| line.starts_with("Acquire::http") || line.starts_with("Acquire::Check-");
    let mut kept: String = settings.lines().filter(of_mirrors).flat_map(|line| [line, "\n"]).collect();
    // Leave out translations, which are half of the download, and which no test reads.
    kept += "Acquire::Languages \"none\";\n";
    std::fs::write(environment.image_root.join("etc/apt/apt.conf.d/99mirrors"), kept).unwrap();
}

/// Makes further mounts belong to this test's thread and to the processes that it starts, so that they vanish with it.
fn own_mounts() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("the tests need root");
    mount(&["--make-rprivate"], Path::new("/"));
    // Hide the profile of the machine's own root: every plain session would run it and wait for it.
    if Path::new("/root/.bashrc").exists() {
        mount(&["--bind", "/dev/null"], Path::new("/root/.bashrc"));
    }
}

/// Gives the machine's root another home and shell, for this thread and its children.
pub fn replace_root(volume: &Volume, home: &Path, shell: &str) {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let root = passwd.lines().find(|line| line.starts_with("root:")).unwrap();
    let mut fields: Vec<_> = root.split(':').collect();
    let home = home.display().to_string();
    (fields[5], fields[6]) = (&home, shell);
    let file = volume.dir.path().join("passwd");
    std::fs::write(&file, passwd.replacen(root, &fields.join(":"), 1)).unwrap();
    mount(&["--bind", file.to_str().unwrap()], Path::new("/etc/passwd"));
}

/// One key pair for all tests. It stays in the cache.
fn client_key() -> PathBuf {
    let pair = cache().join("client-key");
    if !pair.exists() {
        let made = directory();
        let key = made.path().join("id_ed25519");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        // Another program may have been faster, so use the pair that is there.
        let _ = std::fs::rename(made.path(), &pair);
    }
    pair.join("id_ed25519")
}

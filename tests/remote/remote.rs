//! A remote job on a lab's node.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use testbed::job::*;
use testbed::node::{Lab, Node, signal};
use testbed::*;

/// The containers of a pod, with the volume of one job.
pub struct Remote<'a> {
    pub lab: &'a Lab,
    pub node: &'a Node,
    pub job: Job,
    pub entrypoint: Option<Child>,
    pub mode: Mode,
    id: String,
}

impl<'a> Remote<'a> {
    /// A job whose image, a busybox, lies on the volume as `prepare` leaves it.
    pub fn new(lab: &'a Lab, node: &'a Node, mode: Mode) -> Self {
        let job = Job::new();
        let packed = squashfs_of(&job.volume.image_root);
        std::fs::rename(packed, job.volume.parent.join("image.sqsh")).unwrap();
        Self::on(lab, node, mode, job)
    }

    /// A job whose image takes a while to be sent: it has 200 MB that cannot be compressed.
    pub fn large(lab: &'a Lab, node: &'a Node) -> Self {
        // A file without a name: a static's directory would not be removed.
        static LARGE: OnceLock<File> = OnceLock::new();
        let squashfs = LARGE.get_or_init(|| {
            let (dir, tree) = bootable_image();
            let file = format!("of={}", tree.join("large").display());
            succeed(Command::new("dd").args(["if=/dev/urandom", "bs=1M", "count=200", "status=none", &file]));
            let squashfs = dir.path().join("large.sqsh");
            let mut pack = Command::new("mksquashfs");
            succeed(pack.args([&tree, &squashfs]).args(["-noI", "-noD", "-noF", "-noX", "-quiet", "-no-progress"]));
            File::open(squashfs).unwrap()
        });
        let job = Job::new();
        let squashfs = format!("/proc/self/fd/{}", squashfs.as_raw_fd());
        std::fs::copy(squashfs, job.volume.parent.join("image.sqsh")).unwrap();
        Self::on(lab, node, Mode::Jailed, job)
    }

    /// A job whose image is a Debian that Ansible manages, without boot files.
    pub fn managed(lab: &'a Lab, node: &'a Node, mode: Mode) -> Self {
        static MANAGED: OnceLock<File> = OnceLock::new();
        let squashfs = MANAGED.get_or_init(|| {
            let dir = directory();
            let squashfs = dir.path().join("managed.sqsh");
            let mut pack = Command::new("mksquashfs");
            pack.arg(Image::Managed.root()).arg(&squashfs).args([
                "-noI",
                "-noD",
                "-noF",
                "-noX",
                "-quiet",
                "-no-progress",
            ]);
            succeed(&mut pack);
            File::open(squashfs).unwrap()
        });
        let job = Job::new();
        let squashfs = format!("/proc/self/fd/{}", squashfs.as_raw_fd());
        std::fs::copy(squashfs, job.volume.parent.join("image.sqsh")).unwrap();
        Self::on(lab, node, mode, job)
    }

    fn on(lab: &'a Lab, node: &'a Node, mode: Mode, job: Job) -> Self {
        std::fs::remove_dir_all(&job.volume.image_root).unwrap();
        let id = format!("job-{}", job.volume.port);
        Self { lab, node, job, entrypoint: None, mode, id }
    }

    /// A job whose container on the node was started by upstream's prepare, and listens on that port there.
    pub fn begun_by_upstream(lab: &'a Lab, node: &'a Node, mode: Mode, port: u16) -> Self {
        let remote = Self::new(lab, node, mode);
        std::fs::write(remote.job.volume.signal("remote_port"), format!("{port}\n")).unwrap();
        remote
    }

    /// The job's ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("REMOTE_BUILD_NODE", self.node.address.clone()),
            ("REMOTE_HEARTBEAT_TIMEOUT_COUNT", "1".into()),
            ("IMS_REMOTE_KEY", self.lab.key.display().to_string()),
            ("IMS_JOB_ID", self.id.clone()),
            ("CA_CERT", self.job.volume.dir.path().join("ca/certificate_authority.crt").display().to_string()),
        ]
    }

    /// Name of the job's directory on the node.
    pub fn directory(&self) -> String {
        format!("ims_{}", self.id)
    }

    /// Starts the container that runs sshd in a local job.
    pub fn start(&mut self, further: &[(&str, &str)]) {
        let variables = self.variables();
        let mut all: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        all.extend(further);
        let mut command = self.lab.moved(&self.job.volume.entrypoint(self.mode, &all));
        let log = std::fs::File::options().create(true).append(true).open(self.job.volume.log()).unwrap();
        self.entrypoint = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
    }

    /// Starts it, and waits until it can be reached.
    pub fn open(&mut self) {
        self.start(&[]);
        self.job.volume.touch("ready");
        self.wait_for("sshd_listening");
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.job.volume.log()).unwrap_or_default()
    }

    pub fn wait_for(&self, name: &str) {
        let path = self.job.volume.signal(name);
        wait_until(&format!("'{name}'; the log:\n{}", self.log()), || path.exists());
    }

    pub fn wait_for_log(&self, words: &str) {
        wait_until(&format!("'{words}' in the log:\n{}", self.log()), || self.log().contains(words));
    }

    /// A client of the pod's port.
    pub fn ssh(&self, options: &[&str]) -> Command {
        let mut ssh = self.lab.command("ssh");
        ssh.args(ssh_options(&self.job.volume.key)).args(options);
        ssh.args(["-p", &self.job.volume.port.to_string(), "root@127.0.0.1"]).stdin(Stdio::null());
        ssh
    }

    pub fn run(&self, command: &str) -> Output {
        self.ssh(&[]).arg(command).output().unwrap()
    }

    pub fn says(&self, command: &str) -> String {
        let output = self.run(command);
        assert!(output.status.success(), "{command}: {output:?}\n{}", self.log());
        text(output.stdout).trim_end().to_owned()
    }

    /// The entrypoint's exit code.
    pub fn end(&mut self) -> i32 {
        let mut child = self.entrypoint.take().unwrap();
        let mut status = None;
        wait_until(&format!("the entrypoint to end; its log:\n{}", self.log()), || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        let status = status.unwrap();
        status.code().unwrap_or_else(|| 128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap())
    }

    /// Asserts that it ends as failed, with this code, and with these words in the log.
    pub fn fails(&mut self, code: i32, words: &str) {
        assert_eq!(self.end(), code, "{}", self.log());
        let log = self.log();
        assert!(log.contains(words), "no '{words}' in the log:\n{log}");
        let repeats = |line: &str| line.matches("cannot go on with the job").count() > 1;
        assert!(!log.lines().any(repeats), "an error that repeats itself:\n{log}");
        for name in ["failed", "exiting"] {
            assert!(self.job.volume.signal(name).exists(), "no '{name}':\n{log}");
        }
        for name in ["complete", "transfer.sqsh"] {
            assert!(!self.job.volume.signal(name).exists(), "there is '{name}':\n{log}");
        }
        assert_eq!(self.job.volume.signal("pod_error").exists(), code == 1, "{log}");
        let names: Vec<_> =
            std::fs::read_dir(&self.job.volume.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().starts_with(".ims-sshd.remote")), "{names:?}");
    }
}

impl Drop for Remote<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.entrypoint.take() {
            signal(&child, nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the entrypoint's log\n{}", self.log());
        }
    }
}

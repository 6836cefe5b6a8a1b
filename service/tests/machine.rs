//! Jobs on this machine, run by the programs of a pod beside a stand-in for the service that keeps their records.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use clap::Parser;
use ims_service::records::{Container, Job, Location};
use ims_service::runner::{Death, Machine, NewJob, Runner};
use ims_service::settings::Settings;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;
use testbed::ims_server::{ImsServer, JOB};
use testbed::job::packed_image;
use testbed::*;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

#[derive(Parser)]
struct Words {
    #[command(flatten)]
    settings: Settings,
}

/// A runner, and what it runs with.
struct Site {
    dir: TempDir,
    ims: ImsServer,
    settings: Settings,
    runtime: Runtime,
    machine: Arc<Machine>,
    deaths: mpsc::Receiver<Death>,
}

impl Site {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(Path::new(&*IMS_SSHD).exists());
        let dir = directory();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (_image, _, squashfs) = packed_image();
        std::fs::create_dir_all(path("store/boot-images/source")).unwrap();
        std::fs::copy(squashfs, path("store/boot-images/source/rootfs")).unwrap();
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &path("key")]));
        // Ports of other tests, and of other runs of these, are others.
        let first = 20_000 + (std::process::id() % 100) * 100 + NEXT.fetch_add(1, Ordering::Relaxed) * 10;
        let ports = format!("{first}-{}", first + 9);
        let store = format!("file://{}", path("store"));
        let words = ["ims", "--s3-endpoint", &store, "--jobs", &path("jobs"), "--job-ports", &ports];
        let settings = Words::parse_from(words).settings;
        let ims = ImsServer::start();
        ims.state().needs_no_token = true;
        let runtime = Runtime::new().unwrap();
        let (machine, deaths) = run(&runtime, &settings, &ims, Vec::new());
        Self { dir, ims, settings, runtime, machine, deaths }
    }

    /// A job that changes the image of the store.
    fn job(&self) -> NewJob {
        let job: Job = serde_json::from_value(json!({
            "id": JOB, "artifact_id": JOB, "public_key_id": JOB, "job_type": "customize", "created": "",
            "image_root_archive_name": "compute ä", "ssh_containers": [{ "name": "customize", "jail": false }],
        }))
        .unwrap();
        NewJob {
            job,
            object: Location { bucket: "boot-images".into(), key: "source/rootfs".into() },
            download_url: String::new(),
            download_md5sum: String::new(),
            public_key: std::fs::read_to_string(self.dir.path().join("key.pub")).unwrap(),
            recipe_type: None,
            template_dictionary: BTreeMap::new(),
        }
    }

    fn start(&self) -> Job {
        let started = self.runtime.block_on(self.machine.start(&self.job())).unwrap();
        self.runtime.block_on(self.machine.stored(&started));
        started
    }

    /// Starts such a job, and waits until users can log in.
    fn open(&self) -> Job {
        let job = self.start();
        self.wait_for("waiting_on_user");
        job
    }

    fn wait_for(&self, status: &str) {
        wait_until(&format!("the status {status}; {}", self.log()), || self.ims.status() == status);
    }

    /// The service has heard of the end.
    fn release(&self, job: &Job) {
        self.runtime.block_on(self.machine.release(job)).unwrap();
        let volume = self.directory().join("volume");
        wait_until(&format!("the volume to be removed; {}", self.log()), || !volume.exists());
    }

    /// Runs a new service in the place of the one that was killed.
    fn restart(&mut self, running: Vec<Job>) {
        (self.machine, self.deaths) = run(&self.runtime, &self.settings, &self.ims, running);
    }

    fn death(&mut self) -> Death {
        let next = self.deaths.recv();
        let death = self.runtime.block_on(async { tokio::time::timeout(LIMIT, next).await });
        death.unwrap_or_else(|_| panic!("no death; {}", self.log())).unwrap()
    }

    fn directory(&self) -> PathBuf {
        self.settings.machine.jobs.join(JOB)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.machine.log_file(JOB)).unwrap_or_default()
    }

    fn ssh(&self, job: &Job, command: &str) -> Output {
        self.ssh_with(job, &[], command)
    }

    fn ssh_with(&self, job: &Job, options: &[&str], command: &str) -> Output {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        ssh.args(options);
        ssh.arg("-i").arg(self.dir.path().join("key")).args(["-p", &port(job).to_string(), "root@127.0.0.1", command]);
        ssh.stdin(Stdio::null()).output().unwrap()
    }

    /// Processes of the job whose command line begins like this.
    fn programs(&self, command: &str) -> Vec<Pid> {
        let found = processes_with(&format!("{command} {}", self.directory().display()));
        found.into_iter().map(|pid| Pid::from_raw(pid.cast_signed())).collect()
    }

    fn kill_only(&self, command: &str) {
        let [pid] = self.programs(command)[..] else { panic!("{command}: {:?}", self.programs(command)) };
        kill(pid, Signal::SIGKILL).unwrap();
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = self.runtime.block_on(self.machine.remove(&self.job().job));
        let began = std::time::Instant::now();
        while self.directory().exists() && began.elapsed() < LIMIT {
            std::thread::sleep(LIMIT / 1000);
        }
        if !std::thread::panicking() {
            assert!(!self.directory().exists(), "{} is left", self.directory().display());
            assert_eq!(self.programs(""), []);
        }
    }
}

fn run(
    runtime: &Runtime,
    settings: &Settings,
    ims: &ImsServer,
    running: Vec<Job>,
) -> (Arc<Machine>, mpsc::Receiver<Death>) {
    let machine = Machine::new(settings, ims.url.clone(), env!("CARGO_BIN_EXE_ims").into()).unwrap();
    let (machine, (sender, deaths)) = (Arc::new(machine), mpsc::channel(8));
    let watching = machine.clone();
    runtime.spawn(async move { watching.watch(running, sender).await });
    (machine, deaths)
}

fn port(job: &Job) -> u16 {
    let [Container { connection_info: Some(networks), .. }] = job.ssh_containers.as_deref().unwrap() else { panic!() };
    assert_eq!(networks["customer_access"], networks["cluster.local"]);
    networks["customer_access"].port
}

#[test]
fn image_is_changed_over_ssh_and_published() {
    let site = Site::new();
    let job = site.open();
    assert!(job.ssh_containers.as_ref().unwrap()[0].jail, "outside the image a session would be root here");
    let output = site.ssh(&job, "echo changed > /etc/motd; cat /etc/motd; echo $IMS_JOB_ID; hostname");
    assert_eq!(text(&output.stdout), format!("changed\n{JOB}\ncompute\n"), "{}", text(&output.stderr));
    assert!(site.ssh(&job, "touch /tmp/complete").status.success());
    site.wait_for("success");
    let statuses = ["fetching_image", "waiting_on_user", "packaging_artifacts", "success"];
    assert_eq!(site.ims.statuses(), statuses);
    let image = site.ims.state().job["resultant_image_id"].as_str().unwrap().to_owned();
    let record = site.ims.state().images[&image].clone();
    assert_eq!(record["name"], "compute ä");
    assert_eq!(record["link"]["path"], format!("s3://boot-images/{image}/manifest.json"));
    let rootfs = site.dir.path().join(format!("store/boot-images/{image}/rootfs"));
    assert_eq!(succeed(Command::new("unsquashfs").arg("-cat").arg(rootfs).arg("etc/motd")), "changed\n");
    site.release(&job);
    assert!(site.log().contains("sshd is listening") && site.log().contains("uploaded"), "{}", site.log());
}

#[test]
fn sessions_have_terminals_apart_from_those_of_the_machine() {
    let site = Site::new();
    let job = site.open();
    // The machine has two terminals at least, so its list is another one than that of a jail with one session.
    let terminals = [(); 2].map(|()| nix::pty::openpty(None, None).unwrap());
    let output = site.ssh_with(&job, &["-tt"], "tty; stty rows 33 && stty size; cd /dev/pts; echo *");
    let shown = text(&output.stdout).replace('\r', "");
    assert!(shown.starts_with("/dev/pts/0\n33 "), "{shown} {}", text(&output.stderr));
    assert!(shown.contains("\n0 ptmx\n"), "{shown}");
    drop(terminals);
}

#[test]
fn restarted_service_finds_its_job_running() {
    let mut site = Site::new();
    let job = site.open();
    let (pods, port) = (site.programs("pod"), port(&job));
    site.restart(vec![job.clone()]);
    assert_eq!(site.programs("pod"), pods);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok());
    assert!(site.ssh(&job, "touch /tmp/failed").status.success());
    site.wait_for("error");
    assert!(site.ims.state().images.is_empty());
    site.release(&job);
}

#[test]
fn job_that_was_stored_and_not_started_is_started_by_the_next_service() {
    let mut site = Site::new();
    let job = site.runtime.block_on(site.machine.start(&site.job())).unwrap();
    assert_eq!(site.programs("pod"), []);
    site.restart(vec![job.clone()]);
    site.wait_for("waiting_on_user");
    assert!(site.ssh(&job, "true").status.success());
}

#[test]
fn job_without_its_directory_is_told_by_the_next_service() {
    let mut site = Site::new();
    let lost = site.job().job;
    site.restart(vec![lost]);
    let death = site.death();
    assert!(death.id == JOB && death.reason.contains("pod.json"), "{death:?}");
}

#[test]
fn killed_programs_are_told_with_the_reason_and_leave_no_process() {
    for (killed, reason) in [
        ("sidecar", "'ims-sshd sidecar' was killed by SIGKILL"),
        ("pod", "the parent process of its programs was killed"),
        ("entrypoint", "it has been gone for 5 s without a verdict"),
    ] {
        let mut site = Site::new();
        let job = site.open();
        site.kill_only(killed);
        let death = site.death();
        assert!(death.id == JOB && death.reason.contains(reason), "{killed}: {death:?}");
        site.release(&job);
        wait_until(&format!("all to end after {killed}"), || site.programs("").is_empty());
        assert!(TcpStream::connect(("127.0.0.1", port(&job))).is_err(), "{killed}");
        assert!(site.ims.state().images.is_empty(), "{killed}");
    }
}

#[test]
fn damaged_source_ends_the_job_with_the_error_of_its_step() {
    let mut site = Site::new();
    std::fs::write(site.dir.path().join("store/boot-images/source/rootfs"), "damaged").unwrap();
    let job = site.start();
    let death = site.death();
    assert!(death.reason.contains("'ims-sshd prepare' ended with exit code 1: cannot"), "{death:?}");
    assert_eq!(site.ims.status(), "error");
    site.release(&job);
}

#[test]
fn job_whose_port_somebody_else_takes_never_waits_for_users() {
    let site = Site::new();
    let job = site.runtime.block_on(site.machine.start(&site.job())).unwrap();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port(&job))).unwrap();
    site.runtime.block_on(site.machine.stored(&job));
    site.wait_for("error");
    assert!(!site.ims.statuses().contains(&"waiting_on_user".to_owned()), "{:?}", site.ims.statuses());
    let log = std::fs::read_to_string(site.machine.log_file(&job.id)).unwrap();
    assert!(log.contains("Address already in use"), "{log}");
}

#[test]
fn running_job_that_is_removed_leaves_nothing() {
    let mut site = Site::new();
    let job = site.open();
    site.runtime.block_on(site.machine.remove(&job)).unwrap();
    wait_until("the job to be removed", || !site.directory().exists());
    assert!(TcpStream::connect(("127.0.0.1", port(&job))).is_err());
    assert_eq!(site.programs(""), []);
    assert!(site.deaths.try_recv().is_err(), "who removes a job knows of its end");
}

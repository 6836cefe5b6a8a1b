//! Whole jobs: the sidecar beside the build environment, a session, and the published image or none.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ims_sshd::sys::process::output_within;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testbed::ims_server::Fault;
use testbed::job::*;
use testbed::s3_server::{Breaker, Closed, Gate};
use testbed::*;

/// The programs of both containers.
struct Running<'a> {
    job: &'a Job,
    sidecar: Option<Child>,
    sshd: Child,
}

impl<'a> Running<'a> {
    fn start(job: &'a Job, mode: Mode, further: &[(&'static str, &str)]) -> Self {
        let sidecar = job.sidecar(mode, further).spawn().unwrap();
        let config = job.sshd_config();
        let options = format!("-E {} -f {config}", job.volume.sshd_log().display());
        let mut variables = vec![("SSHD_OPTIONS", options.as_str()), ("SSHD_CONFIG_FILE", config.as_str())];
        variables.extend(further.iter().filter(|(name, _)| ["IMS_ACTION", "ENABLE_DEBUG"].contains(name)));
        let sshd = job.volume.entrypoint(mode, &variables).spawn().unwrap();
        Self { job, sidecar: Some(sidecar), sshd }
    }

    fn open(job: &'a Job, mode: Mode) -> Self {
        Self::start(job, mode, &[]).waiting_on_user()
    }

    fn waiting_on_user(self) -> Self {
        wait_until("'waiting_on_user'", || self.job.ims.status() == "waiting_on_user");
        // CFS connects at once then, and takes a refused connection as final.
        std::net::TcpStream::connect(("127.0.0.1", self.job.volume.port)).expect("sshd listens");
        self
    }

    fn ssh(&self, command: &str) -> Output {
        let mut ssh = Command::new("ssh");
        ssh.args(ssh_options(&self.job.volume.key)).args(["-p", &self.job.volume.port.to_string()]);
        ssh.args(["root@127.0.0.1", command]).stdin(Stdio::null()).output().unwrap()
    }

    fn mark(&self, mode: Mode, verdict: &str) {
        let place = if mode == Mode::Jailed { "/tmp".into() } else { self.job.volume.parent.display().to_string() };
        self.ssh(&format!("touch {place}/{verdict}"));
    }

    fn kill_sidecar(&mut self) {
        let mut sidecar = self.sidecar.take().unwrap();
        sidecar.kill().unwrap();
        sidecar.wait().unwrap();
    }

    /// Waits for the end of the sidecar.
    fn end(mut self) -> Output {
        ended(self.sidecar.take().unwrap())
    }
}

/// Output of a sidecar, which has to end within this time.
fn ended(sidecar: Child) -> Output {
    output_within(sidecar, Duration::from_secs(90)).unwrap().expect("the sidecar does not end")
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(mut sidecar) = self.sidecar.take() {
            let _ = sidecar.kill();
            let _ = sidecar.wait();
        }
        let _ = kill(Pid::from_raw(self.sshd.id().cast_signed()), Signal::SIGTERM);
        let _ = self.sshd.wait();
        if std::thread::panicking() {
            eprintln!(
                "--- the environment's log\n{}",
                std::fs::read_to_string(self.job.volume.log()).unwrap_or_default()
            );
        }
    }
}

const CUSTOMIZED: [&str; 3] = ["waiting_on_user", "packaging_artifacts", "success"];

#[test]
fn a_customized_image_is_published_jailed_and_plain() {
    for mode in MODES {
        let job = Job::new();
        let dir = job.volume.dir.path();
        std::fs::create_dir(dir.join("ca")).unwrap();
        std::fs::write(dir.join("ca/certificate_authority.crt"), "authority").unwrap();
        std::os::unix::fs::symlink("/run/netconfig/resolv.conf", job.volume.image_root.join("etc/resolv.conf"))
            .unwrap();
        // The verdict file is left from another job.
        for stale in ["sshd_listening", "complete", "failed", "exiting"] {
            job.volume.touch(stale);
        }
        let running = Running::open(&job, mode);
        let root = if mode == Mode::Jailed { String::new() } else { job.volume.image_root.display().to_string() };
        let said = running.ssh(&format!("cat {root}/etc/resolv.conf; echo new > {root}/etc/motd"));
        assert_eq!(text(said.stdout), std::fs::read_to_string("/etc/resolv.conf").unwrap());
        running.mark(mode, "complete");
        let output = running.end();
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(job.ims.statuses(), CUSTOMIZED);
        job.is_published(&output);
        assert_eq!(report(&output)["ims_job_record"]["status"], "success");
        let published = job.unpacked();
        assert_eq!(std::fs::read_to_string(published.join("etc/motd")).unwrap(), "new\n");
        assert_eq!(
            std::fs::read_link(published.join("etc/resolv.conf")).unwrap(),
            Path::new("/run/netconfig/resolv.conf")
        );
        assert_eq!(
            std::fs::read_to_string(published.join("etc/cray/ca/certificate_authority.crt")).unwrap(),
            "authority"
        );
        assert!(!published.join("tmp/complete").exists());
    }
}

#[test]
fn second_sidecar_on_a_volume_is_refused() {
    let job = Job::new();
    let mut running = Running::open(&job, Mode::Jailed);
    // Its variables do not matter.
    let second = [job.sidecar(Mode::Jailed, &[]), job.sidecar(Mode::Jailed, &[("IMS_ACTION", "create")])];
    for mut second in second {
        let output = ended(second.spawn().unwrap());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("for this sidecar: 'ims-sshd sidecar' has it, as process") && !said.contains("resolv.conf"),
            "{said}"
        );
        assert_eq!(text(&output.stdout), "");
    }
    assert!(!job.volume.signal("failed").exists());
    assert_eq!(job.ims.status(), "waiting_on_user");
    // A killed sidecar holds no claim.
    running.kill_sidecar();
    running.sidecar = Some(job.sidecar(Mode::Jailed, &[]).spawn().unwrap());
    running.mark(Mode::Jailed, "complete");
    let output = running.end();
    assert!(output.status.success(), "{}", text(&output.stderr));
    job.is_published(&output);
    assert!(!job.volume.parent.join(".ims-sshd.sidecar").exists());
}

#[test]
fn ims_is_called_in_the_order_of_the_contract() {
    let job = Job::new();
    let running = Running::open(&job, Mode::Plain);
    running.mark(Mode::Plain, "complete");
    assert!(running.end().status.success());
    let state = job.ims.state();
    let id = state.images.keys().next().unwrap().clone();
    let job_path = format!("/jobs/{}", testbed::ims_server::JOB);
    let calls: Vec<_> = state
        .changes
        .iter()
        .map(|(method, path, body)| {
            let fields: Vec<_> = body.as_object().unwrap().keys().cloned().collect();
            format!("{method} {path} {}", fields.join(","))
        })
        .collect();
    let expected = [
        format!("PATCH {job_path} status"),
        format!("PATCH {job_path} status"),
        "POST /images arch,metadata,name".into(),
        format!("PATCH /images/{id} link"),
        format!("PATCH {job_path} resultant_image_id"),
        format!("PATCH {job_path} status"),
    ];
    assert_eq!(calls, expected);
}

#[test]
fn failed_customization_sets_error_and_publishes_nothing() {
    for mode in MODES {
        let job = Job::new();
        let running = Running::open(&job, mode);
        running.mark(mode, "failed");
        let output = running.end();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
        job.nothing_is_left();
        assert!(!job.volume.parent.join("compute-ö.sqsh").exists());
    }
}

#[test]
fn failed_mark_made_during_packing_is_not_published() {
    for mode in MODES {
        let job = Job::new();
        let tools = job.volume.dir.path().join("tools");
        std::fs::create_dir(&tools).unwrap();
        let mark = match mode {
            Mode::Jailed => job.volume.image_root.join("tmp/failed"),
            Mode::Plain => job.volume.signal("failed"),
        };
        // Packs once the verdict file exists.
        let waits = format!(
            "#!/bin/sh\nuntil [ -e '{}' ]; do sleep 0.05; done\nexec /usr/bin/mksquashfs \"$@\"\n",
            mark.display()
        );
        std::fs::write(tools.join("mksquashfs"), waits).unwrap();
        succeed(Command::new("chmod").args(["+x"]).arg(tools.join("mksquashfs")));
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display());
        let running = Running::start(&job, mode, &[("PATH", &path), ("IMAGE_PACKER", "mksquashfs")]).waiting_on_user();
        running.mark(mode, "complete");
        wait_until("'packaging_artifacts'", || job.ims.status() == "packaging_artifacts");
        std::fs::write(mark, "").unwrap();
        let output = running.end();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(job.ims.statuses(), ["waiting_on_user", "packaging_artifacts", "error"]);
        job.nothing_is_left();
    }
}

/// A session of a plain job can write to the volume while its environment is still open.
#[test]
fn exiting_created_by_a_session_is_ignored_until_the_environment_closes() {
    for verdict in ["failed", "complete"] {
        let job = Job::new();
        let running = Running::open(&job, Mode::Plain);
        running.mark(Mode::Plain, "exiting");
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(job.ims.statuses(), ["waiting_on_user"]);
        running.mark(Mode::Plain, verdict);
        let output = running.end();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("the environment is still open"), "{output:?}");
        if verdict == "complete" {
            job.is_published(&output);
        } else {
            assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
            job.nothing_is_left();
        }
    }
}

#[test]
fn environment_that_ended_without_a_verdict_is_not_published() {
    let job = Job::new();
    let mut running = Running::open(&job, Mode::Plain);
    running.mark(Mode::Plain, "exiting");
    running.sshd.kill().unwrap();
    running.sshd.wait().unwrap();
    let output = running.end();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(report(&output)["error"].as_str().unwrap().contains("neither 'complete' nor 'failed'"), "{output:?}");
    assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
    job.nothing_is_left();
    ended(
        job.volume
            .entrypoint(
                Mode::Plain,
                &[
                    ("SSHD_CONFIG_FILE", ""),
                    ("SSHD_OPTIONS", &format!("-E {} -f {}", job.volume.sshd_log().display(), job.sshd_config())),
                ],
            )
            .spawn()
            .unwrap(),
    );
}

#[test]
fn environment_that_failed_before_the_sidecar_started_ends_the_job_at_once() {
    for mode in MODES {
        let job = Job::new();
        // `prepare` leaves this record, and removes the marks of an earlier run.
        std::fs::write(job.volume.signal(".ims-sshd.source"), "").unwrap();
        let refused = ended(job.volume.entrypoint(mode, &[("IMS_IDLE_LIMIT", "soon")]).spawn().unwrap());
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        let output = ended(job.sidecar(mode, &[]).spawn().unwrap());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(said.contains("the build environment ended as failed before this container started"), "{said}");
        assert_eq!(job.ims.statuses(), ["error"], "{said}");
        assert!(!job.volume.signal("ready").exists() && job.volume.signal("failed").exists());
        job.nothing_is_left();
    }
}

#[test]
fn failure_of_prepare_ends_a_sidecar_without_ims_at_once() {
    for refused in [None, Some(("SSH_JAIL", "maybe"))] {
        let job = Job::new();
        let mut variables = job.variables(Mode::Plain);
        variables.retain(|(name, _)| !ALONE.iter().any(|(alone, _)| name == alone));
        variables.extend(refused.map(|(name, value)| (name, value.to_owned())));
        let output = ims_sshd(&["prepare", "/nonexistent"], &variables).output().unwrap();
        assert!(!output.status.success(), "{output:?}");
        let began = Instant::now();
        let output = ended(job.sidecar(Mode::Plain, &ALONE).spawn().unwrap());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{refused:?}: {said}");
        assert!(said.contains("there is a file 'pod_error' in"), "{refused:?}: {said}");
        assert!(began.elapsed() < Duration::from_secs(5) && !job.volume.signal("ready").exists(), "{said}");
    }
    // Without a job, nobody waits, and nothing is left behind.
    let dir = directory();
    assert!(!ims_sshd(&["prepare", "/nonexistent"], &[]).current_dir(dir.path()).arg(".").status().unwrap().success());
    assert!(dir.path().read_dir().unwrap().next().is_none());
}

#[test]
fn sidecar_says_how_long_it_waits_for_an_environment() {
    let job = Job::new();
    for stale in ["failed", "exiting"] {
        job.volume.touch(stale);
    }
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_START_LIMIT", "1")]).spawn().unwrap());
    let said = text(&output.stderr);
    assert!(said.contains("removed the mark 'failed' of an earlier environment"), "{said}");
    assert!(said.contains("no build environment waits yet; it has 1 s to start (IMS_START_LIMIT)"), "{said}");
}

#[test]
fn marks_of_an_earlier_run_do_not_end_the_job() {
    let job = Job::new();
    for stale in ["failed", "exiting"] {
        job.volume.touch(stale);
    }
    // The kernel counts times of files in ticks.
    std::thread::sleep(Duration::from_millis(50));
    std::fs::write(job.volume.signal(".ims-sshd.source"), "").unwrap();
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_START_LIMIT", "1")]).spawn().unwrap());
    assert!(text(&output.stderr).contains("it has been gone for 1 s"), "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
}

/// Marks the image as other programs do, or between two polls.
#[test]
fn failed_mark_inside_the_image_and_a_short_lived_environment_are_noticed() {
    let job = Job::new();
    let mark = job.volume.image_root.join("tmp/failed");
    std::fs::write(&mark, "").unwrap();
    let sidecar = job.sidecar(Mode::Jailed, &[]).spawn().unwrap();
    let pid = Pid::from_raw(sidecar.id().cast_signed());
    wait_until("'ready'", || job.volume.signal("ready").exists());
    kill(pid, Signal::SIGSTOP).unwrap();
    let old_one = mark.exists();
    std::fs::write(&mark, "").unwrap();
    job.volume.touch("sshd_listening");
    job.volume.touch("exiting");
    kill(pid, Signal::SIGCONT).unwrap();
    let output = ended(sidecar);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
    assert!(!old_one, "one that came with the image does not count");
    job.nothing_is_left();
}

#[test]
fn resolv_conf_changed_in_a_session_stays_in_the_image() {
    let job = Job::new();
    std::fs::write(job.volume.image_root.join("etc/resolv.conf"), "nameserver 203.0.113.1\n").unwrap();
    let running = Running::open(&job, Mode::Jailed);
    // Replaced by a rename, as Ansible's template does.
    let said = running.ssh("echo nameserver 198.51.100.1 > /etc/new && mv /etc/new /etc/resolv.conf");
    assert!(said.status.success(), "{said:?}");
    running.mark(Mode::Jailed, "complete");
    assert!(running.end().status.success());
    assert_eq!(std::fs::read_to_string(job.unpacked().join("etc/resolv.conf")).unwrap(), "nameserver 198.51.100.1\n");
}

#[test]
fn missing_kernel_is_an_error_that_lists_boot() {
    let job = Job::new();
    let boot = job.volume.image_root.join("boot");
    let running = Running::open(&job, Mode::Plain);
    std::fs::rename(boot.join("vmlinuz"), boot.join("bzImage")).unwrap();
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    assert_eq!(output.status.code(), Some(1));
    let report = report(&output);
    assert_eq!(report["result"], "failure");
    assert!(report["error"].as_str().unwrap().contains("/boot holds bzImage, initrd"), "{report}");
    assert_eq!(job.ims.statuses().last().unwrap(), "error");
    job.nothing_is_left();
}

#[test]
fn kernel_missing_at_start_causes_a_warning_and_can_be_installed() {
    let job = Job::new();
    let boot = job.volume.image_root.join("boot");
    std::fs::rename(boot.join("vmlinuz"), boot.join("later")).unwrap();
    let running = Running::start(&job, Mode::Plain, &[("KERNEL_FILENAME", "vmlinuz")]).waiting_on_user();
    std::fs::rename(boot.join("later"), boot.join("vmlinuz")).unwrap();
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("cannot find the kernel /boot/vmlinuz"), "{said}");
    job.is_published(&output);
}

#[test]
fn successful_build_is_published_without_a_shell() {
    let job = Job::laid_out("build/image-root");
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_ACTION", "create")]).spawn().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(job.ims.statuses(), ["packaging_artifacts", "success"]);
    job.is_published(&output);
}

/// Puts the files of a remote job into the image root's parent, without an image root.
fn left_by_a_remote_job(job: &Job) -> Vec<u8> {
    let parent = &job.volume.parent;
    let packed = squashfs_of(&job.volume.image_root);
    std::fs::rename(&packed, parent.join("transfer.sqsh")).unwrap();
    for (name, content) in
        [("vmlinuz", "a remote kernel"), ("initrd", "a remote initrd"), ("kernel-parameters", "quiet")]
    {
        std::fs::write(parent.join(name), content).unwrap();
    }
    std::fs::remove_dir_all(&job.volume.image_root).unwrap();
    std::fs::read(parent.join("transfer.sqsh")).unwrap()
}

#[test]
fn transfer_sqsh_of_a_remote_build_is_published_as_it_is_with_the_boot_files_beside_it() {
    for moment in [None, Some("renamed"), Some("uploaded")] {
        let job = Job::laid_out("build/image-root");
        let packed = left_by_a_remote_job(&job);
        let further = [("IMS_ACTION", "create"), ("REMOTE_BUILD_NODE", "x3000c0s17b1n0")];
        if let Some(moment) = moment {
            let gate = Gate::start(0, Closed::Silent);
            let silent = [("S3_ENDPOINT", gate.endpoint.as_str()), ("IMS_STALL_LIMIT", "100")];
            if moment == "renamed" {
                job.ims.fail("POST /images", Fault::Silence);
            }
            let mut sidecar = job.sidecar(Mode::Plain, &[&further[..], &silent].concat()).spawn().unwrap();
            wait_until(moment, || match moment {
                "renamed" => job.ims.is_well(),
                _ => !job.bucket.keys().is_empty(),
            });
            sidecar.kill().unwrap();
            sidecar.wait().unwrap();
        }
        let output = ended(job.sidecar(Mode::Plain, &further).spawn().unwrap());
        assert!(output.status.success(), "{}", text(&output.stderr));
        job.is_published(&output);
        let object = |name: &str| {
            let key = job.bucket.keys().into_iter().find(|key| key.ends_with(name)).unwrap();
            job.bucket.get(&key).body
        };
        assert!(object("/rootfs") == packed);
        assert_eq!((object("/kernel"), object("/initrd")), (b"a remote kernel".to_vec(), b"a remote initrd".to_vec()));
        let names: Vec<_> = std::fs::read_dir(&job.volume.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(
            !names.iter().any(|n| n == "transfer.sqsh") && names.iter().any(|n| n == "compute-ö.sqsh"),
            "{names:?}"
        );
    }
}

#[test]
fn incomplete_files_of_a_remote_job_are_refused() {
    let cases: [(&str, &str, &str); 8] = [
        ("truncate -s +300M transfer.sqsh", "create", "something follows it"),
        ("truncate -s 4T transfer.sqsh", "create", "something follows it"),
        // A squashfs whose superblock claims this size.
        (
            "truncate -s 4T transfer.sqsh; printf '\\0\\0\\0\\0\\0\\4\\0\\0' | dd of=transfer.sqsh bs=1 seek=40 conv=notrunc",
            "create",
            "but its file system only",
        ),
        ("truncate -s -5000 transfer.sqsh", "create", "it is cut off"),
        ("echo x > transfer.sqsh", "create", "as an image"),
        ("rm vmlinuz", "create", "cannot find vmlinuz in"),
        ("mv initrd x && ln -s x initrd", "create", "which the remote job left"),
        ("mv transfer.sqsh x && ln -s x transfer.sqsh", "create", "a symbolic link"),
    ];
    for (make, action, why) in cases {
        let job = Job::laid_out("build/image-root");
        left_by_a_remote_job(&job);
        succeed(Command::new("sh").args(["-c", make]).current_dir(&job.volume.parent));
        let output = ended(job.sidecar(Mode::Plain, &[("IMS_ACTION", action)]).spawn().unwrap());
        assert_eq!(output.status.code(), Some(1), "{make}: {output:?}");
        assert!(report(&output)["error"].as_str().unwrap().contains(why), "{make}: {output:?}");
        job.nothing_is_left();
    }
    // A file that an earlier job left on the volume is not this job's.
    let job = Job::new();
    let parent = job.volume.dir.path().join("another");
    std::fs::create_dir(&parent).unwrap();
    std::fs::write(parent.join("transfer.sqsh"), "").unwrap();
    let source = job.volume.image_root.display().to_string();
    let output = ims_sshd(&["prepare", parent.to_str().unwrap(), &source], &[]).output().unwrap();
    assert!(output.status.success() && !parent.join("transfer.sqsh").exists(), "{output:?}");
}

/// After a restart of the sidecar, the file in place of the packed image may be somebody else's.
#[test]
fn image_packed_before_a_restart_is_refused_if_incomplete_or_too_large_but_not_for_padding() {
    let cases = [
        ("truncate -s %1M", None),
        ("truncate -s +300M", Some("something follows it")),
        ("truncate -s 4T", Some("something follows it")),
        ("truncate -s -5000", Some("it is cut off")),
        ("cp /etc/passwd", Some("as an image")),
    ];
    for (make, why) in cases {
        let job = Job::laid_out("build/image-root");
        job.ims.fail("POST /images", Fault::Silence);
        let create = [("IMS_ACTION", "create")];
        let silent = [("IMS_ACTION", "create"), ("IMS_STALL_LIMIT", "100")];
        let mut sidecar = job.sidecar(Mode::Plain, &silent).spawn().unwrap();
        wait_until("the request for a record", || job.ims.is_well());
        sidecar.kill().unwrap();
        sidecar.wait().unwrap();
        let script = format!("{make} compute-ö.sqsh");
        succeed(Command::new("sh").args(["-c", &script]).current_dir(&job.volume.parent));
        let output = ended(job.sidecar(Mode::Plain, &create).spawn().unwrap());
        let Some(why) = why else {
            assert!(output.status.success(), "{make}: {output:?}");
            job.is_published(&output);
            continue;
        };
        assert_eq!(output.status.code(), Some(1), "{make}: {output:?}");
        assert!(report(&output)["error"].as_str().unwrap().contains(why), "{make}: {output:?}");
        assert!(job.bucket.keys().is_empty(), "{make}");
    }
}

/// Runs the sidecar of a job whose image root is on another node.
#[test]
fn remote_customization_is_published_without_an_image_root_in_the_pod() {
    let job = Job::new();
    let elsewhere = job.volume.dir.path().join("on-the-node");
    std::fs::rename(&job.volume.image_root, &elsewhere).unwrap();
    let sidecar = job.sidecar(Mode::Jailed, &[("REMOTE_BUILD_NODE", "x3000c0s17b1n0")]).spawn().unwrap();
    wait_until("'ready'", || job.volume.signal("ready").exists());
    std::fs::rename(&elsewhere, &job.volume.image_root).unwrap();
    left_by_a_remote_job(&job);
    for signal in ["sshd_listening", "complete", "exiting"] {
        job.volume.touch(signal);
    }
    let output = ended(sidecar);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(job.ims.statuses(), CUSTOMIZED);
    job.is_published(&output);
    // The remote job has sent nothing.
    let job = Job::new();
    std::fs::remove_dir_all(&job.volume.image_root).unwrap();
    let sidecar = job.sidecar(Mode::Jailed, &[("REMOTE_BUILD_NODE", "x3000c0s17b1n0")]).spawn().unwrap();
    wait_until("'ready'", || job.volume.signal("ready").exists());
    for signal in ["sshd_listening", "complete", "exiting"] {
        job.volume.touch(signal);
    }
    let output = ended(sidecar);
    assert!(report(&output)["error"].as_str().unwrap().contains("left no transfer.sqsh"), "{output:?}");
}

/// Another container of the pod creates what an environment leaves, before any was open.
#[test]
fn exiting_without_an_environment_is_not_published() {
    let job = Job::new();
    let sidecar = job.sidecar(Mode::Jailed, &[("IMS_START_LIMIT", "3")]).spawn().unwrap();
    wait_until("'ready'", || job.volume.signal("ready").exists());
    for signal in ["complete", "exiting"] {
        job.volume.touch(signal);
    }
    let output = ended(sidecar);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(report(&output)["error"].as_str().unwrap().contains("no build environment was open"), "{output:?}");
    assert_eq!(job.ims.statuses(), ["error"]);
    job.nothing_is_left();
}

#[test]
fn failed_build_is_an_error_or_opens_a_debug_shell() {
    let job = Job::laid_out("build/image-root");
    job.volume.touch("build_failed");
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_ACTION", "create")]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(job.ims.statuses(), ["error"]);
    job.nothing_is_left();
    // A tree that was mended by hand is not published.
    for verdict in ["failed", "complete"] {
        let job = Job::laid_out("build/image-root");
        std::fs::write(job.volume.signal("build_failed"), "no provider of 'kernel'\n").unwrap();
        let further = [("IMS_ACTION", "create"), ("ENABLE_DEBUG", "True")];
        let running = Running::start(&job, Mode::Plain, &further).waiting_on_user();
        running.mark(Mode::Plain, verdict);
        let output = running.end();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!(report(&output)["error"].as_str().unwrap().contains("no provider of 'kernel'"), "{output:?}");
        assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
        job.nothing_is_left();
    }
}

#[test]
fn hopeless_jobs_fail_without_waiting() {
    let job = Job::new();
    let began = Instant::now();
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_START_LIMIT", "1")]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("it has been gone for 1 s"), "{}", text(&output.stderr));
    assert_eq!(job.ims.statuses(), ["error"]);
    assert!(job.volume.signal("failed").exists() && began.elapsed() < Duration::from_secs(15));

    // A link in its place points elsewhere.
    let job = Job::new();
    let elsewhere = job.volume.parent.join("build");
    std::fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink("../image-root", elsewhere.join("image-root")).unwrap();
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_ACTION", "create")]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("it is a symbolic link"), "{}", text(&output.stderr));
    job.nothing_is_left();

    let job = Job::new();
    job.volume.touch("pod_error");
    let output = ended(job.sidecar(Mode::Plain, &[]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1));
    assert!(report(&output)["error"].as_str().unwrap().contains("pod_error"));
    assert_eq!(job.ims.statuses(), ["error"]);
    assert!(!job.volume.signal("ready").exists());

    let job = Job::new();
    std::fs::write(job.volume.dir.path().join("authorized_keys"), "\n").unwrap();
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_START_LIMIT", "1")]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(2));
    assert!(report(&output)["error"].as_str().unwrap().contains("it holds no public key"));
    assert!(!job.volume.signal("ready").exists());

    let job = Job::new();
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_ACTION", "destroy")]).spawn().unwrap());
    assert_ne!(output.status.code(), Some(0));
    assert!(report(&output)["error"].as_str().unwrap().contains("IMS_ACTION is 'destroy'"));
    assert_eq!(job.ims.statuses(), ["error"]);
}

#[test]
fn job_with_status_error_is_not_started_again() {
    let job = Job::new();
    job.ims.state().job["status"] = "error".into();
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_START_LIMIT", "1")]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(!job.volume.signal("ready").exists());
    job.nothing_is_left();
}

#[test]
fn ims_job_without_a_store_fails_before_the_environment_opens() {
    let job = Job::new();
    let further = [("S3_BUCKET", ""), ("S3_ENDPOINT", ""), ("IMS_START_LIMIT", "1")];
    let output = ended(job.sidecar(Mode::Plain, &further).spawn().unwrap());
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(report(&output)["error"].as_str().unwrap().contains("no store is named"), "{output:?}");
    assert_eq!(job.ims.statuses(), ["error"]);
    assert!(!job.volume.signal("ready").exists());
}

#[test]
fn pod_error_during_a_session_is_an_error() {
    let job = Job::new();
    let running = Running::open(&job, Mode::Plain);
    job.volume.touch("pod_error");
    let output = running.end();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(report(&output)["error"].as_str().unwrap().contains("pod_error"));
    assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
    job.nothing_is_left();
}

#[test]
fn killed_environment_is_noticed_within_seconds() {
    let job = Job::new();
    let mut running = Running::open(&job, Mode::Plain);
    running.sshd.kill().unwrap();
    running.sshd.wait().unwrap();
    let began = Instant::now();
    let output = running.end();
    assert_eq!(output.status.code(), Some(1));
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
    // Its sshd survives; the next environment on this volume ends it.
    let mut next = job
        .volume
        .entrypoint(
            Mode::Plain,
            &[
                ("SSHD_CONFIG_FILE", ""),
                ("SSHD_OPTIONS", &format!("-E {} -f {}", job.volume.sshd_log().display(), job.sshd_config())),
            ],
        )
        .spawn()
        .unwrap();
    next.wait().unwrap();
}

/// The claim on the volume was seen, so IMS_START_LIMIT no longer applies.
#[test]
fn environment_killed_before_it_listens_is_noticed_within_seconds() {
    let job = Job::new();
    let mut environment = job.volume.entrypoint(Mode::Plain, &[]).spawn().unwrap();
    wait_until("the environment to wait", || {
        std::fs::read_to_string(job.volume.log()).unwrap_or_default().contains("waiting for 'ready'")
    });
    kill(Pid::from_raw(environment.id().cast_signed()), Signal::SIGSTOP).unwrap();
    let sidecar = job.sidecar(Mode::Plain, &[]).spawn().unwrap();
    wait_until("'ready'", || job.volume.signal("ready").exists());
    // The sidecar polls every second.
    std::thread::sleep(Duration::from_secs(2));
    environment.kill().unwrap();
    environment.wait().unwrap();
    let began = Instant::now();
    let output = ended(sidecar);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("it has been gone for 5 s"), "{}", text(&output.stderr));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn terminated_sidecar_closes_the_environment_and_reports() {
    let job = Job::new();
    let mut running = Running::open(&job, Mode::Jailed);
    let sidecar = running.sidecar.take().unwrap();
    let began = Instant::now();
    kill(Pid::from_raw(sidecar.id().cast_signed()), Signal::SIGTERM).unwrap();
    let output = ended(sidecar);
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    assert!(began.elapsed() < Duration::from_secs(9));
    assert_eq!(job.ims.statuses(), ["waiting_on_user", "error"]);
    assert!(job.volume.signal("exiting").exists());
    job.nothing_is_left();
}

#[test]
fn terminated_sidecar_does_not_wait_for_a_missing_environment() {
    let job = Job::new();
    let sidecar = job.sidecar(Mode::Jailed, &[]).spawn().unwrap();
    wait_until("'ready'", || job.volume.signal("ready").exists());
    let began = Instant::now();
    kill(Pid::from_raw(sidecar.id().cast_signed()), Signal::SIGTERM).unwrap();
    let output = ended(sidecar);
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}: {}", began.elapsed(), text(&output.stderr));
    assert!(job.volume.signal("failed").exists());
    assert_eq!(job.ims.statuses(), ["error"]);
}

#[test]
fn terminated_sidecar_closes_the_environment_even_if_ims_is_silent() {
    let job = Job::new();
    job.ims.fail("PATCH /jobs", Fault::Silence);
    let mut running = Running::start(&job, Mode::Plain, &[("IMS_STALL_LIMIT", "100")]);
    let sidecar = running.sidecar.take().unwrap();
    wait_until("IMS to be told", || job.ims.is_well());
    kill(Pid::from_raw(sidecar.id().cast_signed()), Signal::SIGTERM).unwrap();
    let output = ended(sidecar);
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    assert!(job.volume.signal("exiting").exists());
}

#[test]
fn errors_lost_answers_and_expired_tokens_of_ims_are_retried() {
    let job = Job::new();
    for (request, fault) in [
        ("PATCH /jobs", Fault::Status(503)),
        ("PATCH /jobs", Fault::LostAnswer),
        ("POST /token", Fault::Status(500)),
        ("POST /images", Fault::LostAnswer),
        ("GET /images", Fault::ExpiredToken),
        ("PATCH /images", Fault::ExpiredToken),
        ("PATCH /images", Fault::LostAnswer),
        ("GET /jobs", Fault::Silence),
    ] {
        job.ims.fail(request, fault);
    }
    let running = Running::open(&job, Mode::Plain);
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    assert!(output.status.success(), "{}", text(&output.stderr));
    job.is_published(&output);
    assert!(job.ims.state().tokens > 1);
}

#[test]
fn record_of_another_job_with_the_same_name_is_never_taken_for_ones_own() {
    let link = json!({"path": "s3://b/k", "etag": "e", "type": "s3"});
    for rival in
        [Fault::Rival("another", Value::Null), Fault::Rival("compute-ö", link), Fault::Rival("compute-ö", Value::Null)]
    {
        for answer in [Fault::LostAnswer, Fault::Status(504)] {
            let job = Job::new();
            job.ims.state().register("compute-ö", "x86_64", &Value::Null);
            job.ims.fail("GET /images", rival.clone());
            job.ims.fail("POST /images", answer);
            publishes_an_image_of_its_own(&job, 3);
        }
    }
}

#[test]
fn image_is_registered_in_an_ims_without_metadata() {
    let job = Job::new();
    job.ims.state().without_metadata = true;
    publishes_an_image_of_its_own(&job, 1);
    let requests = job.ims.state().requests.clone();
    assert!(!requests.iter().any(|request| request == "GET /apis/ims/images"), "of use to nobody: {requests:?}");
}

/// Publishes; afterwards there are `images` records, and those of others are unchanged.
fn publishes_an_image_of_its_own(job: &Job, images: usize) {
    let running = Running::open(job, Mode::Plain);
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let state = job.ims.state();
    assert_eq!(state.images.len(), images, "{:?}", state.images);
    let own = state.job["resultant_image_id"].as_str().unwrap();
    for (id, record) in &state.images {
        let has_objects = job.bucket.keys().iter().any(|key| key.starts_with(id));
        assert_eq!(has_objects, id == own, "{record}");
        // Other records have no metadata.
        assert_eq!(record.get("metadata").is_some(), id == own, "{record}");
    }
}

/// IMS ends the job on success, and terminates the pod.
#[test]
fn reported_success_is_final() {
    let success = format!("PATCH /jobs/{} {{\"status\":\"success\"}}", testbed::ims_server::JOB);
    // The status of a finished job is sent again, and refused; after a signal, the job's record is read instead.
    for (fault, refused) in [(Fault::LostAnswer, 1), (Fault::SilentlyDone, 0)] {
        let job = Job::new();
        job.ims.fail(&success, fault.clone());
        // Longer than the time for a server after a signal: otherwise the status may be sent again before.
        let running = Running::start(&job, Mode::Plain, &[("IMS_STALL_LIMIT", "100")]).waiting_on_user();
        let pid = Pid::from_raw(running.sidecar.as_ref().unwrap().id().cast_signed());
        running.mark(Mode::Plain, "complete");
        wait_until("'success'", || job.ims.status() == "success");
        if matches!(fault, Fault::SilentlyDone) {
            kill(pid, Signal::SIGTERM).unwrap();
        }
        let output = running.end();
        assert!(output.status.success(), "{fault:?}: {}", text(&output.stderr));
        assert_eq!(std::mem::take(&mut job.ims.state().refused).len(), refused, "{fault:?}: {}", text(&output.stderr));
        job.is_published(&output);
    }
}

/// IMS may know the image as published, but does not answer.
#[test]
fn image_that_ims_may_know_as_published_is_not_rolled_back() {
    let told = format!("PATCH /jobs/{} {{\"status\":\"success\"}}", testbed::ims_server::JOB);
    for is_known in [true, false] {
        let job = Job::new();
        job.ims.fail(&told, if is_known { Fault::SilentlyDone } else { Fault::Silence });
        let running = Running::start(&job, Mode::Jailed, &[("IMS_STALL_LIMIT", "100")]).waiting_on_user();
        let pid = Pid::from_raw(running.sidecar.as_ref().unwrap().id().cast_signed());
        running.mark(Mode::Jailed, "complete");
        wait_until("IMS to be told", || job.ims.is_well());
        for _ in 0..100 {
            job.ims.fail("GET /jobs", Fault::Silence);
        }
        let began = Instant::now();
        kill(pid, Signal::SIGTERM).unwrap();
        let output = running.end();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(began.elapsed() < Duration::from_secs(10), "{said}");
        assert!(
            said.contains("IMS may know the image as published") && said.contains("run the same command again"),
            "{said}"
        );
        assert_eq!((job.ims.state().images.len(), job.bucket.keys().len()), (1, 5), "{said}");
        assert_eq!(job.ims.status(), if is_known { "success" } else { "packaging_artifacts" });
        job.ims.forget_faults();
        let output = ended(job.sidecar(Mode::Jailed, &[]).spawn().unwrap());
        assert!(output.status.success(), "{output:?}");
        assert_eq!(job.ims.status(), "success");
        assert_eq!(report(&output)["result"], "success");
        assert_eq!((job.ims.state().images.len(), job.bucket.keys().len()), (1, 5));
    }
}

#[test]
fn refusal_of_ims_is_quoted_and_everything_is_rolled_back() {
    let job = Job::new();
    job.ims.fail("PATCH /images", Fault::Status(400));
    let running = Running::open(&job, Mode::Plain);
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    assert_eq!(output.status.code(), Some(1));
    assert!(report(&output)["error"].as_str().unwrap().contains("400 Bad Request: Out of order"), "{output:?}");
    assert_eq!(job.ims.status(), "error");
    job.nothing_is_left();
}

#[test]
fn unreachable_ims_is_given_up_after_the_retry_limit() {
    let job = Job::new();
    for _ in 0..100 {
        job.ims.fail("GET /jobs", Fault::Status(503));
    }
    let began = Instant::now();
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_RETRY_LIMIT", "2")]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    let tried = seconds_tried(&said);
    assert!(tried <= began.elapsed().as_secs() + 1, "{tried}: {said}");
    assert_eq!(said.matches("trying again for 2 s (IMS_RETRY_LIMIT)").count(), 1, "told once: {said}");
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(job.ims.status(), "error");
}

#[test]
fn unknown_job_is_refused_before_the_environment_opens() {
    const UNKNOWN: &str = "00000000-0000-4000-8000-000000000404";
    let job = Job::new();
    let further = [("IMS_JOB_ID", UNKNOWN)];
    // An environment has no credentials for IMS: it hears of the refusal from the sidecar.
    let sshd = job.volume.entrypoint(Mode::Plain, &further).spawn().unwrap();
    job.ims.fail("GET /jobs", Fault::Status(503));
    let output = ended(job.sidecar(Mode::Plain, &further).spawn().unwrap());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let refusal = format!("cannot find job {UNKNOWN} in IMS at {}: the server answers 404 Not Found: ", job.ims.url);
    assert_eq!(said.matches(&refusal).count(), 1, "{said}");
    assert!(said.contains("see IMS_JOB_ID and IMS_URL"), "{said}");
    assert!(report(&output)["error"].as_str().unwrap().starts_with(&refusal), "{output:?}");
    assert!(!job.volume.signal("ready").exists() && job.volume.signal("failed").exists());
    let closed = output_within(sshd, Duration::from_secs(20)).unwrap().expect("the environment closes");
    assert!(closed.status.success(), "{closed:?}");
    job.nothing_is_left();
}

#[test]
fn probe_of_ims_names_the_id_that_it_asks_for() {
    let job = Job::new();
    job.ims.fail("GET /images", Fault::Status(403));
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_JOB_ID", "")]).spawn().unwrap());
    let said = text(&output.stderr);
    let asked = job.ims.state().requests.iter().find_map(|r| Some(r.split_once("/images/")?.1.to_owned())).unwrap();
    let probe = format!("check that IMS answers, by a request for image {asked}, which does not exist");
    assert!(said.contains(&probe), "{said}");
}

#[test]
fn refusal_of_the_store_leaves_neither_objects_nor_a_record() {
    let job = Job::new();
    let running = Running::open(&job, Mode::Plain);
    assert_eq!(job.bucket.ask("DELETE", "", b"").status, 204);
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    assert_eq!(output.status.code(), Some(1));
    assert!(report(&output)["error"].as_str().unwrap().contains("NoSuchBucket"), "{output:?}");
    assert_eq!(job.ims.status(), "error");
    job.nothing_is_left();
}

#[test]
fn broken_connections_to_the_store_are_retried() {
    let job = Job::new();
    let random = feed(Command::new("head").args(["-c", "40M", "/dev/urandom"]), b"").stdout;
    std::fs::write(job.volume.image_root.join("random"), random).unwrap();
    // Requests for objects survive: the server closes a connection after each request.
    let (look, upload) = ([0, 1, 20, 50, 100, 200, 300], [500, 100_000, 1_000_000, 2_000_000, 3_000_000]);
    // Small requests, which succeed, use up some of the faults.
    let breaker = Breaker::start(&[&look[..], &[usize::MAX; 6], &upload, &upload, &upload].concat(), 1);
    let running = Running::start(&job, Mode::Plain, &[("S3_ENDPOINT", breaker.endpoint.as_str())].map(|(n, v)| (n, v)))
        .waiting_on_user();
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let broken = breaker.broken.load(std::sync::atomic::Ordering::Relaxed);
    assert!(broken >= 10, "{broken}");
    job.is_published(&output);
    assert_eq!(job.bucket.unfinished_uploads(), 0, "though the answers to some were lost");
}

/// Kills the sidecar at a given moment, and starts it again.
fn killed_when(moment: &str, has_come: impl Fn(&Job) -> bool) {
    let job = Job::new();
    let random = feed(Command::new("head").args(["-c", "40M", "/dev/urandom"]), b"").stdout;
    std::fs::write(job.volume.image_root.join("random"), random).unwrap();
    let mut running = Running::start(&job, Mode::Plain, &[]);
    let early = ["ready", "listening"].contains(&moment);
    if !early {
        wait_until("'waiting_on_user'", || job.ims.status() == "waiting_on_user");
        job.volume.touch("complete");
    }
    wait_until(moment, || has_come(&job));
    running.kill_sidecar();
    // At once: the packer may still be ending.
    let second = job.sidecar(Mode::Plain, &[]).spawn().unwrap();
    running.sidecar = Some(second);
    if early {
        wait_until("'waiting_on_user'", || job.ims.status() == "waiting_on_user");
        job.volume.touch("complete");
    }
    let output = running.end();
    assert!(output.status.success(), "{moment}: {}", text(&output.stderr));
    if job.ims.state().changes.iter().filter(|(_, _, body)| body["status"] == "success").count() == 1
        && !output.stdout.is_empty()
    {
        job.is_published(&output);
    }
    assert_eq!(job.ims.status(), "success", "{moment}");
    assert_eq!(job.ims.state().images.len(), 1, "{moment}: one image, and no orphan");
    assert_eq!(job.bucket.keys().len(), 5, "{moment}: {:?}", job.bucket.keys());
    assert!(!job.ims.statuses().contains(&"error".to_owned()));
}

#[test]
fn sidecar_killed_before_packing_continues() {
    killed_when("ready", |job| job.volume.signal("ready").exists());
    killed_when("listening", |job| job.ims.status() == "waiting_on_user");
    killed_when("closing", |job| job.volume.signal("exiting").exists());
    killed_when("packing", |job| job.volume.parent.join("compute-ö.sqsh.part").exists());
}

#[test]
fn sidecar_killed_during_publication_continues_with_the_same_image() {
    let done = |job: &Job, method: &str, path: &str| {
        job.ims.state().changes.iter().any(|(m, p, _)| m == method && p.starts_with(path))
    };
    killed_when("packed", |job| job.volume.parent.join("compute-ö.sqsh").exists());
    killed_when("registered", |job| done(job, "POST", "/images"));
    killed_when("uploading", |job| !job.bucket.keys().is_empty() || job.bucket.unfinished_uploads() > 0);
    killed_when("uploaded", |job| job.bucket.keys().iter().any(|key| key.ends_with("manifest.json")));
    killed_when("linked", |job| done(job, "PATCH", "/images"));
    killed_when("success", |job| job.ims.status() == "success");
}

#[test]
fn status_shows_packing_and_uploading_only_while_the_sidecar_lives() {
    let job = Job::new();
    let random = feed(Command::new("head").args(["-c", "40M", "/dev/urandom"]), b"").stdout;
    std::fs::write(job.volume.image_root.join("random"), random).unwrap();
    let status = || {
        let printed = succeed(Command::new(&IMS_SSHD).args(["status", "--json"]).arg(&job.volume.parent));
        serde_json::from_str::<Value>(&printed).unwrap()
    };
    let stalling = [("IMS_STALL_LIMIT", "100")];
    let mut running = Running::start(&job, Mode::Plain, &stalling).waiting_on_user();
    assert_eq!(status()["state"], "serving");
    // IMS receives the status of packing, and does not answer.
    job.ims.fail("PATCH /jobs", Fault::Silence);
    running.mark(Mode::Plain, "complete");
    wait_until("'packing'", || status()["state"] == "packing");
    assert_eq!(status()["verdict"], "complete");
    humantime::parse_rfc3339(status()["since"].as_str().unwrap()).unwrap();
    running.kill_sidecar();
    assert_eq!(status()["state"], "done", "nobody packs any more");
    let gate = Gate::start(0, Closed::Silent);
    let further = [("S3_ENDPOINT", gate.endpoint.as_str()), stalling[0]];
    running.sidecar = Some(job.sidecar(Mode::Plain, &further).spawn().unwrap());
    wait_until("a part to be sent", || gate.parts() > 0);
    assert_eq!(status()["state"], "uploading");
    let words = succeed(Command::new(&IMS_SSHD).arg("status").arg(&job.volume.parent));
    assert!(words.contains(": uploading since ") && words.contains(", marked complete"), "{words}");
    running.kill_sidecar();
    assert!(ended(job.sidecar(Mode::Plain, &[]).spawn().unwrap()).status.success());
    assert_eq!(status()["state"], "done");
}

#[test]
fn sidecar_killed_during_an_upload_sends_only_missing_parts() {
    let job = Job::new();
    let random = feed(Command::new("head").args(["-c", "60M", "/dev/urandom"]), b"").stdout;
    std::fs::write(job.volume.image_root.join("random"), random).unwrap();
    let gate = Gate::start(1, Closed::Silent);
    let further = [("S3_ENDPOINT", gate.endpoint.as_str()), ("IMS_STALL_LIMIT", "100")];
    let mut running = Running::start(&job, Mode::Plain, &further).waiting_on_user();
    running.mark(Mode::Plain, "complete");
    // One part is accepted, and the next three are being sent.
    wait_until("the parts to be sent", || gate.parts() == 4);
    running.kill_sidecar();
    let gate = Gate::start(usize::MAX, Closed::Silent);
    running.sidecar = Some(job.sidecar(Mode::Plain, &[("S3_ENDPOINT", &gate.endpoint)]).spawn().unwrap());
    let output = running.end();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!((gate.parts(), gate.begun(), job.bucket.unfinished_uploads()), (3, 0, 0));
    job.is_published(&output);
}

/// A sidecar that was killed during an upload, and its environment, which has closed.
fn killed_amid_an_upload(job: &Job) -> Running<'_> {
    let random = feed(Command::new("head").args(["-c", "40M", "/dev/urandom"]), b"").stdout;
    std::fs::write(job.volume.image_root.join("random"), random).unwrap();
    let gate = Gate::start(0, Closed::Silent);
    let further = [("S3_ENDPOINT", gate.endpoint.as_str()), ("IMS_STALL_LIMIT", "100")];
    let mut running = Running::start(job, Mode::Plain, &further).waiting_on_user();
    running.mark(Mode::Plain, "complete");
    wait_until("a part to be sent", || gate.parts() > 0);
    running.kill_sidecar();
    assert_eq!((job.bucket.unfinished_uploads(), job.ims.state().images.len()), (1, 1));
    running
}

#[test]
fn partial_publication_is_rolled_back_if_the_job_fails() {
    let job = Job::new();
    let _running = killed_amid_an_upload(&job);
    job.volume.touch("pod_error");
    let output = ended(job.sidecar(Mode::Plain, &[]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert_eq!(job.ims.status(), "error");
    job.nothing_is_left();
    assert!(!job.volume.parent.join(".ims-sshd.publication").exists(), "there is nothing to go on with");
}

#[test]
fn image_registered_with_a_lost_answer_is_found_or_rolled_back() {
    for given_up in [false, true] {
        let job = Job::new();
        job.ims.fail("POST /images", Fault::SilentlyDone);
        let mut running = Running::start(&job, Mode::Plain, &[("IMS_STALL_LIMIT", "100")]).waiting_on_user();
        running.mark(Mode::Plain, "complete");
        wait_until("the image to be registered", || !job.ims.state().images.is_empty());
        running.kill_sidecar();
        if given_up {
            job.volume.touch("pod_error");
        }
        let output = ended(job.sidecar(Mode::Plain, &[]).spawn().unwrap());
        assert_eq!(output.status.success(), !given_up, "{}", text(&output.stderr));
        if given_up {
            job.nothing_is_left();
        } else {
            job.is_published(&output);
        }
    }
}

#[test]
fn pod_restarted_during_an_upload_continues_with_the_same_image() {
    let job = Job::new();
    let source = job.volume.dir.path().join("source");
    std::fs::rename(&job.volume.image_root, &source).unwrap();
    let prepare = || {
        let mut prepare = ims_sshd(&["prepare", "--open", "unpack"], &job.variables(Mode::Plain));
        let output = prepare.args([&job.volume.parent, &source]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    };
    prepare();
    let mut running = killed_amid_an_upload(&job);
    prepare();
    running.sidecar = Some(job.sidecar(Mode::Plain, &[]).spawn().unwrap());
    let output = running.end();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(job.bucket.unfinished_uploads(), 0);
    job.is_published(&output);
}

#[test]
fn without_ims_and_store_the_packed_image_stays_on_the_volume() {
    let job = Job::new();
    let nowhere = ["IMS_URL", "OAUTH_CONFIG_DIR", "S3_BUCKET", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY"];
    let further: Vec<_> = nowhere.map(|name| (name, "")).into();
    let running = Running::start(&job, Mode::Plain, &further);
    wait_until("sshd", || job.volume.signal("sshd_listening").exists());
    running.mark(Mode::Plain, "complete");
    let output = running.end();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(job.volume.parent.join("compute-ö.sqsh").exists());
    let log = text(&output.stderr);
    assert!(log.find("no store is named") < log.find("'ready'"), "{log}");
    let report = report(&output);
    assert_eq!(report["archive"], job.volume.parent.join("compute-ö.sqsh").display().to_string());
}

/// Variables without an IMS.
const ALONE: [(&str, &str); 2] = [("IMS_URL", ""), ("OAUTH_CONFIG_DIR", "")];

/// Entrypoint in the pod of `job`.
fn waiting(job: &Job) -> Child {
    let config = job.sshd_config();
    let options = format!("-E {} -f {config}", job.volume.sshd_log().display());
    let variables = [("SSHD_OPTIONS", options.as_str()), ("SSHD_CONFIG_FILE", config.as_str())];
    let sshd = job.volume.entrypoint(Mode::Jailed, &variables).spawn().unwrap();
    wait_until("the entrypoint to wait", || {
        std::fs::read_to_string(job.volume.log()).is_ok_and(|log| log.contains("waiting for 'ready'"))
    });
    sshd
}

fn has_closed_as_failed(job: &Job, mut sshd: Child) {
    let mut code = None;
    wait_until("the entrypoint to end", || {
        code = sshd.try_wait().unwrap();
        code.is_some()
    });
    assert_eq!(code.unwrap().code(), Some(0));
    let stand = ["ready", "failed", "exiting"].map(|name| job.volume.signal(name).exists());
    assert_eq!(stand, [false, true, true]);
}

#[test]
fn waiting_environment_closes_if_the_sidecar_fails_before_ready() {
    type Case<'a> = (&'a str, &'a [(&'static str, &'a str)], u8, &'a str);
    let cases: [Case; 6] = [
        ("a level", &[("LOG_LEVEL", "verbose")], 2, "LOG_LEVEL is 'verbose'"),
        ("a token", &[], 1, "get a token from"),
        ("an action", &[("IMS_ACTION", "")], 2, "IMS_ACTION is not set"),
        ("a key", &[], 2, "it is a private key"),
        ("a URL", &[("S3_ENDPOINT", "127.0.0.1:5777")], 2, "S3_ENDPOINT is '127.0.0.1:5777'"),
        ("a bucket", &[("S3_BUCKET", "no-such-bucket")], 1, "NoSuchBucket"),
    ];
    for (number, (missing, further, code, why)) in cases.into_iter().enumerate() {
        let job = Job::new();
        // The journal belongs to another job.
        job.volume.touch("failed");
        let before = (number % 2 == 0).then(|| waiting(&job));
        match missing {
            "a token" => job.ims.fail("POST /token", Fault::Status(401)),
            "a key" => {
                let key = "-----BEGIN OPENSSH PRIVATE KEY-----\n";
                std::fs::write(job.volume.dir.path().join("authorized_keys"), key).unwrap();
            }
            _ => {}
        }
        let output = ended(job.sidecar(Mode::Jailed, further).spawn().unwrap());
        assert_eq!(output.status.code(), Some(code.into()), "{missing}: {output:?}");
        assert!(report(&output)["error"].as_str().unwrap().contains(why), "{missing}: {output:?}");
        assert_eq!(job.ims.statuses(), ["error"], "{missing}");
        has_closed_as_failed(&job, before.unwrap_or_else(|| waiting(&job)));
        job.nothing_is_left();
    }
}

#[test]
fn waiting_environment_can_be_marked_failed_but_not_complete() {
    let job = Job::new();
    job.volume.touch("failed");
    let mut sshd = waiting(&job);
    let mark = |verdict| Command::new(&IMS_SSHD).arg(verdict).arg(&job.volume.parent).output().unwrap();
    let refused = mark("complete");
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stderr).contains("is not open yet"), "{refused:?}");
    assert!(sshd.try_wait().unwrap().is_none(), "a mark of another job does not count");
    assert!(mark("fail").status.success());
    has_closed_as_failed(&job, sshd);
}

#[test]
fn refusal_of_ims_or_store_fails_before_ready_and_an_outage_causes_a_warning() {
    let job = Job::new();
    job.ims.fail("GET /images", Fault::Status(403));
    let output = ended(job.sidecar(Mode::Plain, &[("IMS_JOB_ID", "")]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!job.volume.signal("ready").exists());

    for (status, is_certain) in [("403 Forbidden", true), ("500 Internal Server Error", false)] {
        let job = Job::new();
        let endpoint = testbed::s3_server::always(status, "<html><body>out of order</body></html>");
        let further = [&ALONE[..], &[("S3_ENDPOINT", &endpoint), ("IMS_START_LIMIT", "1")]].concat();
        let output = ended(job.sidecar(Mode::Plain, &further).spawn().unwrap());
        let log = text(&output.stderr);
        assert_eq!(job.volume.signal("ready").exists(), !is_certain, "{log}");
        assert!(log.contains(&format!("answers {status}")) && !log.contains("html"), "{log}");
    }
}

#[test]
fn sidecar_run_again_after_a_failed_publication_publishes() {
    for begins_again in [false, true] {
        let job = Job::new();
        let running = Running::start(&job, Mode::Jailed, &ALONE);
        wait_until("sshd", || job.volume.signal("sshd_listening").exists());
        running.ssh("echo new > /etc/motd");
        assert_eq!(job.bucket.ask("DELETE", "", b"").status, 204);
        running.mark(Mode::Jailed, "complete");
        let output = running.end();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains("continues from there"), "{output:?}");
        assert_eq!(job.bucket.ask("PUT", "", b"").status, 200);
        if begins_again {
            // The state after `prepare`.
            for name in ["ready", "sshd_listening", "complete", "exiting"] {
                std::fs::remove_file(job.volume.signal(name)).unwrap();
            }
        }
        let output = ended(job.sidecar(Mode::Jailed, &ALONE).spawn().unwrap());
        assert!(output.status.success(), "{output:?}");
        assert_eq!(report(&output)["result"], "success");
        assert_eq!(job.bucket.keys().len(), 5);
        assert_eq!(std::fs::read_to_string(job.unpacked().join("etc/motd")).unwrap(), "new\n");
        if begins_again {
            assert!(waiting(&job).wait().unwrap().success());
            assert!(job.volume.signal("exiting").exists() && !job.volume.signal("failed").exists());
        }
    }
}

/// Runs the sidecar of a finished job again, which only reports.
fn has_ended(job: &Job, further: &[(&'static str, &str)], first: &Output) -> Output {
    let stamps = || {
        let volume = std::fs::read_dir(&job.volume.parent).unwrap().map(Result::unwrap);
        // Only its own claim changes.
        let files = volume.filter(|entry| !entry.file_name().to_string_lossy().starts_with(".ims-sshd.sidecar"));
        let mut stamps: Vec<_> = files.map(|e| (e.file_name(), e.metadata().unwrap().modified().unwrap())).collect();
        stamps.sort();
        stamps
    };
    let before = stamps();
    let began = Instant::now();
    let output = ended(job.sidecar(Mode::Plain, further).spawn().unwrap());
    assert_eq!(output.status.code(), first.status.code(), "{output:?}");
    assert!(text(&output.stderr).contains("the job has ended already"), "{output:?}");
    assert_eq!(report(&output)["result"], report(first)["result"]);
    assert_eq!(stamps(), before);
    assert!(began.elapsed() < Duration::from_secs(5));
    output
}

#[test]
fn sidecar_run_again_after_the_end_only_reports() {
    let nowhere: Vec<_> =
        [&ALONE[..], &[("S3_BUCKET", ""), ("S3_ENDPOINT", ""), ("S3_ACCESS_KEY", ""), ("S3_SECRET_KEY", "")]].concat();
    for (verdict, further) in
        [("complete", &ALONE[..]), ("failed", &ALONE), ("complete", &nowhere), ("failed", &nowhere)]
    {
        let job = Job::new();
        let running = Running::start(&job, Mode::Plain, further);
        wait_until("sshd", || job.volume.signal("sshd_listening").exists());
        running.mark(Mode::Plain, verdict);
        let first = running.end();
        assert_eq!(first.status.code(), Some(0), "{first:?}");
        let keys = job.bucket.keys();
        let output = has_ended(&job, further, &first);
        assert_eq!(job.bucket.keys(), keys);
        if verdict == "complete" && further.len() == ALONE.len() {
            let link = &report(&output)["ims_image_record"]["link"];
            assert_eq!(*link, report(&first)["ims_image_record"]["link"]);
        }
        // The environment of a pod that starts over is closed.
        for name in ["ready", "sshd_listening", "complete", "failed", "exiting"] {
            let _ = std::fs::remove_file(job.volume.signal(name));
        }
        ended(job.sidecar(Mode::Plain, further).spawn().unwrap());
        assert!(waiting(&job).wait().unwrap().success());
        assert_eq!(job.volume.signal("failed").exists(), verdict == "failed");
    }
}

#[test]
fn changed_image_record_is_neither_used_nor_reported_as_published() {
    type Change = fn(&Job, &str);
    let cases: [(&str, Change, bool); 6] = [
        ("nothing", |_, _| {}, true),
        ("link", |job, id| job.ims.state().images.get_mut(id).unwrap()["link"]["path"] = "s3://b/foreign".into(), true),
        ("etag", |job, id| job.ims.state().images.get_mut(id).unwrap()["link"]["etag"] = "foreign".into(), true),
        ("metadata", |job, id| job.ims.state().images.get_mut(id).unwrap()["metadata"] = json!({}), true),
        ("id", |job, id| job.ims.state().images.get_mut(id).unwrap()["id"] = testbed::ims_server::JOB.into(), true),
        ("manifest", |job, id| job.bucket.put(&format!("{id}/manifest.json"), b"{}"), false),
    ];
    for (what, change, is_published) in cases {
        let job = Job::laid_out("build/image-root");
        job.ims.fail("PATCH /images", Fault::SilentlyDone);
        let create = [("IMS_ACTION", "create")];
        let silent = [create[0], ("IMS_STALL_LIMIT", "100")];
        let mut sidecar = job.sidecar(Mode::Plain, &silent).spawn().unwrap();
        wait_until("the image to be linked", || {
            job.ims.state().changes.iter().any(|(method, path, _)| method == "PATCH" && path.starts_with("/images"))
        });
        sidecar.kill().unwrap();
        sidecar.wait().unwrap();
        let id = job.ims.state().images.keys().next().unwrap().clone();
        change(&job, &id);
        let output = ended(job.sidecar(Mode::Plain, &create).spawn().unwrap());
        assert_eq!(output.status.success(), is_published, "{what}: {output:?}");
        let published = job.ims.state().job["resultant_image_id"].clone();
        match what {
            "nothing" => assert_eq!(published, *id),
            "manifest" => assert!(published.is_null() && text(&output.stderr).contains("is not the manifest")),
            _ => {
                assert!(published.is_string() && published != *id, "{what}: {published}");
                assert!(text(&output.stderr).contains("was not created by this job"), "{what}: {output:?}");
            }
        }
    }
}

#[test]
fn job_marked_failed_ends_with_a_report() {
    let job = Job::new();
    let running = Running::start(&job, Mode::Plain, &ALONE);
    wait_until("sshd", || job.volume.signal("sshd_listening").exists());
    running.mark(Mode::Plain, "failed");
    let output = running.end();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(report(&output)["error"].as_str().unwrap().contains("was marked failed"), "{output:?}");
}

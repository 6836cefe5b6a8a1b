//! Jobs that end well.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use testbed::job::*;
use testbed::node::Lab;
use testbed::*;

use crate::remote::Remote;

#[test]
fn image_is_changed_and_packed_on_the_node_and_published_from_the_pod() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    for mode in [Mode::Jailed, Mode::Plain] {
        let mut remote = Remote::new(&lab, node, mode);
        std::fs::create_dir(remote.job.volume.dir.path().join("ca")).unwrap();
        std::fs::write(remote.job.volume.dir.path().join("ca/certificate_authority.crt"), "authority").unwrap();
        // The names are searched for in one of the jobs.
        let kernel = if mode == Mode::Plain { "auto" } else { "vmlinuz" };
        let names = [("REMOTE_BUILD_NODE", node.address.as_str()), ("KERNEL_FILENAME", kernel)];
        // The container that opens the image is not told the names; prepare is.
        let (parent, source) = (&remote.job.volume.parent.clone(), remote.job.volume.dir.path().join("source.sqsh"));
        std::fs::rename(parent.join("image.sqsh"), &source).unwrap();
        let given = names.map(|(name, value)| (name, value.to_owned()));
        let mut prepare = ims_sshd(&["prepare", parent.to_str().unwrap(), source.to_str().unwrap()], &given);
        succeed(&mut prepare);
        let sidecar = remote.job.sidecar(mode, &names).spawn().unwrap();
        remote.start(&[]);
        remote.wait_for("sshd_listening");
        wait_until("'waiting_on_user'", || remote.job.ims.status() == "waiting_on_user");
        assert_eq!(node.jobs(), [remote.directory()]);
        let status = || text(&ims_sshd(&["status", parent.to_str().unwrap()], &[]).output().unwrap().stdout);
        let mut session = remote.ssh(&[]);
        let session = Ended::killed(session.stdin(Stdio::piped()).arg("cat; exit").spawn().unwrap());
        wait_until("the session in the status", || status().contains("cat; exit"));
        let (shown, tier) = (status(), if mode == Mode::Jailed { "namespace" } else { "plain" });
        assert!(shown.contains(": serving since 20") && shown.contains(&format!(", tier {tier}")), "{shown}");
        assert!(shown.contains(&format!("  node: root@{}\n  127.0.0.1  since 20", node.address)), "{shown}");
        drop(session);
        wait_until("the session's end in the status", || !status().contains("cat; exit"));
        let root = if mode == Mode::Jailed { "" } else { "/mnt/image/image-root" };
        assert_eq!(remote.says(&format!("cat {root}/etc/cray/ca/certificate_authority.crt")), "authority");
        assert_eq!(remote.says(&format!("cat {root}/etc/resolv.conf")), "nameserver 192.0.2.53");
        assert_eq!(remote.says("echo $REMOTE_BUILD_NODE"), node.address);
        assert_eq!(remote.run("exit 7").status.code(), Some(7));
        remote.says(&format!("echo changed > {root}/etc/changed"));
        let mark = if mode == Mode::Jailed { "/tmp/complete" } else { "/mnt/image/complete" };
        remote.run(&format!("touch {mark}"));
        assert_eq!(remote.end(), 0, "{}", remote.log());
        let output = sidecar.wait_with_output().unwrap();
        assert!(output.status.success(), "{}\n{}", text(&output.stderr), remote.log());
        remote.job.is_published(&output);
        let published = remote.job.unpacked();
        assert_eq!(std::fs::read_to_string(published.join("etc/changed")).unwrap(), "changed\n");
        assert_eq!(std::fs::read_to_string(published.join("boot/vmlinuz")).unwrap(), "a kernel");
        assert!(!published.join("etc/resolv.conf").exists(), "the node's resolv.conf was packed");
        assert!(!remote.job.volume.signal("pod_error").exists());
        node.is_as_before(&before);
    }
}

#[test]
fn image_marked_failed_on_a_node_sets_error_and_is_not_published() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    for mode in [Mode::Jailed, Mode::Plain] {
        let mut remote = Remote::new(&lab, node, mode);
        let sidecar = remote.job.sidecar(mode, &[("REMOTE_BUILD_NODE", node.address.as_str())]).spawn().unwrap();
        remote.start(&[]);
        remote.wait_for("sshd_listening");
        wait_until("'waiting_on_user'", || remote.job.ims.status() == "waiting_on_user");
        remote.run(if mode == Mode::Jailed { "touch /tmp/failed" } else { "touch /mnt/image/failed" });
        assert_eq!(remote.end(), 0, "{}", remote.log());
        let output = sidecar.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(remote.job.ims.statuses(), ["waiting_on_user", "error"]);
        remote.job.nothing_is_left();
        assert!(!remote.job.volume.signal("transfer.sqsh").exists());
        node.is_as_before(&before);
    }
}

#[test]
fn plain_session_changes_nothing_of_the_node() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let mut remote = Remote::new(&lab, node, Mode::Plain);
    remote.open();
    remote.says(
        "rm -rf /etc/ssh /root /var/lib/dpkg /opt; mkdir /var/lib/new; for d in etc run tmp; do echo x > /$d/new; done",
    );
    assert_eq!(remote.says("cat /tmp/new; ls /tmp | grep -c ^ims_ || true"), "x\n0");
    std::fs::write(remote.job.volume.signal("failed"), "").unwrap();
    assert_eq!(remote.end(), 0, "{}", remote.log());
    node.is_as_before(&before);
}

#[test]
fn second_job_sends_no_program_and_a_damaged_one_is_replaced() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let mut sent = Vec::new();
    for damage in [false, false, true] {
        let place = node.path("/var/lib/ims-sshd");
        if damage {
            let name = std::fs::read_dir(&place).unwrap().next().unwrap().unwrap().file_name();
            std::fs::write(place.join(name).join("ims-jail-shell"), "").unwrap();
        }
        let mut remote = Remote::new(&lab, node, Mode::Jailed);
        remote.open();
        remote.run("touch /tmp/failed");
        assert_eq!(remote.end(), 0, "{}", remote.log());
        sent.push(remote.log().contains("sent ims-sshd to"));
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 1);
        assert_eq!(std::fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o700);
    }
    assert_eq!(sent, [true, false, true]);
}

#[test]
fn programs_of_other_versions_that_nobody_uses_are_removed_from_a_node() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let place = node.path("/var/lib/ims-sshd");
    let [old, new, used, other] = ["a".repeat(64), "b".repeat(64), "c".repeat(64), "d".repeat(64)];
    for name in [&old, &new, &used] {
        let directory = place.join(name);
        std::fs::create_dir_all(&directory).unwrap();
        for program in ["ims-sshd", "ims-jail-shell"] {
            std::fs::copy("/bin/sleep", directory.join(program)).unwrap();
        }
    }
    // Something else of the administrator's.
    std::fs::create_dir(place.join(&other)).unwrap();
    let aged = |name: &str| succeed(Command::new("touch").args(["-d", "2 days ago"]).arg(place.join(name)));
    for name in [&old, &used, &other] {
        aged(name);
    }
    let run = format!("setsid /var/lib/ims-sshd/{used}/ims-sshd 1000 </dev/null >/dev/null 2>&1 &");
    assert!(lab.ssh(node, &run).status.success());
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.open();
    let names: Vec<_> = [&old, &new, &used, &other].map(|name| place.join(name).exists()).into();
    assert_eq!(names, [false, true, true, true], "{}", remote.log());
    remote.run("touch /tmp/failed");
    assert_eq!(remote.end(), 0, "{}", remote.log());
}

#[test]
fn key_that_is_tied_to_jobs_answers_ims_runs_jobs_and_nothing_else() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let installed = node.path("/usr/local/bin");
    std::fs::copy(&*IMS_SSHD, installed.join("ims-sshd")).unwrap();
    std::fs::copy(&*IMS_JAIL_SHELL, installed.join("ims-jail-shell")).unwrap();
    let public = std::fs::read_to_string(lab.key.with_extension("pub")).unwrap();
    let line = format!("restrict,port-forwarding,command=\"/usr/local/bin/ims-sshd node --shell\" {public}");
    std::fs::write(node.path("/root/.ssh/authorized_keys"), line).unwrap();
    for (command, answer) in [
        ("uname -i", "x86_64\n"),
        ("which podman", "/usr/bin/podman\n"),
        ("ls -d1 /tmp/* | grep /tmp/ims_ | wc -l", "0\n"),
    ] {
        let output = lab.ssh(node, command);
        assert_eq!((output.status.code(), text(output.stdout)), (Some(0), answer.into()), "{command}");
    }
    for command in ["id", "", "uname -i; id", "sh -c id sh", "env /bin/sh node", "/usr/local/bin/ims-sshd status"] {
        let output = lab.ssh(node, command);
        assert_eq!((output.status.code(), text(output.stdout)), (Some(1), String::new()), "{command}");
        assert!(text(output.stderr).contains("only build jobs of IMS may use this key"), "{command}");
    }
    let before = node.state();
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.open();
    assert_eq!(remote.says("cat /etc/passwd > /etc/copied; echo $IMS_JOB_ID"), remote.id());
    remote.run("touch /tmp/complete");
    assert_eq!(remote.end(), 0, "{}", remote.log());
    node.is_as_before(&before);
    std::fs::write(installed.join("ims-jail-shell"), "another version").unwrap();
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.start(&[]);
    remote.job.volume.touch("ready");
    remote.fails(1, "this node runs the one that is installed");
    node.is_as_before(&before);
}

#[test]
fn jail_of_a_job_with_dkms_can_stay_closed_on_a_node() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    for (value, code) in [("open", 0), ("closed", 1)] {
        let mut remote = Remote::new(&lab, node, Mode::Jailed);
        remote.start(&[("JOB_ENABLE_DKMS", "True"), ("IMS_REMOTE_DKMS", value)]);
        remote.job.volume.touch("ready");
        remote.wait_for("sshd_listening");
        assert_eq!(remote.says("echo $IMS_DKMS_ENABLED"), "True");
        assert_eq!(remote.run("test -e /dev/loop-control").status.code(), Some(code), "{value}");
        remote.run("touch /tmp/failed");
        assert_eq!(remote.end(), 0, "{}", remote.log());
    }
}

#[test]
fn two_jobs_at_once_have_an_environment_each() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let mut jobs: Vec<_> = [Mode::Jailed, Mode::Plain].map(|mode| Remote::new(&lab, node, mode)).into();
    for job in &mut jobs {
        job.start(&[]);
        job.job.volume.touch("ready");
    }
    for job in &jobs {
        job.wait_for("sshd_listening");
    }
    assert_eq!(node.jobs().len(), 2);
    let names: Vec<_> = jobs.iter().map(|job| job.says("echo $IMS_JOB_ID")).collect();
    assert_ne!(names[0], names[1]);
    jobs[0].run("touch /tmp/complete");
    assert_eq!(jobs[0].end(), 0, "{}", jobs[0].log());
    assert!(jobs[0].job.volume.signal("transfer.sqsh").exists());
    assert_eq!(jobs[1].says("ls /mnt/image/image-root/etc/passwd"), "/mnt/image/image-root/etc/passwd");
    jobs[1].run("touch /mnt/image/failed");
    assert_eq!(jobs[1].end(), 0, "{}", jobs[1].log());
    node.is_as_before(&before);
}

#[test]
fn prepare_of_a_remote_job_makes_a_squashfs_of_any_source_and_nothing_else() {
    let (_dir, tree, squashfs) = packed_image();
    let parent = directory();
    let variables = [("REMOTE_BUILD_NODE", "x3000c0s17b1n0".to_owned())];
    let place = parent.path().to_str().unwrap();
    let tar = parent.path().join("source.tar");
    succeed(Command::new("tar").arg("-C").arg(&tree).args(["-cf", tar.to_str().unwrap(), "."]));
    for source in [&squashfs, &tar, &tree, &squashfs] {
        let output = ims_sshd(&["prepare", place, source.to_str().unwrap()], &variables).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let image = parent.path().join("image.sqsh");
        if source == &squashfs {
            assert_eq!(std::fs::read(&image).unwrap(), std::fs::read(&squashfs).unwrap());
        } else {
            assert_eq!(succeed(Command::new("unsquashfs").arg("-cat").arg(&image).arg("boot/vmlinuz")), "a kernel");
        }
        let mut names: Vec<_> = std::fs::read_dir(place).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.retain(|name| !name.to_str().unwrap().starts_with(".ims-sshd.") && name != "source.tar");
        assert_eq!(names, ["image.sqsh"]);
    }
}

//! Parts of upstream around this program: a container on the node that its prepare has started, and its sidecar behind
//! this program's prepare and entrypoint.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use nix::sys::signal::Signal;
use testbed::job::*;
use testbed::node::{Lab, Node, signal};
use testbed::*;

use crate::remote::Remote;

/// Port of the container's sshd on the node.
const PORT: u16 = 2022;

/// In place of podman: a container is a process whose number is in a file of its name.
const PODMAN: &str = r#"#!/bin/sh
echo "$*" >>/run/podman.log
command=$1
shift
case $command in
    exec)
        kill -0 "$(cat "/run/podman/$1")" 2>/dev/null || exit 125
        if [ "$2" = touch ]; then touch "/tmp/ims_${1#ims-}/image/${3#/mnt/image/}"; fi ;;
    stop) kill "$(cat "/run/podman/$3")" ;;
    rm) rm -f "/run/podman/$2" ;;
    rmi) rm -f "/run/podman/image-${2%%:*}" ;;
    *) exit 1 ;;
esac
"#;

/// In place of the container: lets people in once `unpacked` is there, waits for their verdict, and leaves what it has
/// packed. Arguments: the job's ID, the port.
const CONTAINER: &str = r#"#!/bin/sh
echo $$ >"/run/podman/ims-$1"
dir=/tmp/ims_$1/image
until [ -e "$dir/unpacked" ]; do sleep 0.05; done
rm "$dir/unpacked"
/usr/sbin/sshd -D -p "$2" -o PidFile=none -o 'SetEnv=IN=container' &
trap "kill $!; exit" TERM
until [ -e "$dir/image-root/tmp/complete" ] || [ -e "$dir/image-root/tmp/failed" ]; do sleep 0.05; done
if [ -e "$dir/image-root/tmp/complete" ]; then
    for file in /root/packed/*; do cp -P "$file" "$dir/"; done
    touch "$dir/complete"
else
    touch "$dir/failed"
fi
touch "$dir/remote_exiting"
wait
"#;

/// What upstream's prepare does to a node: a directory, a container of a new image.
fn begin(lab: &Lab, node: &Node, id: &str) {
    let image = node.path(&format!("/tmp/ims_{id}/image"));
    std::fs::create_dir_all(image.join("image-root/tmp")).unwrap();
    std::fs::write(image.join("image.sqsh"), "").unwrap();
    std::fs::write(node.path(&format!("/run/podman/image-ims-remote-{id}")), "").unwrap();
    let start = format!("setsid /root/container {id} {PORT} </dev/null >/dev/null 2>&1 &");
    assert!(lab.ssh(node, &start).status.success());
}

/// A lab whose node has podman, and a packed image for the container to leave.
fn lab() -> Lab {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    for (path, text) in [("/usr/bin/podman", PODMAN), ("/root/container", CONTAINER)] {
        std::fs::write(node.path(path), text).unwrap();
        std::fs::set_permissions(node.path(path), PermissionsExt::from_mode(0o755)).unwrap();
    }
    for directory in ["/run/podman", "/root/packed"] {
        std::fs::create_dir(node.path(directory)).unwrap();
    }
    std::fs::write(node.path("/run/podman.log"), "").unwrap();
    let (_dir, tree, squashfs) = packed_image();
    std::fs::copy(squashfs, node.path("/root/packed/transfer.sqsh")).unwrap();
    for name in ["vmlinuz", "initrd", "kernel-parameters"] {
        std::fs::copy(tree.join("boot").join(name), node.path("/root/packed").join(name)).unwrap();
    }
    lab
}

#[test]
fn container_of_upstreams_prepare_is_reached_and_its_image_published() {
    let lab = lab();
    let node = &lab.nodes[0];
    let before = node.state();
    for (mark, from_the_pod) in [("complete", false), ("complete", true), ("failed", false)] {
        let mut remote = Remote::begun_by_upstream(&lab, node, Mode::Jailed, PORT);
        begin(&lab, node, remote.id());
        let place = node.path(&format!("/tmp/{}/image", remote.directory()));
        let sidecar = remote.job.sidecar(Mode::Jailed, &[("REMOTE_BUILD_NODE", &node.address)]).spawn().unwrap();
        remote.start(&[]);
        remote.wait_for_log("was started by IMS's own prepare");
        // Nobody is told of a port that does not answer yet.
        assert_eq!(remote.run("true").status.code(), Some(255));
        assert!(!remote.job.volume.signal("sshd_listening").exists());
        std::fs::write(place.join("unpacked"), "").unwrap();
        remote.wait_for("sshd_listening");
        let mut ssh = remote.lab.command("ssh");
        let key = lab.dir.path().join("own-key");
        ssh.args(ssh_options(&key)).args(["-p", &remote.job.volume.port.to_string(), "root@127.0.0.1"]);
        assert_eq!(succeed(ssh.arg("echo $IN")), "container\n");
        if from_the_pod {
            remote.job.volume.touch(mark);
        } else {
            std::fs::write(place.join("image-root/tmp").join(mark), "").unwrap();
        }
        assert_eq!(remote.end(), 0, "{}", remote.log());
        let output = sidecar.wait_with_output().unwrap();
        assert!(output.status.success(), "{}\n{}", text(&output.stderr), remote.log());
        if mark == "complete" {
            remote.job.is_published(&output);
        } else {
            assert_eq!(remote.job.ims.status(), "error");
            remote.job.nothing_is_left();
        }
        assert!(!std::fs::read_to_string(node.path("/run/podman.log")).unwrap().contains("volume"));
        node.is_as_before(&before);
    }
}

#[test]
fn container_of_upstreams_prepare_that_fails_fails_the_job_and_leaves_nothing() {
    let lab = lab();
    let node = &lab.nodes[0];
    let packed = node.path("/root/packed/transfer.sqsh");
    let before = node.state();
    for how in ["error", "dead", "signal", "link", "altered", "missing", "early", "stuck"] {
        let mut remote = Remote::begun_by_upstream(&lab, node, Mode::Jailed, PORT);
        begin(&lab, node, remote.id());
        let place = node.path(&format!("/tmp/{}/image", remote.directory()));
        let touch = |path: &str| std::fs::write(place.join(path), "").unwrap();
        let other = match how {
            // The digest is told before the file is sent.
            "altered" => Some(("/usr/local/bin/sha256sum", "#!/bin/sh\n/usr/bin/sha256sum | tr 0-9 1-90\n")),
            "stuck" => {
                Some(("/usr/local/bin/cat", "#!/bin/sh\n[ \"$1\" = -- ] && exec sleep 12\nexec /usr/bin/cat \"$@\"\n"))
            }
            _ => None,
        };
        if let Some((path, text)) = other {
            std::fs::write(node.path(path), text).unwrap();
            std::fs::set_permissions(node.path(path), PermissionsExt::from_mode(0o755)).unwrap();
        }
        if how == "early" {
            touch("complete");
            touch("remote_exiting");
            remote.start(&[]);
            remote.job.volume.touch("ready");
        } else {
            touch("unpacked");
            remote.open();
        }
        let (code, words) = match how {
            "error" => {
                touch("remote_error");
                (1, "remote_error")
            }
            "dead" => {
                let name = format!("/run/podman/ims-{}", remote.id());
                let number = std::fs::read_to_string(node.path(&name)).unwrap();
                node.kill(number.trim().parse().unwrap());
                let mut kill = Command::new("nsenter");
                kill.args(["-t", &node.pid.to_string(), "--pid", "--mount", "sh", "-c"]);
                let _ = kill.arg(format!("kill $(pgrep -f 'sshd.* -p {PORT}')")).output();
                (1, "does not run any more")
            }
            "signal" => {
                signal(remote.entrypoint.as_ref().unwrap(), Signal::SIGTERM);
                (143, "received SIGTERM")
            }
            "link" => {
                std::fs::rename(&packed, packed.with_extension("own")).unwrap();
                symlink("/etc/shadow", &packed).unwrap();
                touch("image-root/tmp/complete");
                (1, "has left no packed image")
            }
            "missing" => {
                std::fs::remove_file(&packed).unwrap();
                touch("image-root/tmp/complete");
                (1, "has left no packed image")
            }
            "early" => (1, "it has closed before anybody could log in"),
            "stuck" => {
                touch("image-root/tmp/complete");
                (1, "nothing of it has come for 5 s")
            }
            _ => {
                touch("image-root/tmp/complete");
                (1, "it was altered on the way")
            }
        };
        remote.fails(code, words);
        if how == "link" {
            std::fs::remove_file(&packed).unwrap();
            std::fs::rename(packed.with_extension("own"), &packed).unwrap();
        }
        if let Some((path, _)) = other {
            std::fs::remove_file(node.path(path)).unwrap();
        }
        if how == "missing" {
            std::fs::write(&packed, "").unwrap();
        }
        node.is_as_before(&before);
    }
}

/// Steps of upstream's sidecar on the volume of a remote job. Arguments: the image root's parent, the names of the image,
/// of its kernel and of its initrd. Prints the statuses that IMS would hear.
const SIDECAR: &str = r#"
cd "$1"
rm -f complete failed exiting
touch ready
echo waiting_on_user
until [ -f exiting ]; do sleep 0.1; done
if [ -f pod_error ]; then echo error; exit 1; fi
# In a local job it would look into the image as well.
if [ -f failed ] || [ -f image-root/tmp/failed ]; then echo error; exit 0; fi
[ -f complete ] || exit 2
echo packaging_artifacts
[ -f transfer.sqsh ] || exit 3
mv transfer.sqsh "$2.sqsh"
for name in "$3" "$4"; do
    if [ ! -f "$name" ] || [ -L "$name" ]; then echo error; exit 4; fi
done
echo success
"#;

#[test]
fn sidecar_of_upstream_finds_what_it_looks_for_behind_our_prepare_and_entrypoint() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    for (end, code, statuses) in [
        ("complete", 0, "waiting_on_user\npackaging_artifacts\nsuccess\n"),
        ("failed", 0, "waiting_on_user\nerror\n"),
        ("broken", 1, "waiting_on_user\nerror\n"),
    ] {
        let mut remote = Remote::new(&lab, node, Mode::Jailed);
        let parent = remote.job.volume.parent.clone();
        let source = remote.job.volume.dir.path().join("source.sqsh");
        std::fs::rename(parent.join("image.sqsh"), &source).unwrap();
        let variables = [("REMOTE_BUILD_NODE", node.address.clone())];
        succeed(&mut ims_sshd(&["prepare", parent.to_str().unwrap(), source.to_str().unwrap()], &variables));
        remote.start(&[]);
        let mut sidecar = Command::new("sh");
        sidecar.args(["-c", SIDECAR, "sh"]).arg(&parent).args(["compute", "vmlinuz", "initrd"]);
        let sidecar = sidecar.stdout(std::process::Stdio::piped()).spawn().unwrap();
        remote.wait_for("sshd_listening");
        match end {
            "complete" => drop(remote.says("echo changed > /etc/changed; touch /tmp/complete")),
            "failed" => drop(remote.run("touch /tmp/failed")),
            _ => {
                let program = |line: &str| line.ends_with("ims-sshd node");
                let (number, _) = node.processes().into_iter().find(|(_, line)| program(line)).unwrap();
                node.send(number, "TERM");
            }
        }
        assert_eq!(remote.end(), i32::from(end == "broken"), "{}", remote.log());
        let output = sidecar.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(code), statuses.into()), "{}", remote.log());
        let packed = parent.join("compute.sqsh");
        assert_eq!(packed.exists(), end == "complete");
        if end == "complete" {
            assert_eq!(succeed(Command::new("unsquashfs").arg("-cat").arg(packed).arg("etc/changed")), "changed\n");
            assert_eq!(std::fs::read_to_string(parent.join("vmlinuz")).unwrap(), "a kernel");
        }
        node.is_as_before(&before);
    }
}

//! Changes that are kept: nothing but their own command goes on with them, nothing loses them, and nothing is told of any that are not there.

use std::process::{Command, Stdio};

use testbed::job::*;
use testbed::*;

use crate::customize::nothing_stays;
use crate::directory::{CUSTOMIZE, run, tree};

#[test]
fn what_was_changed_by_hand_between_two_runs_that_kept_nothing_is_of_no_matter() {
    let dir = directory();
    let tree = tree(dir.path());
    let mut killed = ims_sshd(&[&CUSTOMIZE[..], &["--", "sh", "-c", "echo open; exec sleep 600"]].concat(), &[]);
    let mut killed = Ended::new(killed.current_dir(dir.path()).stdout(Stdio::piped()).spawn().unwrap());
    std::io::Read::read_exact(killed.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    std::fs::write(tree.join("usr/one"), "by hand\n").unwrap();
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "sh", "-c", "echo more >> /usr/one"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(tree.join("usr/one")).unwrap(), "by hand\nmore\n");
    nothing_stays(dir.path());
}

#[test]
fn an_overlay_that_is_mounted_already_is_gone_on_with_and_nothing_is_unpacked_over_it() {
    let dir = directory();
    squashfs_of(&tree(dir.path()));
    let script = "set -e; $0 prepare --open overlay parent tree.sqsh; echo more > parent/image-root/etc/more; \
        $0 prepare --open overlay parent tree.sqsh; cat parent/image-root/etc/more; \
        ! $0 prepare parent tree.sqsh; umount parent/image-root parent/overlay/lower; ! $0 prepare parent tree.sqsh; \
        $0 prepare --fresh parent tree.sqsh; test ! -e parent/image-root/etc/more";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.success() && text(&output.stdout) == "more\n", "{output:?}");
    assert!(said.contains("parent/image-root is mounted already, made of "), "{said}");
    let refusal = "it is below an overlay; --open overlay goes on with it;";
    assert_eq!(said.matches(refusal).count(), 2, "{said}");
}

#[test]
fn dkms_gives_a_command_of_customize_all_that_the_container_has() {
    let dir = directory();
    tree(dir.path());
    for (dkms, code) in [("false", 1), ("True", 0)] {
        let mut customize = ims_sshd(&CUSTOMIZE, &[("JOB_ENABLE_DKMS", dkms.into())]);
        customize.args(["--", "sh", "-c", "mount -t tmpfs t /tmp && umount /tmp"]).current_dir(dir.path());
        let output = customize.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{dkms}: {output:?}");
    }
    nothing_stays(dir.path());
}

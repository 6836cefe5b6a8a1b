//! The umask of the caller decides nothing about files of ours.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use testbed::job::*;
use testbed::*;

/// `ims-sshd` with this umask, in octal.
fn with_umask(mask: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "umask \"$0\" && exec \"$@\"", mask, &*IMS_SSHD]).args(arguments);
    command.env("IMS_RETRY_LIMIT", "20").env("IMS_STALL_LIMIT", "2").stdin(std::process::Stdio::null());
    command
}

/// Modes and paths of what another user may write to, links and devices aside.
const WRITABLE: &str = "find \"$1\" -path '*/image-root' -prune -o '(' -type f -o -type d ')' -perm /022 -print";

fn writable_below(dir: &Path) -> String {
    succeed(Command::new("sh").args(["-c", WRITABLE, "sh"]).arg(dir))
}

#[test]
fn no_other_user_can_write_to_what_a_run_makes_whatever_the_umask_is() {
    for mask in ["0", "002", "777"] {
        let (dir, tree) = bootable_image();
        let script = dir.path().join("script");
        let lines = format!(
            "set -e\ncd \"$IMAGE_ROOT_PARENT\"\nset -- .\n{WRITABLE} > {0}/writable\nstat -c %a ssh_config > {0}/modes\n\
             umask > {0}/umask\nssh -F ssh_config image umask > {0}/session\ntouch complete\n",
            dir.path().display()
        )
        .replace("\"$1\"", ".");
        std::fs::write(&script, lines).unwrap();
        let store = dir.path().join("out");
        let mut command = with_umask(mask, &["customize", tree.to_str().unwrap(), "--output", store.to_str().unwrap()]);
        command.args(["--kernel", "vmlinuz", "--initrd", "initrd", "--changes"]).arg(dir.path().join("changes"));
        command.arg("--host-script").arg(&script).arg("--work").arg(dir.path().join("work")).env("LC_ALL", "C");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{mask}: {output:?}");
        let said = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(said("writable"), "", "{mask}");
        assert_eq!(said("modes"), "644\n", "{mask}");
        // Files that the person's own programs create do not count.
        let number = |text: &str| u32::from_str_radix(text.trim(), 8).unwrap();
        assert_eq!(number(&said("umask")), number(mask));
        // sshd adds 022 (`main` of OpenSSH's sshd.c).
        assert_eq!(number(&said("session")), number(mask) | 0o022);
        assert_eq!(writable_below(&store), "", "{mask}");
        assert_eq!(std::fs::metadata(dir.path().join("changes")).unwrap().mode() & 0o777, 0o644, "{mask}");
    }
}

#[test]
fn the_commands_own_files_have_modes_of_their_own_whatever_the_umask_is() {
    for mask in ["0", "777"] {
        let (dir, tree, squashfs) = packed_image();
        let (pages, store) = (dir.path().join("pages"), dir.path().join("new"));
        succeed(&mut with_umask(mask, &["man", pages.to_str().unwrap()]));
        assert_eq!(writable_below(&pages), "", "{mask}");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&pages), mode(&pages.join("ims-sshd.1"))), (0o755, 0o644), "{mask}");
        let mut upload = with_umask(mask, &["upload", "--archive", squashfs.to_str().unwrap(), "--kernel", "vmlinuz"]);
        upload.arg(&tree);
        succeed(upload.args(["--initrd", "initrd", "--name", "compute", "--store"]).arg(&store));
        assert_eq!((mode(&store), writable_below(&store)), (0o755, String::new()), "{mask}");
    }
}

#[test]
fn an_unpacked_directory_that_the_archive_does_not_name_has_its_mode_from_no_umask() {
    for mask in ["0", "077"] {
        let (dir, tree) = bootable_image();
        let archive = dir.path().join("image.tar");
        let files = "cd \"$0\" && find . ! -type d | tar -c --no-recursion -T - -f \"$1\"";
        succeed(Command::new("sh").args(["-c", files]).arg(&tree).arg(&archive));
        let parent = dir.path().join("parent");
        succeed(with_umask(mask, &["prepare"]).arg(&parent).arg(&archive));
        let mode = |path: &str| std::fs::metadata(parent.join("image-root").join(path)).unwrap().mode() & 0o777;
        assert_eq!((mode("etc"), mode("bin"), mode("boot")), (0o755, 0o755, 0o755), "{mask}");
    }
}

#[test]
fn the_images_resolv_conf_comes_back_whatever_the_umask_is() {
    for mask in ["077", "027", "777"] {
        let (dir, tree) = bootable_image();
        let own = tree.join("etc/resolv.conf");
        std::fs::write(&own, "nameserver 192.0.2.1\n").unwrap();
        std::fs::set_permissions(&own, PermissionsExt::from_mode(0o644)).unwrap();
        let squashfs = squashfs_of(&tree);
        let is_own = |path: &Path, what: &str| {
            let mode = std::fs::metadata(path).unwrap().mode() & 0o777;
            let text = std::fs::read_to_string(path).unwrap();
            assert_eq!((text.as_str(), mode), ("nameserver 192.0.2.1\n", 0o644), "{mask}: {what}");
        };
        let run = |arguments: &[&str], command: &[&str]| {
            let mut run = with_umask(mask, arguments);
            let output = run.arg("--work").arg(dir.path().join("work")).arg("--").args(command).output().unwrap();
            assert!(output.status.success(), "{mask} {arguments:?}: {output:?}");
            let said = text(&output.stderr);
            assert!(!said.contains("a session changed"), "{mask} {arguments:?}: {said}");
            text(&output.stdout)
        };
        let directory = tree.to_str().unwrap();
        let modes = ["stat", "-c", "%a", "/etc/resolv.conf"];
        assert_eq!(run(&["enter", directory], &modes), "644\n", "{mask}");
        is_own(&own, "enter");
        assert_eq!(run(&["customize", directory], &modes), "644\n", "{mask}");
        is_own(&own, "customize");
        let (store, mounted) = (dir.path().join("out"), dir.path().join("published"));
        let published = ["--output", store.to_str().unwrap(), "--kernel", "vmlinuz", "--initrd", "initrd", "--json"];
        let said = run(&[&["customize", squashfs.to_str().unwrap()], &published[..]].concat(), &["true"]);
        let rootfs = store.join(place_of(&report_in(&said))).join("rootfs");
        succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&mounted, &rootfs]));
        is_own(&mounted.join("etc/resolv.conf"), "published");
    }
}

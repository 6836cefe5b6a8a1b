//! The view of programs in the image, which must be consistent: that of a booted node or that of a chroot, and never a
//! mixture.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use testbed::*;

fn open(volume: Volume, tier: &str) -> Environment {
    volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready()
}

/// Runs a command line in a plain chroot with a /proc, in which process 1 has another root.
fn in_chroot(image_root: &Path, line: &str) -> Output {
    let script =
        "mount -t proc proc \"$0/proc\"; mount --rbind /dev \"$0/dev\"; chroot \"$0\" /bin/bash -c \"$1\"; exit $?";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "sh", "-c", script]).arg(image_root).arg(line);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root").output().unwrap()
}

/// Commands run as root through programs that drop the session's variables.
const SYSTEMD: [&str; 10] = [
    "systemctl restart cron",
    "systemctl daemon-reload",
    "sudo systemctl restart cron",
    "su - -c 'systemctl restart cron'",
    "env -i /usr/bin/systemctl daemon-reload",
    "env -i SHELL=/bin/sh HOME=/root sh -c 'systemctl try-restart cron'",
    "systemctl is-system-running",
    "systemctl enable systemd-networkd && systemctl is-enabled systemd-networkd && systemctl disable systemd-networkd",
    "env -i udevadm trigger && env -i udevadm control --reload && env -i udevadm settle",
    "env -i systemd-detect-virt --chroot",
];

#[test]
fn systemctl_behaves_as_in_a_chroot_whatever_the_environment_variables_are() {
    let node = || {
        let volume = Volume::new(Image::Node);
        // sudo complains about a host name that it cannot resolve.
        std::fs::copy("/etc/hosts", volume.image_root.join("etc/hosts")).unwrap();
        volume
    };
    let chroot = node();
    let wanted = SYSTEMD.map(|line| in_chroot(&chroot.image_root, line));
    for tier in NAMESPACE_TIERS {
        let environment = open(node(), tier);
        let master = environment.master();
        for (line, wanted) in SYSTEMD.iter().zip(&wanted) {
            let got = master.ssh().arg(line).output().unwrap();
            assert_eq!(
                (got.status.code(), text(&got.stdout), text(&got.stderr)),
                (wanted.status.code(), text(&wanted.stdout), text(&wanted.stderr)),
                "{tier}: {line}"
            );
        }
        // In a chroot they may not inspect process 1, and fail.
        assert_eq!(environment.run("su nobody -s /bin/sh -c 'env -i systemctl restart cron'").status.code(), Some(0));
        assert_eq!(environment.says("env | grep -c SYSTEMD || true"), "0", "{tier}");
        assert_eq!(environment.says("ls -A /run | grep -c ims-sshd.root || true"), "0", "{tier}");
    }
    let environment = open(Volume::new(Image::Node), "chroot");
    assert_eq!(environment.run("systemctl restart cron").status.code(), Some(0));
}

/// A file and its link target; an empty target makes it a program.
type InitFile = (&'static str, &'static str);

/// An image of an init system, and the service manager that Ansible finds on the booted node.
const INITS: [(&str, &[InitFile], &str); 6] = [
    (
        "systemd",
        &[("lib/systemd/systemd", ""), ("bin/systemctl", ""), ("sbin/init", "/lib/systemd/systemd")],
        "systemd",
    ),
    ("systemd without a link", &[("lib/systemd/systemd", ""), ("bin/systemctl", "")], "systemd"),
    ("OpenRC", &[("sbin/openrc", ""), ("sbin/init", "/bin/busybox")], "openrc"),
    ("runit", &[("sbin/runit-init", ""), ("sbin/init", "runit-init")], "runit"),
    ("System V", &[("etc/init.d/rc", ""), ("sbin/init", "")], "sysvinit"),
    ("none", &[], "service"),
];

#[test]
fn ansible_finds_the_service_manager_that_the_booted_node_has() {
    for (name, files, wanted) in INITS {
        for tier in NAMESPACE_TIERS {
            let volume = Volume::new(Image::Managed);
            std::fs::remove_dir_all(volume.image_root.join("etc/init.d")).unwrap();
            for (file, link) in files {
                let file = volume.image_root.join(file);
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                if link.is_empty() {
                    std::fs::write(&file, "#!/bin/sh\n").unwrap();
                    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
                } else {
                    symlink(link, file).unwrap();
                }
            }
            let environment = open(volume, tier);
            for program in ["/usr/bin/ansible".into(), cache().join("ansible-core/bin/ansible")] {
                let facts = ansible(&environment, &program, "setup", "filter=ansible_service_mgr");
                assert!(facts.contains(&format!("\"ansible_service_mgr\": \"{wanted}\"")), "{name}, {tier}: {facts}");
            }
        }
    }
}

/// Runs one module of Ansible, which must succeed.
fn ansible(environment: &Environment, ansible: &Path, module: &str, arguments: &str) -> String {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(ansible);
    command.args(["-i", "127.0.0.1,", "-m", module, "-a", arguments, "-u", "root", "all"]);
    let options = environment.ssh_options().join(" ");
    command.args(["-e", &format!("ansible_port={} ansible_python_interpreter=/usr/bin/python3", environment.port)]);
    command.args(["--ssh-common-args", &options]);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", home.path()).env("LC_ALL", "C.UTF-8");
    succeed(&mut command)
}

#[test]
fn jail_with_the_containers_proc_shows_its_own_init() {
    let volume = Volume::new(Image::Node);
    // With a /proc that is masked like this, the kernel refuses a new procfs in a user namespace.
    succeed(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/proc/fs"]));
    let environment = open(volume, "user");
    assert!(environment.log_text().contains("/proc is the container's"), "{}", environment.log_text());
    assert_eq!(environment.says("cat /proc/1/comm; env -i systemctl restart cron; echo $?"), "systemd\n0");
}

#[test]
fn run_has_what_a_boot_would_create() {
    // The expected /run comes from systemd-tmpfiles on an image that was not booted.
    let booted = Volume::new(Image::Node);
    let prepare = |volume: &Volume| {
        let root = &volume.image_root;
        let rules = "d /run/munge 0755 games games -\nD! /var/run/spool/in 2775 root mail 1d\nL /run/linked - - - - /dev/shm\n\
            d /run/../srv/outside 0755\nd /srv/outside 0755\nd /run/nobody 0755 no-such-user root -\n";
        std::fs::write(root.join("usr/lib/tmpfiles.d/tests.conf"), rules).unwrap();
        std::fs::write(root.join("usr/lib/tmpfiles.d/masked.conf"), "d /run/masked 0755 root root -\n").unwrap();
        std::fs::create_dir_all(root.join("etc/tmpfiles.d")).unwrap();
        symlink("/dev/null", root.join("etc/tmpfiles.d/masked.conf")).unwrap();
    };
    prepare(&booted);
    let mut tmpfiles = Command::new("systemd-tmpfiles");
    tmpfiles.arg(format!("--root={}", booted.image_root.display()));
    // Ignore the exit code: one of the rules cannot be applied.
    let _ = tmpfiles.args(["--create", "--boot", "--prefix=/run", "--prefix=/var/run"]).output().unwrap();
    const FIND: &str = "cd /run && find . -mindepth 1 \\( -type d -o -type l \\) -printf '%P %y %m %U:%G %l\\n' | sort";
    let wanted = in_chroot(&booted.image_root, FIND);
    let wanted = text(wanted.stdout);
    assert!(wanted.contains("munge d 755 5:60") && !wanted.contains("masked"), "{wanted}");
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Node);
        prepare(&volume);
        std::fs::create_dir_all(volume.image_root.join("run/left/over")).unwrap();
        std::fs::write(volume.image_root.join("run/left/over/file"), "the image's own\n").unwrap();
        let before = digest(&volume.image_root.join("run"));
        let mut environment = open(volume, tier);
        let got = environment.says(FIND);
        let lacking: Vec<_> =
            wanted.lines().filter(|line| !got.lines().any(|found| found.trim_end() == line.trim_end())).collect();
        assert!(lacking.is_empty(), "{tier}: {lacking:#?} are not in {got}");
        assert!(
            !got.contains("masked") && !got.contains("nobody") && !got.contains("systemd/system d"),
            "{tier}: {got}"
        );
        assert_eq!(
            environment.says("flock /var/lock/x echo locked; cat /run/left/over/file"),
            "locked\nthe image's own"
        );
        assert_eq!(environment.says("ls /srv"), "", "{tier}: nothing outside /run is made");
        assert_eq!(environment.complete(), 0);
        assert_eq!(differences(&before, &digest(&environment.image_root.join("run"))), [""; 0], "{tier}");
    }
}

#[test]
fn ansible_validates_a_configuration_of_sshd_as_on_a_node() {
    for tier in NAMESPACE_TIERS {
        let environment = open(Volume::new(Image::Managed), tier);
        environment.says("ssh-keygen -q -A");
        let controller = tempfile::tempdir().unwrap();
        std::fs::write(controller.path().join("sshd_config"), "PermitRootLogin no\n").unwrap();
        let copy = format!(
            "src={}/sshd_config dest=/etc/ssh/sshd_config validate='/usr/sbin/sshd -t -f %s'",
            controller.path().display()
        );
        ansible(&environment, Path::new("/usr/bin/ansible"), "copy", &copy);
        assert_eq!(environment.says("cat /etc/ssh/sshd_config"), "PermitRootLogin no", "{tier}");
    }
}

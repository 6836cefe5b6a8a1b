//! Images of several distributions: common work in them succeeds as on a booted node.

use std::path::{Path, PathBuf};
use std::process::Command;

use testbed::*;

/// Package scriptlet for every package manager. [`check`] verifies its effects.
const SCRIPTLET: &str = "set -e
mknod /opt/node c 1 3 || touch /opt/refused
mkfifo /opt/fifo
cp /bin/true /opt/capable
setcap cap_net_raw+ep /opt/capable
chroot / /bin/sh -c 'echo from chroot > /opt/chrooted'
mkdir -p /etc/tmpfiles.d
printf 'd /opt/made 0751 root root\\n' > /etc/tmpfiles.d/tried.conf
systemd-tmpfiles --create /etc/tmpfiles.d/tried.conf
";

/// Verifies the effects of [`SCRIPTLET`] from outside the jail.
fn check(environment: &mut Environment, tier: &str) {
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    assert_eq!(environment.says("getcap /opt/capable; cat /opt/chrooted"), "/opt/capable cap_net_raw=ep\nfrom chroot");
    assert!(!environment.run("cat /opt/node").status.success(), "a device in the image opens nothing");
    assert_eq!(environment.complete(), 0);
    let look = |name: &str| std::fs::symlink_metadata(environment.image_root.join(name)).unwrap();
    // A user namespace cannot create device nodes.
    assert_eq!(environment.image_root.join("opt/refused").exists(), tier == "user");
    if tier != "user" {
        let node = look("opt/node");
        assert!(node.file_type().is_char_device() && node.rdev() == nix::sys::stat::makedev(1, 3));
    }
    assert!(look("opt/fifo").file_type().is_fifo());
    assert_eq!(look("opt/made").permissions().mode(), 0o40751);
}

#[test]
fn apt_installs_a_package_with_scriptlets_and_dependencies_into_a_debian() {
    for tier in NAMESPACE_TIERS {
        let mut environment = open(Image::Debian, tier);
        let package = environment.dir.path().join("tried");
        let control = "Package: tried\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: tried\n\
                       Depends: libcap2-bin, systemd-standalone-tmpfiles | systemd\n";
        put(&package.join("DEBIAN/control"), control, 0o644);
        put(&package.join("DEBIAN/postinst"), &format!("#!/bin/sh\n{SCRIPTLET}"), 0o755);
        put(&package.join("opt/payload"), "payload\n", 0o644);
        let file = environment.dir.path().join("tried.deb");
        succeed(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).arg(&package).arg(&file));
        send(&environment, &file);
        share_apts_settings(&environment);
        environment.says("apt-get -q update >&2 && apt-get -q install -y --no-install-recommends /root/tried.deb >&2");
        assert_eq!(environment.says("dpkg-query -W -f '${db:Status-Abbrev}' tried; cat /opt/payload"), "ii payload");
        check(&mut environment, tier);
    }
}

#[test]
fn rpm_installs_a_package_with_scriptlets_into_an_image_of_rpm_packages() {
    for tier in NAMESPACE_TIERS {
        let mut environment = open(Image::Rpm, tier);
        let work = environment.dir.path().join("rpm");
        let post = SCRIPTLET.replace('%', "%%");
        let spec = format!(
            "Name: tried\nVersion: 1\nRelease: 1\nSummary: tried\nLicense: MIT\nBuildArch: noarch\nRequires: system\n%description\ntried\n\
             %install\nmkdir -p %{{buildroot}}/opt\necho payload > %{{buildroot}}/opt/payload\n%post\n{post}%files\n/opt/payload\n"
        );
        put(&work.join("tried.spec"), &spec, 0o644);
        let top = format!("_topdir {}", work.display());
        succeed(Command::new("rpmbuild").args(["--quiet", "-bb", "--define", &top]).arg(work.join("tried.spec")));
        send(&environment, &work.join("RPMS/noarch/tried-1-1.noarch.rpm"));
        environment.says("rpm --install /root/tried-1-1.noarch.rpm");
        assert_eq!(environment.says("rpm -q tried; rpm --verify tried; cat /opt/payload"), "tried-1-1.noarch\npayload");
        check(&mut environment, tier);
    }
}

#[test]
fn dracut_builds_an_initrd_in_a_debian() {
    for tier in NAMESPACE_TIERS {
        let mut environment = open(Image::Debian, tier);
        share_apts_settings(&environment);
        environment.says(
            "apt-get -q update >&2 && apt-get -q install -y --no-install-recommends dracut-core systemd-sysv >&2",
        );
        let built = environment.run("dracut --force --no-kernel --no-hostonly /boot/initrd none");
        assert!(built.status.success(), "{built:?}");
        let errors = [&built.stdout, &built.stderr].map(text).concat();
        assert!(!errors.to_lowercase().contains("error") && !errors.contains("failed"), "{errors}");
        let listing = environment.says("lsinitrd /boot/initrd");
        // In a user namespace dracut leaves out device nodes, which the booted kernel creates.
        for (part, found) in [("init -> usr/lib/systemd/systemd", true), ("dev/null", tier != "user")] {
            assert_eq!(listing.contains(part), found, "{part}: {listing}");
        }
        assert_eq!(environment.complete(), 0);
        assert!(std::fs::metadata(environment.image_root.join("boot/initrd")).unwrap().len() > 1 << 20);
    }
}

#[test]
fn musl_image_supports_login_changes_and_transfers() {
    for tier in NAMESPACE_TIERS {
        let mut environment = open(Image::Musl, tier);
        assert_eq!(environment.says("root-shell; echo $0"), "/bin/ash\nash");
        assert_eq!(text(feed(&mut environment.ssh(&[]), b"echo $0 $HOME; pwd\n").stdout), "-ash /root\n/root\n");
        let typed = feed(environment.ssh(&["-tt", "-e", "none"]).env("TERM", "xterm"), b"tty\nexit 5\n");
        assert!(typed.status.code() == Some(5) && text(&typed.stdout).contains("/dev/pts/"), "{typed:?}");
        let payload = environment.dir.path().join("payload.tar");
        succeed(Command::new("tar").args(["-C", "/etc", "-cf"]).arg(&payload).arg("hostname"));
        send(&environment, &payload);
        environment.says("mkdir /opt && tar -xf /root/payload.tar -C /opt");
        assert_eq!(environment.complete(), 0);
        assert!(environment.image_root.join("opt/hostname").exists());
    }
}

#[test]
fn distroless_image_supports_transfers_and_running_its_program() {
    for tier in NAMESPACE_TIERS {
        let mut environment = open(Image::Distroless, tier);
        for (options, command) in [(&[][..], "echo here"), (&["-tt"], ""), (&[], "")] {
            let refused = environment.ssh(options).arg(command).output().unwrap();
            assert_eq!(refused.status.code(), Some(127), "{refused:?}");
            let said = [&refused.stdout, &refused.stderr].map(text).concat();
            assert!(said.contains("cannot start"), "{said}");
        }
        let file = environment.dir.path().join("file");
        put(&file, "text", 0o644);
        send(&environment, &file);
        assert_eq!(environment.complete(), 0);
        assert_eq!(std::fs::read_to_string(environment.image_root.join("root/file")).unwrap(), "text");
        let mut entered = Command::new(&IMS_SSHD);
        let entered = entered
            .arg("enter")
            .arg(&environment.image_root)
            .args(["--", "/service", "word"])
            .env("IMS_JAIL_TIER", tier)
            .output()
            .unwrap();
        assert_eq!((entered.status.code(), text(&entered.stdout).as_str()), (Some(7), "word\n"), "{entered:?}");
    }
}

fn open(image: Image, tier: &str) -> Environment {
    Volume::new(image).start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready()
}

/// Sends a file to root's home.
fn send(environment: &Environment, file: &Path) {
    let sent = environment.sftp(&format!("put {} /root/\n", file.display()));
    assert!(sent.status.success(), "{sent:?}");
}

fn put(file: &PathBuf, text: &str, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, text).unwrap();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).unwrap();
}

//! Files of /proc/net, which belong to the container's network: root needs no capability to change them.

use std::process::Command;

use testbed::*;

/// Runs `inside` in the image, in a network namespace in which `before` was run, and `after` when it has ended. Returns
/// what they print, and the log.
fn enter(tier: &str, before: &str, inside: &str, after: &str) -> (String, String) {
    let volume = Volume::new(Image::Busybox);
    let script = format!("{before}\n{IMS_SSHD} enter {} -- sh -c \"$0\"\n{after}", volume.image_root.display());
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", &script, inside]).env("IMS_JAIL_TIER", tier);
    let output = command.stdin(std::process::Stdio::null()).output().unwrap();
    (text(output.stdout), text(output.stderr))
}

#[test]
fn session_cannot_change_the_firewalls_list_of_recent_addresses() {
    let list = "iptables-legacy -A INPUT -m recent --name BAD --rcheck -j DROP || echo 'no xt_recent'";
    let write = "for net in self/net $$/task/$$/net; do echo +192.0.2.1 > /proc/$net/xt_recent/BAD; done; id -u";
    for tier in ["namespace", "user"] {
        let (out, log) = enter(tier, list, write, "cat /proc/self/net/xt_recent/BAD");
        assert_eq!(out, "0\n", "{tier}: {log}");
        assert!(log.contains("Read-only file system"), "{tier}: {log}");
    }
}

#[test]
fn session_cannot_change_modes_and_owners_of_the_networks_files() {
    let change =
        "for net in self/net $$/task/$$/net; do chmod 000 /proc/$net/tcp; chown 5:5 /proc/$net/udp; done; id -u";
    for tier in ["namespace", "user"] {
        let (out, log) = enter(tier, "true", change, "stat -c '%A %u:%g' /proc/self/net/tcp /proc/self/net/udp");
        assert_eq!(out, "0\n-r--r--r-- 0:0\n-r--r--r-- 0:0\n", "{tier}: {log}");
    }
}

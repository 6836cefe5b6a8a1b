//! Operations of a node that a jail refuses, as docs/CLIENTS.md lists them. The tests try each operation and the
//! advised alternative.

use std::process::Command;

use testbed::*;

use crate::clients::Place;

/// One refused operation.
struct Limit {
    /// Person or program that does it.
    who: &'static str,
    /// Command that does it to the file /root/f or to the node.
    command: &'static str,
    /// Part of its error message.
    said: &'static str,
    /// Capabilities without which root gets the same message outside a jail, in the syntax of setpriv(1); empty if the
    /// message is the jail's own.
    like_root_without: &'static str,
    why: &'static str,
    /// Alternative, and a command that shows that it works.
    instead: &'static str,
    shown: &'static str,
}

const LIMITS: &[Limit] = &[
    Limit {
        who: "rpm with its plugin ima, evmctl",
        command: "setfattr -n security.ima -v 0x0304 /root/f",
        said: "Operation not permitted",
        like_root_without: "-sys_admin",
        why: "the kernel asks for CAP_SYS_ADMIN over the disk, which opens the jail; a filter cannot see the attribute's name",
        instead: "`rpm --noplugins`, or `%__transaction_ima %{nil}` in /etc/rpm/macros of the image",
        shown: "setfattr -n user.x -v 0x0304 /root/f",
    },
    Limit {
        who: "`rsync -X`, `tar --xattrs-include='*'`, overlay tools",
        command: "setfattr -n trusted.x -v 1 /root/f",
        said: "Operation not permitted",
        like_root_without: "-sys_admin",
        why: "the same",
        instead: "leave these out: `user.*` and `security.capability` are kept; ACLs are in the image root, and a squashfs has none",
        shown: "setfattr -n user.x -v 1 /root/f && setfacl -m u:1:r /root/f",
    },
    Limit {
        who: "chattr",
        command: "chattr +i /root/f",
        said: "Operation not permitted",
        like_root_without: "-linux_immutable",
        why: "a squashfs has no such flag, so the image would not have it either; and nobody could remove the volume afterwards, or put back what the jail has changed",
        instead: "a line `h /root/f - - - - +i` in /etc/tmpfiles.d, which sets it when the node boots",
        shown: "echo 'h /root/f - - - - +i' > /etc/tmpfiles.d/f.conf",
    },
    Limit {
        who: "`sysctl -w`, `sysctl -p`, Ansible's sysctl with `reload: true`",
        command: "sysctl -w kernel.printk=4",
        said: "kernel.printk",
        like_root_without: "",
        why: "/proc/sys is the node's that the pod runs on, and read-only",
        instead: "a file in /etc/sysctl.d; `reload: false`",
        shown: "echo kernel.printk=4 > /etc/sysctl.d/f.conf",
    },
    Limit {
        who: "modprobe, insmod, Ansible's modprobe",
        command: "busybox insmod /bin/true",
        said: "can't insert",
        like_root_without: "-sys_module",
        why: "the kernel is the node's",
        instead: "a file in /etc/modules-load.d; to build modules, a job with `JOB_ENABLE_DKMS=True`",
        shown: "echo loop > /etc/modules-load.d/f.conf",
    },
    Limit {
        who: "mount, Ansible's mount with `state: mounted`",
        command: "mount -t tmpfs tmpfs /mnt",
        said: "permission denied",
        like_root_without: "-sys_admin",
        why: "who may mount uncovers what the jail covers",
        instead: "a line in /etc/fstab (`state: present`)",
        shown: "echo 'tmpfs /mnt tmpfs defaults 0 0' >> /etc/fstab",
    },
    Limit {
        who: "hostnamectl, timedatectl, localectl",
        command: "hostnamectl set-hostname x",
        said: "not been booted with systemd",
        like_root_without: "",
        why: "no systemd runs, as in a chroot",
        instead: "`hostname x`, and /etc/hostname for the booted node; Ansible's hostname does the latter",
        shown: "hostname x && hostname > /etc/hostname",
    },
    Limit {
        who: "dmesg",
        command: "dmesg",
        said: "Operation not permitted",
        like_root_without: "-syslog",
        why: "the kernel's log is the node's",
        instead: "look at the node",
        shown: "true",
    },
    Limit {
        who: "tcpdump, arping",
        command: "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
        said: "Address family not supported by protocol",
        like_root_without: "",
        why: "it shows what others in the pod send",
        instead: "`ss`, `ping`, `curl -v`",
        shown: "python3 -c 'import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)'",
    },
    Limit {
        who: "nft, iw, devlink",
        command: "python3 -c 'import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)'",
        said: "Protocol not supported",
        like_root_without: "",
        why: "such parts of the kernel are the node's, and tell of what happens there",
        instead: "`ip`, `ss`, `ethtool`",
        shown: "python3 -c 'import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)'",
    },
    Limit {
        who: "choom; cron, atd and login (pam_loginuid)",
        command: "sh -c 'echo 5 > /proc/self/oom_score_adj'",
        said: "Read-only file system",
        like_root_without: "",
        why: "/proc/PID/net is the network's of the pod or the machine, and cannot be protected alone",
        instead: "`OOMScoreAdjust=` of a unit; run a job of cron by hand",
        shown: "cat /proc/self/oom_score_adj",
    },
    Limit {
        who: "bubblewrap, rootless containers, `unshare -U`",
        command: "unshare --user true",
        said: "Operation not permitted",
        like_root_without: "",
        why: "the creator of a user namespace has every capability in it",
        instead: "chroot",
        shown: "chroot / true",
    },
];

#[test]
fn refused_operations_fail_as_without_the_capability_and_the_advised_alternatives_work() {
    for place in [Place::Namespace, Place::User] {
        let volume = Volume::new(Image::Node);
        std::fs::write(volume.image_root.join("root/f"), "").unwrap();
        let environment = place.open_on(volume, &[]);
        let master = environment.master();
        for limit in LIMITS {
            let refused = master.ssh().arg(format!("LC_ALL=C {} 2>&1", limit.command)).output().unwrap();
            let told = text(&refused.stdout);
            assert!(!refused.status.success() && told.contains(limit.said), "{place:?} {}: {refused:?}", limit.command);
            let shown = master.ssh().arg(limit.shown).output().unwrap();
            assert!(shown.status.success(), "{place:?} {}: {shown:?}", limit.shown);
            if !limit.like_root_without.is_empty() {
                let mut outside = Command::new("setpriv");
                outside.args(["--bounding-set", limit.like_root_without, "chroot"]).arg(&environment.image_root);
                let line = format!("PATH=/usr/sbin:/usr/bin LC_ALL=C {} 2>&1", limit.command);
                let outside = outside.args(["/bin/sh", "-c", &line]).output().unwrap();
                assert_eq!((outside.status.code(), text(&outside.stdout)), (refused.status.code(), told), "{place:?}");
            }
        }
    }
}

/// The section of docs/CLIENTS.md.
pub fn page() -> String {
    let mut page = "\n## What a jail refuses\n\n\
        In the tiers `namespace` and `user`, each with the message that a root without the right gets anywhere, and what to do\n\
        instead (`tests/suite/limits.rs`). With `JOB_ENABLE_DKMS=True` all of it is allowed, and the jail is open.\n\n\
        | who | does | is told | why | instead |\n|---|---|---|---|---|\n"
        .to_owned();
    for Limit { who, command, said, why, instead, .. } in LIMITS {
        page += &format!("| {who} | `{command}` | {said} | {why} | {instead} |\n");
    }
    page
}

//! Parsers that run at each start of a session or an environment, on realistic input.

use std::ffi::OsStr;
use std::hint::black_box;
use std::path::Path;

use criterion::Criterion;
use ims_sshd::jail::mount_table::{Proc, mount_table};
use ims_sshd::jailer::mount_points;
use ims_sshd::session::account::Account;
use ims_sshd::session::request::Request;
use ims_sshd::sshd::effective::Effective;
use ims_sshd::sshd::options::Options;
use ims_sshd::sys::mounts::mount_points;
use ims_sshd::sys::tree::Tree;

/// The cases, with criterion's names of their directories.
pub const CASES: [(&str, &str); 6] = [
    ("account", "root's account from passwd (41 lines) and group (60 lines)"),
    ("request", "`SSH_ORIGINAL_COMMAND` of an Ansible task"),
    ("mountinfo", "mount points from mountinfo (1000 lines)"),
    ("options", "`SSHD_OPTIONS` of a pod"),
    ("effective", "output of `sshd -T` (120 lines)"),
    ("mount_table", "the mount table, and the mount points that a tree lacks"),
];

const TASK: &str = "/bin/sh -c '/usr/bin/env python3 && sleep 0'";

const MOUNT: &str =
    "712 28 0:61 / /var/lib/with\\040space/712 rw,nosuid,nodev,relatime shared:330 - tmpfs tmpfs rw,size=4k,inode64\n";

pub fn measure(criterion: &mut Criterion) {
    let other = |n: usize| format!("someone{n}:x:{n}:{n}:Some One,,,:/home/someone{n}:/usr/sbin/nologin\n");
    let passwd = lines(40, other) + "root:x:0:0:root:/root:/bin/bash\n";
    let group = lines(60, |n| format!("group{n}:x:{n}:someone{n},root\n"));
    let mountinfo = MOUNT.repeat(1000);
    let effective = lines(120, |n| format!("keyword{n} value of it\n"));
    let tree = Tree::open(Path::new("/")).unwrap();
    let measures: [&dyn Fn(); CASES.len()] = [
        &|| drop(black_box(Account::parse(black_box(passwd.as_bytes()), black_box(group.as_bytes())))),
        &|| drop(black_box(Request::from_original_command(Some(OsStr::new(black_box(TASK)))))),
        &|| drop(black_box(mount_points(black_box(mountinfo.as_bytes())))),
        &|| drop(black_box(Options::parse(black_box("-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config")))),
        &|| drop(black_box(Effective::parse(black_box(effective.as_bytes())))),
        &|| drop(black_box(mount_points::mount_points(&tree, mount_table(false, Proc::New)))),
    ];
    for ((name, _), measure) in CASES.iter().zip(measures) {
        criterion.bench_function(name, |bencher| bencher.iter(measure));
    }
}

fn lines(count: usize, line: impl Fn(usize) -> String) -> String {
    (1..=count).map(line).collect::<Vec<_>>().concat()
}

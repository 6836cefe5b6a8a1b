//! Parsers of other programs' formats: the same text is given to the program and to our parser, and the results are
//! compared.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ims_sshd::session::account::Account;
use ims_sshd::sshd::config::{fragment, including};
use ims_sshd::sshd::effective::Effective;
use ims_sshd::sys::mounts::{mount_points, unmount};
use ims_sshd::sys::tree::Tree;
use proptest::collection::vec;
use proptest::prelude::*;
use testbed::*;

/// Configuration with few cases, since each case starts programs or mounts a file system.
fn few() -> ProptestConfig {
    ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() }
}

fn passwd_line() -> impl Strategy<Value = String> {
    let name = || "[ \\t]?[a-z+#-][a-z0-9#. -]{0,3}";
    let path = || "(/[a-z]{0,4}){0,2}";
    prop_oneof![
        // Not more than seven fields: getent refuses to print such an entry.
        4 => (name(), "0{0,2}|1", "[0-9]{0,2}", "[^:\n\0]{0,3}", path(), path()).prop_map(
            |(name, user, group, comment, home, shell)| format!("{name}:x:{user}:{group}:{comment}:{home}:{shell}"),
        ),
        2 => (name(), "0|1|x", "(:0){0,1}", ":{0,3}")
            .prop_map(|(name, user, group, colons)| format!("{name}:x:{user}{group}{colons}")),
        1 => "[a-z:0 #+-]{0,8}",
    ]
}

fn group_line() -> impl Strategy<Value = String> {
    let members = "((root|toor|a|b),){0,2}(root|toor|a)?";
    ("[ ]?#?[a-z]{1,3}", "[0-9]{1,4}|x", members)
        .prop_map(|(name, number, members)| format!("{name}:x:{number}:{members}"))
}

/// Standard output of a program of the image, whatever its exit code.
fn output_of(image_root: &Path, words: &[&str]) -> Vec<u8> {
    let output = Command::new("chroot").arg(image_root).args(words).output().unwrap();
    assert!(output.status.code().is_some_and(|code| code < 125), "{words:?}: {output:?}");
    output.stdout
}

#[test]
fn root_account_is_the_one_that_the_images_libc_returns() {
    let volume = Volume::new(Image::Debian);
    let etc = volume.image_root.join("etc");
    let strategy = (vec(passwd_line(), 0..6), vec(group_line(), 0..6));
    proptest!(few(), |((passwd, group) in strategy)| {
        // End every line with a newline: glibc reads the last byte of an unterminated line that begins with a blank
        // twice.
        std::fs::write(etc.join("passwd"), passwd.join("\n") + "\n").unwrap();
        std::fs::write(etc.join("group"), group.join("\n")).unwrap();
        let account = Account::root_of(&Tree::open(&volume.image_root).unwrap());
        let said = output_of(&volume.image_root, &["getent", "-s", "files", "passwd", "0"]);
        let said: Vec<&[u8]> = said.trim_ascii_end().splitn(7, |&b| b == b':').collect();
        if let [name, _, _, number, _, home, shell] = said[..] {
            let or = |path: &[u8], default: &str| {
                let path = if path.starts_with(b"/") { OsStr::from_bytes(path) } else { OsStr::new(default) };
                PathBuf::from(path)
            };
            prop_assert_eq!(account.name.as_bytes(), name);
            prop_assert_eq!(account.group.to_string(), text(number));
            prop_assert_eq!(account.home, or(home, "/root"));
            prop_assert_eq!(account.shell, or(shell, "/bin/sh"));
        } else {
            prop_assert_eq!((account.name.as_str(), account.home), ("root", PathBuf::from("/root")));
        }
        let said = output_of(&volume.image_root, &["getent", "-s", "files", "initgroups", "--", &account.name]);
        let said = text(&said);
        // The first column is the name, which may contain blanks.
        let said = said.trim_end().strip_prefix(&account.name).unwrap_or_default().split_whitespace();
        let mut wanted: BTreeSet<u32> = said.map(|number| number.parse().unwrap()).collect();
        wanted.insert(account.group);
        prop_assert_eq!(BTreeSet::from_iter(account.groups), wanted);
    });
}

#[test]
fn mount_point_of_any_name_is_found_in_mountinfo_and_unmounted() {
    let volume = Volume::new(Image::Busybox);
    let byte = prop_oneof![any::<u8>(), prop::sample::select(b" \t\n\\0147#".to_vec())];
    let name = vec(byte.prop_filter("no name holds it", |b| *b != 0 && *b != b'/'), 1..12);
    proptest!(few(), |(name in name.prop_filter("names nothing new", |name| name != b"." && name != b".."))| {
        let place = volume.image_root.join(OsStr::from_bytes(&name));
        prop_assume!(!place.exists());
        std::fs::create_dir(&place).unwrap();
        mount(&["-t", "tmpfs", "none"], &place);
        let listed = || mount_points(&std::fs::read("/proc/thread-self/mountinfo").unwrap());
        prop_assert!(listed().contains(&place));
        unmount(&place).unwrap();
        prop_assert!(!listed().contains(&place));
    });
}

/// Keywords that decide where a session lands, each with a pattern of its values.
const KEYWORDS: [(&str, &str); 11] = [
    ("Match", "User (root|\\*|nobody|!root,\\*)|all"),
    ("ForceCommand", "none|internal-sftp|/bin/sh|\"exec sh\""),
    ("ChrootDirectory", "none|/srv|%h"),
    ("PermitTTY", "yes|no"),
    ("PermitTunnel", "yes|no|point-to-point"),
    ("AllowStreamLocalForwarding", "yes|no|local|all"),
    ("X11Forwarding", "yes|no"),
    ("PermitUserRC", "yes|no"),
    ("AllowUsers", "root|\\*|nobody"),
    ("AcceptEnv", "LANG|LC_\\*|\"LANG\" LC_\\*"),
    ("SetEnv", "A=b|\"IMS_JOB_ID=old one\"|A=b C=d"),
];

fn directive() -> impl Strategy<Value = String> {
    let one = prop::sample::select(&KEYWORDS[..]).prop_flat_map(|(name, values)| {
        (any::<bool>(), "[ \t]{0,2}", "[ \t]{1,2}|[ ]?=[ ]?", values, "[ \t\r]{0,2}").prop_map(
            move |(upper, indent, between, value, end)| {
                let name = if upper { name.to_ascii_uppercase() } else { name.to_owned() };
                format!("{indent}{name}{between}{value}{end}")
            },
        )
    });
    prop_oneof![8 => one, 1 => "(# a comment \u{e9})?"]
}

proptest! {
    #![proptest_config(few())]
    #[test]
    fn any_sshd_configuration_puts_sessions_of_root_into_the_jail_and_refuses_other_users(
        global in vec("(PermitUserEnvironment|permituserenvironment) (yes|no|LANG)|DenyUsers (root|bob)|Port 22", 0..3),
        lines in vec(directive(), 0..10),
    ) {
        const COMMAND: &str = "exec /opt/ims-jail-shell session /run/jail";
        let directory = tempfile::tempdir().unwrap();
        let (config, ours) = (directory.path().join("config"), directory.path().join("ours"));
        let own = [global, lines].concat().join("\n");
        let options = ["-f".to_owned(), config.display().to_string()];
        std::fs::write(&config, &own).unwrap();
        let base = Effective::ask(&options, "root").unwrap();
        let job = [("IMS_JOB_ID".to_owned(), "new".to_owned())];
        std::fs::write(&ours, fragment(&job, &base.set_env(), &BTreeSet::new(), true, Some(COMMAND))).unwrap();
        std::fs::write(&config, including(own.as_bytes(), &ours)).unwrap();
        let effective = Effective::ask(&options, "root").unwrap();
        effective.check_jail(COMMAND).unwrap();
        Effective::ask(&options, "nobody").unwrap().check_denied().unwrap();
        let variables = effective.set_env();
        prop_assert!(variables.contains(&job[0]), "{:?}", variables);
        for variable in base.set_env() {
            prop_assert!(variables.contains(&variable) || variable.0 == "IMS_JOB_ID", "{:?} is lost", variable);
        }
    }
}

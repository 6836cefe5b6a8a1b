//! Contents of the jail's own /run, as after a boot: the image's own entries, the directories and links of its
//! tmpfiles.d (tmpfiles.d(5)), and those that every distribution makes. All of it comes from the image and is
//! untrusted, so everything has a limit, and odd entries are left out.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode};

use crate::sys::attributes;
use crate::sys::tree::Tree;

/// An entry below /run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Path relative to /run.
    path: PathBuf,
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Link(PathBuf),
}

/// Limits of the image's own /run: number of entries, bytes of one file, bytes in total, and levels of directories.
const MOST_ENTRIES: usize = 1000;
const LARGEST_FILE: u64 = 64 << 10;
const MOST_BYTES: usize = 1 << 20;
const DEEPEST: usize = 8;

/// Limits of tmpfiles.d: files per directory, bytes per file, bytes in total.
const MOST_FILES: usize = 500;
const LARGEST_RULES: u64 = 64 << 10;
const MOST_RULES: usize = 1 << 20;

/// Maximum size of passwd and of group, in bytes.
const LARGEST_ACCOUNTS: u64 = 1 << 20;

/// Entries that are left out, since programs take them for the sign of a running systemd (sd_booted(3)) or of a
/// container of podman or buildah. In an image they are left over from its build.
const LEFT_OUT: [&str; 2] = ["systemd/system", ".containerenv"];

/// Prefix of the jail's own names.
const OURS: &[u8] = b".ims-sshd";

/// Entries of the jail's /run in the order of their creation. If two entries have the same name, the first counts.
pub(crate) fn of_boot(image_root: &Tree) -> Vec<Entry> {
    let mut entries = own_entries(image_root).unwrap_or_default();
    entries.extend(of_tmpfiles(image_root));
    let directory = |path: &str, mode| Entry { path: path.into(), kind: Kind::Directory, mode, uid: 0, gid: 0 };
    entries.extend([directory("lock", 0o1777), directory("user", 0o755)]);
    // sshd refuses to check its configuration without this directory, which its service creates on a node.
    let sshd = ["usr/sbin/sshd", "usr/bin/sshd"].into_iter().any(|path| matches!(image_root.look(path), Ok(Some(_))));
    entries.extend(sshd.then(|| directory("sshd", 0o755)));
    entries.retain(|entry| !LEFT_OUT.iter().any(|left_out| entry.path.starts_with(left_out)) && !entry.is_ours());
    entries.truncate(MOST_ENTRIES);
    entries
}

/// Creates the entries in `run`, a file system of the jail's own. Existing entries stay.
pub(crate) fn make(run: &Tree, entries: &[Entry]) {
    for entry in entries {
        // An odd entry of the image is no reason to refuse the image.
        let _ = entry.make(run);
    }
}

impl Entry {
    /// True if the entry's name is reserved for the jail.
    fn is_ours(&self) -> bool {
        self.path.as_os_str().as_bytes().starts_with(OURS)
    }

    fn make(&self, run: &Tree) -> io::Result<()> {
        let above = self.path.parent().unwrap_or(Path::new(""));
        run.make_directories(above)?;
        let above = if above.as_os_str().is_empty() { run.directory(".")? } else { run.directory(above)? };
        let name = self.path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        match &self.kind {
            Kind::Directory => rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o700))?,
            Kind::Link(target) => rustix::fs::symlinkat(target, &above, name)?,
            Kind::File(content) => {
                if above.look(name)?.is_some() {
                    return Ok(());
                }
                above.replace(name, content)?;
            }
        }
        // Set the mode even if changing the owner fails: a user namespace need not map every user.
        let (user, group) = (attributes::user(self.uid), attributes::group(self.gid));
        let owned = rustix::fs::chownat(&above, name, user, group, AtFlags::SYMLINK_NOFOLLOW);
        if !matches!(self.kind, Kind::Link(_)) {
            rustix::fs::chmodat(&above, name, Mode::from_raw_mode(self.mode), AtFlags::empty())?;
        }
        owned.map_err(Into::into)
    }
}

/// Entries below the image's own /run: directories, small files and links.
fn own_entries(image_root: &Tree) -> io::Result<Vec<Entry>> {
    let run = image_root.directory_of_same_mount("run")?;
    let (mut entries, mut bytes) = (Vec::new(), 0);
    let mut directories = vec![PathBuf::new()];
    while let Some(path) = directories.pop() {
        let directory =
            if path.as_os_str().is_empty() { run.directory(".") } else { run.directory_of_same_mount(&path) };
        let Ok(directory) = directory else { continue };
        for name in directory.first_names(MOST_ENTRIES.saturating_sub(entries.len()))? {
            let Ok(found) = rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let path = path.join(&name);
            let kind = match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory if path.components().count() < DEEPEST => {
                    directories.push(path.clone());
                    Kind::Directory
                }
                FileType::RegularFile => match directory.read(&name, LARGEST_FILE) {
                    Ok(content) if bytes + content.len() <= MOST_BYTES => {
                        bytes += content.len();
                        Kind::File(content)
                    }
                    _ => continue,
                },
                FileType::Symlink => match rustix::fs::readlinkat(&directory, &name, Vec::new()) {
                    Ok(target) => Kind::Link(OsStr::from_bytes(target.to_bytes()).into()),
                    Err(_) => continue,
                },
                _ => continue,
            };
            entries.push(Entry { path, kind, mode: found.st_mode & 0o7777, uid: found.st_uid, gid: found.st_gid });
        }
    }
    Ok(entries)
}

/// Directories and links below /run from the image's tmpfiles.d. If two files have the same name, the one in the first
/// directory counts.
fn of_tmpfiles(image_root: &Tree) -> Vec<Entry> {
    let (mut files, mut bytes) = (BTreeMap::new(), 0);
    for place in ["etc/tmpfiles.d", "usr/local/lib/tmpfiles.d", "usr/lib/tmpfiles.d"] {
        let Ok(directory) = image_root.directory(place) else { continue };
        for name in directory.first_names(MOST_FILES).unwrap_or_default() {
            if name.as_bytes().ends_with(b".conf") && !files.contains_key(&name) && bytes < MOST_RULES {
                // A file that cannot be read counts as empty: a link to /dev/null disables files of the same name in
                // later directories.
                let rules = image_root.read(Path::new(place).join(&name), LARGEST_RULES).unwrap_or_default();
                bytes += rules.len();
                files.insert(name, rules);
            }
        }
    }
    let read = |path| image_root.read(path, LARGEST_ACCOUNTS).unwrap_or_default();
    let (passwd, group) = (read("etc/passwd"), read("etc/group"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (passwd, group) = (text(passwd), text(group));
    let lines = files.into_values().flat_map(|rules| text(rules).lines().map(str::to_owned).collect::<Vec<_>>());
    lines.filter_map(|line| of_rule(&line, &passwd, &group)).take(MOST_ENTRIES).collect()
}

/// Entry below /run that a line of tmpfiles.d describes: `TYPE PATH MODE USER GROUP AGE ARGUMENT`, with `-` for a
/// default.
fn of_rule(line: &str, passwd: &str, group: &str) -> Option<Entry> {
    // Skips lines with quoted words or specifiers (%m): no directory that programs need has such a line.
    if line.contains(['"', '\'', '\\', '%']) {
        return None;
    }
    let mut words = line.split_whitespace();
    let (kind, path) = (words.next()?, Path::new(words.next()?));
    let below = ["/run", "/var/run"].into_iter().find_map(|run| path.strip_prefix(run).ok())?;
    let is_plain = below.components().all(|component| matches!(component, Component::Normal(_)));
    if !is_plain || !(1..=DEEPEST).contains(&below.components().count()) {
        return None;
    }
    let [mode, user, owner, _age] = [(); 4].map(|()| words.next().filter(|word| *word != "-"));
    // Boot-only lines (!) apply, since a boot starts with an empty /run too.
    let kind = match kind.trim_end_matches(['!', '+', '-', '=', '~', '^', '$']) {
        "d" | "D" => Kind::Directory,
        "L" => Kind::Link(words.next()?.into()),
        _ => return None,
    };
    let mode = mode.map_or(Some(0o755), |mode| u32::from_str_radix(mode.trim_start_matches(['~', ':']), 8).ok())?;
    let uid = user.map_or(Some(0), |user| number(user, passwd))?;
    let gid = owner.map_or(Some(0), |owner| number(owner, group))?;
    Some(Entry { path: below.to_owned(), kind, mode: mode & 0o7777, uid, gid })
}

/// ID of a user or group, from the lines of passwd or group.
fn number(name: &str, accounts: &str) -> Option<u32> {
    let name = name.trim_start_matches(':');
    let of_line = |line: &str| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)).flatten()?.parse().ok()
    };
    name.parse().ok().or_else(|| accounts.lines().find_map(of_line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nmunge:x:101:102::/:/bin/false\n";
    const GROUP: &str = "root:x:0:\nmunge:x:102:\n";

    #[test]
    fn tmpfiles_rules_create_directories_and_links_below_run() {
        for (line, wanted) in [
            ("d /run/lock 1777 root root -", Some(("lock", Kind::Directory, 0o1777, 0, 0))),
            ("D! /var/run/munge/in 0750 munge munge 10d", Some(("munge/in", Kind::Directory, 0o750, 101, 102))),
            ("d /run/a", Some(("a", Kind::Directory, 0o755, 0, 0))),
            ("d\t/run/a ~2755 : 7 -", None),
            ("d /run/a ~2755 5 7 -", Some(("a", Kind::Directory, 0o2755, 5, 7))),
            ("L+ /run/shm - - - - /dev/shm", Some(("shm", Kind::Link("/dev/shm".into()), 0o755, 0, 0))),
            ("L /run/shm", None),
            ("d /run/a 0755 nobody-here root", None),
            ("d /run/../etc/x 0755", None),
            ("d /run/./x/../../etc 0755", None),
            ("d /run 0755", None),
            ("d /running/x 0755", None),
            ("d /etc/x 0755", None),
            ("f /run/x 0644 root root - text", None),
            ("d /run/%m 0755", None),
            ("d \"/run/x y\" 0755", None),
            ("d /run/a rwx", None),
            ("# d /run/a 0755", None),
            ("", None),
        ] {
            let got = of_rule(line, PASSWD, GROUP);
            let wanted = wanted.map(|(path, kind, mode, uid, gid)| Entry { path: path.into(), kind, mode, uid, gid });
            assert_eq!(got, wanted, "{line}");
        }
    }

    proptest! {
        #[test]
        fn tmpfiles_rules_cannot_leave_run(line in "[dDL]!? /(var/)?run/?[a./]{0,12} [0-7]{0,5}") {
            if let Some(entry) = of_rule(&line, PASSWD, GROUP) {
                prop_assert!(entry.path.components().all(|c| matches!(c, Component::Normal(_))), "{:?}", entry);
            }
        }
    }

    #[test]
    fn run_gets_the_images_entries_and_tmpfiles_rules_within_limits() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for path in ["run/own/deep", "run/systemd/system", "etc/tmpfiles.d", "usr/lib/tmpfiles.d", "usr/sbin"] {
            std::fs::create_dir_all(at(path)).unwrap();
        }
        let many: PathBuf = (0..20).map(|n| n.to_string()).collect();
        std::fs::create_dir_all(at("run").join(many)).unwrap();
        std::fs::write(at("run/own/file"), "text").unwrap();
        std::fs::set_permissions(at("run/own"), PermissionsExt::from_mode(0o2770)).unwrap();
        std::fs::write(at("run/large"), vec![0; 100 << 10]).unwrap();
        std::fs::write(at("run/.containerenv"), "").unwrap();
        symlink("own/file", at("run/link")).unwrap();
        symlink("../../..", at("run/up")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("run/fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        std::fs::write(at("etc/passwd"), PASSWD).unwrap();
        std::fs::write(at("etc/group"), GROUP).unwrap();
        std::fs::write(at("usr/lib/tmpfiles.d/a.conf"), "d /run/munge 0711 munge munge\nd /run/up/outside 0755\n")
            .unwrap();
        std::fs::write(at("usr/lib/tmpfiles.d/d.conf"), "d /run/nobodys 0711 4294967295 4294967295\n").unwrap();
        std::fs::write(at("usr/lib/tmpfiles.d/b.conf"), "d /run/masked 0755\n").unwrap();
        std::fs::write(at("usr/lib/tmpfiles.d/c.conf"), "L /run/.ims-sshd.root - - - - /\nd /run/.ims-sshd/x 0755\n")
            .unwrap();
        symlink("/", at("run/.ims-sshd.other")).unwrap();
        symlink("/dev/null", at("etc/tmpfiles.d/b.conf")).unwrap();
        std::fs::write(at("usr/sbin/sshd"), "").unwrap();
        let entries = of_boot(&Tree::open(dir.path()).unwrap());

        let made = dir.path().join("made/run");
        std::fs::create_dir_all(&made).unwrap();
        make(&Tree::open(&made).unwrap(), &entries);
        let about =
            |path: &str| std::fs::symlink_metadata(made.join(path)).map(|m| (m.mode() & 0o7777, m.uid(), m.gid())).ok();
        assert_eq!(about("own"), Some((0o2770, 0, 0)));
        assert_eq!(std::fs::read_to_string(made.join("link")).unwrap(), "text");
        assert_eq!(about("munge"), Some((0o711, 101, 102)));
        assert_eq!(about("nobodys"), Some((0o711, 0, 0)), "chown(2) has no such user");
        assert_eq!(
            (about("lock"), about("user"), about("sshd")),
            (Some((0o1777, 0, 0)), Some((0o755, 0, 0)), Some((0o755, 0, 0)))
        );
        for absent in [
            ".ims-sshd.root",
            ".ims-sshd",
            ".ims-sshd.other",
            "systemd/system",
            ".containerenv",
            "large",
            "fifo",
            "masked",
            "0/1/2/3/4/5/6/7/8",
        ] {
            assert_eq!(about(absent), None, "{absent}");
        }
        let beside: Vec<_> =
            std::fs::read_dir(dir.path().join("made")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(beside, ["run"], "no link leads out");

        for number in 0..2000 {
            std::fs::write(at("run").join(format!("many-{number}")), "").unwrap();
        }
        assert!(of_boot(&Tree::open(dir.path()).unwrap()).len() <= MOST_ENTRIES);
    }
}

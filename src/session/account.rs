//! The account of the image's root, read from passwd and group files of any content.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::sys::attributes;
use crate::sys::tree::Tree;

/// Account that a session runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// Primary group.
    pub group: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: PathBuf,
    /// True if passwd has an entry for root; otherwise the fields have default values.
    pub(crate) known: bool,
}

/// Shell of an account whose entry has none (passwd(5)).
pub(crate) const DEFAULT_SHELL: &str = "/bin/sh";

/// Maximum size of passwd and of group, in bytes: enough for 50,000 users. A larger file counts as missing, because
/// every session reads both files.
const LIMIT: u64 = 4 << 20;

/// Maximum length of a line of passwd, in bytes; a longer line counts as missing. The home directory is an argument of
/// every program, and the kernel refuses arguments of 128 KiB: nobody could log in to repair the line.
const LONGEST_LINE: usize = 16 << 10;

impl Account {
    /// Account of root in `image_root`, with default values for what the image does not say.
    pub fn root_of(image_root: &Tree) -> Self {
        let passwd = image_root.read("etc/passwd", LIMIT).unwrap_or_default();
        let group = image_root.read("etc/group", LIMIT).unwrap_or_default();
        Self::parse(&passwd, &group)
    }

    /// Reads passwd(5) and group(5) as glibc's getpwuid and getgrouplist do: the first entry with user ID 0 counts,
    /// comments and NIS entries (`+`, `-`) do not, and trailing fields may be missing. A path that is not absolute gets
    /// the default value.
    pub fn parse(passwd: &[u8], group: &[u8]) -> Self {
        let mut account = Self {
            name: "root".into(),
            group: 0,
            groups: Vec::new(),
            home: "/root".into(),
            shell: DEFAULT_SHELL.into(),
            known: false,
        };
        let mut lines = passwd.split(|&b| b == b'\n').filter(|line| line.len() <= LONGEST_LINE);
        let root = lines.find_map(|line| {
            // The last field is the rest of the line.
            let fields: Vec<&[u8]> = line.trim_ascii_start().splitn(7, |&b| b == b':').collect();
            let is_entry = !matches!(fields[0], [] | [b'#' | b'+' | b'-', ..]) && !line.contains(&0);
            let is_root = is_entry && number(fields.get(2)?) == Some(0) && number(fields.get(3)?).is_some();
            is_root.then_some(fields)
        });
        if let Some(fields) = root {
            account.known = true;
            if let Ok(name) = std::str::from_utf8(fields[0]) {
                name.clone_into(&mut account.name);
            }
            account.group = group_number(fields[3]).unwrap_or(0);
            let path = |at: usize| {
                let field = fields.get(at).filter(|field| field.starts_with(b"/"));
                field.map(|field| PathBuf::from(OsStr::from_bytes(field)))
            };
            account.home = path(5).unwrap_or(account.home);
            account.shell = path(6).unwrap_or(account.shell);
        }
        account.groups = groups_of(account.name.as_bytes(), group);
        if !account.groups.contains(&account.group) {
            account.groups.insert(0, account.group);
        }
        account
    }
}

/// Maximum number of supplementary groups. The kernel allows 65536, but no root needs that many.
const MOST_GROUPS: usize = 1024;

/// Supplementary groups of the user `name`. Lines that begin with `#` are not skipped. getgrouplist, unlike getpwuid,
/// does not treat them as comments, so on the booted image too, root is in a group whose line is commented out.
fn groups_of(name: &[u8], group: &[u8]) -> Vec<u32> {
    let lines = group.split(|&b| b == b'\n').map(|line| line.splitn(4, |&b| b == b':').collect::<Vec<_>>());
    lines
        .filter(|fields| fields.len() == 4 && fields[3].split(|&b| b == b',').any(|member| member == name))
        .filter_map(|fields| group_number(fields[2]))
        .take(MOST_GROUPS)
        .collect()
}

/// Parses a group ID. An invalid ID is dropped, because setgroups(2) would refuse the valid ones together with it.
fn group_number(digits: &[u8]) -> Option<u32> {
    number(digits).filter(|number| attributes::group(*number).is_some())
}

fn number(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn root_has_the_shell_home_and_groups_of_the_image() {
        let passwd = b"#\nbin:x:1:1::/bin:/bin/false\nroot:x:0:0:root:/root:/bin/zsh\ntoor:x:0:0::/toor:/bin/sh\n";
        let account = Account::parse(passwd, b"root:x:0:\nwheel:x:10:bin,root\nother:x:11:rooter\n");
        assert_eq!(account.shell, PathBuf::from("/bin/zsh"));
        assert_eq!(account.home, PathBuf::from("/root"));
        assert_eq!(account.groups, [0, 10]);
    }

    #[test]
    fn invalid_group_id_does_not_cost_root_its_other_groups() {
        let account = Account::parse(b"root:x:0:4294967295::/r:/bin/zsh\n", b"a:x:4294967295:root\nb:x:10:root\n");
        assert_eq!((account.group, account.groups), (0, vec![0, 10]));
        assert_eq!(account.shell, PathBuf::from("/bin/zsh"));
    }

    #[test]
    fn image_without_an_entry_for_root_gets_the_default_one() {
        for passwd in [
            &b""[..],
            b"root:x:0:0",
            b"root:x:0:0:r:relative:sh\n",
            b"ro\0t:x:0:0:::\n",
            b"#root:x:0:0::/x:/x\n+:x:0:0::/x:/x\n",
        ] {
            let account = Account::parse(passwd, b"");
            assert_eq!((account.home, account.shell), ("/root".into(), DEFAULT_SHELL.into()));
            assert_eq!((account.group, account.groups), (0, vec![0]));
        }
    }

    /// A line of passwd, and the account of root if the line has one.
    fn passwd_line() -> impl Strategy<Value = (Vec<u8>, Option<Root>)> {
        let text = |line: String| (line.into_bytes(), None);
        let name = "[a-z][a-z0-9 .#+-]{0,4}";
        let path = "/[a-z0-9/ .#-]{0,6}";
        prop_oneof![
            4 => (name, "0{1,3}", 0..70000_u32, "[^:\\n\0]{0,3}", path, path, "[ \\t]{0,1}").prop_map(
                |(name, user, group, comment, home, shell, indent)| {
                    let line = format!("{indent}{name}:x:{user}:{group}:{comment}:{home}:{shell}");
                    (line.into_bytes(), Some(Root { name, group, home, shell }))
                },
            ),
            // Fields that are missing or empty get the default values.
            2 => (name, 0..100_u32, ":{0,3}").prop_map(|(name, group, colons)| {
                let line = format!("{name}:x:0:{group}{colons}").into_bytes();
                (line, Some(Root { name, group, home: "/root".into(), shell: DEFAULT_SHELL.into() }))
            }),
            4 => (name, "[1-9][0-9]{0,9}", path).prop_map(move |(name, user, home)| text(format!("{name}:x:{user}:0::{home}:/bin/u"))),
            // Comments, NIS entries, lines that lack a number or a field, and blanks.
            1 => "[ \\t]{0,1}[#+-][a-z]{0,4}:x:0:0::/evil:/bin/evil".prop_map(text),
            1 => "[a-z]{1,3}(:x)?|[ \\t:]{0,4}".prop_map(text),
            1 => "[a-z]{1,3}:x:((0x|zero|)?:0:|0:[a-z]?):/evil:/bin/evil".prop_map(text),
            1 => vec(any::<u8>(), 0..20).prop_map(|mut bytes| {
                bytes.retain(|&b| b != b'\n' && b != b'0');
                (bytes, None)
            }),
        ]
    }

    #[derive(Debug, Clone)]
    struct Root {
        name: String,
        group: u32,
        home: String,
        shell: String,
    }

    /// A line of group, and the ID of the group if `root` is a member.
    fn group_line() -> impl Strategy<Value = (String, Option<u32>)> {
        let others = || "([a-qs-z][a-z0]{0,3},){0,2}";
        prop_oneof![
            (others(), others(), 0..70000_u32)
                .prop_map(|(before, after, number)| { (format!("g:x:{number}:{before}root,{after}"), Some(number)) }),
            (others(), 0..70000_u32).prop_map(|(others, number)| (format!("g:x:{number}:{others}rooter"), None)),
            "g:x:root|g:x:five:root|root:x:0:|g:root:5:".prop_map(|line| (line, None)),
        ]
    }

    proptest! {
        #[test]
        fn root_is_the_first_entry_with_user_id_0(
            lines in vec(passwd_line(), 0..6),
            end in "\n?",
        ) {
            let text: Vec<&[u8]> = lines.iter().map(|(line, _)| line.as_slice()).collect();
            let account = Account::parse(&[&text.join(&b'\n'), end.as_bytes()].concat(), b"");
            let root = lines.into_iter().find_map(|(_, root)| root);
            let known = root.is_some();
            let root = root.unwrap_or(Root {
                name: "root".into(),
                group: 0,
                home: "/root".into(),
                shell: DEFAULT_SHELL.into(),
            });
            prop_assert_eq!(account, Account {
                name: root.name,
                group: root.group,
                groups: vec![root.group],
                home: root.home.into(),
                shell: root.shell.into(),
                known,
            });
        }

        #[test]
        fn root_is_in_the_groups_that_name_it(lines in vec(group_line(), 0..6)) {
            let text: Vec<&str> = lines.iter().map(|(line, _)| line.as_str()).collect();
            let account = Account::parse(b"root:x:0:0::/root:/bin/sh", text.join("\n").as_bytes());
            let mut groups: Vec<u32> = lines.iter().filter_map(|(_, number)| *number).collect();
            if !groups.contains(&0) {
                groups.insert(0, 0);
            }
            prop_assert_eq!(account.groups, groups);
        }

        #[test]
        fn arbitrary_passwd_and_group_files_give_a_usable_account(passwd in soup(), group in soup()) {
            let account = Account::parse(&passwd, &group);
            prop_assert!(account.home.is_absolute() && account.shell.is_absolute());
            for text in [account.name.as_bytes(), account.home.as_os_str().as_bytes(), account.shell.as_os_str().as_bytes()] {
                prop_assert!(!text.contains(&0) && !text.contains(&b'\n'));
            }
        }
    }

    /// Text of pieces that mostly mean something in passwd and group files.
    fn soup() -> impl Strategy<Value = Vec<u8>> {
        let known =
            prop::sample::select(&["root", "root:x:0:0:", "g:x:5:root", ":", "0", ",", "/", "#", "\n", "\n", "\0"][..]);
        let piece = prop_oneof![3 => known.prop_map(|text| text.as_bytes().to_vec()), 1 => vec(any::<u8>(), 1..3)];
        vec(piece, 0..30).prop_map(|pieces| pieces.concat())
    }
}

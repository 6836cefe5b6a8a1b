//! The image's root: what its passwd and group files say, whatever else they hold.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::sys::tree::Tree;

/// Whom a session becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The login name.
    pub name: String,
    /// The primary group.
    pub group: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// The home folder.
    pub home: PathBuf,
    /// The login shell.
    pub shell: PathBuf,
}

/// What passwd(5) says of an account without a shell.
pub const DEFAULT_SHELL: &str = "/bin/sh";

/// No passwd or group file of an image is larger; a larger one is taken as missing.
const LIMIT: u64 = 16 << 20;

impl Account {
    /// Root as `image_root` knows it; the customary values where it does not say.
    pub fn root_of(image_root: &Tree) -> Self {
        let passwd = image_root.read("etc/passwd", LIMIT).unwrap_or_default();
        let group = image_root.read("etc/group", LIMIT).unwrap_or_default();
        Self::parse(&passwd, &group)
    }

    /// Reads passwd(5) and group(5). The first line with user number 0 counts, as for getpwuid; lines that are none are passed over.
    pub fn parse(passwd: &[u8], group: &[u8]) -> Self {
        let mut account = Self {
            name: "root".into(),
            group: 0,
            groups: Vec::new(),
            home: "/root".into(),
            shell: DEFAULT_SHELL.into(),
        };
        let fields = passwd.split(|&b| b == b'\n').find_map(|line| {
            let fields: Vec<&[u8]> = line.split(|&b| b == b':').collect();
            let complete = fields.len() == 7 && fields[2] == b"0" && !fields[0].is_empty() && !line.contains(&0);
            complete.then_some(fields)
        });
        if let Some(fields) = fields {
            if let Ok(name) = std::str::from_utf8(fields[0]) {
                name.clone_into(&mut account.name);
            }
            account.group = number(fields[3]).unwrap_or(0);
            let path = |bytes: &[u8]| bytes.starts_with(b"/").then(|| PathBuf::from(OsStr::from_bytes(bytes)));
            account.home = path(fields[5]).unwrap_or(account.home);
            account.shell = path(fields[6]).unwrap_or(account.shell);
        }
        account.groups = groups_of(account.name.as_bytes(), group);
        if !account.groups.contains(&account.group) {
            account.groups.insert(0, account.group);
        }
        account
    }
}

/// The kernel allows 65536; no root needs more than a few.
const MOST_GROUPS: usize = 1024;

fn groups_of(name: &[u8], group: &[u8]) -> Vec<u32> {
    let lines = group.split(|&b| b == b'\n').map(|line| line.split(|&b| b == b':').collect::<Vec<_>>());
    lines
        .filter(|fields| fields.len() == 4 && fields[3].split(|&b| b == b',').any(|member| member == name))
        .filter_map(|fields| number(fields[2]))
        .take(MOST_GROUPS)
        .collect()
}

fn number(digits: &[u8]) -> Option<u32> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn root_is_whom_the_image_says() {
        let passwd = b"#\nbin:x:1:1::/bin:/bin/false\nroot:x:0:0:root:/root:/bin/zsh\ntoor:x:0:0::/toor:/bin/sh\n";
        let account = Account::parse(passwd, b"root:x:0:\nwheel:x:10:bin,root\nother:x:11:rooter\n");
        assert_eq!(account.shell, PathBuf::from("/bin/zsh"));
        assert_eq!(account.home, PathBuf::from("/root"));
        assert_eq!(account.groups, [0, 10]);
    }

    #[test]
    fn an_image_without_root_still_has_one() {
        for passwd in
            [&b""[..], b"root:x:0:0", b"root:x:0:0:r:relative:sh\n", b"ro\0t:x:0:0:::\n", b"root:x:00:0:::/bin/x\n"]
        {
            let account = Account::parse(passwd, b"");
            assert_eq!((account.home, account.shell), ("/root".into(), DEFAULT_SHELL.into()));
            assert_eq!((account.group, account.groups), (0, vec![0]));
        }
    }

    proptest! {
        #[test]
        fn no_file_breaks_it(passwd in proptest::collection::vec(any::<u8>(), 0..400), group in proptest::collection::vec(any::<u8>(), 0..200)) {
            let account = Account::parse(&passwd, &group);
            prop_assert!(account.home.is_absolute() && account.shell.is_absolute());
            prop_assert!(!account.home.as_os_str().as_bytes().contains(&0));
        }
    }
}

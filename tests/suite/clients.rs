//! Table of clients and places in docs/CLIENTS.md, generated from the tests that prove it.
//!
//! A test file lists its rows with `crate::clients::shown!`, once. `SHOWN` below names the file, and `VERSIONS` its
//! clients:
//!
//! ```ignore
//! crate::clients::shown! {
//!     "OpenSSH sftp", "a file is put over another by rename" => a_file_is_renamed_over_another;
//!     "OpenSSH sftp", "free space (`df`)" => free_space_is_reported, { User: "the container's" };
//!     "OpenSSH scp", "recursive", "with -p" => trees_are_copied;
//! }
//!
//! fn a_file_is_renamed_over_another(place: Place) {
//!     let environment = place.open(Image::Debian);
//!     …
//! }
//! ```
//!
//! Each text is a row of the page. Each line makes a test of the function's name
//! (`…::shown::a_file_is_renamed_over_another`), which calls the function in every place, each in a thread of its own.
//! So every row is tested. A cell is "yes" or the text that the line has for its place; the function gets the place and
//! must prove just that.

use std::path::Path;
use std::process::Command;

use testbed::*;

/// Clients that report their version, each with a shell line (`$CACHE` is set), in the order of the page.
const VERSIONS: &[(&str, &str)] = &[
    ("OpenSSH ssh", "ssh -V 2>&1"),
    ("OpenSSH sftp", "ssh -V 2>&1"),
    ("OpenSSH scp", "ssh -V 2>&1"),
    ("Ansible (Debian's)", "/usr/bin/ansible --version"),
    ("Ansible (newest for Python 3.11)", "$CACHE/ansible-core/bin/ansible --version"),
    ("paramiko", "/usr/bin/python3 -W ignore -c 'import paramiko; print(paramiko.__version__)'"),
    ("git", "git --version"),
    ("sshfs", "sshfs --version"),
    ("rsync", "rsync --version"),
    ("tar", "tar --version"),
    ("setcap", "dpkg-query -W libcap2-bin"),
    ("bash", "chroot $CACHE/node bash --version"),
    ("dash", "chroot $CACHE/node dpkg-query -W dash"),
    ("zsh", "chroot $CACHE/node dpkg-query -W zsh"),
    ("fish", "chroot $CACHE/node dpkg-query -W fish"),
    ("busybox sh", "chroot $CACHE/node busybox"),
    ("vim", "chroot $CACHE/node dpkg-query -W vim"),
    ("less", "chroot $CACHE/node dpkg-query -W less"),
    ("top", "chroot $CACHE/node dpkg-query -W procps"),
    ("tmux", "chroot $CACHE/node dpkg-query -W tmux"),
    ("screen", "chroot $CACHE/node dpkg-query -W screen"),
    ("su, sudo, script", "chroot $CACHE/node dpkg-query -W util-linux"),
];

/// Rows of each file.
const SHOWN: &[&[Row]] = &[crate::ansible::ROWS, crate::agent::ROWS, crate::transfers::ROWS, crate::people::ROWS];

/// The packed image that a node sends back.
pub const PACKED: &str = "transfer.sqsh";

/// Place in which a session lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Namespace,
    User,
    Plain,
    /// A jail on a build node, through the pod's port.
    Node,
}

pub const PLACES: [Place; 4] = [Place::Namespace, Place::User, Place::Plain, Place::Node];

impl Place {
    pub fn mode(self) -> Mode {
        if self == Self::Plain { Mode::Plain } else { Mode::Jailed }
    }

    /// Variables of an environment in this place.
    pub fn variables(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Namespace => &[("IMS_JAIL_TIER", "namespace")],
            Self::User => &[("IMS_JAIL_TIER", "user")],
            Self::Plain | Self::Node => &[],
        }
    }

    pub fn open(self, image: Image) -> Environment {
        self.open_on(Volume::new(image), &[])
    }

    /// Opens it with further variables.
    pub fn open_on(self, volume: Volume, further: &[(&str, &str)]) -> Environment {
        let variables = [self.variables(), further].concat();
        match self {
            Self::Node => volume.open_on_a_node(&variables),
            _ => volume.start_with(self.mode(), &variables).ready(),
        }
    }

    /// Content of a file in the image of an environment that was closed.
    pub fn left(self, environment: &Environment, path: &str) -> String {
        match self {
            Self::Node => succeed(Command::new("unsquashfs").arg("-cat").arg(environment.signal(PACKED)).arg(path)),
            _ => std::fs::read_to_string(environment.image_root.join(path)).unwrap(),
        }
    }

    pub fn open_in_container(self) -> Environment {
        self.open_in_container_on(Volume::new(Image::Managed), &[])
    }

    /// Opens it in a container made of the same image, so that a plain session may change anything.
    pub fn open_in_container_on(self, volume: Volume, further: &[(&str, &str)]) -> Environment {
        let variables = [self.variables(), further].concat();
        match self {
            Self::Node => volume.open_on_a_node(&variables),
            _ => volume.start_in_container(self.mode(), &variables).ready(),
        }
    }
}

/// A row of the page.
#[derive(Clone, Copy)]
pub struct Row {
    pub client: &'static str,
    pub what: &'static [&'static str],
    /// Places whose cell is not "yes".
    pub but: &'static [(Place, &'static str)],
}

/// See the documentation of this module.
macro_rules! shown {
    ($($client:expr, $($what:literal),+ => $test:ident $(, { $($place:ident: $cell:literal),+ })?;)+) => {
        pub const ROWS: &[crate::clients::Row] = &[$(crate::clients::Row {
            client: $client,
            what: &[$($what),+],
            but: &[$($((crate::clients::Place::$place, $cell)),+)?],
        }),+];

        mod shown {
            $(#[test]
            fn $test() {
                crate::clients::in_every_place(super::$test);
            })+
        }
    };
}
pub(crate) use shown;

pub fn in_every_place(test: fn(Place)) {
    let failed = run_each(&PLACES, 2, |place| format!("{place:?}"), |place| test(*place));
    assert!(failed.is_empty(), "failed in {failed:?}");
}

#[test]
fn clients_page_agrees_with_the_tests() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CLIENTS.md");
    let shown = shown_page();
    // The versions below the table are of the machine that wrote the page; other versions do not make it wrong.
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    if written.split(VERSIONS_BEGIN).next() != Some(&shown) {
        std::fs::write(&path, format!("{shown}{VERSIONS_BEGIN}{}", versions())).unwrap();
        panic!("{} did not agree with the tests and has been rewritten: check and commit it", path.display());
    }
}

const VERSIONS_BEGIN: &str = "\n## Versions\n";

fn shown_page() -> String {
    let mut page = "# Clients\n\n\
        What the tests show, with the real programs: the page is written by them (`tests/suite/clients.rs`). The columns are\n\
        where a session lands: in a jail of the tier `namespace` or `user`, in plain mode in the build environment, or, through\n\
        the port of the pod, in a jail on a build node.\n\n\
        | client | what | namespace | user | plain | node |\n|---|---|---|---|---|---|\n"
        .to_owned();
    for row in SHOWN.concat() {
        assert!(VERSIONS.iter().any(|(client, _)| *client == row.client), "'{}' has no line in VERSIONS", row.client);
        let cell = |place| row.but.iter().find(|(but, _)| *but == place).map_or("yes", |(_, cell)| cell);
        let cells = PLACES.map(cell).join(" | ");
        for what in row.what {
            page += &format!("| {} | {what} | {cells} |\n", row.client);
        }
    }
    page + &crate::commands::page() + &crate::limits::page()
}

fn versions() -> String {
    let mut text =
        "\nThose of the machine on which the page was written last.\n\n| client | version |\n|---|---|\n".to_owned();
    for (client, line) in VERSIONS {
        let answer = succeed(Command::new("sh").args(["-c", line]).env("CACHE", cache()));
        let version = answer.split(|c: char| c.is_whitespace() || "[],()_".contains(c)).find(|word| {
            let word = word.strip_prefix('v').unwrap_or(word);
            word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit())
        });
        text += &format!("| {client} | {} |\n", version.unwrap_or_else(|| panic!("no version in '{answer}'")));
    }
    text
}

//! The programs under test.

use std::ffi::OsStr;
use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::LazyLock;

pub static IMS_SSHD: Program = Program(LazyLock::new(|| path("ims-sshd")));
pub static IMS_JAIL_SHELL: Program = Program(LazyLock::new(|| path("ims-jail-shell")));

/// Path of a program, as text.
pub struct Program(LazyLock<String>);

impl Deref for Program {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<OsStr> for Program {
    fn as_ref(&self) -> &OsStr {
        self.0.as_ref()
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self)
    }
}

/// Path of a program. Cargo passes the paths of a package's programs to the package's own tests at compile time, and
/// since 1.94 also at run time, which is all that a library can read. With an older Cargo, the program lies one
/// directory above the test.
fn path(name: &str) -> String {
    let beside = || std::env::current_exe().unwrap().parent().unwrap().with_file_name(name);
    let path = std::env::var_os(format!("CARGO_BIN_EXE_{name}")).map_or_else(beside, PathBuf::from);
    assert!(path.exists(), "no {}: let cargo run this", path.display());
    path.into_os_string().into_string().unwrap()
}

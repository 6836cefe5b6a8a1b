//! The programs under test.

use std::ffi::OsStr;
use std::fmt;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crate::succeed;

pub static IMS_SSHD: Program = Program(LazyLock::new(|| path("ims-sshd")));
pub static IMS_JAIL_SHELL: Program = Program(LazyLock::new(|| path("ims-jail-shell")));

/// `ims-sshd` without symbols, for jobs that send it to a build node: a debug build has hundreds of megabytes of them.
/// Its helper is next to it.
pub static IMS_SSHD_TO_SEND: Program = Program(LazyLock::new(|| {
    let directory = Path::new(&IMS_SSHD).with_file_name("to-send");
    std::fs::create_dir_all(&directory).unwrap();
    let [program, _] = [&IMS_SSHD, &IMS_JAIL_SHELL].map(|program| {
        let to = directory.join(Path::new(program).file_name().unwrap());
        // Other tests may be running it.
        let new = to.with_extension(std::process::id().to_string());
        succeed(Command::new("strip").arg("-o").arg(&new).arg(program));
        std::fs::rename(new, &to).unwrap();
        to
    });
    program.into_os_string().into_string().unwrap()
}));

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

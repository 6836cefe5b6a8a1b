//! Installed packages of an image, from its package databases.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::OFlags;

use crate::error::{Attempt, Result};
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::transfer::confinement::Confined;

/// dpkg's database in an image.
const DPKG: &str = "var/lib/dpkg/status";
/// Directories that may hold the rpm database in an image.
const RPM: [&str; 2] = ["usr/lib/sysimage/rpm", "var/lib/rpm"];

/// Maximum size of dpkg's database, in bytes.
const LIMIT: u64 = 64 << 20;

/// Maximum size of all files of an rpm database together, in bytes. Holes count, because the copy of the database has
/// none.
const RPM_LIMIT: u64 = 1 << 30;

/// Package names with versions. The image is untrusted, so an unreadable database is logged and is not an error.
pub(crate) fn of(work: &Work, tree: &Tree) -> Result<BTreeMap<String, String>> {
    let mut packages = of_dpkg(&String::from_utf8_lossy(&tree.read(DPKG, LIMIT).unwrap_or_default()));
    for place in RPM {
        // In many images one of these directories is a link to the other.
        if let Ok(database) = tree.directory(place)
            && database.names().is_ok_and(|names| !names.is_empty())
        {
            match of_rpm(work, &database) {
                Ok(found) => packages.extend(found),
                Err(e) => {
                    work.heed()?;
                    tracing::warn!(
                        "cannot list rpm's packages in /{place} of the image: {e}; the report has only their files"
                    );
                }
            }
            break;
        }
    }
    Ok(packages)
}

fn of_dpkg(status: &str) -> BTreeMap<String, String> {
    let mut packages = BTreeMap::new();
    for paragraph in status.split("\n\n") {
        let field = |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        if let (Some(name), Some(version), Some(state)) = (field("Package"), field("Version"), field("Status"))
            && state.ends_with(" installed")
        {
            packages.insert(name.to_owned(), version.to_owned());
        }
    }
    packages
}

/// Operation in error messages: "cannot ask rpm".
const ASK: &str = "ask rpm";

/// Queries a copy of the database, because even a query makes sqlite leave files beside it.
fn of_rpm(work: &Work, database: &Tree) -> Result<BTreeMap<String, String>> {
    let copy = Copied::of(database).attempt(|| "copy their database")?;
    let mut rpm = Command::new("rpm");
    rpm.arg("--dbpath").arg(&copy.0).args(["-qa", "--queryformat", "%{NAME}.%{ARCH} %{EVR}\\n"]);
    let directory = Tree::open(&copy.0).attempt(|| format!("open {}", copy.0.display()))?;
    let output = work.run(ASK, &mut rpm, Some(&Confined::asking(&directory)), |_| {})?;
    let text = String::from_utf8_lossy(&output.stdout);
    // rpm reports a damaged database on standard error, and exits with 0.
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || (text.is_empty() && !said.is_empty()) {
        return Err(crate::error::Error::new(ASK).because(said.lines().last().unwrap_or("it failed")));
    }
    Ok(text.lines().filter_map(|line| line.split_once(' ')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect())
}

/// A private copy of the regular files of a directory; removed when dropped.
struct Copied(PathBuf);

impl Copied {
    fn of(directory: &Tree) -> io::Result<Self> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let copied = Self(std::env::temp_dir().join(format!("ims-sshd-{}", id.trim())));
        DirBuilder::new().mode(0o700).create(&copied.0)?;
        let mut left = RPM_LIMIT;
        for name in directory.names()? {
            // Skip the lock, which is a fifo or a socket in some versions of rpm.
            let Ok(file) = directory.open_regular(&name, OFlags::RDONLY | OFlags::NOFOLLOW) else { continue };
            let Some(rest) = left.checked_sub(file.metadata()?.len()) else {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {RPM_LIMIT} bytes")));
            };
            io::copy(&mut file.take(left), &mut File::create_new(copied.0.join(&name))?)?;
            left = rest;
        }
        Ok(copied)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

//! The packages of an image, by the databases that it has.

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

/// Where Debian's packages are told, and where those of rpm.
const DPKG: &str = "var/lib/dpkg/status";
const RPM: [&str; 2] = ["usr/lib/sysimage/rpm", "var/lib/rpm"];

/// No file of dpkg's is larger.
const LIMIT: u64 = 64 << 20;

/// No database of rpm's is larger, all its files together; holes count, since a copy has none.
const RPM_LIMIT: u64 = 1 << 30;

/// Names with versions. What cannot be read of an image, which is anybody's, is told in the log and is no error.
pub(crate) fn of(work: &Work, tree: &Tree) -> Result<BTreeMap<String, String>> {
    let mut packages = of_dpkg(&String::from_utf8_lossy(&tree.read(DPKG, LIMIT).unwrap_or_default()));
    for place in RPM {
        // On many the one is a link to the other.
        if let Ok(database) = tree.directory(place)
            && database.names().is_ok_and(|names| !names.is_empty())
        {
            match of_rpm(work, &database) {
                Ok(found) => packages.extend(found),
                Err(e) => {
                    work.heed()?;
                    tracing::warn!("packages of rpm, in /{place} of the image, are not told: {e}; their files are");
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

/// rpm is asked about a copy: of sqlite even a question leaves files beside the database.
fn of_rpm(work: &Work, database: &Tree) -> Result<BTreeMap<String, String>> {
    let copy = Copied::of(database).attempt(|| "copy their database")?;
    let mut rpm = Command::new("rpm");
    rpm.arg("--dbpath").arg(&copy.0).args(["-qa", "--queryformat", "%{NAME}.%{ARCH} %{EVR}\\n"]);
    let directory = Tree::open(&copy.0).attempt(|| format!("open {}", copy.0.display()))?;
    let output = work.run(&mut rpm, Some(&Confined::asking(&directory)), |_| {})?;
    let text = String::from_utf8_lossy(&output.stdout);
    // One that it takes for damaged it tells of, and ends well.
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || (text.is_empty() && !said.is_empty()) {
        return Err(crate::error::Error::new("ask rpm").because(said.lines().last().unwrap_or("it failed")));
    }
    Ok(text.lines().filter_map(|line| line.split_once(' ')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect())
}

/// A copy of the regular files of a directory, removed when it is dropped. Nobody else reads it.
struct Copied(PathBuf);

impl Copied {
    fn of(folder: &Tree) -> io::Result<Self> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let copied = Self(std::env::temp_dir().join(format!("ims-sshd-{}", id.trim())));
        DirBuilder::new().mode(0o700).create(&copied.0)?;
        let mut left = RPM_LIMIT;
        for name in folder.names()? {
            // Its lock is a fifo or a socket in some versions.
            let Ok(file) = folder.open_regular(&name, OFlags::RDONLY | OFlags::NOFOLLOW) else { continue };
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

//! What a customization has changed, against the image that it began with.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{FileType, Stat};
use serde_json::{Map, Value, json};

use crate::error::{Attempt, Error, Result};
use crate::image::installed_packages;
use crate::image::packing;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::volume::layout::INVENTORY;
use std::path::Path;

/// An inventory of a million files with long names is smaller.
const LIMIT: u64 = 1 << 30;

/// A tree as it was at one time: of each path what tells that it has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Inventory {
    files: BTreeMap<String, String>,
    /// Packages with their versions; of rpm where its program is there.
    packages: BTreeMap<String, String>,
}

impl Inventory {
    /// Looks through a tree.
    pub(crate) fn of(work: &Work, root: &Tree) -> Result<Self> {
        let attempted = || format!("look through {}", root.shown().display());
        let mut files = BTreeMap::new();
        let mut interrupted = Ok(());
        let looked = root.walk(|path, folder, name, found| {
            interrupted = work.heed();
            if interrupted.is_err() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if !path.as_os_str().is_empty() {
                let path = path.as_os_str().as_bytes().escape_ascii();
                files.insert(format!("/{path}"), state(folder, name, found));
            }
            Ok(())
        });
        interrupted?;
        looked.attempt(attempted)?;
        Ok(Self { files, packages: installed_packages::of(work, root)? })
    }

    /// Keeps it in the file `name` of a directory.
    pub(crate) fn save(&self, folder: &Tree, name: &str) -> Result<()> {
        let attempted = || format!("write {}/{name}", folder.shown().display());
        let mut file = io::BufWriter::new(folder.create_file(name).attempt(attempted)?);
        for (kind, map) in [("file", &self.files), ("package", &self.packages)] {
            for (name, state) in map {
                writeln!(file, "{kind}\t{name}\t{state}").attempt(attempted)?;
            }
        }
        file.flush().attempt(attempted)
    }

    /// Reads what was kept. On a shared volume it may be anybody's: it decides on nothing but what is told.
    pub(crate) fn load(folder: &Tree, name: &str) -> Result<Self> {
        let attempted = || format!("read what the image was before, {}/{name}", folder.shown().display());
        let text = folder
            .read(name, LIMIT)
            .attempt(attempted)
            .map_err(|e| e.advise("only an image that 'ims-sshd prepare' has opened can be compared"))?;
        let text = String::from_utf8(text).attempt(attempted)?;
        let mut inventory = Self::default();
        for line in text.lines() {
            let mut fields = line.splitn(3, '\t').map(str::to_owned);
            match (fields.next().as_deref(), fields.next(), fields.next()) {
                (Some("file"), Some(name), Some(state)) => drop(inventory.files.insert(name, state)),
                (Some("package"), Some(name), Some(state)) => drop(inventory.packages.insert(name, state)),
                _ => return Err(Error::new(attempted()).because("it is damaged")),
            }
        }
        Ok(inventory)
    }

    /// What has become of it, as JSON.
    pub(crate) fn changes_to(&self, now: &Self) -> Value {
        let names = |in_a: &BTreeMap<String, String>, not_in: &BTreeMap<String, String>| -> Vec<Value> {
            in_a.keys().filter(|name| !not_in.contains_key(*name)).map(|n| n.as_str().into()).collect()
        };
        let altered = |name: &&String| self.files.get(*name).is_some_and(|before| *before != now.files[*name]);
        let altered: Vec<_> = now.files.keys().filter(altered).collect();
        let with_versions =
            |in_a: &BTreeMap<String, String>, not_in: &BTreeMap<String, String>| -> Map<String, Value> {
                let only = in_a.iter().filter(|(name, _)| !not_in.contains_key(*name));
                only.map(|(name, version)| (name.clone(), version.as_str().into())).collect()
            };
        let changed = now.packages.iter().filter_map(|(name, version)| {
            let before = self.packages.get(name).filter(|before| *before != version)?;
            Some((name.clone(), json!([before, version])))
        });
        json!({
            "added": names(&now.files, &self.files),
            "removed": names(&self.files, &now.files),
            "altered": altered,
            "packages": {
                "added": with_versions(&now.packages, &self.packages),
                "removed": with_versions(&self.packages, &now.packages),
                "altered": changed.collect::<Map<_, _>>(),
            },
        })
    }
}

/// A directory's size and time change with what is in it, which is told by itself.
fn state(folder: &Tree, name: &OsStr, found: &Stat) -> String {
    let owner = format!("{:o} {} {}", found.st_mode, found.st_uid, found.st_gid);
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Directory => owner,
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(folder, name, Vec::new()).unwrap_or_default();
            format!("{owner} -> {}", target.as_bytes().escape_ascii())
        }
        _ => format!("{owner} {} {}.{} {}", found.st_size, found.st_mtime, found.st_mtime_nsec, found.st_rdev),
    }
}

/// Writes what has changed since the inventory in `folder` was made to the new file `to`. The directory may be somebody else's: what has the
/// name there, a link or a fifo perhaps, is replaced, and neither followed nor opened.
pub(crate) fn write_changes(work: &Work, folder: &Tree, image_root: &Tree, to: &Path) -> Result<()> {
    let (above, name) = packing::output(to, "the report of changes")?;
    let changes = Inventory::load(folder, INVENTORY)?.changes_to(&Inventory::of(work, image_root)?);
    above.replace(name, format!("{changes:#}\n").as_bytes()).attempt(|| format!("write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_removed_and_altered_is_told_apart() {
        let of = |files: &[(&str, &str)], packages: &[(&str, &str)]| {
            let owned = |list: &[(&str, &str)]| list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
            Inventory { files: owned(files), packages: owned(packages) }
        };
        let before = of(&[("/a", "1"), ("/b", "1"), ("/c", "1")], &[("bash", "5.1"), ("vim", "9")]);
        let after = of(&[("/a", "1"), ("/b", "2"), ("/d", "1")], &[("bash", "5.2"), ("nano", "7")]);
        assert_eq!(
            before.changes_to(&after),
            json!({
                "added": ["/d"], "removed": ["/c"], "altered": ["/b"],
                "packages": { "added": {"nano": "7"}, "removed": {"vim": "9"}, "altered": {"bash": ["5.1", "5.2"]} },
            })
        );
        let dir = tempfile::tempdir().unwrap();
        let folder = Tree::open(dir.path()).unwrap();
        before.save(&folder, "inventory").unwrap();
        assert_eq!(Inventory::load(&folder, "inventory").unwrap(), before);
    }
}

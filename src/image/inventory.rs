//! Comparison of an image with the image that its customization began with.

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
use crate::sys::walk::refuse_long;
use crate::transfer::Work;
use crate::volume::layout::INVENTORY;
use std::path::Path;

/// Maximum size of an inventory in bytes, enough for more than a million files with long names.
const LIMIT: u64 = 1 << 30;

/// State of a tree at one time: for each path, a text that differs whenever the file differs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Inventory {
    files: BTreeMap<String, String>,
    /// Packages with their versions; packages of rpm only where the program rpm is installed.
    packages: BTreeMap<String, String>,
}

impl Inventory {
    /// Takes the inventory of a tree.
    pub(crate) fn of(work: &Work, root: &Tree) -> Result<Self> {
        let attempted = || format!("list the files of {}", root.shown().display());
        let mut files = BTreeMap::new();
        let mut interrupted = Ok(());
        let looked = root.walk(|path, directory, name, found| {
            interrupted = work.heed();
            if interrupted.is_err() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if !path.as_os_str().is_empty() {
                refuse_long(path)?;
                let path = path.as_os_str().as_bytes().escape_ascii();
                files.insert(format!("/{path}"), state(directory, name, found));
            }
            Ok(())
        });
        interrupted?;
        looked.attempt(attempted)?;
        Ok(Self { files, packages: installed_packages::of(work, root)? })
    }

    /// Writes the inventory to the file `name` of a directory.
    pub(crate) fn save(&self, directory: &Tree, name: &str) -> Result<()> {
        let attempted = || format!("write {}/{name}", directory.shown().display());
        let mut file = io::BufWriter::new(directory.create_file(name).attempt(attempted)?);
        for (kind, map) in [("file", &self.files), ("package", &self.packages)] {
            for (name, state) in map {
                writeln!(file, "{kind}\t{name}\t{state}").attempt(attempted)?;
            }
        }
        file.flush().attempt(attempted)
    }

    /// Reads a saved inventory. On a shared volume anybody may have written the file, so nothing but the content of the
    /// report may depend on it.
    pub(crate) fn load(directory: &Tree, name: &str) -> Result<Self> {
        let attempted = || format!("read the inventory of the image as it was, {}/{name}", directory.shown().display());
        let text = directory
            .read(name, LIMIT)
            .attempt(attempted)
            .map_err(|e| e.advise("'ims-sshd prepare' writes it when it opens an image"))?;
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

    /// Differences between this inventory and a later one, as JSON.
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

/// State of one file. The size and times of a directory are left out: they change with its entries, which are reported
/// separately.
fn state(directory: &Tree, name: &OsStr, found: &Stat) -> String {
    let owner = format!("{:o} {} {}", found.st_mode, found.st_uid, found.st_gid);
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Directory => owner,
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(directory, name, Vec::new()).unwrap_or_default();
            format!("{owner} -> {}", target.as_bytes().escape_ascii())
        }
        _ => format!("{owner} {} {}.{} {}", found.st_size, found.st_mtime, found.st_mtime_nsec, found.st_rdev),
    }
}

/// Writes to the file `to` what has changed since the inventory in `directory` was taken. Others may be able to write
/// to the directory of `to`, so anything that already has the name, such as a link or a fifo, is replaced, and neither
/// followed nor opened.
pub(crate) fn write_changes(work: &Work, directory: &Tree, image_root: &Tree, to: &Path) -> Result<()> {
    let (above, name) = packing::output(to, "the report of changes")?;
    let changes = Inventory::load(directory, INVENTORY)?.changes_to(&Inventory::of(work, image_root)?);
    above.replace(name, format!("{changes:#}\n").as_bytes()).attempt(|| format!("write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_of_changes_separates_added_removed_and_altered() {
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
        let directory = Tree::open(dir.path()).unwrap();
        before.save(&directory, "inventory").unwrap();
        assert_eq!(Inventory::load(&directory, "inventory").unwrap(), before);
    }
}

//! What a customization has changed, against the image that it began with.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Attempt, Error, Result};
use crate::publish::packages;
use crate::publish::work::Work;

/// A tree as it was at one time: of each path what tells that it has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    files: BTreeMap<String, String>,
    /// Packages with their versions; of rpm where its program is there.
    packages: BTreeMap<String, String>,
}

impl Inventory {
    /// Looks through the tree at `root`.
    pub fn of(work: &Work, root: &Path) -> Result<Self> {
        let attempted = || format!("look through {}", root.display());
        let mut files = BTreeMap::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            work.heed()?;
            for entry in std::fs::read_dir(&folder).attempt(attempted)? {
                let path = entry.attempt(attempted)?.path();
                let found = std::fs::symlink_metadata(&path).attempt(attempted)?;
                let name = path.strip_prefix(root).unwrap_or(&path).as_os_str().as_bytes().escape_ascii().to_string();
                files.insert(format!("/{name}"), state(&path, &found));
                if found.is_dir() {
                    folders.push(path);
                }
            }
        }
        Ok(Self { files, packages: packages::of(work, root)? })
    }

    /// Keeps it in a file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let attempted = || format!("write {}", path.display());
        let mut file = std::io::BufWriter::new(std::fs::File::create(path).attempt(attempted)?);
        for (kind, map) in [("file", &self.files), ("package", &self.packages)] {
            for (name, state) in map {
                writeln!(file, "{kind}\t{name}\t{state}").attempt(attempted)?;
            }
        }
        file.flush().attempt(attempted)
    }

    /// Reads what was kept.
    pub fn load(path: &Path) -> Result<Self> {
        let attempted = || format!("read what the image was before, {}", path.display());
        let text = std::fs::read_to_string(path)
            .attempt(attempted)
            .map_err(|e| e.advise("only an image that 'ims-sshd prepare' has opened can be compared"))?;
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
    pub fn changes_to(&self, now: &Self) -> Value {
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

/// A folder's size and time change with what is in it, which is told by itself.
fn state(path: &Path, found: &std::fs::Metadata) -> String {
    let owner = format!("{:o} {} {}", found.mode(), found.uid(), found.gid());
    if found.is_dir() {
        return owner;
    }
    if found.is_symlink() {
        let target = std::fs::read_link(path).unwrap_or_default();
        return format!("{owner} -> {}", target.as_os_str().as_bytes().escape_ascii());
    }
    format!("{owner} {} {}.{} {}", found.size(), found.mtime(), found.mtime_nsec(), found.rdev())
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
        let file = tempfile::NamedTempFile::new().unwrap();
        before.save(file.path()).unwrap();
        assert_eq!(Inventory::load(file.path()).unwrap(), before);
    }
}

//! Recognizes an image root by its files, and refuses any other directory: an empty one, somebody's home, the top directory of an archive.

use std::path::Path;

use crate::error::{Error, Result};
use crate::sys::tree::Tree;

/// Each is enough: a distribution, an image without one (distroless), a busybox. systemd-nspawn looks for the former.
const KNOWN_BY: [&str; 5] = ["etc/os-release", "usr/lib/os-release", "etc/passwd", "bin/sh", "usr/bin/sh"];

/// Files of a saved container image, which holds layers and no tree.
const SAVED: [&str; 2] = ["oci-layout", "manifest.json"];

/// So many names are looked at for an image root one directory below.
const MOST: usize = 100;

/// Refuses a directory that is no image root. `refused` makes the error of a reason; `shown` is the directory's path, or an archive's that it
/// is in.
pub fn check(root: &Tree, shown: &Path, archive: bool, refused: impl Fn(String) -> Error) -> Result<()> {
    if is_one(root) {
        return Ok(());
    }
    let (last, others) = KNOWN_BY.split_last().unwrap_or((&"", &[]));
    let error = refused(format!("it is no image root, which has {} or {last}", others.join(", ")));
    if SAVED.iter().any(|name| matches!(root.look(name), Ok(Some(_)))) {
        return Err(error.advise("it is a saved image of a container: 'ims-sshd prepare' unpacks its layers"));
    }
    let below = root.first_names(MOST).unwrap_or_default();
    let is_below = |name: &&std::ffi::OsString| root.folder_without_links(name).is_ok_and(|tree| is_one(&tree));
    let found: Vec<_> = below.iter().filter(is_below).collect();
    let [name] = found.as_slice() else {
        return Err(error.advise("name the directory that holds the image's etc and usr"));
    };
    Err(error.advise(if archive {
        format!("'{}' in it is one: unpack the archive and name that directory", name.display())
    } else {
        format!("{} is one", shown.join(name).display())
    }))
}

fn is_one(root: &Tree) -> bool {
    KNOWN_BY.iter().any(|path| matches!(root.look(path), Ok(Some(_))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(files: &[&str], archive: bool) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let tree = Tree::open(dir.path()).unwrap();
        let refused = |why| Error::new("open x").because(why);
        check(&tree, Path::new("/x"), archive, refused).err().map(|e| e.to_string())
    }

    #[test]
    fn an_image_root_has_a_distribution_users_or_a_shell_and_one_below_is_offered() {
        for name in KNOWN_BY {
            assert_eq!(said(&[name], false), None, "{name}");
        }
        assert!(
            said(&[], false).unwrap().contains("which has etc/os-release, usr/lib/os-release, etc/passwd, bin/sh or")
        );
        for (files, archive, advice) in [
            (&[".bashrc", "bin/tool"][..], false, "name the directory that holds"),
            (&["os-release", "passwd"], false, "name the directory that holds"),
            (&["oci-layout", "index.json"], false, "'ims-sshd prepare' unpacks its layers"),
            (&["rootfs/etc/passwd", "README"], false, "; /x/rootfs is one"),
            (&["rootfs/etc/passwd"], true, "'rootfs' in it is one: unpack the archive and name that directory"),
            (&["a/etc/passwd", "b/etc/passwd"], false, "name the directory that holds"),
        ] {
            let said = said(files, archive).unwrap();
            assert!(said.contains(advice), "{files:?}: {said}");
        }
    }
}

//! Opens the image root, distinguishes it from other directories (an empty one, a home, the top directory of an
//! archive) by its files, and marks it with the verdict.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Advise, Attempt, Error, Result};
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::verdict::{Markers, Verdict, is_mark};
use crate::volume::signal_files::SignalFiles;

/// A directory that has any of these files counts as an image root. systemd-nspawn looks for os-release; distroless
/// images have only etc/passwd, a busybox image only a shell.
const KNOWN_BY: [&str; 5] = ["etc/os-release", "usr/lib/os-release", "etc/passwd", "bin/sh", "usr/bin/sh"];

/// Files of a saved container image (docker save, OCI layout), which holds layers instead of a tree.
const SAVED: [&str; 2] = ["oci-layout", "manifest.json"];

/// Number of subdirectories searched for an image root to suggest.
const MOST: usize = 100;

/// Opens the image root, which has to be a directory of the parent and not a link.
pub(crate) fn open(files: &SignalFiles, name: &str) -> Result<Tree> {
    let shown = files.path().join(name);
    let attempted = || format!("open the image root {}", shown.display());
    // Check and use the same descriptor: a session can replace the directory with a link in between.
    let found = match files.parent().handle_without_links(name) {
        Err(e) if Errno::from_io_error(&e) == Some(Errno::LOOP) => {
            return Err(Error::new(attempted()).because("a directory on the way to it is a symbolic link"))
                .advise("replace the link with a directory on the volume");
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(attempted()).because("it does not exist"))
                .advise("unpack the image there before creating 'ready'");
        }
        other => other.attempt(attempted)?,
    };
    match FileKind::of(&rustix::fs::fstat(&found).attempt(attempted)?) {
        FileKind::Directory => Ok(Tree::from_fd(found)),
        other => Err(Error::new(attempted()).because(format!("it is {other}"))).advise("it has to be a directory"),
    }
}

/// Refuses a directory that is not an image root. `refused` makes the error from a reason; `shown` is the path of the
/// directory, or of the archive that contains it.
pub(crate) fn check(root: &Tree, shown: &Path, archive: bool, refused: impl Fn(String) -> Error) -> Result<()> {
    const ADVICE: &str = "name the directory that holds the image's etc and usr";
    if is_one(root) {
        // This has a bin/sh where /bin is a link to usr/bin.
        let above = shown.parent().filter(|_| !archive && shown.ends_with("usr"));
        return match above.filter(|above| Tree::open(above).is_ok_and(|above| is_one(&above))) {
            Some(above) => Err(refused(format!("it is the usr of {}", above.display())).advise(ADVICE)),
            None => Ok(()),
        };
    }
    let (last, others) = KNOWN_BY.split_last().unwrap_or((&"", &[]));
    let error = refused(format!("it is not an image root, which has {} or {last}", others.join(", ")));
    if SAVED.iter().any(|name| matches!(root.look(name), Ok(Some(_)))) {
        return Err(error.advise("it is a saved container image: 'ims-sshd prepare' unpacks its layers"));
    }
    let below = root.first_names(MOST).unwrap_or_default();
    let is_below = |name: &&std::ffi::OsString| root.directory_without_links(name).is_ok_and(|tree| is_one(&tree));
    let found: Vec<_> = below.iter().filter(is_below).collect();
    let [name] = found.as_slice() else {
        return Err(error.advise(ADVICE));
    };
    Err(error.advise(if archive {
        format!("'{}' in it is an image root: unpack the archive and name that directory", name.display())
    } else {
        format!("{} is an image root", shown.join(name).display())
    }))
}

/// Returns whether the directory is an image root.
pub(crate) fn is_one(root: &Tree) -> bool {
    KNOWN_BY.iter().any(|path| matches!(root.look(path), Ok(Some(_))))
}

/// Removes marks that came with the image, which would end the job before it began. A link or fifo of that name is
/// removed too.
pub(crate) fn remove_old_marks(image_root: &Tree) -> Result<()> {
    for verdict in Verdict::ALL {
        let name = mark_of(verdict);
        remove_directory(image_root, &name)?;
        let attempted = || removing(&name);
        // Check first: on a read-only file system unlink fails with EROFS even if the file does not exist.
        if image_root.look(&name).attempt(attempted)?.is_some() && image_root.remove(&name).attempt(attempted)? {
            tracing::info!("removed /{}, which came with the image", name.display());
        }
    }
    Ok(())
}

fn mark_of(verdict: Verdict) -> PathBuf {
    Path::new("tmp").join(verdict.signal_file())
}

fn removing(mark: &Path) -> String {
    format!("remove /{} of the image", mark.display())
}

/// Removes an empty directory with the name of a mark, which would keep sessions from creating the mark. A directory
/// that is not empty is an error.
fn remove_directory(image_root: &Tree, name: &Path) -> Result<()> {
    let attempted = || removing(name);
    if image_root.look(name).attempt(attempted)?.as_ref().map(FileKind::of) != Some(FileKind::Directory) {
        return Ok(());
    }
    match image_root.remove_directory(name) {
        Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            // The advice is part of the reason: a caller may set an advice of its own.
            let why = "it is a non-empty directory with the name of a mark: remove it from the image";
            return Err(Error::new(attempted()).because(why));
        }
        other => other.attempt(attempted)?,
    };
    tracing::warn!("removed the empty directory /{} of the image, which had the name of a mark", name.display());
    Ok(())
}

/// Returns whether a mark of the user `owner` counts. Logs a warning if it does not.
pub(crate) fn counts(markers: Markers, verdict: Verdict, owner: u32) -> bool {
    if !markers.include(owner) {
        tracing::warn!(
            "/{} of the image belongs to user {owner} and does not count: other users of this machine reach the image \
             root, so that only root can mark it there; remove it first, or use 'ims-sshd {}'",
            mark_of(verdict).display(),
            if verdict == Verdict::Failed { "fail" } else { "complete" }
        );
    }
    markers.include(owner)
}

/// Removes the mark from the image's /tmp, or an empty directory of that name. Returns the mark's owner. Only a regular
/// file is a mark; anything else of that name stays.
pub(crate) fn remove_mark(image_root: &Tree, verdict: Verdict) -> Result<Option<u32>> {
    let name = mark_of(verdict);
    let attempted = || removing(&name);
    remove_directory(image_root, &name)?;
    let Some(found) = image_root.look(&name).attempt(attempted)?.filter(is_mark) else { return Ok(None) };
    Ok(image_root.remove(&name).attempt(attempted)?.then_some(found.st_uid))
}

/// Returns whether `failed` exists in the parent or, for a jailed job, as a mark in the image that `markers` accepts. A
/// place that cannot be read is an error: an image whose verdict is unknown is not packed.
pub(crate) fn is_marked_failed(files: &SignalFiles, image_root: Option<&Tree>, markers: Markers) -> Result<bool> {
    let name = mark_of(Verdict::Failed);
    let in_image = |root: &Tree| {
        let found = root.look(&name).attempt(|| format!("look for /{} in the image", name.display()))?;
        Ok(found.is_some_and(|found| is_mark(&found) && markers.include(found.st_uid)))
    };
    Ok(files.stands(Verdict::Failed.signal_file())? || image_root.map_or(Ok(false), in_image)?)
}

/// Sets the marks in the image's /tmp as a sidecar expects them after a jailed job: creates `failed` if that is the
/// verdict, and removes `complete`.
pub(crate) fn mark(files: &SignalFiles, image_root: &Tree, verdict: Verdict) -> Result<()> {
    let failed = mark_of(Verdict::Failed);
    remove_directory(image_root, &failed)?;
    if verdict == Verdict::Failed {
        files.create(image_root, &failed).attempt(|| "create /tmp/failed in the image")?;
    }
    match remove_mark(image_root, Verdict::Complete) {
        Err(e) if verdict == Verdict::Failed => tracing::warn!("{e}"),
        taken => drop(taken?),
    }
    Ok(())
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
    fn image_root_is_known_by_os_release_passwd_or_shell_and_a_subdirectory_is_suggested() {
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
            (&["rootfs/etc/passwd", "README"], false, "; /x/rootfs is an image root"),
            (&["rootfs/etc/passwd"], true, "'rootfs' in it is an image root: unpack the archive"),
            (&["a/etc/passwd", "b/etc/passwd"], false, "name the directory that holds"),
        ] {
            let said = said(files, archive).unwrap();
            assert!(said.contains(advice), "{files:?}: {said}");
        }
    }

    #[test]
    fn failed_mark_is_found_in_parent_or_image_and_an_unreadable_place_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let files = SignalFiles::open(dir.path()).unwrap().unwrap();
        let root = dir.path().join("image-root");
        std::fs::create_dir(&root).unwrap();
        let tree = open(&files, "image-root").unwrap();
        let is_marked = |tree: Option<&Tree>| is_marked_failed(&files, tree, Markers::Everyone);
        assert!(!is_marked(Some(&tree)).unwrap(), "without a /tmp");
        std::os::unix::fs::symlink("tmp", root.join("tmp")).unwrap();
        let told = is_marked(Some(&tree)).unwrap_err().to_string();
        assert!(told.contains("look for /tmp/failed in the image: Too many levels"), "{told}");
        assert!(!is_marked(None).unwrap());
        std::fs::remove_file(root.join("tmp")).unwrap();
        std::fs::create_dir_all(root.join("tmp/failed")).unwrap();
        assert!(!is_marked(Some(&tree)).unwrap(), "a directory is no mark");
        std::fs::write(root.join("tmp/failed/file"), "").unwrap();
        let told = remove_mark(&tree, Verdict::Failed).unwrap_err().to_string();
        assert!(told.ends_with("with the name of a mark: remove it from the image"), "{told}");
        std::fs::remove_file(root.join("tmp/failed/file")).unwrap();
        assert!(remove_mark(&tree, Verdict::Failed).unwrap().is_none() && !root.join("tmp/failed").exists());
        std::fs::write(root.join("tmp/failed"), "").unwrap();
        assert!(is_marked(Some(&tree)).unwrap());
        std::os::unix::fs::chown(root.join("tmp/failed"), Some(1234), None).unwrap();
        assert!(is_marked(Some(&tree)).unwrap() && !is_marked_failed(&files, Some(&tree), Markers::Root).unwrap());
        assert_eq!(remove_mark(&tree, Verdict::Failed).unwrap(), Some(1234));
        std::fs::write(dir.path().join("failed"), "").unwrap();
        assert!(is_marked(None).unwrap());
    }
}

//! The image root: opened, told from other directories (an empty one, somebody's home, the top directory of an archive) by its files, and
//! marked.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Advise, Attempt, Error, Result};
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::verdict::{Verdict, is_mark};
use crate::volume::signal_files::SignalFiles;

/// Each is enough: a distribution, an image without one (distroless), a busybox. systemd-nspawn looks for the former.
const KNOWN_BY: [&str; 5] = ["etc/os-release", "usr/lib/os-release", "etc/passwd", "bin/sh", "usr/bin/sh"];

/// Files of a saved container image, which holds layers and no tree.
const SAVED: [&str; 2] = ["oci-layout", "manifest.json"];

/// So many names are looked at for an image root one directory below.
const MOST: usize = 100;

/// Opens the image root. It has to be a directory of the parent and not a link.
pub(crate) fn open(files: &SignalFiles, name: &str) -> Result<Tree> {
    let shown = files.path().join(name);
    let attempted = || format!("open the image root {}", shown.display());
    // The descriptor that was looked at is the one that is used: what was a directory a moment ago may be a link now.
    let found = match files.parent().handle_without_links(name) {
        Err(e) if Errno::from_io_error(&e) == Some(Errno::LOOP) => {
            return Err(Error::new(attempted()).because("a directory on the way to it is a symbolic link"))
                .advise("it has to be a directory of the volume");
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(attempted()).because("it does not exist"))
                .advise("whoever creates 'ready' has to unpack the image there first");
        }
        other => other.attempt(attempted)?,
    };
    match FileKind::of(&rustix::fs::fstat(&found).attempt(attempted)?) {
        FileKind::Directory => Ok(Tree::from_fd(found)),
        other => Err(Error::new(attempted()).because(format!("it is {other}"))).advise("it has to be a directory"),
    }
}

/// Refuses a directory that is no image root. `refused` makes the error of a reason; `shown` is the directory's path, or an archive's that it
/// is in.
pub(crate) fn check(root: &Tree, shown: &Path, archive: bool, refused: impl Fn(String) -> Error) -> Result<()> {
    if is_one(root) {
        return Ok(());
    }
    let (last, others) = KNOWN_BY.split_last().unwrap_or((&"", &[]));
    let error = refused(format!("it is no image root, which has {} or {last}", others.join(", ")));
    if SAVED.iter().any(|name| matches!(root.look(name), Ok(Some(_)))) {
        return Err(error.advise("it is a saved image of a container: 'ims-sshd prepare' unpacks its layers"));
    }
    let below = root.first_names(MOST).unwrap_or_default();
    let is_below = |name: &&std::ffi::OsString| root.directory_without_links(name).is_ok_and(|tree| is_one(&tree));
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

/// Removes marks that came with the image: a job must not end before it began. A link or fifo of that name is removed too.
pub(crate) fn remove_old_marks(image_root: &Tree) -> Result<()> {
    for verdict in Verdict::ALL {
        let name = mark_of(verdict);
        remove_directory(image_root, &name)?;
        let attempted = || removing(&name);
        // Looked at first: where the image is read-only, the kernel refuses to remove what is not there, too.
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

/// Removes an empty directory in the place of a mark: with it in the way, no session could make the mark. One that is not empty is an error.
fn remove_directory(image_root: &Tree, name: &Path) -> Result<()> {
    let attempted = || removing(name);
    if image_root.look(name).attempt(attempted)?.as_ref().map(FileKind::of) != Some(FileKind::Directory) {
        return Ok(());
    }
    match image_root.remove_directory(name) {
        Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            // No advice, in whose place there may be the caller's.
            let why = "it is a directory that is not empty, in the place of a mark: remove it from the image";
            return Err(Error::new(attempted()).because(why));
        }
        other => other.attempt(attempted)?,
    };
    tracing::warn!("removed the empty directory /{} of the image, which has the name of a mark", name.display());
    Ok(())
}

/// Removes the mark from the image's /tmp, and an empty directory in its place. Returns whether the mark stood there. What else is no
/// regular file is no mark, and stays.
pub(crate) fn remove_mark(image_root: &Tree, verdict: Verdict) -> Result<bool> {
    let name = mark_of(verdict);
    let attempted = || removing(&name);
    remove_directory(image_root, &name)?;
    if !image_root.look(&name).attempt(attempted)?.is_some_and(|found| is_mark(&found)) {
        return Ok(false);
    }
    image_root.remove(&name).attempt(attempted)
}

/// Returns whether `failed` stands in the parent or, for a jailed job, in the image's /tmp. A place that cannot be looked at is an error: an
/// image whose verdict is not known is not packed.
pub(crate) fn is_marked_failed(files: &SignalFiles, image_root: Option<&Tree>) -> Result<bool> {
    let name = mark_of(Verdict::Failed);
    let in_image = |root: &Tree| {
        let found = root.look(&name).attempt(|| format!("look for /{} in the image", name.display()))?;
        Ok(found.is_some_and(|found| is_mark(&found)))
    };
    Ok(files.stands(Verdict::Failed.signal_file())? || image_root.map_or(Ok(false), in_image)?)
}

/// Makes the image's own mark as a sidecar expects it after a jailed job: a failure stands in its /tmp too, a success leaves
/// nothing there.
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

    #[test]
    fn an_image_is_marked_failed_outside_or_inside_or_where_one_cannot_look() {
        let dir = tempfile::tempdir().unwrap();
        let files = SignalFiles::open(dir.path()).unwrap().unwrap();
        let root = dir.path().join("image-root");
        std::fs::create_dir(&root).unwrap();
        let tree = open(&files, "image-root").unwrap();
        let is_marked = |tree: Option<&Tree>| is_marked_failed(&files, tree);
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
        assert!(told.ends_with("in the place of a mark: remove it from the image"), "{told}");
        std::fs::remove_file(root.join("tmp/failed/file")).unwrap();
        assert!(!remove_mark(&tree, Verdict::Failed).unwrap() && !root.join("tmp/failed").exists());
        std::fs::write(root.join("tmp/failed"), "").unwrap();
        assert!(is_marked(Some(&tree)).unwrap());
        assert!(remove_mark(&tree, Verdict::Failed).unwrap());
        std::fs::write(dir.path().join("failed"), "").unwrap();
        assert!(is_marked(None).unwrap());
    }
}

//! Checks bind mounts against an image, and finds the mount points for them that the image lacks.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Advise, Attempt, Result};
use crate::jail::binds::{Bind, overlap, taken};
use crate::jail::tier::Tier;
use crate::jailer::mount_points::{Kind, MountPoint};
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use std::io;

/// Resolves the targets of `binds` in this image, so that no link is left in them. Returns the binds and the mount
/// points that the image lacks. Every check of a bind against the image is in this function.
pub(crate) fn place(image_root: &Tree, tier: Tier, binds: &[Bind]) -> Result<(Vec<Bind>, Vec<MountPoint>)> {
    let (mut placed, mut lacking): (Vec<Bind>, Vec<MountPoint>) = (Vec::new(), Vec::new());
    let root = rustix::fs::fstat(image_root).attempt(|| "look at the image root")?;
    for bind in binds {
        let attempted = || bind.attempted();
        let refuse = |why: String| bind.refuse(why);
        if tier == Tier::Chroot {
            return Err(refuse("in the tier 'chroot' nothing can be mounted".into()))
                .advise("allow the container another tier, or leave the bind mount out");
        }
        let is_root = |m: std::fs::Metadata| (m.dev(), m.ino()) == (root.st_dev, root.st_ino);
        if bind.source.ancestors().any(|above| std::fs::metadata(above).is_ok_and(is_root)) {
            return Err(refuse("the source lies in the image root".into())).advise("name a source outside the image");
        }
        let is_directory = std::fs::symlink_metadata(&bind.source).attempt(attempted)?.is_dir();
        let kind = if is_directory { Kind::Directory } else { Kind::File };
        let (there, missing) = nearest(image_root, &bind.target).map_err(refuse)?;
        // Do not use Path::join: with an empty path it adds a trailing slash, which the kernel refuses for a file.
        let target: PathBuf = there.components().chain(missing.components()).collect();
        if let Some(why) = taken(&target) {
            return Err(refuse(format!("a link of the image leads to /{}: {why}", target.display())));
        }
        if let Some(other) = placed.iter().find(|other| overlap(&other.target, &target)) {
            let why = format!("{} is bound to /{}", other.source.display(), other.target.display());
            return Err(refuse(why)).advise("no target may equal another one or lie in it");
        }
        let found = image_root.look(&target).attempt(attempted)?;
        match (found.as_ref().map(FileKind::of), is_directory) {
            (None | Some(FileKind::Directory), true) | (None | Some(FileKind::Regular), false) => {}
            (Some(other), _) => {
                let expected = if is_directory { "a directory" } else { "a regular file" };
                let why = format!("the source is {expected}, and the target is {other}");
                return Err(refuse(why)).advise("name another target");
            }
        }
        for above in missing.ancestors().filter(|path| !path.as_os_str().is_empty()).collect::<Vec<_>>().iter().rev() {
            let kind = if **above == missing { kind } else { Kind::Directory };
            let mount_point = MountPoint { path: there.join(above), kind };
            if !lacking.contains(&mount_point) {
                lacking.push(mount_point);
            }
        }
        placed.push(Bind { target, ..bind.clone() });
    }
    Ok((placed, lacking))
}

/// Splits `target` into the part that exists in the image, as a path without links, and the rest. Links are followed as
/// long as they stay in the image.
fn nearest(image_root: &Tree, target: &Path) -> std::result::Result<(PathBuf, PathBuf), String> {
    for path in target.ancestors() {
        let shown = || format!("/{} of the image", path.display());
        let found = if path.as_os_str().is_empty() { image_root.beneath(".") } else { image_root.beneath(path) };
        match found {
            Ok(found) => {
                let real = image_root.path_of(&found).map_err(|e| format!("{}: {e}", shown()))?;
                let rest = target.strip_prefix(path).unwrap_or(target);
                return Ok((real, rest.to_owned()));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => match image_root.look(path) {
                Ok(None) => {}
                Ok(Some(_)) => return Err(format!("{} is a dangling link", shown())),
                Err(e) => return Err(format!("{}: {e}", shown())),
            },
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                return Err(format!("a link on the way to {} leads out of the image root", shown()));
            }
            Err(e) => return Err(format!("{}: {e}", shown())),
        }
    }
    Ok((PathBuf::new(), target.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn bind_target_is_resolved_in_the_image_and_links_out_of_it_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (root, source) = (dir.path().join("root"), dir.path().join("source"));
        std::fs::create_dir_all(root.join("usr/lib")).unwrap();
        std::fs::create_dir(root.join("run")).unwrap();
        std::fs::create_dir(&source).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        for (link, to) in [
            ("lib", "usr/lib"),
            ("out", "/etc"),
            ("up", "../../etc"),
            ("nothing", "usr/nothing"),
            ("running", "run"),
            ("odd", "a\nfile etc"),
            ("loop", "loop"),
        ] {
            symlink(to, root.join(link)).unwrap();
        }
        std::fs::create_dir(root.join("a\nfile etc")).unwrap();
        let tree = Tree::open(&root).unwrap();
        let bind = |target: &str| Bind { source: source.clone(), target: target.into(), read_only: false };
        let (placed, lacking) = place(&tree, Tier::User, &[bind("lib/a/b"), bind("lib/a/c"), bind("usr/x")]).unwrap();
        let targets: Vec<_> = placed.iter().map(|bind| bind.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["usr/lib/a/b", "usr/lib/a/c", "usr/x"]);
        let lacking: Vec<_> = lacking.iter().map(ToString::to_string).collect();
        assert_eq!(lacking, ["folder usr/lib/a", "folder usr/lib/a/b", "folder usr/lib/a/c", "folder usr/x"]);
        assert_eq!(place(&tree, Tier::User, &[bind("usr/lib")]).unwrap().1, []);
        for (targets, why) in [
            (&["out/x"][..], "leads out of the image root"),
            (&["out"], "leads out of the image root"),
            (&["up/x"], "leads out of the image root"),
            (&["nothing/x"], "is a dangling link"),
            (&["loop"], "Too many levels"),
            (&["running/x"], "leads to /run/x: /run is the jail's own"),
            (&["odd/passwd"], "control characters"),
            (&["file"], "the source is a directory, and the target is a regular file"),
            (&["file/x"], "Not a directory"),
            (&["lib/x", "usr/lib/x"], "no target may equal another one or lie in it"),
            (&["opt", "opt/x"], "no target may equal another one or lie in it"),
        ] {
            let binds: Vec<_> = targets.iter().map(|target| bind(target)).collect();
            let refused = place(&tree, Tier::User, &binds).unwrap_err().to_string();
            assert!(refused.contains(why), "{targets:?}: {refused}");
        }
        let licence = dir.path().join("licence");
        std::fs::write(&licence, "").unwrap();
        let file = Bind { source: licence, ..bind("file") };
        let (placed, lacking) = place(&tree, Tier::User, std::slice::from_ref(&file)).unwrap();
        assert_eq!((placed, lacking), (vec![file], Vec::new()));
        let file = Bind { source: root.join("file"), ..bind("usr/y") };
        assert!(place(&tree, Tier::User, &[file]).unwrap_err().to_string().contains("lies in the image root"));
        assert!(place(&tree, Tier::Chroot, &[bind("usr/y")]).unwrap_err().to_string().contains("tier 'chroot'"));
    }
}

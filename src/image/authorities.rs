//! CA certificates of a site, copied into an image.

use std::path::Path;

use crate::error::{Attempt, Result};
use crate::sys::tree::Tree;

/// Directory of CA certificates in the image.
const AUTHORITIES: &str = "etc/cray/ca";

/// Name under which programs of the image expect the pod's CA certificate.
const AUTHORITY: &str = "certificate_authority.crt";

/// Copies the CA certificates in `directory` into the image, without the links through which Kubernetes mounts them.
pub(crate) fn put_authorities(image_root: &Tree, directory: &Path) -> Result<()> {
    let attempted = || format!("copy {} into the image", directory.display());
    let Ok(entries) = std::fs::read_dir(directory) else { return Ok(()) };
    image_root.make_directories(AUTHORITIES).attempt(attempted)?;
    for entry in entries {
        let file = entry.attempt(attempted)?.path();
        let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("..") || !file.is_file() {
            continue;
        }
        let text = std::fs::read(&file).attempt(|| format!("read {}", file.display()))?;
        image_root.replace(format!("{AUTHORITIES}/{name}"), &text).attempt(attempted)?;
        if name != AUTHORITY && image_root.look(format!("{AUTHORITIES}/{AUTHORITY}")).attempt(attempted)?.is_none() {
            image_root.replace(format!("{AUTHORITIES}/{AUTHORITY}"), &text).attempt(attempted)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn image() -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        (dir, tree)
    }

    #[test]
    fn certificates_are_not_copied_through_links_out_of_the_image() {
        let outside = tempfile::tempdir().unwrap();
        let authorities = tempfile::tempdir().unwrap();
        std::fs::write(authorities.path().join("certificate_authority.crt"), "authority").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        symlink(outside.path(), dir.path().join("etc")).unwrap();
        assert!(put_authorities(&tree, authorities.path()).is_err());
        std::fs::remove_file(dir.path().join("etc")).unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        symlink(outside.path(), dir.path().join("etc/cray")).unwrap();
        assert!(put_authorities(&tree, authorities.path()).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn certificates_are_copied_repeatedly_without_links_of_kubernetes() {
        let pod = tempfile::tempdir().unwrap();
        std::fs::create_dir(pod.path().join("..2026")).unwrap();
        std::fs::write(pod.path().join("..2026/certificate_authority.crt"), "authority").unwrap();
        symlink("..2026", pod.path().join("..data")).unwrap();
        symlink("..data/certificate_authority.crt", pod.path().join("certificate_authority.crt")).unwrap();
        let (dir, tree) = image();
        // A link that upstream's sidecar has left behind.
        let there = dir.path().join("etc/cray/ca");
        std::fs::create_dir_all(&there).unwrap();
        symlink("..data/certificate_authority.crt", there.join("certificate_authority.crt")).unwrap();
        for _ in 0..2 {
            put_authorities(&tree, pod.path()).unwrap();
            let names: Vec<_> = std::fs::read_dir(&there).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names, ["certificate_authority.crt"]);
            assert_eq!(std::fs::read_to_string(there.join("certificate_authority.crt")).unwrap(), "authority");
        }
        put_authorities(&tree, Path::new("/nowhere")).unwrap();
    }
}

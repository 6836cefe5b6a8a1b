//! Image roots of distributions, packed from sources of all kinds.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use testbed::succeed;

use crate::snapshot::{assert_same, backhand_agrees, inventory, of_image, of_reader, of_tree, pack_from};
use crate::sources::{KINDS, mksquashfs};

/// Image roots of the cache, and the kinds of sources that are made of each of them: of the large ones that which takes
/// the shortest time.
const IMAGES: [(&str, &[&[&str]]); 4] =
    [("debian", &[KINDS[14]]), ("rpm", &[KINDS[14]]), ("musl", &KINDS), ("debian-arm64", &[KINDS[3]])];

#[test]
fn image_roots_of_distributions_come_out_as_the_kernel_sees_them() {
    let is_all = std::env::var("SQUASHFS_IMAGES").is_ok_and(|which| which == "all");
    for (name, kinds) in IMAGES {
        let kinds: &[_] = if is_all { &KINDS } else { kinds };
        for kind in kinds {
            edited(name, kind);
        }
    }
}

/// Packs an image root of which a few files were changed and removed.
fn edited(name: &str, kind: &[&str]) {
    let dir = testbed::directory();
    let path = |name: &str| dir.path().join(name);
    let (root, source, image) = (path("tree"), path("source"), path("image"));
    succeed(Command::new("cp").arg("-aT").arg(testbed::cache().join(name)).arg(&root));
    mksquashfs(&root, &source, kind);
    let (inventory, mut unchanged, options) = inventory(&source, &root);
    let files: Vec<_> = testbed::walk(&root).into_iter().filter(|path| testbed::is_regular(path)).collect();
    for (number, file) in files.iter().enumerate() {
        let is_several = |file: &Path| fs::metadata(file).unwrap().nlink() > 1;
        match number % 97 {
            0 => {
                unchanged.remove(&fs::metadata(file).unwrap().ino());
                fs::OpenOptions::new().append(true).open(file).unwrap().write_all(b"changed").unwrap();
            }
            1 if !is_several(file) => fs::remove_file(file).unwrap(),
            _ => {}
        }
    }
    let what = format!("{name}, {kind:?}");
    let summary = pack_from(&root, Some((&inventory, &unchanged)), &image, &options);
    assert!(summary.files_taken > 0 && summary.files_read > 0, "{what}: {summary:?}");
    let expected = of_tree(&root);
    assert_same(&expected, &of_image(&image, &path("mounted")), &what);
    assert_same(&expected, &of_reader(&image), &what);
    assert!(backhand_agrees(&expected, &image, &what), "{what}: backhand cannot read it");
    println!("{what}: {} of {} files taken over", summary.files_taken, files.len());
}

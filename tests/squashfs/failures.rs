//! Trees that change while they are packed, and disks that become full: an error, and no half image that is taken for a
//! whole one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use ims_sshd::squashfs::gather::{Choice, Gathered, gather, opener};
use ims_sshd::squashfs::{Compression, Content, Failure, Options, Progress, Summary, write};
use ims_sshd::sys::tree::Tree;
use testbed::{Mounted, mount};

use crate::snapshot::{Unchanged, assert_same, inventory, of_image, of_tree, options, pack, pack_from};
use crate::trees::Random;

/// A tree of incompressible files, which are of several blocks, and of less than one.
fn tree(dir: &Path) -> PathBuf {
    let root = dir.join("tree");
    fs::create_dir_all(root.join("sub")).unwrap();
    for number in 0..20 {
        fs::write(root.join(format!("large {number:02}")), Random(number).bytes(100_000)).unwrap();
        fs::write(root.join(format!("sub/small {number:02}")), Random(number + 100).bytes(1000)).unwrap();
    }
    root
}

fn gathered(tree: &Tree) -> Gathered {
    gather(tree, &mut |_, _| Choice::Pack(Content::Read)).unwrap()
}

/// Options with which the files are read one after another.
fn one_at_a_time() -> Options {
    Options { processors: 1, ..options(Compression::Gzip, 4096) }
}

/// Packs a tree that was collected before; `report` hears of the progress.
fn written(tree: &Tree, all: &Gathered, image: &Path, report: &(dyn Fn(&Progress) + Sync)) -> Result<Summary, Failure> {
    let output = File::options().read(true).write(true).create_new(true).open(image).unwrap();
    write(&all.plan, None, &one_at_a_time(), &mut opener(tree), &output, report)
}

fn begins_like_a_squashfs(image: &Path) -> bool {
    fs::read(image).unwrap().starts_with(b"hsqs")
}

#[test]
fn file_that_vanishes_after_it_was_collected_is_named() {
    let dir = testbed::directory();
    let root = tree(dir.path());
    for gone in ["large 07", "sub/small 12", "sub"] {
        let (opened, image) = (Tree::open(&root).unwrap(), dir.path().join(gone.replace('/', "-")));
        let all = gathered(&opened);
        let aside = dir.path().join("aside");
        fs::rename(root.join(gone), &aside).unwrap();
        let said = written(&opened, &all, &image, &|_| {}).unwrap_err().to_string();
        assert!(said.starts_with(&format!("/{gone}")) && said.contains("No such file"), "{said}");
        assert!(!begins_like_a_squashfs(&image), "{gone}");
        fs::rename(&aside, root.join(gone)).unwrap();
        // The same again, with all files.
        fs::remove_file(&image).unwrap();
        written(&opened, &gathered(&opened), &image, &|_| {}).unwrap();
        assert_same(&of_tree(&root), &of_image(&image, &dir.path().join("mounted")), gone);
    }
}

#[test]
fn file_that_shrinks_while_it_is_read_is_named() {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    fs::create_dir(&root).unwrap();
    // Longer than all that is read ahead.
    fs::write(root.join("file"), Random(1).bytes(4 << 20)).unwrap();
    let tree = Tree::open(&root).unwrap();
    let all = gathered(&tree);
    let shrink = |_: &Progress| File::options().write(true).open(root.join("file")).unwrap().set_len(5000).unwrap();
    let said = written(&tree, &all, &image, &shrink).unwrap_err().to_string();
    assert_eq!(said, "/file: it has changed meanwhile");
    assert!(!begins_like_a_squashfs(&image));
}

#[test]
fn link_in_the_place_of_a_file_is_not_followed() {
    let dir = testbed::directory();
    let (root, image, secret) = (tree(dir.path()), dir.path().join("image"), dir.path().join("secret"));
    fs::copy(root.join("large 03"), &secret).unwrap();
    let opened = Tree::open(&root).unwrap();
    let all = gathered(&opened);
    fs::remove_file(root.join("large 03")).unwrap();
    std::os::unix::fs::symlink(&secret, root.join("large 03")).unwrap();
    let said = written(&opened, &all, &image, &|_| {}).unwrap_err().to_string();
    assert!(said.starts_with("/large 03: "), "{said}");
    assert!(!begins_like_a_squashfs(&image));
}

/// On a file system with too little space a write is short, and the next one fails. The blocks of a source are copied to
/// another file system than theirs.
#[test]
fn full_disk_is_an_error_wherever_it_is_met_and_packing_can_be_repeated() {
    let dir = testbed::directory();
    let (root, source) = (tree(dir.path()), dir.path().join("source"));
    let summary = pack(&root, &source, &one_at_a_time());
    let (inventory, unchanged, options) = inventory(&source, &root);
    let tree = Tree::open(&root).unwrap();
    let taken = |unchanged: &Unchanged| {
        gather(&tree, &mut |_, found| {
            Choice::Pack(unchanged.get(&found.st_ino).map_or(Content::Read, |number| Content::Taken(*number)))
        })
        .unwrap()
    };
    let (none, all) = (gathered(&tree), taken(&unchanged));
    // In the first block, in the middle of one, and behind all blocks, in the tables.
    for kibibytes in [4, 36, 1000, summary.length / 1024 / 4 * 4 - 4] {
        for (what, plan, source) in [("from scratch", &none, None), ("taken over", &all, Some(&inventory))] {
            let place = dir.path().join("small");
            fs::create_dir(&place).unwrap();
            mount(&["-t", "tmpfs", "-o", &format!("size={kibibytes}k"), "tmpfs"], &place);
            let mounted = Mounted(place.clone());
            let image = place.join("image");
            let output = File::options().read(true).write(true).create_new(true).open(&image).unwrap();
            let failed = write(&plan.plan, source, &options, &mut opener(&tree), &output, &|_| {}).unwrap_err();
            let Failure::Output(error) = failed else { panic!("{kibibytes} KiB, {what}: {failed}") };
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{kibibytes} KiB, {what}");
            assert!(!begins_like_a_squashfs(&image), "{kibibytes} KiB, {what}");
            drop((output, mounted));
            fs::remove_dir(&place).unwrap();
        }
    }
    let again = dir.path().join("again");
    pack_from(&root, Some((&inventory, &unchanged)), &again, &options);
    assert_same(&of_tree(&root), &of_image(&again, &dir.path().join("mounted")), "repeated");
}

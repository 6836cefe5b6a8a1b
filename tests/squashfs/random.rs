//! Random trees with random edits, over sources of all kinds and over several generations of our own images.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::snapshot::{Unchanged, assert_same, backhand_agrees, inventory, of_image, of_reader, of_tree, pack_from};
use crate::sources::{KINDS, mksquashfs};
use crate::trees::Drawn;

#[test]
fn edited_trees_come_out_as_the_kernel_sees_them() {
    let trees = std::env::var("SQUASHFS_TREES").map_or(20, |number| number.parse().unwrap());
    let first = std::env::var("SQUASHFS_SEED").map_or(0, |number| number.parse().unwrap());
    for seed in first..first + trees {
        edited(seed);
    }
}

fn edited(seed: u64) {
    let kind = KINDS[usize::try_from(seed).unwrap() % KINDS.len()];
    let block_size = kind.iter().skip_while(|option| **option != "-b").nth(1).map_or(131_072, |b| b.parse().unwrap());
    let dir = testbed::directory();
    let root = dir.path().join("tree");
    let mut tree = Drawn::new(&root, seed, block_size);
    let (mut source, mut next) = (dir.path().join("source"), dir.path().join("next"));
    mksquashfs(&root, &source, kind);
    for generation in 0..2 + tree.random.below(2) {
        let what = format!("seed {seed}, {kind:?}, generation {generation}");
        let (inventory, mut unchanged, options) = inventory(&source, &root);
        tree.changed.clear();
        for _ in 0..tree.random.below(25) {
            tree.edit();
        }
        unchanged.retain(|inode, _| !tree.changed.contains(inode));
        let summary = pack_from(&root, Some((&inventory, &unchanged)), &next, &options);
        let expected = of_tree(&root);
        assert_same(&expected, &of_image(&next, &dir.path().join("mounted")), &what);
        assert_same(&expected, &of_reader(&next), &what);
        if !backhand_agrees(&expected, &next, &what) {
            // It cannot read every squashfs.
            let theirs = dir.path().join("theirs");
            mksquashfs(&root, &theirs, kind);
            assert!(!backhand_agrees(&expected, &theirs, &what), "{what}: backhand reads mksquashfs's image, not ours");
        }
        assert_eq!(fs::metadata(&next).unwrap().size(), summary.length, "{what}");
        // The same from scratch gives the same tree.
        if seed.is_multiple_of(4) {
            pack_from(&root, None::<(_, &Unchanged)>, &source, &options);
            assert_same(&expected, &of_image(&source, &dir.path().join("mounted")), &what);
        }
        std::mem::swap(&mut source, &mut next);
    }
}

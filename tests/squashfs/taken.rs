//! Content that is taken over from a source, and content that must not be.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use ims_sshd::squashfs::gather::Choice;
use ims_sshd::squashfs::{Compression, Content, Options};
use testbed::succeed;

use crate::snapshot::{assert_same, inventory, of_image, of_tree, options, pack, pack_from};
use crate::sources::mksquashfs;
use crate::trees::Random;

/// Returns whether `secret` is in `all`.
fn holds(all: &[u8], secret: &[u8]) -> bool {
    all.windows(secret.len()).any(|window| window == secret)
}

#[test]
fn nothing_of_removed_or_changed_files_is_in_the_result() {
    let dir = testbed::directory();
    let (root, image, again) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("again"));
    fs::create_dir(&root).unwrap();
    let mut random = Random(5);
    let secrets: Vec<_> = (0..6).map(|_| random.bytes(64)).collect();
    // In files of one block, of several, and in tails that share a fragment with others.
    for (number, secret) in secrets.iter().enumerate() {
        for (size, name) in [(200, "small"), (9000, "large"), (70_000, "huge")] {
            let mut content = random.bytes(size);
            content[size / 2..size / 2 + 64].copy_from_slice(secret);
            fs::write(root.join(format!("{name} {number}")), content).unwrap();
            fs::write(root.join(format!("{name} other {number}")), random.bytes(size)).unwrap();
        }
    }
    for kind in [&["-b", "4096"][..], &["-b", "4096", "-always-use-fragments"], &["-b", "4096", "-noD", "-noF"]] {
        let copy = dir.path().join("copy");
        let _ = fs::remove_dir_all(&copy);
        succeed(Command::new("cp").arg("-a").arg(&root).arg(&copy));
        mksquashfs(&copy, &image, kind);
        let source = fs::read(&image).unwrap();
        assert!(secrets.iter().all(|secret| holds(&source, secret)), "what is random is stored as it is");
        let (source, mut unchanged, options) = inventory(&image, &copy);
        for number in 0..6 {
            for name in ["small", "large", "huge"] {
                let path = copy.join(format!("{name} {number}"));
                unchanged.remove(&fs::metadata(&path).unwrap().ino());
                match number % 3 {
                    0 => fs::remove_file(&path).unwrap(),
                    1 => fs::write(&path, random.bytes(300)).unwrap(),
                    _ => fs::write(&path, b"").unwrap(),
                }
            }
        }
        let summary = pack_from(&copy, Some((&source, &unchanged)), &again, &options);
        assert!(summary.files_taken == 18 && summary.progress.taken > 6 * 75_000, "{summary:?}");
        assert_same(&of_tree(&copy), &of_image(&again, &dir.path().join("mounted")), "others are kept");
        let result = fs::read(&again).unwrap();
        for (number, secret) in secrets.iter().enumerate() {
            assert!(!holds(&result, secret), "{kind:?}: secret {number} is in the result");
        }
    }
}

#[test]
fn a_fragment_block_is_taken_over_if_all_of_it_is_live() {
    let dir = testbed::directory();
    let (root, image, again) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("again"));
    fs::create_dir(&root).unwrap();
    let mut random = Random(6);
    // Ten fragment blocks of ten files.
    for number in 0..100 {
        fs::write(root.join(format!("{number:03}")), random.bytes(409)).unwrap();
    }
    pack(&root, &image, &options(Compression::Gzip, 4096));
    let (source, mut unchanged, options) = inventory(&image, &root);
    unchanged.remove(&fs::metadata(root.join("055")).unwrap().ino());
    fs::remove_file(root.join("055")).unwrap();
    let summary = pack_from(&root, Some((&source, &unchanged)), &again, &options);
    assert_eq!((summary.progress.taken, summary.progress.read), (9 * 4090, 9 * 409), "{summary:?}");
    assert_same(&of_tree(&root), &of_image(&again, &dir.path().join("mounted")), "tails");
}

#[test]
fn a_new_file_equal_to_one_that_is_taken_over_is_stored_once() {
    let dir = testbed::directory();
    let (root, image, again) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("again"));
    fs::create_dir(&root).unwrap();
    let mut random = Random(7);
    for (name, size) in [("large", 3 << 20), ("small", 3000)] {
        fs::write(root.join(name), random.bytes(size)).unwrap();
    }
    mksquashfs(&root, &image, &[]);
    let (source, unchanged, options) = inventory(&image, &root);
    for name in ["large", "small"] {
        fs::copy(root.join(name), root.join(format!("another {name}"))).unwrap();
    }
    let summary = pack_from(&root, Some((&source, &unchanged)), &again, &options);
    assert_eq!(summary.duplicates, 2);
    let grown = fs::metadata(&again).unwrap().len().abs_diff(fs::metadata(&image).unwrap().len());
    assert!(grown <= 4096, "{grown}");
    assert_same(&of_tree(&root), &of_image(&again, &dir.path().join("mounted")), "copies");
}

#[test]
fn a_source_that_is_cut_off_meanwhile_is_an_error() {
    let dir = testbed::directory();
    let (root, image, again) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("again"));
    fs::create_dir(&root).unwrap();
    for number in 0..20 {
        fs::write(root.join(number.to_string()), Random(number).bytes(100_000)).unwrap();
    }
    mksquashfs(&root, &image, &["-b", "4096"]);
    let (source, unchanged, options) = inventory(&image, &root);
    fs::File::options().write(true).open(&image).unwrap().set_len(500_000).unwrap();
    let tree = ims_sshd::sys::tree::Tree::open(&root).unwrap();
    let plan = ims_sshd::squashfs::gather::gather(&tree, &mut |_, found| {
        let known = unchanged.get(&found.st_ino);
        Choice::Pack(known.map_or(Content::Read, |number| Content::Taken(*number)))
    });
    let output = fs::File::options().read(true).write(true).create_new(true).open(&again).unwrap();
    let mut open = ims_sshd::squashfs::gather::opener(&tree);
    let written = ims_sshd::squashfs::write(&plan.unwrap().plan, Some(&source), &options, &mut open, &output, &|_| {});
    let said = written.unwrap_err().to_string();
    assert!(matches!(&*said, "source: the squashfs is damaged: it was cut off meanwhile"), "{said}");
    assert!(!fs::read(&again).unwrap().starts_with(b"hsqs"));
}

#[test]
fn ten_generations_grow_by_less_than_one_percent() {
    let dir = testbed::directory();
    let root = dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    let mut random = Random(8);
    let text = |random: &mut Random| {
        let words: Vec<_> = (0..100).map(|_| random.bytes(5)).collect();
        let length = if random.one_in(20) { random.index(400_000) } else { random.index(20_000) };
        (0..length / 5).flat_map(|_| words[random.index(100)].clone()).collect::<Vec<u8>>()
    };
    for number in 0..1500 {
        fs::write(root.join(format!("{number}")), text(&mut random)).unwrap();
    }
    let (mut source, mut next) = (dir.path().join("source"), dir.path().join("next"));
    let gzip = options(Compression::Gzip, 128 << 10);
    mksquashfs(&root, &source, &[]);
    for generation in 0..10 {
        let (inventory, mut unchanged, options) = inventory(&source, &root);
        for _ in 0..15 {
            let path = root.join(format!("{}", random.index(1500)));
            unchanged.remove(&fs::metadata(&path).unwrap().ino());
            fs::write(&path, text(&mut random)).unwrap();
        }
        pack_from(&root, Some((&inventory, &unchanged)), &next, &options);
        assert_same(&of_tree(&root), &of_image(&next, &dir.path().join("mounted")), &format!("{generation}"));
        std::mem::swap(&mut source, &mut next);
    }
    pack(&root, &next, &Options { ..gzip });
    let [grown, fresh] = [&source, &next].map(|image| fs::metadata(image).unwrap().len());
    println!("after ten generations {grown} bytes, from scratch {fresh}");
    assert!(grown * 100 <= fresh * 101, "{grown} bytes, from scratch {fresh}");
}

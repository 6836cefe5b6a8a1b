//! Single properties of the format, each on a tree made for it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use ims_sshd::squashfs::{Compression, Fragments, Options};
use testbed::succeed;

use crate::snapshot::{assert_same, of_image, of_tree, options, pack};
use crate::trees::{Drawn, Random};

const MIB: u64 = 1 << 20;

#[test]
fn every_compression_and_block_size_is_what_the_kernel_reads() {
    let dir = testbed::directory();
    let root = dir.path().join("tree");
    Drawn::new(&root, 7, 128 << 10);
    let expected = of_tree(&root);
    for compression in Compression::ALL {
        for block_size in [4 << 10, 128 << 10, 1 << 20] {
            let image = dir.path().join("image");
            pack(&root, &image, &options(compression, block_size));
            let what = format!("{compression:?} {block_size}");
            assert_same(&expected, &of_image(&image, &dir.path().join("mounted")), &what);
            let said = succeed(Command::new("unsquashfs").arg("-stat").arg(&image));
            let name = if compression == Compression::None { "gzip" } else { compression.name() };
            assert!(said.contains(&format!("Compression {name}")), "{said}");
            assert!(said.contains(&format!("Block size {block_size}")), "{said}");
            succeed(Command::new("unsquashfs").arg("-lls").arg(&image));
        }
    }
}

#[test]
fn unsquashfs_unpacks_the_tree_as_it_was() {
    let dir = testbed::directory();
    let (root, image, unpacked) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("unpacked"));
    for seed in 20..23 {
        let root = root.join(seed.to_string());
        Drawn::new(&root, seed, 4096);
        pack(&root, &image, &options(Compression::Zstd, 4096));
        succeed(Command::new("unsquashfs").args(["-force", "-no-progress", "-dest"]).arg(&unpacked).arg(&image));
        assert_same(&of_tree(&root), &of_tree(&unpacked), &format!("seed {seed}"));
        fs::remove_dir_all(&unpacked).unwrap();
    }
}

#[test]
fn fragments_hold_nothing_small_files_or_tails_too() {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    Drawn::new(&root, 8, 4096);
    for fragments in [Fragments::Never, Fragments::Small, Fragments::Tails] {
        pack(&root, &image, &Options { fragments, ..options(Compression::Gzip, 4096) });
        assert_same(&of_tree(&root), &of_image(&image, &dir.path().join("mounted")), &format!("{fragments:?}"));
        let said = succeed(Command::new("unsquashfs").arg("-stat").arg(&image));
        let is_always = said.contains("Always-use-fragments option is specified")
            || said.contains("Tailends are packed into fragments");
        assert_eq!(is_always, fragments == Fragments::Tails, "{said}");
        assert_eq!(said.contains("Number of fragments 0"), fragments == Fragments::Never, "{said}");
    }
}

#[test]
fn a_directory_of_many_entries_is_indexed_and_each_is_found() {
    let dir = testbed::directory();
    let (root, image, mounted) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("mounted"));
    let large = root.join("large");
    fs::create_dir_all(&large).unwrap();
    for number in 0..6000 {
        let name = large.join(format!("{number:x} {}", "n".repeat(number % 200)));
        if number % 3 == 0 { fs::create_dir(name).unwrap() } else { drop(File::create(name).unwrap()) }
    }
    pack(&root, &image, &options(Compression::Zstd, 128 << 10));
    // Lookups by name use the index, and a listing does not.
    assert_same(&of_tree(&root), &of_image(&image, &mounted), "large directory");
}

#[test]
fn a_file_above_four_gib_and_its_holes_are_kept() {
    let dir = testbed::directory();
    let (root, image, mounted) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("mounted"));
    fs::create_dir(&root).unwrap();
    let file = File::create(root.join("large")).unwrap();
    file.set_len(5 << 30).unwrap();
    for at in [0, 1 << 30, (4 << 30) + 4096 * 5 + 1, (5 << 30) - 3] {
        file.write_all_at(b"abc", at).unwrap();
    }
    let summary = pack(&root, &image, &options(Compression::Gzip, 1 << 20));
    assert!(summary.length < MIB, "{summary:?}");
    fs::create_dir(&mounted).unwrap();
    testbed::mount(&["-t", "squashfs", "-o", "loop,ro", image.to_str().unwrap()], &mounted);
    let _mounted = testbed::Mounted(mounted.clone());
    succeed(Command::new("cmp").arg(root.join("large")).arg(mounted.join("large")));
}

#[test]
fn equal_files_are_stored_once() {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    fs::create_dir(&root).unwrap();
    let (large, small) = (Random(1).bytes(3 << 20), Random(2).bytes(5000));
    for number in 0..4 {
        fs::write(root.join(format!("large{number}")), &large).unwrap();
        fs::write(root.join(format!("small{number}")), &small).unwrap();
    }
    let mut other = large.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(root.join("other"), other).unwrap();
    let summary = pack(&root, &image, &options(Compression::Gzip, 128 << 10));
    assert_eq!(summary.duplicates, 6);
    assert!((6 * MIB..6 * MIB + 20_000).contains(&summary.length), "{summary:?}");
    assert_same(&of_tree(&root), &of_image(&image, &dir.path().join("mounted")), "duplicates");
    let each = Options { without_duplicates: false, ..options(Compression::Gzip, 128 << 10) };
    let summary = pack(&root, &image, &each);
    assert_eq!((summary.duplicates, summary.length / MIB), (0, 15));
}

#[test]
fn the_same_tree_gives_the_same_bytes_whatever_the_number_of_processors() {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    Drawn::new(&root, 9, 4096);
    let made = |processors: usize, epoch: Option<u32>| {
        pack(&root, &image, &Options { processors, epoch, ..options(Compression::Zstd, 4096) });
        fs::read(&image).unwrap()
    };
    let one = made(1, None);
    for processors in [2, 3, 16] {
        assert!(made(processors, None) == one, "{processors} processors");
    }
    let dated = made(1, Some(1_000_000_000));
    assert!(made(5, Some(1_000_000_000)) == dated);
    for (_, entry) in of_image(&image, &dir.path().join("mounted")) {
        assert!(entry.contains(" time 1000000000 "), "{entry}");
    }
    assert_eq!(dated[8..12], 1_000_000_000_u32.to_le_bytes(), "time of the image");
}

#[test]
fn an_image_that_was_cut_off_while_it_was_written_is_no_squashfs() {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    fs::create_dir(&root).unwrap();
    fs::write(root.join("file"), Random(1).bytes(1 << 20)).unwrap();
    let tree = ims_sshd::sys::tree::Tree::open(&root).unwrap();
    let gathered = ims_sshd::squashfs::gather::gather(&tree, &mut |_, _| {
        ims_sshd::squashfs::gather::Choice::Pack(ims_sshd::squashfs::Content::Read)
    });
    // The file changes after it was counted.
    fs::write(root.join("file"), b"shorter").unwrap();
    let output = File::options().read(true).write(true).create(true).truncate(true).open(&image).unwrap();
    let mut open = ims_sshd::squashfs::gather::opener(&tree);
    let options = options(Compression::Gzip, 4096);
    let result = ims_sshd::squashfs::write(&gathered.unwrap().plan, None, &options, &mut open, &output, &|_| {});
    assert_eq!(result.unwrap_err().to_string(), "/file: it has changed meanwhile");
    assert!(!begins_like_a_squashfs(&image));
}

fn begins_like_a_squashfs(image: &Path) -> bool {
    fs::read(image).unwrap().starts_with(b"hsqs")
}

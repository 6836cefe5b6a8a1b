//! Images of mksquashfs, as the reader sees them, and taken over.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ims_sshd::squashfs::{Inventory, Reader};
use testbed::succeed;

use crate::snapshot::{assert_same, inventory, of_image, of_reader, of_tree, pack, pack_from};
use crate::trees::Drawn;

/// Makes a source with these options of mksquashfs.
///
/// With `-always-use-fragments` mksquashfs 4.5.1 writes an image now and then that unsquashfs cannot read either, on a
/// loaded machine: such an image is made again.
pub fn mksquashfs(root: &Path, image: &Path, options: &[&str]) {
    let copy = image.with_extension("copy");
    for _ in 0..20 {
        let _ = fs::remove_file(image);
        let mut command = Command::new("mksquashfs");
        command.arg(root).arg(image).args(["-noappend", "-quiet", "-no-progress", "-xattrs"]);
        succeed(command.args(options));
        if !options.contains(&"-always-use-fragments") {
            return;
        }
        let copied = Command::new("unsquashfs").args(["-q", "-n", "-d"]).arg(&copy).arg(image).output().unwrap();
        let _ = fs::remove_dir_all(&copy);
        if copied.status.success() {
            return;
        }
    }
    panic!("mksquashfs made 20 images that unsquashfs cannot read");
}

/// All kinds of sources, in so far as the compression is one of ours.
pub const KINDS: [&[&str]; 16] = [
    &[],
    &["-comp", "zstd"],
    &["-comp", "xz"],
    &["-noI", "-noD", "-noF", "-noX"],
    &["-b", "4096"],
    &["-b", "1048576", "-comp", "zstd", "-Xcompression-level", "3"],
    &["-b", "65536", "-comp", "xz", "-Xbcj", "x86,arm", "-Xdict-size", "32768"],
    &["-no-fragments"],
    &["-always-use-fragments", "-b", "4096"],
    &["-no-duplicates", "-b", "4096"],
    &["-no-exports", "-comp", "gzip", "-Xcompression-level", "1"],
    &["-no-sparse", "-b", "4096"],
    &["-comp", "gzip", "-Xwindow-size", "9", "-Xstrategy", "default,huffman_only"],
    &["-no-xattrs"],
    &["-noD", "-noF"],
    &["-b", "16384", "-noI"],
];

fn drawn(seed: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = testbed::directory();
    let root = dir.path().join("tree");
    Drawn::new(&root, seed, 4096);
    (dir, root)
}

#[test]
fn the_reader_sees_what_the_kernel_shows() {
    let (dir, root) = drawn(11);
    let image = dir.path().join("image");
    for kind in KINDS {
        mksquashfs(&root, &image, kind);
        println!("{kind:?}");
        let expected = of_image(&image, &dir.path().join("mounted"));
        assert_same(&expected, &of_reader(&image), &format!("{kind:?}"));
        let ours = Reader::open(File::open(&image).unwrap()).unwrap().options();
        let again = dir.path().join("again");
        pack(&root, &again, &ours);
        let header = |image: &Path| fs::read(image).unwrap()[12..36].to_vec();
        let (theirs, ours) = (header(&image), header(&again));
        // Block size, compression and version.
        assert_eq!((&theirs[..4], &theirs[8..12], &theirs[16..20]), (&ours[..4], &ours[8..12], &ours[16..20]));
    }
}

#[test]
fn an_unchanged_tree_is_taken_over_as_a_whole() {
    let (dir, root) = drawn(12);
    let (image, again) = (dir.path().join("image"), dir.path().join("again"));
    for kind in KINDS {
        mksquashfs(&root, &image, kind);
        let (source, unchanged, options) = inventory(&image, &root);
        let summary = pack_from(&root, Some((&source, &unchanged)), &again, &options);
        assert_eq!((summary.files_read, summary.progress.read), (0, 0), "{kind:?}");
        let mut expected = of_tree(&root);
        assert_same(&expected, &of_image(&again, &dir.path().join("mounted")), &format!("{kind:?}"));
        expected.retain(|_, entry| entry.contains("content"));
        // All of it again, from an image of ours.
        let (source, unchanged, options) = inventory(&again, &root);
        pack_from(&root, Some((&source, &unchanged)), &image, &options);
        assert!(fs::read(&again).unwrap() == fs::read(&image).unwrap(), "{kind:?}: two images of one tree differ");
    }
}

#[test]
fn gzip_of_each_level_is_no_larger_than_mksquashfs_makes_it() {
    let dir = testbed::directory();
    let (root, image, ours) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("ours"));
    fs::create_dir(&root).unwrap();
    // A program and a text, as most of an image is.
    for file in ["usr/bin/bash", "var/lib/dpkg/status"] {
        fs::copy(testbed::cache().join("debian").join(file), root.join(file.replace('/', "-"))).unwrap();
    }
    for level in 1..=9 {
        mksquashfs(&root, &image, &["-Xcompression-level", &level.to_string()]);
        let options = Reader::open(File::open(&image).unwrap()).unwrap().options();
        pack(&root, &ours, &options);
        let [theirs, ours] = [&image, &ours].map(|image| fs::metadata(image).unwrap().len());
        assert!(ours <= theirs, "level {level}: {ours} bytes, mksquashfs {theirs}");
    }
}

/// Another implementation of the format, squashfs-tools-ng, reads our images as we do, and writes sources for us.
#[test]
fn images_are_exchanged_with_squashfs_tools_ng() {
    let (dir, root) = drawn(16);
    // A tar archive holds no sockets.
    succeed(Command::new("find").arg(&root).args(["-type", "s", "-delete"]));
    let path = |name: &str| dir.path().join(name);
    let (image, again, tar) = (path("image"), path("again"), path("tar"));
    let options = crate::snapshot::options(ims_sshd::squashfs::Compression::Zstd, 4096);
    pack(&root, &image, &options);
    let script = "sqfs2tar --root-becomes . \"$0\" > \"$1\" && mkdir \"$2\" && \
                  tar --extract --xattrs --xattrs-include='*' --numeric-owner --same-owner -p -C \"$2\" -f \"$1\"";
    succeed(Command::new("sh").args(["-c", script]).args([&image, &tar, &path("unpacked")]));
    assert_same(&of_tree(&root), &of_tree(&path("unpacked")), "sqfs2tar");
    for compression in ["gzip", "zstd", "xz"] {
        for block_size in ["4096", "131072"] {
            let _ = fs::remove_file(&image);
            let mut command = Command::new("sh");
            command.args(["-c", "tar2sqfs -q -c \"$0\" -b \"$1\" \"$2\" < \"$3\"", compression, block_size]);
            succeed(command.arg(&image).arg(&tar));
            is_taken(&root, &image, &again, &format!("tar2sqfs {compression} {block_size}"));
            let _ = fs::remove_file(&image);
            let mut command = Command::new("gensquashfs");
            command.args(["-q", "-k", "-x", "-c", compression, "-b", block_size, "--pack-dir"]);
            succeed(command.arg(&root).arg(&image));
            is_taken(&root, &image, &again, &format!("gensquashfs {compression} {block_size}"));
        }
    }
}

/// Asserts that a source of the tree is taken over as a whole, and that the kernel shows the tree.
fn is_taken(root: &Path, source: &Path, image: &Path, what: &str) {
    let (inventory, unchanged, options) = inventory(source, root);
    let summary = pack_from(root, Some((&inventory, &unchanged)), image, &options);
    assert_eq!(summary.files_read, 0, "{what}");
    assert_same(&of_tree(root), &of_image(image, &image.with_extension("mounted")), what);
}

#[test]
fn a_source_of_another_compression_or_block_size_is_not_taken_over() {
    let (dir, root) = drawn(13);
    let (image, again) = (dir.path().join("image"), dir.path().join("again"));
    for (kind, expected) in [(["-comp", "lz4"], "compression lz4"), (["-comp", "lzo"], "compression lzo")] {
        mksquashfs(&root, &image, &kind);
        let Err(fault) = Reader::open(File::open(&image).unwrap()) else { panic!("it was opened") };
        assert_eq!(fault.to_string(), format!("a squashfs of the {expected}"));
    }
    mksquashfs(&root, &image, &["-b", "8192"]);
    let (source, unchanged, mut options) = inventory(&image, &root);
    options.block_size = 4096;
    let summary = pack_from(&root, Some((&source, &unchanged)), &again, &options);
    assert_eq!((summary.files_taken, summary.progress.taken), (0, 0));
    assert_same(&of_tree(&root), &of_image(&again, &dir.path().join("mounted")), "another block size");
}

#[test]
fn a_file_of_another_size_than_in_the_source_is_read() {
    let (dir, root) = drawn(14);
    fs::write(root.join("grown"), b"before").unwrap();
    let (image, again) = (dir.path().join("image"), dir.path().join("again"));
    mksquashfs(&root, &image, &[]);
    let (source, unchanged, options) = inventory(&image, &root);
    fs::write(root.join("grown"), b"and after").unwrap();
    let summary = pack_from(&root, Some((&source, &unchanged)), &again, &options);
    assert_eq!(summary.files_read, 1);
    assert_same(&of_tree(&root), &of_image(&again, &dir.path().join("mounted")), "grown");
}

#[test]
fn a_source_that_is_cut_off_is_refused() {
    let (dir, root) = drawn(15);
    let image = dir.path().join("image");
    mksquashfs(&root, &image, &[]);
    let length = fs::metadata(&image).unwrap().size();
    for left in [0, 50, 96, 4096, length / 2] {
        File::options().write(true).open(&image).unwrap().set_len(left).unwrap();
        let opened = Reader::open(File::open(&image).unwrap()).and_then(Inventory::new);
        assert!(opened.is_err(), "{left} of {length} bytes");
        mksquashfs(&root, &image, &[]);
    }
}

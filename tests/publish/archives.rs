//! Sources other than a squashfs: saved images of containers, cpio archives, tar archives with absolute names.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testbed::file_server::FileServer;
use testbed::job::*;
use testbed::*;

use crate::prepare::{is_empty, refused, same_tree};

fn prepare(parent: &Path, source: &Path) -> Output {
    ims_sshd(&["prepare", &parent.display().to_string(), &source.display().to_string()], &[]).output().unwrap()
}

fn taken(parent: &Path, source: &Path) -> PathBuf {
    let output = prepare(parent, source);
    assert!(output.status.success(), "{}: {}", source.display(), text(&output.stderr));
    let left: Vec<_> = std::fs::read_dir(parent).unwrap().map(|e| e.unwrap().file_name()).collect();
    // The packer takes unchanged files over from a squashfs, and needs to know how they were unpacked.
    let is_squashfs = source.extension().is_some_and(|extension| extension == "sqsh");
    let expected = 3 + usize::from(is_squashfs);
    assert_eq!(left.len(), expected, "the image root, its inventories and its source: {left:?}");
    parent.join("image-root")
}

/// Four layers: files are removed, a link becomes a directory, a directory a link, one is emptied, one changes its
/// mode.
const CONTAINERFILE: &str = "FROM scratch
ADD tree.tar /
RUN mkdir -p /a/b /gone/deep && echo 1 > /a/b/x && echo 2 > /a/y && ln /a/y /a/z && ln -s /etc/passwd /link && \
    touch /gone/deep/file && mkdir -m 1777 /sticky && chmod 700 /etc
RUN rm /a/b/x && echo new > /a/b/n && rm /link && mkdir /link && touch /link/file
RUN rm -rf /a /gone /sticky && mkdir /a && touch /a/only && ln -s a /sticky && mkdir -m 2750 /late && chown 7:8 /late
";

#[test]
fn users_enter_the_root_of_an_archive_that_has_no_entry_for_it() {
    let dir = directory();
    let tree = dir.path().join("tree");
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&tree));
    succeed(Command::new("chmod").arg("0700").arg(&tree));
    let pack = |command: &str| succeed(Command::new("sh").args(["-ec", command]).current_dir(&tree));
    for (name, command, mode) in [
        ("without.tar", "tar -cf ../without.tar *", 0o755),
        ("without.cpio", "find * | cpio --quiet -o -H newc > ../without.cpio", 0o755),
        ("with.tar", "tar -cf ../with.tar .", 0o700),
        ("with.cpio", "find . | cpio --quiet -o -H newc > ../with.cpio", 0o700),
    ] {
        pack(command);
        let image_root = taken(&dir.path().join(format!("parent-{name}")), &dir.path().join(name));
        assert_eq!(std::fs::metadata(image_root).unwrap().mode() & 0o7777, mode, "{name}");
    }
}

#[test]
fn saved_container_image_is_unpacked_as_podman_mounts_it() {
    let dir = directory();
    let place = dir.path();
    succeed(Command::new("tar").arg("-cf").arg(place.join("tree.tar")).arg("-C").arg(cache().join("busybox")).arg("."));
    std::fs::write(place.join("Containerfile"), CONTAINERFILE).unwrap();
    let podman = |arguments: &[&str]| {
        let mut command = Command::new("podman");
        for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(option).arg(place.join(name));
        }
        succeed(
            command
                .env("CONTAINERS_CONF", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/containers.conf"))
                .args(arguments)
                .current_dir(place),
        )
    };
    podman(&["build", "--isolation=chroot", "--layers", "--tag=image:1", "."]);
    let mounted = PathBuf::from(podman(&["image", "mount", "image:1"]).trim());
    let _storage = Mounted(place.join("root/overlay"));
    let _image = Mounted(mounted.clone());
    let same_as_mounted = |image_root: &Path| {
        // No layer contains the root itself, whose mode podman makes up.
        assert_eq!(std::fs::metadata(image_root).unwrap().mode() & 0o7777, 0o755);
        for program in ["chmod", "touch"] {
            succeed(Command::new(program).arg(format!("--reference={}", mounted.display())).arg(image_root));
        }
        same_tree(&mounted, image_root);
    };
    let formats = ["docker-archive", "oci-archive", "oci-dir", "docker-dir"];
    for format in formats {
        podman(&["save", "--quiet", "--format", format, "--output", format, "image:1"]);
        let image_root = taken(&place.join(format!("parent-{format}")), &place.join(format));
        same_as_mounted(&image_root);
        assert_eq!(std::fs::metadata(image_root.join("late")).unwrap().mode() & 0o7777, 0o2750);
        assert!(!walk(&image_root).iter().any(|path| path.to_string_lossy().contains(".wh.")));
    }
    succeed(Command::new("gzip").arg(place.join("docker-archive")));
    same_as_mounted(&taken(&place.join("parent-gz"), &place.join("docker-archive.gz")));

    // Two images make no image root, and layers are not a directory that can be mounted.
    podman(&["build", "--isolation=chroot", "--tag=other:1", "--label=a=b", "."]);
    podman(&["save", "--quiet", "--multi-image-archive", "--output=both", "image:1", "other:1"]);
    refused(&place.join("parent"), &place.join("both").display().to_string(), "there are 2");
    let (parent, layers) = (place.join("parent").display().to_string(), place.join("oci-dir").display().to_string());
    let output = ims_sshd(&["prepare", "--open", "overlay", &parent, &layers], &[]).output().unwrap();
    assert!(!output.status.success() && text(&output.stderr).contains("--open unpack"), "{output:?}");
    is_empty(Path::new(&parent));
}

#[test]
fn hostile_layer_neither_writes_nor_removes_outside_the_root() {
    let dir = directory();
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    // A saved image that no engine would write; each layer is a list of (name, kind, target).
    let make = "
import io, json, sys, tarfile
archive, layers = sys.argv[1], json.loads(sys.argv[2])
def tar_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type = {'file': tarfile.REGTYPE, 'link': tarfile.SYMTYPE, 'hard': tarfile.LNKTYPE, 'dir': tarfile.DIRTYPE}[kind]
            member.linkname, member.mode = target, 0o755
            tar.addfile(member)
    return out.getvalue()
with tarfile.open(archive, 'w') as tar:
    contents = [tar_of(layer) for layer in layers]
    names = ['%d/layer.tar' % n for n in range(len(layers))]
    for name, content in [('manifest.json', json.dumps([{'Layers': names}]).encode()), *zip(names, contents)]:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
";
    let out = outside.display().to_string();
    let up = "../../../outside".to_owned();
    let archive_of = |name: &str, layers: serde_json::Value| {
        let archive = dir.path().join(format!("{name}.tar"));
        succeed(Command::new("/usr/bin/python3").args(["-c", make]).arg(&archive).arg(layers.to_string()));
        archive
    };
    let untouched = || {
        let names: Vec<_> = std::fs::read_dir(&outside).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
    };
    let parent = dir.path().join("parent");
    for (name, layers) in [
        ("whiteout-above", serde_json::json!([[["a", "file", ""]], [[".wh...", "file", ""]]])),
        (
            "whiteout-above-in-link",
            serde_json::json!([[["way", "link", out]], [["way", "dir", ""], ["way/.wh...", "file", ""]]]),
        ),
        ("dots", serde_json::json!([[["../../outside/made", "file", ""]]])),
        ("hard-link", serde_json::json!([[["copy", "hard", format!("{out}/secret")]]])),
        ("link-in-one-layer", serde_json::json!([[["way", "link", out], ["way/made", "file", ""]]])),
    ] {
        refused(&parent, &archive_of(name, layers).display().to_string(), "cannot unpack");
        untouched();
    }
    // A path through a link of a lower layer, which would lead outside, replaces the link, as in container engines.
    for target in [&out, &up] {
        let layers = serde_json::json!([
            [
                ["etc/passwd", "file", ""],
                ["way", "link", target],
                ["gone", "link", target],
                ["d", "dir", ""],
                ["d/way", "link", target]
            ],
            [["way", "dir", ""], ["way/made", "file", ""], ["way/.wh.secret", "file", ""], [".wh.gone", "file", ""]],
            [["d/way/.wh..wh..opq", "file", ""], ["d/way/made", "file", ""]]
        ]);
        let image_root = taken(&dir.path().join(format!("parent-{}", target.len())), &archive_of("through", layers));
        untouched();
        let kinds = ["way", "d/way"].map(|name| std::fs::symlink_metadata(image_root.join(name)).unwrap().is_dir());
        assert_eq!(kinds, [true, true]);
        assert!(image_root.join("way/made").exists() && std::fs::symlink_metadata(image_root.join("gone")).is_err());
    }
}

#[test]
fn cpio_archive_is_unpacked_to_the_same_tree() {
    let (dir, tree) = bootable_image();
    std::fs::hard_link(tree.join("etc/passwd"), tree.join("etc/second-name")).unwrap();
    symlink("/etc/passwd", tree.join("absolute")).unwrap();
    std::fs::write(tree.join("größe und mehr"), "x").unwrap();
    std::fs::set_permissions(tree.join("etc/second-name"), PermissionsExt::from_mode(0o4711)).unwrap();
    succeed(
        Command::new("sh")
            .arg("-c")
            .arg("mknod null c 1 3; mkfifo fifo; chown 7:8 fifo; mkdir -m 2750 shared")
            .current_dir(&tree),
    );
    let archives = "find . | cpio --quiet -o -H newc > ../plain.cpio
        find . -depth | cpio --quiet -o -H crc > ../depth-first.cpio
        find . | cpio --quiet -o -H newc | tee ../plain | gzip > ../image.gz; xz -k ../plain; zstd -q ../plain
        find . | cpio --quiet -o -H odc > ../old.cpio";
    succeed(Command::new("sh").args(["-e", "-c", archives]).current_dir(&tree));
    for (number, name) in ["plain.cpio", "depth-first.cpio", "image.gz", "plain.xz", "plain.zst"].iter().enumerate() {
        let image_root = taken(&dir.path().join(format!("parent-{number}")), &dir.path().join(name));
        same_tree(&tree, &image_root);
        let look = |name: &str| std::fs::symlink_metadata(image_root.join(name)).unwrap();
        assert_eq!((look("etc/passwd").ino(), look("etc/passwd").nlink()), (look("etc/second-name").ino(), 2));
        assert!(look("null").file_type().is_char_device() && look("null").rdev() == 0x103, "{name}");
    }
    let parent = dir.path().join("parent");
    refused(&parent, &dir.path().join("old.cpio").display().to_string(), "cpio -o -H newc");
    for (name, reason) in [("plain.cpio", "is cut off"), ("image.gz", "cannot unpack"), ("plain.zst", "cannot unpack")]
    {
        let whole = std::fs::read(dir.path().join(name)).unwrap();
        let short = dir.path().join("short");
        std::fs::write(&short, &whole[..whole.len() * 2 / 3]).unwrap();
        refused(&parent, &short.display().to_string(), reason);
    }
    is_empty(&parent);
}

#[test]
fn absolute_names_in_a_tar_archive_are_unpacked_below_the_root() {
    let dir = directory();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    std::fs::write(tree.join("etc/file"), "content").unwrap();
    std::fs::write(tree.join("etc/passwd"), "").unwrap();
    std::fs::hard_link(tree.join("etc/file"), tree.join("etc/name")).unwrap();
    symlink("/etc/file", tree.join("link")).unwrap();
    let archive = dir.path().join("image.tar");
    succeed(
        Command::new("tar")
            .args(["-P", "-c", "-f"])
            .arg(&archive)
            .args(["--transform=s,^\\.,,", "-C"])
            .arg(&tree)
            .arg("."),
    );
    let names = succeed(Command::new("tar").arg("-Ptvf").arg(&archive));
    assert!(names.contains(" /etc/file") && names.contains("link to /etc/"), "{names}");
    let image_root = taken(&dir.path().join("parent"), &archive);
    same_tree(&tree, &image_root);
    assert_eq!(std::fs::read_link(image_root.join("link")).unwrap(), Path::new("/etc/file"));
}

/// To chown(2), -1 means no change: such a file would be root's.
#[test]
fn member_of_a_tar_archive_that_belongs_to_nobody_is_refused_by_name() {
    let dir = directory();
    let make = "import io, sys, tarfile
archive = tarfile.open(sys.argv[1], 'w', format=tarfile.PAX_FORMAT)
for name, user, group in [('etc/passwd', 0, 0), ('etc/odd', int(sys.argv[2]), int(sys.argv[3]))]:
    member = tarfile.TarInfo(name)
    member.uid, member.gid = user, group
    archive.addfile(member, io.BytesIO())
archive.close()";
    for (number, (user, group, refusal)) in
        [("4294967295", "7", true), ("7", "4294967295", true), ("4294967294", "7", false)].into_iter().enumerate()
    {
        let archive = dir.path().join(format!("{number}.tar"));
        succeed(Command::new("python3").args(["-c", make]).arg(&archive).args([user, group]));
        let parent = dir.path().join(format!("parent-{number}"));
        if refusal {
            refused(&parent, &archive.display().to_string(), "etc/odd: Cannot change ownership to uid");
            is_empty(&parent);
        } else {
            let found = std::fs::metadata(taken(&parent, &archive).join("etc/odd")).unwrap();
            assert_eq!((found.uid(), found.gid()), (u32::MAX - 1, 7));
        }
    }
}

#[test]
fn ordinary_user_cannot_unpack_since_owners_would_be_lost() {
    let (dir, _, squashfs) = packed_image();
    let place = dir.path().join("of a user");
    std::fs::create_dir(&place).unwrap();
    std::os::unix::fs::chown(&place, Some(1234), Some(1234)).unwrap();
    let mut as_user = Command::new("setpriv");
    as_user.args(["--reuid=1234", "--regid=1234", "--clear-groups", &*IMS_SSHD, "prepare", "parent"]);
    // The path of the cache may be closed to others, so the directory is entered and the image opened before.
    let output = as_user.arg("/dev/stdin").stdin(File::open(&squashfs).unwrap()).current_dir(&place).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("is missing, which is needed to") && said.contains("run it as root"), "{said}");
    is_empty(&place);
}

#[test]
fn squashfs_with_padding_is_accepted() {
    let (dir, tree, squashfs) = packed_image();
    let size = std::fs::metadata(&squashfs).unwrap().len().next_multiple_of(1 << 20) + (1 << 20);
    std::fs::File::options().write(true).open(&squashfs).unwrap().set_len(size).unwrap();
    same_tree(&tree, &taken(&dir.path().join("parent"), &squashfs));
    let parent = dir.path().join("mounted");
    let _lower = Mounted(parent.join("overlay/lower"));
    let _root = Mounted(parent.join("image-root"));
    let (place, source) = (parent.display().to_string(), squashfs.display().to_string());
    let output = ims_sshd(&["prepare", "--open", "overlay", &place, &source], &[]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    same_tree(&tree, &parent.join("image-root"));
    std::fs::File::options()
        .append(true)
        .open(&squashfs)
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"x"))
        .unwrap();
    refused(&dir.path().join("other"), &source, "something follows");
}

/// Writes tar archives: each is a list of (name, kind, target or content).
const TAR: &str = "
import io, json, sys, tarfile
KINDS = {'file': tarfile.REGTYPE, 'link': tarfile.SYMTYPE, 'hard': tarfile.LNKTYPE, 'dir': tarfile.DIRTYPE}
def tar_of(members, form=tarfile.GNU_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=form) as tar:
        for name, kind, text in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = KINDS[kind], 0o755
            content = text.encode() if kind == 'file' else b''
            member.linkname, member.size = '' if kind == 'file' else text, len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()
";

/// tar(1) creates absolute symbolic links, and those through `..`, after all other members.
#[test]
fn tar_member_that_replaces_an_absolute_link_is_refused_and_never_lost() {
    let dir = directory();
    let make = format!(
        "{TAR}
form = tarfile.PAX_FORMAT if sys.argv[3] == 'pax' else tarfile.GNU_FORMAT
open(sys.argv[1], 'wb').write(tar_of([('etc', 'dir', ''), ('etc/passwd', 'file', '')] + json.loads(sys.argv[2]), form))"
    );
    let archive_of = |name: &str, members: &serde_json::Value, form: &str| {
        let archive = dir.path().join(format!("{name}.tar"));
        succeed(Command::new("python3").args(["-c", &make]).arg(&archive).arg(members.to_string()).arg(form));
        archive
    };
    let parent = dir.path().join("parent");
    let long = format!("{}/{}", "d".repeat(120), "n".repeat(120));
    let (kind, target) = ("link", "/etc/x");
    for (name, members, lost) in [
        ("file", serde_json::json!([["a", kind, target], ["a", "file", "new"]]), "a"),
        ("spelled", serde_json::json!([["/a", kind, target], ["./a", "file", "new"]]), "./a"),
        ("up", serde_json::json!([["etc/a", "link", "../b"], ["etc/a", "file", "new"]]), "etc/a"),
        ("inner", serde_json::json!([["a", "link", "etc/../b"], ["a", "file", "new"]]), "a"),
        ("other-link", serde_json::json!([["a", kind, target], ["a", kind, "/etc/y"]]), "a"),
        ("relative", serde_json::json!([["a", kind, target], ["a", "link", "etc"]]), "a"),
        ("directory", serde_json::json!([["a", kind, target], ["a", "dir", ""]]), "a"),
        ("below", serde_json::json!([["a", kind, "/etc"], ["a/b", "file", "new"]]), "a/b"),
        ("again", serde_json::json!([["a", "file", "1"], ["a", kind, target], ["a", "file", "new"]]), "a"),
        ("name", serde_json::json!([["a", kind, target], ["b", "hard", "a"], ["b", "file", "new"]]), "b"),
        ("alias", serde_json::json!([["s", "link", "etc"], ["etc/a", kind, target], ["s/a", "file", "new"]]), "s/a"),
        ("long", serde_json::json!([[long, kind, target], [long, "file", "new"]]), long.as_str()),
    ] {
        for form in ["gnu", "pax"] {
            let archive = archive_of(name, &members, form);
            let packed = dir.path().join("packed.tar.gz");
            succeed(Command::new("sh").args(["-c", "gzip -c \"$0\" > \"$1\""]).arg(&archive).arg(&packed));
            for archive in [&archive, &packed] {
                refused(&parent, &archive.display().to_string(), &format!("the member '{lost}"));
                refused(&parent, &archive.display().to_string(), "an earlier member");
            }
        }
    }
    // What is right without a delay stays right.
    for (number, (members, path, target)) in [
        (serde_json::json!([["a", kind, target], ["a", kind, target]]), "a", Some("/etc/x")),
        (serde_json::json!([["a", "file", "old"], ["a", kind, target]]), "a", Some("/etc/x")),
        (serde_json::json!([["a", "link", "etc"], ["a", "file", "new"]]), "a", None),
        (serde_json::json!([["a", "link", "etc"], ["a", "dir", ""], ["a/b", "file", "new"]]), "a/b", None),
        (serde_json::json!([["a", "link", "etc"], ["a/b", "file", "new"]]), "etc/b", None),
        (serde_json::json!([["a", kind, target], ["b", "hard", "a"], ["b", "hard", "a"]]), "b", Some("/etc/x")),
        (serde_json::json!([["a", kind, target], ["ab", "file", "new"], ["b/a", "file", "new"]]), "ab", None),
    ]
    .into_iter()
    .enumerate()
    {
        let archive = archive_of(&format!("right-{number}"), &members, "gnu");
        let path = taken(&dir.path().join(format!("parent-{number}")), &archive).join(path);
        match target {
            Some(target) => assert_eq!(std::fs::read_link(path).unwrap(), Path::new(target), "{members}"),
            None => assert_eq!(std::fs::read_to_string(path).unwrap(), "new", "{members}"),
        }
    }
}

#[test]
fn later_layer_of_a_saved_image_replaces_an_absolute_link() {
    let dir = directory();
    let make = format!(
        "{TAR}
layers = [tar_of([('etc', 'dir', ''), ('etc/passwd', 'file', ''), ('a', 'link', '/etc'), ('etc/b', 'link', '../a')]),
    tar_of([('a', 'dir', ''), ('a/f', 'file', 'new'), ('etc/b', 'file', 'new')])]
doubled = tar_of([('a', 'link', '/etc/x'), ('a', 'file', 'new')])
for path, layers in [(sys.argv[1], layers), (sys.argv[2], layers + [doubled])]:
    members = [('%d.tar' % number, content) for number, content in enumerate(layers)]
    with tarfile.open(path, 'w') as tar:
        for name, content in [('manifest.json', json.dumps([{{'Layers': [n for n, _ in members]}}]).encode())] + members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))"
    );
    let [saved, doubled] = ["saved.tar", "doubled.tar"].map(|name| dir.path().join(name));
    succeed(Command::new("python3").args(["-c", &make]).args([&saved, &doubled]));
    let image_root = taken(&dir.path().join("parent"), &saved);
    for name in ["a/f", "etc/b"] {
        assert_eq!(std::fs::read_to_string(image_root.join(name)).unwrap(), "new");
    }
    refused(&dir.path().join("other"), &doubled.display().to_string(), "an earlier member");
}

#[test]
fn layer_with_a_hard_link_to_another_layer_is_refused_with_a_way_out() {
    let dir = directory();
    let make = format!(
        "{TAR}
layers = [tar_of([('etc', 'dir', ''), ('etc/passwd', 'file', ''), ('base', 'file', 'b')]),
    tar_of([('n', 'dir', ''), ('n/l', 'hard', 'base')])]
members = [('%d.tar' % number, content) for number, content in enumerate(layers)]
with tarfile.open(sys.argv[1], 'w') as tar:
    for name, content in [('manifest.json', json.dumps([{{'Layers': [n for n, _ in members]}}]).encode())] + members:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))"
    );
    let saved = dir.path().join("saved.tar");
    succeed(Command::new("python3").args(["-c", &make]).arg(&saved));
    let reason = "'podman create' and 'podman export'";
    refused(&dir.path().join("parent"), &saved.display().to_string(), reason);
}

/// Name, parts of an archive, and why it is refused.
type Case<'a> = (&'a str, Vec<&'a [u8]>, Option<&'a str>);

#[test]
fn second_archive_or_data_after_a_tar_archive_is_refused() {
    let dir = directory();
    let make = format!(
        "{TAR}
open(sys.argv[1], 'wb').write(tar_of([('etc/passwd', 'file', ''), ('one', 'file', '1')]))
open(sys.argv[2], 'wb').write(tar_of([('two', 'file', '2')]))"
    );
    let [one, two] = ["one.tar", "two.tar"].map(|name| dir.path().join(name));
    succeed(Command::new("python3").args(["-c", &make]).args([&one, &two]));
    let [one, two] = [one, two].map(|path| std::fs::read(path).unwrap());
    let without_end = &one[..2 * 512 + 512];
    let zeros = vec![0; 1 << 20];
    let cases: [Case; 9] = [
        ("two", vec![&one, &two], Some("a second tar archive")),
        ("far", vec![&one, &zeros, &two], Some("a second tar archive")),
        ("garbage", vec![&one, b"garbage", &zeros], Some("something follows")),
        ("after-one-empty-block", vec![without_end, &zeros[..512], &two], Some("a second tar archive")),
        ("whole", vec![&one], None),
        ("padded", vec![&one, &zeros], None),
        ("padded-unevenly", vec![&one, &zeros[..100]], None),
        ("without-end", vec![without_end], Some("cut off")),
        ("short", vec![&one[..700]], Some("cut off")),
    ];
    let parent = dir.path().join("parent");
    for (name, parts, refusal) in cases {
        let plain = dir.path().join(format!("{name}.tar"));
        std::fs::write(&plain, parts.concat()).unwrap();
        let mut archives = vec![plain.clone()];
        for program in ["gzip", "xz", "zstd"] {
            let packed = dir.path().join(format!("{name}.{program}"));
            succeed(Command::new("sh").args(["-c", "$0 -c \"$1\" > \"$2\"", program]).args([&plain, &packed]));
            archives.push(packed);
        }
        // Each part as a compressed member of its own, which together are one stream.
        let members = dir.path().join(format!("{name}.members"));
        for part in &parts {
            let path = dir.path().join("part");
            std::fs::write(&path, part).unwrap();
            succeed(Command::new("sh").args(["-c", "gzip -c \"$0\" >> \"$1\""]).args([&path, &members]));
        }
        archives.push(members);
        for archive in archives {
            match refusal {
                Some(reason) => refused(&parent, &archive.display().to_string(), reason),
                None => {
                    let image_root = taken(&parent, &archive);
                    assert!(image_root.join("one").exists());
                    std::fs::remove_dir_all(&parent).unwrap();
                }
            }
        }
    }
    // What follows a compressed stream.
    for program in ["gzip", "xz", "zstd"] {
        let path = dir.path().join(format!("whole.{program}"));
        let mut content = std::fs::read(path).unwrap();
        content.extend(b"garbage");
        let archive = dir.path().join(format!("garbage.{program}"));
        std::fs::write(&archive, content).unwrap();
        refused(&parent, &archive.display().to_string(), program);
    }
}

#[test]
fn limit_of_file_sizes_is_named_whoever_hits_it() {
    let (dir, tree, _) = packed_image();
    std::fs::write(tree.join("large"), feed(Command::new("head").args(["-c", "2M", "/dev/urandom"]), b"").stdout)
        .unwrap();
    let archive = dir.path().join("large.tar");
    succeed(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg("."));
    let (tree, archive) = (tree.to_str().unwrap(), archive.to_str().unwrap());
    let parent = dir.path().join("parent").display().to_string();
    let packed = dir.path().join("packed.sqsh").display().to_string();
    let pack = ["package", "--kernel", "auto", "--archive", &packed, tree];
    // Written by this program itself.
    let server = FileServer::start(vec![1; 2 << 20], &[]);
    let fetched = ["prepare", &parent, &server.url];
    for (packer, arguments) in
        [("", &["prepare", &parent, archive][..]), ("", &fetched), ("mksquashfs", &pack), ("ims-sshd", &pack)]
    {
        let mut command = Command::new("prlimit");
        command.arg("--fsize=1000000").arg(&*IMS_SSHD).args(arguments).current_dir(dir.path());
        if !packer.is_empty() {
            command.env("IMAGE_PACKER", packer);
        }
        let output = command.output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert!(said.contains("larger than 1000000 bytes") && said.contains("ulimit -f"), "{packer}: {said}");
    }
}

//! Our own packer (`IMAGE_PACKER=ims-sshd`): the kernel mounts each result, and every entry is compared with the tree.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use testbed::file_server::FileServer;
use testbed::job::*;
use testbed::*;

/// Everything of each entry that a squashfs holds.
fn seen(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let describe = |path: PathBuf| {
        let found = fs::symlink_metadata(&path).unwrap();
        let below = path.strip_prefix(root).unwrap().to_owned();
        let same = first.entry(found.ino()).or_insert_with(|| below.clone()).clone();
        let content = match found.file_type() {
            t if t.is_symlink() => fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes(),
            t if t.is_file() => fs::read(&path).unwrap(),
            _ => Vec::new(),
        };
        // An overlay shows no number of links for its directories.
        let (size, links) = if found.is_dir() { (0, 0) } else { (found.size(), found.nlink()) };
        let attributes =
            Command::new("getfattr").args(["-d", "-h", "-m", "-", "-e", "hex"]).arg(&path).output().unwrap();
        let attributes: Vec<_> = text(&attributes.stdout).lines().skip(1).map(str::to_owned).collect();
        let described = format!(
            "{:o} {}:{} {} {:x} {size} {} {} {} {attributes:?}",
            found.mode(),
            found.uid(),
            found.gid(),
            links,
            found.rdev(),
            found.mtime(),
            same.display(),
            md5(&content)
        );
        (below, described)
    };
    walk(root).into_iter().map(describe).collect()
}

/// Describes every entry of an image as the kernel shows it.
fn mounted(image: &Path) -> BTreeMap<PathBuf, String> {
    let place = image.with_extension("mounted");
    fs::create_dir_all(&place).unwrap();
    mount(&["-t", "squashfs", "-o", "loop,ro", image.to_str().unwrap()], &place);
    let _mounted = Mounted(place.clone());
    seen(&place)
}

fn is_packed(tree: &Path, image: &Path) {
    let (wanted, found) = (seen(tree), mounted(image));
    let differ = |path: &&PathBuf| wanted.get(*path) != found.get(*path);
    let different: Vec<_> = wanted.keys().chain(found.keys()).filter(differ).collect();
    let shown: Vec<_> = different.iter().map(|path| (path, wanted.get(*path), found.get(*path))).collect();
    assert!(different.is_empty(), "{shown:#?}");
}

fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let variables: Vec<_> =
        [("IMAGE_PACKER", "ims-sshd")].iter().chain(variables).map(|(n, v)| (*n, (*v).to_owned())).collect();
    // The record of an archive is written to the current directory.
    let place = directory();
    let output = ims_sshd(arguments, &variables).current_dir(place.path()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output
}

/// Bytes that no compressor makes smaller.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// The command substituted, as a shell runs it in a directory.
fn sh(directory: &Path, script: &str) {
    succeed(Command::new("sh").args(["-e", "-c", script]).current_dir(directory));
}

const SECRET: &str = "the-secret-that-was-removed-0123456789";

/// A tree with every kind of entry, and files for [`edit`].
fn tree(dir: &Path) -> PathBuf {
    let tree = image(dir);
    fs::create_dir_all(tree.join("opt/data/deep/deeper")).unwrap();
    for number in 0..8 {
        fs::write(tree.join(format!("opt/data/large-{number}")), noise(number, 800_000)).unwrap();
    }
    for number in 0..40 {
        fs::write(tree.join(format!("opt/data/deep/small-{number}")), format!("small {number}\n").repeat(20)).unwrap();
    }
    for name in ["same-size", "mapped", "linked", "renamed-over", "synced", "appended", "truncated", "bound", "moded"] {
        fs::write(tree.join("opt").join(name), noise(99, 200_000)).unwrap();
    }
    fs::hard_link(tree.join("opt/linked"), tree.join("opt/data/other-name")).unwrap();
    // Names of one file: changed by one that is removed afterwards, so that the other one is all that is left.
    fs::write(tree.join("opt/pair"), noise(7, 150_000)).unwrap();
    fs::hard_link(tree.join("opt/pair"), tree.join("opt/data/pair")).unwrap();
    fs::write(tree.join("opt/removed"), format!("{SECRET}\n").repeat(9000)).unwrap();
    fs::write(tree.join("opt/data/deep/secret"), SECRET).unwrap();
    fs::write(tree.join("opt/was-secret"), format!("{SECRET} and more\n")).unwrap();
    sh(
        &tree,
        "mknod opt/device c 1 3; mkfifo opt/fifo; ln -s ../etc opt/link; mkdir opt/empty opt/renamed-directory \
         opt/opaque; echo in > opt/renamed-directory/inside; head -c 200000 /dev/urandom > opt/renamed-directory/large; \
         echo gone > opt/opaque/gone; truncate -s 3M opt/sparse; chown 12345:4294967290 opt/fifo; chmod 4755 opt/moded; \
         setfattr -n user.note -v hello etc/passwd; setcap cap_net_raw+ep bin/busybox; \
         python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"opt/socket\")'; \
         touch -d @1000000000 opt/* opt/data/*",
    );
    tree
}

/// Changes a tree in all ways that could go unnoticed.
fn edit(root: &Path) {
    let place = root.with_extension("bind");
    fs::create_dir(&place).unwrap();
    mount(&["--bind", root.join("opt").to_str().unwrap()], &place);
    let bound = Mounted(place.clone());
    sh(&place, "printf changed-by-bind | dd of=bound conv=notrunc status=none; touch -d @1000000000 bound");
    drop(bound);
    let file = File::options().read(true).write(true).open(root.join("opt/same-size")).unwrap();
    file.write_all_at(b"other bytes, same size", 1000).unwrap();
    drop(file);
    sh(
        &root.join("opt"),
        "touch -d @1000000000 same-size
         python3 -c 'import mmap; f = open(\"mapped\", \"r+b\"); m = mmap.mmap(f.fileno(), 0); m[7:11] = b\"mmap\"; m.close()'
         touch -d @1000000000 mapped
         printf through-the-link | dd of=data/other-name conv=notrunc status=none; touch -d @1000000000 linked
         head -c 200000 /dev/urandom > new; touch -d @1000000000 new; mv new renamed-over
         cp -a synced ../synced; printf synced-text | dd of=../synced conv=notrunc status=none
         touch -d @1000000000 ../synced; mv ../synced ../to-sync; cat ../to-sync > synced; touch -r ../to-sync synced
         rm ../to-sync; echo more >> appended; truncate -s 100000 truncated; chmod 600 moded; setfattr -n user.a -v b moded
         printf changed-pair | dd of=data/pair conv=notrunc status=none; rm data/pair
         rm removed data/deep/secret; echo 'nothing to hide' > was-secret
         mv renamed-directory data/was-renamed; echo changed > data/was-renamed/inside
         rm -r opaque; mkdir opaque; echo new > opaque/new
         ln data/large-1 data/new-name; cp -a data/large-2 data/copy; rm data/large-3; mv data/large-4 data/moved",
    );
}

/// The result line says how many MiB were taken over; parts of one count as a whole.
fn taken(output: &Output) -> u64 {
    let said = text(&output.stderr);
    let line = said.lines().find(|line| line.contains("were taken over")).unwrap_or_else(|| panic!("{said}"));
    let before = line.split(" were taken over").next().unwrap();
    let (before, unit) = before.rsplit_once(' ').unwrap();
    let size: u64 = before.rsplit(' ').next().unwrap().parse().unwrap();
    if unit == "KiB" { size.div_ceil(1024) } else { size }
}

/// Asserts that a text is nowhere in the image, neither in its bytes nor in its blocks.
fn is_nowhere(secret: &str, image: &Path) {
    let holds = |bytes: &[u8]| bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
    let bytes = fs::read(image).unwrap();
    assert!(!holds(&bytes));
    // Any zlib stream in the file, at whatever place.
    let script = "import sys, zlib
data = open(sys.argv[1], 'rb').read()
at = data.find(b'\\x78')
while at >= 0:
    try:
        if sys.argv[2].encode() in zlib.decompressobj().decompress(data[at:at + (1 << 17)], 1 << 17):
            sys.exit('found at %d' % at)
    except zlib.error:
        pass
    at = data.find(b'\\x78', at + 1)";
    succeed(Command::new("python3").args(["-c", script]).arg(image).arg(secret));
}

#[test]
fn every_kind_of_entry_is_packed_from_scratch_with_each_compression() {
    let dir = directory();
    let tree = tree(dir.path());
    for compression in ["gzip", "zstd", "xz", "none"] {
        let archive = dir.path().join(format!("{compression}.sqsh"));
        let output = run(
            &["package", "--compression", compression, "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()],
            &[],
        );
        assert_eq!(taken(&output), 0);
        is_packed(&tree, &archive);
        if compression == "gzip" {
            // The same search that finds nothing in other tests.
            let found = std::panic::catch_unwind(|| is_nowhere(SECRET, &archive));
            assert!(found.is_err());
        }
    }
}

/// Opens a squashfs of [`tree`] in `parent`, and returns its image root.
struct Prepared {
    dir: tempfile::TempDir,
    squashfs: PathBuf,
    mounts: Vec<Mounted>,
}

impl Prepared {
    fn new(open: &str) -> Self {
        let dir = directory();
        let squashfs = squashfs_of(&tree(dir.path()));
        let parent = dir.path().join("parent");
        run(&["prepare", "--open", open, parent.to_str().unwrap(), squashfs.to_str().unwrap()], &[]);
        let mounts = match open {
            "overlay" => vec![Mounted(parent.join("image-root")), Mounted(parent.join("overlay/lower"))],
            _ => Vec::new(),
        };
        Self { dir, squashfs, mounts }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("parent/image-root")
    }

    fn packed(&self) -> PathBuf {
        self.dir.path().join("parent/image.sqsh")
    }

    fn package(&self, arguments: &[&str]) -> Output {
        let parent = self.dir.path().join("parent");
        run(&[&["package"], arguments, &[parent.to_str().unwrap()]].concat(), &[])
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // The overlay before what is below it.
        self.mounts.drain(..).for_each(drop);
    }
}

#[test]
fn unchanged_files_below_an_overlay_are_taken_over_and_changed_ones_are_not() {
    takes_over_what_is_unchanged("overlay");
}

#[test]
fn unchanged_files_of_an_unpacked_image_are_taken_over_and_changed_ones_are_not() {
    takes_over_what_is_unchanged("unpack");
}

fn takes_over_what_is_unchanged(open: &str) {
    let prepared = Prepared::new(open);
    let all = taken(&prepared.package(&[]));
    assert!(all >= 4, "{all}");
    is_packed(&prepared.root(), &prepared.packed());
    edit(&prepared.root());
    let output = prepared.package(&[]);
    let now = taken(&output);
    assert!(now >= 1 && now < all, "{now} {all} {}", text(&output.stderr));
    is_packed(&prepared.root(), &prepared.packed());
    is_nowhere(SECRET, &prepared.packed());
    let first = fs::read(prepared.packed()).unwrap();
    prepared.package(&[]);
    assert!(first == fs::read(prepared.packed()).unwrap(), "the same tree gives the same bytes");
    assert_eq!(taken(&prepared.package(&["--from-scratch"])), 0);
    is_packed(&prepared.root(), &prepared.packed());
    let (alone, root) = (prepared.dir.path().join("alone.sqsh"), prepared.root());
    let output = run(&["package", "--archive", alone.to_str().unwrap(), root.to_str().unwrap()], &[]);
    assert_eq!(taken(&output), now, "the image root named without its parent");
    // Nobody knows a source of a directory elsewhere.
    let (copy, elsewhere) = (prepared.dir.path().join("copy"), prepared.dir.path().join("elsewhere.sqsh"));
    succeed(Command::new("cp").arg("-aT").arg(prepared.root()).arg(&copy));
    run(&["package", "--archive", elsewhere.to_str().unwrap(), copy.to_str().unwrap()], &[]);
    assert!(fs::read(elsewhere).unwrap() == fs::read(prepared.packed()).unwrap(), "from scratch is without a source");
    assert_eq!(taken(&prepared.package(&["--compression", "zstd"])), 0);
    is_packed(&prepared.root(), &prepared.packed());
}

#[test]
fn source_that_is_not_the_mounted_one_is_not_used() {
    let prepared = Prepared::new("overlay");
    let copy = fs::read(&prepared.squashfs).unwrap();
    fs::remove_file(&prepared.squashfs).unwrap();
    fs::write(&prepared.squashfs, copy).unwrap();
    let output = prepared.package(&[]);
    let said = text(&output.stderr);
    assert_eq!(said.matches("packing everything anew: ").count(), 1, "{said}");
    assert!(said.contains("not the one that is mounted"), "{said}");
    assert_eq!(taken(&output), 0);
    is_packed(&prepared.root(), &prepared.packed());
    fs::remove_file(&prepared.squashfs).unwrap();
    assert!(text(&prepared.package(&[]).stderr).contains("packing everything anew: "));
}

#[test]
fn description_of_kiwi_excluded_paths_and_sparse_logs_are_packed_as_by_mksquashfs() {
    let dir = directory();
    let tree = image(dir.path());
    sh(
        &tree,
        "mkdir -p image var/log secret/deep; echo x > image/config.xml; truncate -s 3G var/log/lastlog; \
         echo secret > secret/deep/file; echo '*' > 'etc/a b*'; echo kept > etc/kept",
    );
    let archive = dir.path().join("image.sqsh");
    let places = [archive.to_str().unwrap(), tree.to_str().unwrap()];
    let arguments = ["package", "--exclude", "secret", "--exclude", "etc/a b*", "--archive", places[0], places[1]];
    let output = run(&arguments, &[("SOURCE_DATE_EPOCH", "1700000000")]);
    assert!(text(&output.stderr).contains("/var/log/lastlog is packed empty"), "{output:?}");
    let place = dir.path().join("mounted");
    fs::create_dir(&place).unwrap();
    mount(&["-t", "squashfs", "-o", "loop,ro", places[0]], &place);
    let _mounted = Mounted(place.clone());
    assert_eq!(fs::metadata(place.join("image")).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(place.join("var/log/lastlog")).unwrap().len(), 0);
    assert!(!place.join("secret").exists() && !place.join("etc/a b*").exists() && place.join("etc/kept").exists());
    assert_eq!(fs::metadata(place.join("etc/passwd")).unwrap().mtime(), 1_700_000_000);
}

/// Starts a `package` that takes long.
fn long_run() -> (tempfile::TempDir, PathBuf, Child) {
    let (dir, tree) = bootable_image();
    for number in 0..8 {
        fs::write(tree.join(format!("noise-{number}")), noise(number, 8 << 20)).unwrap();
    }
    let arguments = ["package", "--compression", "xz", "--archive", "image.sqsh", tree.to_str().unwrap()];
    let mut command = ims_sshd(&arguments, &[("IMAGE_PACKER", "ims-sshd".into())]);
    let child = command.current_dir(dir.path()).stderr(Stdio::piped()).spawn().unwrap();
    (dir, tree, child)
}

fn packers(tree: &Path) -> Vec<u32> {
    at_work_in(tree, "pack-as-child")
}

fn nothing_is_left(dir: &Path) {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<_> = names.filter(|name| name.contains("sqsh")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn killed_packer_is_an_error_and_leaves_no_file() {
    let (dir, tree, child) = long_run();
    wait_until("the packer works", || !packers(&tree).is_empty());
    for pid in packers(&tree) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("signal: 9"), "{output:?}");
    nothing_is_left(dir.path());
}

#[test]
fn packer_ends_with_a_killed_command_and_with_a_signal() {
    let (_dir, tree, mut child) = long_run();
    wait_until("the packer works", || !packers(&tree).is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the packer has ended", || packers(&tree).is_empty());
    let (dir, tree, child) = long_run();
    wait_until("the packer works", || !packers(&tree).is_empty());
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(128 + 15));
    assert!(packers(&tree).is_empty());
    nothing_is_left(dir.path());
}

/// A session could do that while the image is packed: replace the image root, and every name of the archive.
#[test]
fn renaming_the_image_root_while_it_is_packed_changes_nothing() {
    let (dir, tree, child) = long_run();
    wait_until("the packer works", || !packers(&tree).is_empty());
    let pids: Vec<_> = packers(&tree).into_iter().map(|pid| nix::unistd::Pid::from_raw(pid.cast_signed())).collect();
    let send = |signal| pids.iter().for_each(|pid| nix::sys::signal::kill(*pid, signal).unwrap());
    send(nix::sys::signal::Signal::SIGSTOP);
    let (away, secret) = (dir.path().join("away"), dir.path().join("secret"));
    fs::rename(&tree, &away).unwrap();
    fs::create_dir_all(&secret).unwrap();
    fs::write(secret.join("client-secret"), "secret").unwrap();
    std::os::unix::fs::symlink(&secret, &tree).unwrap();
    send(nix::sys::signal::Signal::SIGCONT);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    is_packed(&away, &dir.path().join("image.sqsh"));
}

#[test]
fn link_in_place_of_the_part_is_not_written_through() {
    let dir = directory();
    let tree = tree(dir.path());
    let secret = dir.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    std::os::unix::fs::symlink(&secret, dir.path().join("image.sqsh.part")).unwrap();
    let archive = dir.path().join("image.sqsh");
    run(&["package", "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()], &[]);
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert!(fs::symlink_metadata(&archive).unwrap().is_file());
    is_packed(&tree, &archive);
}

#[test]
fn full_disk_is_an_error_and_leaves_no_file() {
    let dir = directory();
    let tree = tree(dir.path());
    let place = dir.path().join("small");
    fs::create_dir(&place).unwrap();
    mount(&["-t", "tmpfs", "-o", "size=2m", "tmpfs"], &place);
    let _mounted = Mounted(place.clone());
    let archive = place.join("image.sqsh");
    let arguments = ["package", "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()];
    let output = ims_sshd(&arguments, &[("IMAGE_PACKER", "ims-sshd".into())]).current_dir(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    let full =
        format!("cannot pack {}: the file system of {} has almost no space left", tree.display(), place.display());
    assert!(said.contains("No space left") || said.contains(&full), "{said}");
    nothing_is_left(&place);
}

/// A fetched image in a parent that exists already.
fn fetched(parent: &Path, variables: &[(&str, &str)]) -> (FileServer, Output) {
    let squashfs = squashfs_of(&tree(parent.parent().unwrap()));
    let server = FileServer::start(fs::read(squashfs).unwrap(), &[]);
    let output = run(&["prepare", parent.to_str().unwrap(), &server.url], variables);
    (server, output)
}

const INVENTORY: &str = ".ims-sshd.unpacked";
const KEPT: &str = ".ims-sshd.source.sqsh";

#[test]
fn fetched_source_is_kept_while_there_is_room_and_moves_with_a_fresh_image_root() {
    let dir = directory();
    let parent = dir.path().join("parent");
    let (server, _) = fetched(&parent, &[]);
    let named = parent.to_str().unwrap();
    assert!(parent.join(KEPT).exists() && !parent.join("image.sqsh").exists());
    assert!(taken(&run(&["package", "--name", "compute", named], &[])) >= 4);
    is_packed(&parent.join("image-root"), &parent.join("compute.sqsh"));
    fs::write(parent.join("image-root/etc/motd"), "changed").unwrap();
    run(&["prepare", "--fresh", named, &server.url], &[]);
    assert!(taken(&run(&["package", "--name", "compute", named], &[])) >= 4);
    is_packed(&parent.join("image-root"), &parent.join("compute.sqsh"));
    let output = run(&["prepare", "--fresh", named, &server.url], &[("IMAGE_KEEP_SOURCE", "false")]);
    assert!(text(&output.stderr).contains("the image will be packed from scratch: "), "{output:?}");
    assert!(!parent.join(KEPT).exists() && !parent.join(INVENTORY).exists());
    assert_eq!(taken(&run(&["package", "--name", "compute", named], &[])), 0);
    is_packed(&parent.join("image-root"), &parent.join("compute.sqsh"));
}

#[test]
fn inventory_that_is_damaged_forged_or_from_the_future_is_not_used() {
    let dir = directory();
    let parent = dir.path().join("parent");
    fs::create_dir(&parent).unwrap();
    // Others can write there, so the records are authenticated by the job's secret.
    fs::set_permissions(&parent, fs::Permissions::from_mode(0o777)).unwrap();
    let keys = [("S3_ACCESS_KEY", "a"), ("S3_SECRET_KEY", "s")];
    let _server = fetched(&parent, &keys);
    let file = parent.join(INVENTORY);
    let good = fs::read(&file).unwrap();
    let package =
        |variables: &[(&str, &str)]| run(&["package", "--name", "compute", parent.to_str().unwrap()], variables);
    assert!(taken(&package(&keys)) >= 4);
    let refused = |variables: &[(&str, &str)], why: &str| {
        let output = package(variables);
        let said = text(&output.stderr);
        assert!(said.contains("packing everything anew: ") && said.contains(why), "{why}: {said}");
        assert_eq!(taken(&output), 0, "{why}");
        is_packed(&parent.join("image-root"), &parent.join("compute.sqsh"));
    };
    refused(&[("S3_ACCESS_KEY", "a"), ("S3_SECRET_KEY", "other")], "this job has not written it");
    fs::write(&file, &good[..good.len() - 10]).unwrap();
    refused(&keys, "it is damaged");
    // Without a secret, a record is worth what signal files are: its content is checked.
    let forged = |edit: &str| {
        let script = "import base64, hashlib, json, sys
data = open(sys.argv[1], 'rb').read()
line, body = data.split(b'\\n', 1)
head, files = body.split(b'\\0', 1)
head = json.loads(head)
exec(sys.argv[2])
body = json.dumps(head).encode() + b'\\0' + files
sum = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b'=')
open(sys.argv[1], 'wb').write(sum + b'\\n' + body)";
        fs::write(&file, &good).unwrap();
        succeed(Command::new("python3").args(["-c", script]).arg(&file).arg(edit));
    };
    for (edit, why) in [
        ("head['clock']['offset'] += 3600 * 10**9", "the clock was set back"),
        ("head['clock'].update(boot='another', now=head['clock']['now'] + 10**15)", "the clock was set back"),
        ("head['root'][0] += 1", "another image root"),
        ("head['squashfs']['size'] += 1", "the squashfs was changed"),
        ("files = b'1 2 3\\0'", "it is damaged"),
        ("head = 7", "it is damaged"),
        ("head['source'] = '/etc/passwd'", "it names a squashfs outside the volume"),
        ("head['source'] = '/nowhere'", "it names a squashfs outside the volume"),
    ] {
        forged(edit);
        refused(&[], why);
    }
    forged("pass");
    assert!(taken(&package(&[])) >= 4);
    // Paths that lead nowhere, or to other kinds, take nothing over.
    forged(
        "files = b'\\0'.join(f.rsplit(b' ', 1)[0] + b' ../../etc/passwd' for f in files[:-1].split(b'\\0')) + b'\\0'",
    );
    assert_eq!(taken(&package(&[])), 0);
    is_packed(&parent.join("image-root"), &parent.join("compute.sqsh"));
    // Another kept squashfs.
    fs::write(&file, &good).unwrap();
    fs::copy(parent.join(KEPT), parent.join("copy")).unwrap();
    fs::rename(parent.join("copy"), parent.join(KEPT)).unwrap();
    refused(&keys, "the squashfs was changed");
}

type Variables<'a> = &'a [(&'a str, &'a str)];

#[test]
fn squashfs_outside_the_volume_is_not_packed_from_because_a_record_names_it() {
    let keys = [("S3_ACCESS_KEY", "a"), ("S3_SECRET_KEY", "s")];
    let job = [("IMS_JOB_ID", testbed::ims_server::JOB)];
    let created = [("IMS_ACTION", "customize")];
    let both = [keys[0], keys[1], job[0]];
    let (stranger, outside) = ("this job has not written it", "outside the volume");
    // A record without a key is one that anybody with access to the volume can write.
    let cases: [(u32, Variables, Variables, Option<&str>); 10] = [
        (0o700, &[], &[], None),
        (0o755, &[], &[], None),
        (0o777, &keys, &keys, None),
        (0o700, &both, &both, None),
        // Nobody else writes there, and a record that nobody can check is as good as one without a key.
        (0o700, &keys, &[], None),
        (0o777, &[], &[], Some(outside)),
        (0o700, &job, &job, Some(outside)),
        (0o700, &created, &created, Some(outside)),
        (0o700, &[], &keys, Some(stranger)),
        (0o700, &job, &both, Some(stranger)),
    ];
    let dir = directory();
    let squashfs = squashfs_of(&tree(dir.path()));
    for (number, (mode, before, after, why)) in cases.into_iter().enumerate() {
        let parent = dir.path().join(format!("parent-{number}"));
        let named = parent.to_str().unwrap();
        fs::create_dir(&parent).unwrap();
        fs::set_permissions(&parent, fs::Permissions::from_mode(mode)).unwrap();
        run(&["prepare", "--open", "unpack", named, squashfs.to_str().unwrap()], before);
        let output = run(&["package", "--name", "compute", named], after);
        let said = text(&output.stderr);
        assert_eq!(taken(&output) >= 4, why.is_none(), "{number}: {said}");
        let told = said.lines().filter(|line| line.contains("packing everything anew: ")).collect::<Vec<_>>();
        assert_eq!(told.len(), usize::from(why.is_some()), "{number}: {said}");
        assert!(why.is_none_or(|why| told[0].contains(why)), "{number}: {said}");
        is_packed(&parent.join("image-root"), &parent.join("compute.sqsh"));
    }
}

#[test]
fn link_in_place_of_the_kept_source_is_not_followed() {
    let dir = directory();
    let parent = dir.path().join("parent");
    fs::create_dir(&parent).unwrap();
    let _server = fetched(&parent, &[]);
    // The record describes the file that the link leads to.
    fs::rename(parent.join(KEPT), dir.path().join("outside.sqsh")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("outside.sqsh"), parent.join(KEPT)).unwrap();
    let output = run(&["package", "--name", "compute", parent.to_str().unwrap()], &[]);
    assert_eq!(taken(&output), 0, "{output:?}");
    assert!(text(&output.stderr).contains("it is a symbolic link"), "{output:?}");
}

#[test]
fn sidecar_takes_over_from_a_kept_source_and_removes_it() {
    let job = Job::laid_out("build/image-root");
    fs::remove_dir_all(job.volume.parent.join("build")).unwrap();
    let further = [("IMS_ACTION", "create"), ("IMAGE_PACKER", "ims-sshd"), ("IMAGE_COMPRESSION", "")];
    let mut variables = job.variables(Mode::Plain);
    variables.extend(further.map(|(name, value)| (name, value.to_owned())));
    let squashfs = squashfs_of(&tree(job.volume.dir.path()));
    let server = FileServer::start(fs::read(squashfs).unwrap(), &[]);
    let mut prepare = ims_sshd(&["prepare"], &variables);
    succeed(prepare.arg(&job.volume.parent).arg(&server.url).current_dir(job.volume.dir.path()));
    assert!(job.volume.parent.join(KEPT).exists());
    let output = job.sidecar(Mode::Plain, &further).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(taken(&output) >= 4, "{output:?}");
    assert!(!job.volume.parent.join(KEPT).exists());
    job.is_published(&output);
}

/// Containers of a pod that are run by hand have no secret by which the sidecar could verify the record of a source.
#[test]
fn sidecar_without_a_secret_takes_over_only_from_a_copy_on_the_volume() {
    let nowhere = ["IMS_URL", "OAUTH_CONFIG_DIR", "S3_BUCKET", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY"];
    for keep in ["", "true"] {
        let job = Job::laid_out("build/image-root");
        fs::remove_dir_all(job.volume.parent.join("build")).unwrap();
        let squashfs = squashfs_of(&tree(job.volume.dir.path()));
        let before = fs::read(&squashfs).unwrap();
        let by_hand = [("IMS_ACTION", "create"), ("IMAGE_PACKER", "ims-sshd"), ("IMAGE_KEEP_SOURCE", keep)];
        let by_hand = by_hand.map(|(name, value)| (name, value.to_owned()));
        succeed(ims_sshd(&["prepare"], &by_hand).arg(&job.volume.parent).arg(&squashfs));
        assert_eq!(job.volume.parent.join(KEPT).exists(), keep == "true");
        let mut further: Vec<_> = nowhere.map(|name| (name, "")).into();
        further.extend([("IMS_ACTION", "create"), ("IMAGE_PACKER", "ims-sshd"), ("IMAGE_COMPRESSION", "")]);
        let output = job.sidecar(Mode::Plain, &further).output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(taken(&output) >= 4, keep == "true", "{said}");
        let remedy = "IMAGE_KEEP_SOURCE=true for 'ims-sshd prepare' keeps a copy of it there";
        assert_eq!(said.contains(remedy), keep != "true", "{said}");
        assert!(!job.volume.parent.join(KEPT).exists());
        assert!(fs::read(&squashfs).unwrap() == before, "the source itself is left alone");
    }
}

#[test]
fn squashfs_with_files_of_another_overlay_is_unpacked_and_not_mounted_below_one() {
    let makes = [
        ("opt/gone", "mknod opt/gone c 0 0"),
        ("opt/layer", "mkdir opt/layer && setfattr -n trusted.overlay.opaque -v y opt/layer"),
    ];
    for (path, make) in makes {
        let (dir, tree) = bootable_image();
        sh(&tree, &format!("mkdir opt && {make}"));
        let squashfs = squashfs_of(&tree);
        let parent = dir.path().join("parent");
        let refused = ims_sshd(&["prepare", "--open", "overlay"], &[]).args([&parent, &squashfs]).output().unwrap();
        let said = text(&refused.stderr);
        let why = format!("it holds files of another overlay (/{path}), which an overlay hides");
        assert!(said.contains(&format!("{why}; unpack it (--open unpack)")), "{said}");
        assert_eq!((refused.status.code(), parent.join("overlay").exists()), (Some(1), false), "{said}");
        let mut customize = ims_sshd(&["customize", "tree.sqsh", "--output", "out", "--work", "work"], &[]);
        customize.args(["--kernel", "vmlinuz", "--initrd", "initrd", "--", "true"]);
        let output = customize.current_dir(dir.path()).output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.success() && said.contains(&why) && said.contains("unpacking "), "{said}");
        is_packed(&tree, &dir.path().join("out/tree/rootfs"));
    }
}

#[test]
fn squashfs_that_cannot_be_looked_through_is_mounted_nevertheless() {
    let (dir, tree) = bootable_image();
    let squashfs = dir.path().join("tree.sqsh");
    let mut pack = Command::new("mksquashfs");
    succeed(pack.args([&tree, &squashfs]).args(["-comp", "lz4", "-quiet", "-no-progress"]));
    let parent = dir.path().join("parent");
    let script = "$0 prepare --open overlay $1 $2 && cat $1/image-root/boot/vmlinuz";
    let mut shell = Command::new("unshare");
    let shell = shell.args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&parent, &squashfs]).output().unwrap();
    let said = text(&shell.stderr);
    assert!(text(&shell.stdout).contains("a kernel"), "{said}");
    assert!(said.contains("cannot look for files of an overlay in ") && said.contains("lz4"), "{said}");
}

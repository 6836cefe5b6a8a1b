//! The checked file is the unpacked one: sources that another user exchanges or changes meanwhile, and content with
//! a wrong digest.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use testbed::job::*;
use testbed::s3_server::Bucket;
use testbed::*;

use crate::prepare::{is_empty, refused, same_tree};

/// Serves `content` once; `at_end` is called before its last byte.
fn serve(content: Vec<u8>, at_end: impl FnOnce() + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/image", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        BufReader::new(&connection).lines().map_while(Result::ok).find(String::is_empty).unwrap();
        let length = content.len();
        write!(connection, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n").unwrap();
        connection.write_all(&content[..length - 1]).unwrap();
        at_end();
        connection.write_all(&content[length - 1..]).unwrap();
    });
    url
}

/// An image, and one of an attacker: each a tree and its squashfs.
fn two_images(dir: &Path) -> [(PathBuf, PathBuf); 2] {
    let tree = image(dir);
    let other = dir.join("other");
    succeed(Command::new("cp").arg("-aT").args([&tree, &other]));
    std::fs::write(other.join("etc/hostile"), "").unwrap();
    [tree, other].map(|tree| (tree.clone(), squashfs_of(&tree)))
}

/// Directory of another user, used as a volume.
fn users_directory(path: PathBuf) -> PathBuf {
    std::fs::create_dir(&path).unwrap();
    chown(&path, Some(1000), Some(1000)).unwrap();
    path
}

#[test]
fn download_exchanged_on_the_volume_is_not_unpacked() {
    let dir = directory();
    let [(tree, squashfs), (_, other)] = two_images(dir.path());
    let content = std::fs::read(&squashfs).unwrap();
    let sum = sha256(&content);
    let cases = [("file", "unpack"), ("file", "overlay"), ("link", "unpack"), ("link", "overlay")];
    for (number, (kind, open)) in cases.into_iter().enumerate() {
        let parent = users_directory(dir.path().join(format!("parent-{number}")));
        let part = parent.join("image.sqsh.part");
        let other = other.clone();
        let url = serve(content.clone(), move || {
            wait_until("the download", || part.exists());
            let new = part.with_extension("new");
            if kind == "link" {
                symlink(&other, &new).unwrap();
            } else {
                std::fs::copy(&other, &new).unwrap();
            }
            std::fs::rename(new, &part).unwrap();
        });
        let script = "$0 prepare --open $1 --sha256 $2 $3 $4 && cp -a $3/image-root $3/copy";
        let mut shell = Command::new("unshare");
        let output =
            shell.args(["-m", "sh", "-c", script, &*IMS_SSHD, open, &sum]).arg(&parent).arg(url).output().unwrap();
        assert!(output.status.success(), "{kind}, {open}: {}", text(&output.stderr));
        same_tree(&tree, &parent.join("copy"));
    }
}

/// Runs `ims-sshd prepare`, and stops `program` at its start, in the directory that it writes to, until `meanwhile` has
/// run.
fn prepare_held(parent: &Path, source: &Path, program: &str, further: &[&str], meanwhile: impl FnOnce()) -> Output {
    let programs = parent.with_extension("programs");
    std::fs::create_dir(&programs).unwrap();
    let script = "#!/bin/sh\nPATH=/usr/bin:/bin\n: > held; until [ -e go ]; do sleep 0.02; done; rm held go\n";
    let file = programs.join(program);
    std::fs::write(&file, format!("{script}exec {program} \"$@\"\n")).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = ims_sshd(&["prepare"], &[]);
    command
        .args(further)
        .args([parent, source])
        .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display()));
    let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let targets = ["", ".layer"].map(|ending| parent.join(format!(".ims-sshd.unpacking{ending}")));
    wait_until("the program to be held", || targets.iter().any(|target| target.join("held").exists()));
    meanwhile();
    // Only the first run of the program is stopped.
    std::fs::remove_file(&file).unwrap();
    let held = walk(parent).into_iter().find(|path| path.ends_with("held")).unwrap();
    std::fs::write(held.with_file_name("go"), "").unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn local_archive_changed_after_the_checksum_is_not_unpacked() {
    let dir = directory();
    let [(tree, squashfs), (_, other)] = two_images(dir.path());
    let content = std::fs::read(&squashfs).unwrap();
    chown(&squashfs, Some(1000), Some(1000)).unwrap();
    let parent = dir.path().join("parent");
    let output = prepare_held(&parent, &squashfs, "unsquashfs", &["--sha256", &sha256(&content)], || {
        // The same file, with another content.
        std::fs::write(&squashfs, std::fs::read(&other).unwrap()).unwrap();
    });
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
    // A file of root is not copied, and its name may be given to another file.
    let parent = dir.path().join("parent-of-root");
    chown(&squashfs, Some(0), Some(0)).unwrap();
    std::fs::write(&squashfs, &content).unwrap();
    let output = prepare_held(&parent, &squashfs, "unsquashfs", &["--sha256", &sha256(&content)], || {
        std::fs::rename(&other, &squashfs).unwrap();
    });
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
}

#[test]
fn source_replaced_by_rename_is_read_from_the_opened_file() {
    let dir = directory();
    let [(tree, squashfs), (_, other)] = two_images(dir.path());
    let bucket = Bucket::new();
    bucket.put("a/rootfs", &std::fs::read(&squashfs).unwrap());
    let parent = users_directory(dir.path().join("parent-s3"));
    let mut variables = bucket.variables();
    variables.push(("DOWNLOAD_SHA256SUM", sha256(&std::fs::read(&squashfs).unwrap())));
    let output = ims_sshd(&["prepare"], &variables)
        .args([&*parent, Path::new(&format!("s3://{}/a/rootfs", bucket.name))])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
    // A directory.
    let parent = dir.path().join("parent");
    let (was, hostile) = (tree.with_extension("was"), other.with_extension(""));
    let output = prepare_held(&parent, &tree, "cp", &[], || {
        std::fs::rename(&tree, &was).unwrap();
        std::fs::rename(hostile, &tree).unwrap();
    });
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&was, &parent.join("image-root"));
}

#[test]
fn directory_exchanged_during_unpacking_is_refused() {
    let dir = directory();
    let [(_, squashfs), (other, _)] = two_images(dir.path());
    let parent = users_directory(dir.path().join("parent"));
    let output = prepare_held(&parent, &squashfs, "unsquashfs", &[], || {
        let unpacking = parent.join(".ims-sshd.unpacking");
        std::fs::rename(&unpacking, parent.join("moved")).unwrap();
        succeed(Command::new("cp").arg("-aT").args([&other, &unpacking]));
    });
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("another directory has taken the place"), "{}", text(&output.stderr));
}

#[test]
fn fifo_device_or_socket_as_source_is_refused() {
    let dir = directory();
    let place = |name: &str| dir.path().join(name);
    succeed(
        Command::new("sh").args(["-c", "mkfifo fifo; mknod device c 1 3; ln -s fifo link"]).current_dir(dir.path()),
    );
    let _listener = UnixListener::bind(place("socket")).unwrap();
    let [parent, store] = ["parent", "store"].map(|name| place(name).display().to_string());
    for (name, kind) in
        [("fifo", "a fifo"), ("device", "a character device"), ("socket", "a socket"), ("link", "a fifo")]
    {
        let source = place(name).display().to_string();
        for arguments in [
            vec!["prepare", &parent, &source],
            vec!["prepare", "--open", "overlay", &parent, &source],
            vec!["customize", "--output", &store, &source],
            vec!["enter", &source],
            vec!["enter", "--output", &store, &source, "--", "true"],
        ] {
            let mut command = Command::new("timeout");
            let output = command.args(["-s", "KILL", "20"]).arg(&IMS_SSHD).args(&arguments).output().unwrap();
            let said = text(&output.stderr);
            assert!(output.status.code() != Some(137), "{arguments:?} hangs");
            assert!(said.contains(&format!("it is {kind}")) && !output.status.success(), "{arguments:?}: {said}");
        }
    }
    is_empty(&place("parent"));
}

#[test]
fn saved_image_content_with_a_wrong_digest_is_refused_by_name() {
    let dir = directory();
    let place = dir.path();
    // Two layers as container engines save them: an OCI layout, skopeo's `dir:`, docker's newer and older archives.
    let make = "
import hashlib, io, json, os, sys, tarfile
def tar_of(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()
layers = [tar_of({'bin/sh': b'1', 'etc/os-release': b'ID=x'}), tar_of({'etc/two': b'2' * 2000})]
digest = lambda content: hashlib.sha256(content).hexdigest()
config = json.dumps({'rootfs': {'diff_ids': ['sha256:' + digest(layer) for layer in layers]}}).encode()
descriptor = lambda content: {'digest': 'sha256:' + digest(content)}
manifest = json.dumps({'config': descriptor(config), 'layers': [descriptor(layer) for layer in layers]}).encode()
blobs = {'blobs/sha256/' + digest(blob): blob for blob in [config, manifest, *layers]}
docker = lambda config, layers: json.dumps([{'Config': config, 'Layers': layers}]).encode()
oci = {'oci-layout': b'{}', 'index.json': json.dumps({'manifests': [descriptor(manifest)]}).encode(), **blobs}
sets = {
    'oci': oci,
    'dir': {'version': b'', 'manifest.json': manifest, **{digest(blob): blob for blob in [config, *layers]}},
    'new': {'manifest.json': docker('blobs/sha256/' + digest(config), ['blobs/sha256/' + digest(layer) for layer in layers]), **blobs},
    'podman': {'manifest.json': docker(digest(config) + '.json', [digest(layer) + '.tar' for layer in layers]), digest(config) + '.json': config,
               **{digest(layer) + '.tar': layer for layer in layers}},
    'old': {'manifest.json': docker(digest(config) + '.json', ['1/layer.tar', '2/layer.tar']), digest(config) + '.json': config,
            '1/layer.tar': layers[0], '2/layer.tar': layers[1]},
}
for name, files in sets.items():
    for changed in [None, *(path for path in files if path not in ['oci-layout', 'index.json', 'manifest.json', 'version'])]:
        if name == 'new' and changed == 'blobs/sha256/' + digest(manifest): continue
        target = name + '-' + (changed or 'whole').replace('/', '_')
        now = {**files, **({changed: files[changed].replace(b'2' * 10, b'3' * 10).replace(b'ID=x', b'ID=y').replace(b'sha256', b'SHA256', 1)} if changed else {})}
        assert changed is None or now[changed] != files[changed], changed
        for path, content in now.items():
            os.makedirs(os.path.dirname(os.path.join(target, path)), exist_ok=True)
            open(os.path.join(target, path), 'wb').write(content)
        with tarfile.open(target + '.tar', 'w') as tar:
            tar.add(target, arcname='.')
";
    succeed(Command::new("/usr/bin/python3").args(["-c", make]).current_dir(place));
    let mut sources: Vec<_> = std::fs::read_dir(place).unwrap().map(|entry| entry.unwrap().path()).collect();
    sources.sort();
    assert_eq!(sources.len(), 2 * (5 + 4 + 3 * 4));
    for (number, source) in sources.iter().enumerate() {
        let name = source.file_name().unwrap().to_str().unwrap();
        let parent = place.join(format!("parent-{number}"));
        let shown = source.display().to_string();
        if name.contains("whole") {
            let output = ims_sshd(&["prepare"], &[]).args([&parent, source]).output().unwrap();
            assert!(output.status.success(), "{name}: {}", text(&output.stderr));
            assert_eq!(std::fs::read(parent.join("image-root/etc/two")).unwrap(), vec![b'2'; 2000]);
            continue;
        }
        refused(&parent, &shown, "its SHA-256 is");
        let output = ims_sshd(&["prepare"], &[]).args([&parent, source]).output().unwrap();
        let changed = name.split_once('-').unwrap().1.trim_end_matches(".tar").trim_start_matches("blobs_sha256_");
        let changed = changed.trim_end_matches(".json").replace("_layer", "/layer");
        assert!(text(&output.stderr).contains(&changed), "{name}: {}", text(&output.stderr));
    }
}

#[test]
fn layer_changed_after_its_check_is_not_unpacked() {
    let dir = directory();
    let layout = dir.path().join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let tar = |tree: &Path| succeed_bytes(Command::new("tar").args(["-c", "-C"]).arg(tree).arg("."));
    let [(tree, _), (other, _)] = two_images(dir.path());
    let (layer, hostile) = (tar(&tree), tar(&other));
    let blob = |content: &[u8]| {
        let digest = sha256(content);
        std::fs::write(layout.join("blobs/sha256").join(&digest), content).unwrap();
        serde_json::json!({ "digest": format!("sha256:{digest}") })
    };
    let manifest = serde_json::json!({ "layers": [blob(&layer)] }).to_string();
    let index = serde_json::json!({ "manifests": [blob(manifest.as_bytes())] }).to_string();
    std::fs::write(layout.join("index.json"), index).unwrap();
    std::fs::write(layout.join("oci-layout"), "{}").unwrap();
    succeed(Command::new("chown").args(["-R", "1000:1000"]).arg(&layout));
    let parent = dir.path().join("parent");
    let output = prepare_held(&parent, &layout, "tar", &[], || {
        std::fs::write(layout.join("blobs/sha256").join(sha256(&layer)), &hostile).unwrap();
    });
    assert!(output.status.success(), "{}", text(&output.stderr));
    succeed(
        Command::new("sh")
            .args(["-c", "touch -r \"$0\" \"$1\"; chmod --reference \"$0\" \"$1\""])
            .args([&tree, &parent.join("image-root")]),
    );
    same_tree(&tree, &parent.join("image-root"));
}

fn succeed_bytes(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn source_that_is_not_an_image_is_refused_with_the_reason() {
    let (dir, tree) = bootable_image();
    let place = |name: &str| dir.path().join(name);
    let make = "mkdir empty home around; touch home/.bashrc; cp -a tree around/rootfs; mkdir saved; echo {} > saved/oci-layout
        for name in empty home around; do tar -cf $name.tar -C $name .; tar -czf $name.tgz -C $name .
            (cd $name && find . | cpio --quiet -o -H newc) > $name.cpio; mksquashfs $name $name.sqsh -quiet -no-progress; done
        tar -cf members.tar -C around rootfs";
    succeed(Command::new("sh").args(["-e", "-c", make]).current_dir(dir.path()));
    let [parent, store, work] = ["parent", "store", "work"].map(|name| place(name).display().to_string());
    let looked_for = "which has etc/os-release, usr/lib/os-release, etc/passwd, bin/sh or usr/bin/sh";
    for (name, advice) in [
        ("empty", "name the directory that holds"),
        ("home", "name the directory that holds"),
        ("saved", "'ims-sshd prepare' unpacks its layers"),
        ("around", "around/rootfs is an image root"),
        ("empty.sqsh", "name the directory that holds"),
        ("home.tgz", "name the directory that holds"),
        ("around.tar", "'rootfs' in it is an image root: unpack the archive and name that directory"),
        ("around.cpio", "'rootfs' in it is an image root: unpack the archive and name that directory"),
        ("around.sqsh", "'rootfs' in it is an image root: unpack the archive and name that directory"),
        ("members.tar", "'rootfs' in it is an image root: unpack the archive and name that directory"),
    ] {
        let source = place(name).display().to_string();
        let is_directory = place(name).is_dir();
        let mut commands = vec![
            vec!["customize", "--output", &store, "--work", &work, &source],
            vec!["enter", "--work", &work, &source, "--", "true"],
            vec!["enter", "--output", &store, "--work", &work, &source, "--", "true"],
        ];
        if is_directory {
            commands.push(vec!["customize", &source]);
            commands.push(vec!["package", "--archive", "packed.sqsh", &source]);
        }
        // Layers of a saved image are unpacked; this one has none.
        if name != "saved" {
            commands.push(vec!["prepare", &parent, &source]);
        }
        if name != "saved" && (is_directory || name.contains("sqsh")) {
            commands.push(vec!["prepare", "--open", "overlay", &parent, &source]);
        }
        for arguments in commands {
            let output = ims_sshd(&arguments, &[]).current_dir(dir.path()).output().unwrap();
            let said = text(&output.stderr);
            assert!(!output.status.success(), "{arguments:?}: {said}");
            assert!(said.contains(looked_for) && said.contains(advice), "{arguments:?}: {said}");
            if place("parent").exists() {
                is_empty(&place("parent"));
            }
            assert!(!place("packed.sqsh").exists(), "{arguments:?}");
        }
    }
    assert!(std::fs::read_dir(place("store")).map_or(0, Iterator::count) == 0, "nothing is published");
    assert_eq!(walk(&place("home")).len(), 2);
    // The directory that the advice names.
    let [source, advised] = [tree, place("around/rootfs")];
    for (number, source) in [source, advised].iter().enumerate() {
        let output = ims_sshd(&["prepare"], &[]).args([&place(&format!("taken-{number}")), source]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
}

/// Program that takes a write lease on a file, says so, and sleeps.
const LEASE: &str = "import fcntl, os, signal, sys, time\n\
                     signal.signal(signal.SIGIO, signal.SIG_IGN)\n\
                     fd = os.open(sys.argv[1], os.O_RDWR)\n\
                     fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
                     print('leased', flush=True)\n\
                     time.sleep(100)\n";

#[test]
fn file_that_another_program_has_leased_is_an_error_at_once() {
    let (dir, tree, squashfs) = packed_image();
    let script = dir.path().join("script");
    std::fs::write(&script, "true\n").unwrap();
    let key = dir.path().join("key.pub");
    std::fs::write(&key, "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPKpLkc8jqmsnJzMdQ0V9Zr1fJ0d1n4kAbBbBbBbBbB x\n")
        .unwrap();
    let [tree, squashfs] = [&tree, &squashfs].map(|path| path.to_str().unwrap().to_owned());
    let [parent, out] = ["parent", "out"].map(|name| dir.path().join(name).display().to_string());
    let [script, key] = [script, key].map(|path| path.to_str().unwrap().to_owned());
    for (leased, arguments) in [
        (&squashfs, vec!["prepare", &parent, &squashfs]),
        (&squashfs, vec!["enter", &squashfs, "--", "true"]),
        (&squashfs, vec!["customize", &squashfs, "--output", &out, "--", "true"]),
        (&squashfs, vec!["upload", &tree, "--archive", &squashfs, "--store", &out]),
        (&script, vec!["enter", &tree, "--script", &script]),
        (&script, vec!["customize", &tree, "--host-script", &script]),
        (&key, vec!["customize", &tree, "--authorized-key", &key]),
    ] {
        let mut holder = Command::new("python3");
        let mut holder = Ended::new(holder.args(["-c", LEASE, leased]).stdout(Stdio::piped()).spawn().unwrap());
        let mut said = [0; 6];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();
        let began = std::time::Instant::now();
        let mut command = ims_sshd(&arguments, &[]);
        let output = command.output().unwrap();
        let took = began.elapsed();
        holder.kill().unwrap();
        assert!(!output.status.success() && took.as_secs() < 10, "{arguments:?} {took:?}: {output:?}");
        assert!(
            text(&output.stderr).contains("another program, which 'lslocks' shows, holds a lease on it"),
            "{arguments:?}: {output:?}"
        );
    }
}

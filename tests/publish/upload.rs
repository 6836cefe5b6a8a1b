//! Uploading a packed image to a store.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testbed::ims_server::{Fault, ImsServer};
use testbed::job::*;
use testbed::s3_server::{Bucket, Closed, Gate, Sink};
use testbed::tls_server::{Tls, certificates, port_of};
use testbed::*;

#[test]
fn directory_works_as_a_store() {
    let (dir, tree, squashfs) = packed_image();
    let store = dir.path().join("store");
    let output = ims_sshd(&["upload", "--name", "compute", "--store"], &[])
        .arg(&store)
        .arg("--archive")
        .args([&squashfs, &tree])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report = report(&output);
    let compute = store.canonicalize().unwrap().join("compute");
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(compute.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["id"], report["ims_image_record"]["id"]);
    assert_eq!(manifest["name"], "compute");
    let said = text(&output.stderr);
    let last = said.lines().last().unwrap();
    let place = format!("the image is {}, ", compute.display());
    let files = "iB: rootfs, kernel, initrd, boot_parameters, manifest.json";
    assert!(last.contains(&place) && last.ends_with(files), "{last}");
    for artifact in manifest["artifacts"].as_array().unwrap() {
        let path = artifact["link"]["path"].as_str().unwrap();
        let content = std::fs::read(path.strip_prefix("file://").unwrap()).unwrap();
        assert_eq!(artifact["md5"], md5(&content), "{path}");
    }
    assert_eq!(std::fs::read(compute.join("rootfs")).unwrap(), std::fs::read(&squashfs).unwrap());
    assert_eq!(manifest["artifacts"].as_array().unwrap().len(), 4);

    // The next image of this name gets another directory, and one that another run has created stays.
    let before = std::fs::read(compute.join("manifest.json")).unwrap();
    std::fs::create_dir(store.join("compute-2")).unwrap();
    let mut again = ims_sshd(&["upload", "--name", "compute", "--store"], &[]);
    let output = again.arg(&store).arg("--archive").args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(images_in(&store), ["compute", "compute-2", "compute-3"].map(|name| store.join(name)));
    assert_eq!(std::fs::read(compute.join("manifest.json")).unwrap(), before);
    assert!(is_whole(&store.join("compute-3")) && std::fs::read_dir(store.join("compute-2")).unwrap().next().is_none());
}

/// Images in a store that is a directory.
fn images_in(store: &Path) -> Vec<PathBuf> {
    let mut images: Vec<_> = std::fs::read_dir(store).unwrap().map(|e| e.unwrap().path()).collect();
    images.retain(|path| path.is_dir());
    images.sort();
    images
}

/// Returns whether all files that a manifest lists exist with their checksums.
fn is_whole(image: &Path) -> bool {
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(image.join("manifest.json")).unwrap()).unwrap();
    manifest["artifacts"].as_array().unwrap().iter().all(|artifact| {
        let path = Path::new(artifact["link"]["path"].as_str().unwrap().strip_prefix("file://").unwrap());
        path.parent() == Some(&image.canonicalize().unwrap()) && artifact["md5"] == md5(&std::fs::read(path).unwrap())
    })
}

#[test]
fn concurrent_runs_with_one_name_publish_to_different_directories() {
    let (dir, tree, squashfs) = packed_image();
    let runs: Vec<_> = (0..6)
        .map(|number| {
            let place = dir.path().join(number.to_string());
            std::fs::create_dir(&place).unwrap();
            let mut upload = ims_sshd(&["upload", "--name", "a b", "--store", "../store", "--archive"], &[]);
            upload.args([&squashfs, &tree]).current_dir(place).stdout(Stdio::piped()).stderr(Stdio::piped());
            upload.spawn().unwrap()
        })
        .collect();
    for run in runs {
        let output = run.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let images = images_in(&dir.path().join("store"));
    assert_eq!(images.len(), 6, "{images:?}");
    for image in images {
        assert!(image.file_name().unwrap().to_str().unwrap().starts_with("a_b") && is_whole(&image), "{image:?}");
    }
}

#[test]
fn second_upload_of_an_image_root_parent_is_refused() {
    let (dir, tree, squashfs) = packed_image();
    let upload = |store: &str, variables: &[(&'static str, String)]| {
        let mut upload = ims_sshd(&["upload", "--name", "compute", "--store", store, "--archive"], variables);
        upload.args([&squashfs, &tree]).current_dir(dir.path());
        upload.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // A store that never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let variables = [
        ("AWS_ACCESS_KEY_ID", "access".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".into()),
        ("AWS_ENDPOINT_URL", format!("http://{}", silent.local_addr().unwrap())),
    ];
    let mut first = Ended::new(upload("s3://bucket", &variables));
    let _request = silent.accept().unwrap();
    let second = upload("store", &[]).wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    let (shown, first_is) = (dir.path().display(), first.id());
    let why = format!("cannot claim {shown} for this upload: 'ims-sshd upload' has it, as process {first_is}; wait");
    assert!(text(&second.stderr).contains(&why), "{second:?}");
    assert!(!dir.path().join("store/compute").exists());
    first.kill().unwrap();
    first.wait().unwrap();
    let other = upload("store", &[]).wait_with_output().unwrap();
    assert!(!text(&other.stderr).contains("cannot claim"), "{other:?}");
}

#[test]
fn a_packed_image_is_registered_without_a_job() {
    let (dir, tree, squashfs) = packed_image();
    let (bucket, ims) = (Bucket::new(), ImsServer::start());
    let mut variables = bucket.variables();
    variables.extend(ims.variables().into_iter().filter(|(name, _)| *name != "IMS_JOB_ID"));
    let debug = tree.join("etc/passwd");
    let mut command = ims_sshd(&["upload", "--name", "compute"], &variables);
    command.arg("--debug-kernel").arg(&debug).arg("--archive").args([&squashfs, &tree]).current_dir(dir.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let state = ims.state();
    let (id, record) = state.images.first_key_value().unwrap();
    assert_eq!(record["name"], "compute");
    let object = bucket.get(&format!("{id}/debug_kernel"));
    assert_eq!(object.header("content-type"), Some("application/vnd.cray.image.debug.kernel"));
    assert_eq!(state.changes.len(), 2, "the job is nobody's: {:?}", state.changes);
}

#[test]
fn newly_prepared_image_does_not_continue_a_killed_upload_of_another() {
    let (dir, tree) = bootable_image();
    let parent = dir.path().join("parent");
    let (bucket, ims) = (Bucket::new(), ImsServer::start());
    let mut variables = bucket.variables();
    variables.extend(ims.variables().into_iter().filter(|(name, _)| *name != "IMS_JOB_ID"));
    let packed = || {
        assert!(ims_sshd(&["prepare"], &[]).args([&parent, &tree]).status().unwrap().success());
        assert!(ims_sshd(&["package"], &[]).arg(&parent).status().unwrap().success());
        let mut upload = ims_sshd(&["upload"], &variables);
        upload.arg(&parent).env("IMS_STALL_LIMIT", "100");
        upload
    };
    ims.fail("PATCH /images", Fault::SilentlyDone);
    let mut child = packed().spawn().unwrap();
    wait_until("the image to be linked", || ims.state().images.values().any(|image| !image["link"].is_null()));
    child.kill().unwrap();
    child.wait().unwrap();
    // `package` replaces no archive of another image root.
    std::fs::remove_dir_all(parent.join("image-root")).unwrap();
    for entry in std::fs::read_dir(&parent).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_some_and(|extension| extension == "sqsh") {
            std::fs::remove_file(entry).unwrap();
        }
    }
    std::fs::write(tree.join("boot/vmlinuz"), "another kernel").unwrap();
    let output = packed().output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let id = report(&output)["ims_image_record"]["id"].as_str().unwrap().to_owned();
    assert_eq!(bucket.get(&format!("{id}/kernel")).body, b"another kernel");
}

/// Objects of others under an ID stay, whatever IMS answers.
#[test]
fn records_and_objects_of_others_are_neither_used_nor_overwritten() {
    use serde_json::{Value, json};
    let (dir, tree, squashfs) = packed_image();
    // The first ID that this IMS assigns.
    let id = "00000000-0000-4000-8000-000000000001";
    let link = json!({"path": format!("s3://b/{id}/manifest.json"), "etag": "e", "type": "s3"});
    let of_another = json!({"ims-sshd-request": "5b3b3b6e-0000-4000-8000-000000000000"});
    for (record, is_old, key, reason) in [
        (json!({"id": id, "name": "compute", "link": null}), false, "rootfs", "made by this request"),
        (json!({"id": id, "name": "compute", "link": null, "metadata": {}}), false, "kernel", "made by this request"),
        (
            json!({"id": id, "name": "compute", "link": null, "metadata": of_another}),
            false,
            "rootfs",
            "made by this request",
        ),
        (json!({"id": id, "name": "compute", "link": link}), true, "rootfs", "it has a link"),
        (json!({"id": id, "name": "another", "link": null}), true, "rootfs", "its name is"),
        (json!({"id": id, "name": "compute", "link": null}), true, "manifest.json", "belongs to somebody else"),
        (Value::Null, false, "rootfs", "belongs to somebody else"),
        (Value::Null, false, "debug_kernel", "belongs to somebody else"),
        (Value::Null, false, "manifest.json", "belongs to somebody else"),
    ] {
        for store in ["s3", "directory"] {
            let (bucket, ims, out) = (Bucket::new(), ImsServer::start(), tempfile::tempdir_in(dir.path()).unwrap());
            ims.state().without_metadata = is_old;
            if !record.is_null() {
                if is_old {
                    // The request is repeated without metadata.
                    ims.fail("POST /images", Fault::Status(422));
                }
                ims.fail("POST /images", Fault::Record(record.clone()));
                ims.state().images.insert(id.into(), record.clone());
            }
            let file = out.path().join(id).join(key);
            let mut variables = [bucket.variables(), ims.variables()].concat();
            if store == "s3" {
                bucket.put(&format!("{id}/{key}"), b"of others");
            } else {
                std::fs::create_dir(file.parent().unwrap()).unwrap();
                std::fs::write(&file, "of others").unwrap();
                variables.push(("IMAGE_STORE", out.path().display().to_string()));
            }
            let mut upload = ims_sshd(&["upload", "--name", "compute", "--archive"], &variables);
            let output = upload
                .args([&squashfs, &tree])
                .current_dir(tempfile::tempdir_in(dir.path()).unwrap().path())
                .output()
                .unwrap();
            let said = text(&output.stderr);
            assert!(output.status.code() == Some(1) && said.contains(reason), "{record} {key} {store}: {said}");
            if store == "s3" {
                assert_eq!(bucket.keys(), [format!("{id}/{key}")]);
                assert_eq!(bucket.get(&format!("{id}/{key}")).body, b"of others", "{record}");
            } else {
                assert_eq!(std::fs::read(&file).unwrap(), b"of others", "{record}");
                assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "{record}");
            }
            let state = ims.state();
            assert!(record.is_null() || state.images[id] == record, "{:?}", state.images);
            assert!(
                !state.changes.iter().any(|(method, path, _)| method != "POST" && path.starts_with("/images")),
                "{:?}",
                state.changes
            );
        }
    }
}

/// `IMS_SSHD_UPLOAD_GIB` (default 1) is the size of the image.
#[test]
fn a_large_image_is_uploaded_without_being_read_into_memory() {
    let gib = std::env::var("IMS_SSHD_UPLOAD_GIB").map_or(1, |n| n.parse().expect("IMS_SSHD_UPLOAD_GIB: a number"));
    let (dir, tree) = bootable_image();
    let file = dir.path().join("sparse.sqsh");
    succeed(Command::new("truncate").args(["-s", &format!("{gib}G")]).arg(&file));
    call_squashfs(&file);
    let sink = Sink::start();
    let mut command = ims_sshd(&["upload", "--archive"], &sink.variables());
    command.args([&file, &tree]).current_dir(dir.path());
    let began = std::time::Instant::now();
    let most = memory_of(command.stdout(Stdio::null()).spawn().unwrap());
    println!("{gib} GiB uploaded in {:.0?} with {} MiB of memory at the most", began.elapsed(), most >> 10);
    assert!(most <= 128 << 10, "{most} KiB");
    let sizes = sink.sizes.lock().unwrap();
    assert!(sizes.iter().any(|(path, size)| path.ends_with("/rootfs") && *size == gib << 30), "{sizes:?}");
}

/// Writes the beginning of a squashfs superblock into a file, with the size of the file.
fn call_squashfs(file: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(b"hsqs", 0).unwrap();
    file.write_all_at(&file.metadata().unwrap().len().to_le_bytes(), 40).unwrap();
}

#[test]
fn archive_that_is_not_a_complete_squashfs_is_refused_before_uploading() {
    let dir = directory();
    let tree = image(dir.path());
    let whole = std::fs::read(squashfs_of(&tree)).unwrap();
    let tar = dir.path().join("image.tar");
    succeed(Command::new("tar").arg("-cf").arg(&tar).arg("-C").args([&tree, Path::new(".")]));
    let junk = [&whole[..], b"junk"].concat();
    let cases: [(&str, &[u8], &str); 5] = [
        ("empty", b"", "neither a squashfs nor an archive"),
        ("text", b"no image\n", "neither a squashfs nor an archive"),
        ("cut off", &whole[..whole.len() / 2], "it is cut off"),
        ("followed", &junk, "something follows it"),
        ("a tar archive", &std::fs::read(&tar).unwrap(), "it is not a squashfs"),
    ];
    for (what, content, why) in cases {
        let (bucket, ims) = (Bucket::new(), ImsServer::start());
        let variables = [bucket.variables(), ims.variables()].concat();
        let archive = dir.path().join("given.sqsh");
        std::fs::write(&archive, content).unwrap();
        let mut command = ims_sshd(&["upload", "--archive"], &variables);
        let output = command.args([&archive, &tree]).current_dir(dir.path()).output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(why), "{what}: {output:?}");
        assert_eq!((bucket.keys(), ims.state().requests.len()), (Vec::new(), 0), "{what}: {said}");
    }
}

#[test]
fn object_with_a_wrong_size_in_the_store_is_noticed() {
    let (dir, tree, squashfs) = packed_image();
    let sink = Sink::losing(1);
    let output = ims_sshd(&["upload", "--archive"], &sink.variables())
        .args([&squashfs, &tree])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let size = squashfs.metadata().unwrap().len();
    assert!(text(&output.stderr).contains(&format!("it has {} bytes, expected {size}", size - 1)), "{output:?}");
}

#[test]
fn object_with_another_md5_in_the_store_is_noticed() {
    let (dir, tree, squashfs) = packed_image();
    let other = md5(b"other content");
    for (headers, is_refused) in [
        (format!("etag: \"{other}\""), true),
        (format!("etag: {other}"), true),
        // Parts, or an encryption: the ETag is not the content's MD5.
        (format!("etag: \"{other}-2\""), false),
        (format!("etag: \"{other}\"\r\nx-amz-server-side-encryption: aws:kms"), false),
        (format!("etag: \"{other}\"\r\nx-amz-server-side-encryption-customer-algorithm: AES256"), false),
        (format!("etag: W/\"{other}\""), false),
    ] {
        let sink = Sink::describing(&headers);
        let mut command = ims_sshd(&["upload", "--archive"], &sink.variables());
        let output = command.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(i32::from(is_refused)), "{headers}: {said}");
        assert_eq!(said.contains(&format!("its MD5 there is {other}, expected ")), is_refused, "{headers}: {said}");
    }
}

#[test]
fn part_altered_on_the_way_to_the_store_is_refused_by_it() {
    let upload = Upload::new();
    for with_tls in [false, true] {
        let gate = Gate::start(usize::MAX, Closed::Altering(usize::MAX));
        let (mut command, _tls) = upload.through_tls(&gate, with_tls);
        let output = command.env("IMS_RETRY_LIMIT", "1").output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let why = "answers 400 Bad Request: XAmzContentSHA256Mismatch, The provided 'x-amz-content-sha256' header does";
        assert!(said.contains("cannot upload s3://") && said.contains(why), "{said}");
        let left = (upload.bucket.keys(), upload.bucket.unfinished_uploads());
        assert_eq!(left, (Vec::new(), 0), "{said}");
    }
}

#[test]
fn part_altered_once_on_the_way_to_the_store_is_sent_again() {
    let upload = Upload::new();
    let gate = Gate::start(usize::MAX, Closed::Altering(1));
    assert_eq!(upload.ended_through(&gate, 0), (PARTS + 1, 1));
}

#[test]
fn etag_of_an_object_that_was_uploaded_in_parts_is_not_compared() {
    let upload = Upload::new();
    let other = md5(b"other content");
    for etag in [&*format!("{other}-{PARTS}"), &other, "e"] {
        let sink = Sink::describing(&format!("etag: \"{etag}\""));
        let mut command = ims_sshd(&["upload", "--archive"], &sink.variables());
        command.arg(&upload.archive).arg(&upload.tree).current_dir(upload.dir.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{etag}: {output:?}");
    }
}

#[test]
fn archive_changed_since_it_was_packed_is_not_uploaded() {
    use std::os::unix::fs::FileExt;
    let (dir, tree) = bootable_image();
    let (archive, store) = (dir.path().join("image.sqsh"), dir.path().join("store"));
    let run = |command: &[&str]| {
        let output =
            ims_sshd(command, &[]).args(["--archive", "image.sqsh"]).arg(&tree).current_dir(dir.path()).output();
        output.unwrap()
    };
    let packed = run(&["package"]);
    assert!(packed.status.success(), "{packed:?}");
    let file = std::fs::OpenOptions::new().write(true).open(&archive).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    let middle = file.metadata().unwrap().len() / 2;
    std::fs::File::open(&archive).unwrap().read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();
    file.set_modified(time).unwrap();
    let upload = ["upload", "--store", store.to_str().unwrap()];
    let refused = run(&upload);
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("its content was changed since it was packed"), "{said}");
    assert!(walk(&store).iter().all(|path| !path.is_file()), "{said}");
    // Earlier releases record no checksum.
    let record = dir.path().join(".ims-sshd.packed");
    let mut recorded: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    assert!(recorded["archives"][0].as_object_mut().unwrap().remove("sha256").is_some());
    std::fs::write(&record, recorded.to_string()).unwrap();
    let accepted = run(&upload);
    assert!(accepted.status.success(), "{accepted:?}");
}

#[test]
fn token_is_replaced_before_it_expires() {
    let (dir, tree, squashfs) = packed_image();
    let (bucket, ims) = (Bucket::new(), ImsServer::start());
    ims.state().token_lives = 5;
    let mut variables = bucket.variables();
    variables.extend(ims.variables());
    let mut command = ims_sshd(&["upload", "--archive"], &variables);
    let output = command.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let state = ims.state();
    assert!(state.tokens > 1);
    // The job is looked for before anything is changed.
    assert_eq!(state.tokens, state.changes.len() + 1, "each request has a token of its own");
}

#[test]
fn links_in_a_directory_store_are_replaced_and_not_followed() {
    let (dir, tree) = bootable_image();
    // The random content makes the image large enough for several parts.
    let random = feed(Command::new("head").args(["-c", "40M", "/dev/urandom"]), b"").stdout;
    std::fs::write(tree.join("random"), random).unwrap();
    let squashfs = squashfs_of(&tree);
    let ims = ImsServer::start();
    let precious = dir.path().join("precious");
    std::fs::write(&precious, "precious").unwrap();
    // The first ID that this IMS assigns.
    let script = "mkdir -p out/$0 && ln -s ../../precious out/$0/rootfs#1";
    let id = "00000000-0000-4000-8000-000000000001";
    succeed(Command::new("sh").args(["-c", script, id]).current_dir(dir.path()));
    let mut enter = ims_sshd(&["enter", "--kernel", "vmlinuz", "--initrd", "initrd"], &ims.variables());
    enter.args(["--yes", "--output", "out", "--work", "work"]).arg(&squashfs).args(["--", "true"]);
    let output = enter.current_dir(dir.path()).output().unwrap();
    assert_eq!(std::fs::read(&precious).unwrap(), b"precious", "{output:?}");
    assert!(output.status.success(), "{output:?}");
    let rootfs = dir.path().join("out").join(id).join("rootfs");
    assert!(rootfs.symlink_metadata().unwrap().is_file());
}

/// Another user with write access to the store replaces the directory of an image by a link to a directory of his own,
/// which has files of the same names.
#[test]
fn directory_exchanged_for_a_link_during_publication_is_not_followed() {
    for ims in [false, true] {
        let dir = directory();
        let tree = image(dir.path());
        let [archive, store, target] = ["sparse.sqsh", "store", "target"].map(|name| dir.path().join(name));
        succeed(Command::new("truncate").args(["-s", "100M"]).arg(&archive));
        call_squashfs(&archive);
        for directory in [&store, &target] {
            std::fs::create_dir(directory).unwrap();
        }
        let keys = ["boot_parameters", "initrd", "kernel", "manifest.json", "rootfs"];
        for key in keys {
            std::fs::write(target.join(key), "precious").unwrap();
        }
        let server = ims.then(ImsServer::start);
        let variables = server.as_ref().map(ImsServer::variables).unwrap_or_default();
        let mut upload = ims_sshd(&["upload", "--name", "compute", "--store"], &variables);
        upload.arg(&store).arg("--archive").args([&archive, &tree]).current_dir(dir.path());
        let child = upload.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let begun = || {
            let names = std::fs::read_dir(&store).unwrap().map(|entry| entry.unwrap().file_name());
            names.map(|name| name.into_string().unwrap()).find(|name| name.len() == 36)
        };
        let name = loop {
            if let Some(name) = begun() {
                break name;
            }
        };
        std::fs::rename(store.join(&name), store.join("moved")).unwrap();
        std::os::unix::fs::symlink(&target, store.join(&name)).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = text(&output.stderr);
        let mut left: Vec<_> = std::fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, keys, "{said}");
        for key in keys {
            assert_eq!(std::fs::read(target.join(key)).unwrap(), b"precious", "{key}: {said}");
        }
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("is not the directory that this job has made"), "{said}");
        assert_eq!(std::fs::read_dir(store.join("moved")).unwrap().count(), 0, "{said}");
        assert!(!store.join("compute").exists(), "{said}");
    }
}

#[test]
fn directory_of_another_user_in_place_of_an_image_is_left_alone() {
    let dir = directory();
    let tree = image(dir.path());
    let squashfs = squashfs_of(&tree);
    let ims = ImsServer::start();
    // The first ID that this IMS assigns.
    let place = dir.path().join("out/00000000-0000-4000-8000-000000000001");
    std::fs::create_dir_all(&place).unwrap();
    std::os::unix::fs::chown(&place, Some(1234), Some(1234)).unwrap();
    let mut upload = ims_sshd(&["upload", "--name", "compute", "--store", "out", "--archive"], &ims.variables());
    let output = upload.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("belongs to somebody else"), "{said}");
    assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "{said}");
}

#[test]
fn empty_directory_left_by_an_older_version_is_reused() {
    use std::os::unix::fs::DirBuilderExt;
    let dir = directory();
    let tree = image(dir.path());
    let squashfs = squashfs_of(&tree);
    let store = dir.path().join("store");
    std::fs::create_dir(&store).unwrap();
    std::fs::DirBuilder::new().mode(0o700).create(store.join("compute")).unwrap();
    let mut upload = ims_sshd(&["upload", "--name", "compute", "--store"], &[]);
    let output = upload.arg(&store).arg("--archive").args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.success() && !said.contains("is an earlier one"), "{said}");
    assert_eq!(images_in(&store), [store.join("compute")]);
    assert!(is_whole(&store.join("compute")));
}

/// Upload of an archive in several parts to a bucket.
struct Upload {
    dir: tempfile::TempDir,
    tree: PathBuf,
    archive: PathBuf,
    bucket: Bucket,
}

const PARTS: usize = 6;

/// Number of parts that are sent concurrently.
const AT_A_TIME: usize = 3;

impl Upload {
    fn new() -> Self {
        let (dir, tree) = bootable_image();
        let archive = dir.path().join("packed.sqsh");
        write_parts(&archive, 1);
        Self { dir, tree, archive, bucket: Bucket::new() }
    }

    fn through(&self, gate: &Gate) -> Command {
        let mut variables = self.bucket.variables();
        variables.push(("S3_ENDPOINT", gate.endpoint.clone()));
        let mut command = ims_sshd(&["upload", "--archive"], &variables);
        command.arg(&self.archive).arg(&self.tree).current_dir(self.dir.path());
        // On a loaded machine moto joins parts for longer than the two seconds that other tests allow.
        command.env("IMS_STALL_LIMIT", "20");
        command
    }

    /// The same, if `with_tls` over TLS that ends in front of the gate.
    fn through_tls(&self, gate: &Gate, with_tls: bool) -> (Command, Option<Tls>) {
        let mut command = self.through(gate);
        let tls = with_tls.then(|| {
            certificates(self.dir.path());
            let tls = Tls::start(self.dir.path(), port_of(&gate.endpoint));
            command.env("S3_ENDPOINT", format!("https://127.0.0.1:{}", tls.port));
            tls
        });
        (command, tls)
    }

    /// Starts an upload and kills it after this many parts.
    fn killed_after(parts: usize) -> Self {
        let upload = Self::new();
        upload.kill_after(parts);
        upload
    }

    /// Runs it until this many more parts are uploaded.
    fn kill_after(&self, parts: usize) {
        let gate = Gate::start(parts, Closed::Silent);
        let mut child = self.through(&gate).env("IMS_STALL_LIMIT", "100").spawn().unwrap();
        // Further parts are sent once the accepted ones are recorded.
        wait_until("the parts to be sent", || gate.parts() == parts + AT_A_TIME);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(self.bucket.unfinished_uploads(), 1);
    }

    /// Runs it to its end; returns the number of parts that it sent, and of uploads that it started.
    fn again(&self) -> (usize, usize) {
        self.again_beside(0)
    }

    /// The same in a bucket with this many unfinished uploads of others.
    fn again_beside(&self, others: usize) -> (usize, usize) {
        self.ended_through(&Gate::start(usize::MAX, Closed::Silent), others)
    }

    fn ended_through(&self, gate: &Gate, others: usize) -> (usize, usize) {
        // A part of an unknown upload is an internal error in moto, which is retried; in S3 it is 404.
        let mut command = self.through(gate);
        let output = command.env("IMS_RETRY_LIMIT", "5").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let report = report(&output);
        let id = report["ims_image_record"]["id"].as_str().unwrap();
        let object = self.bucket.get(&format!("{id}/rootfs"));
        assert!(object.body == std::fs::read(&self.archive).unwrap());
        assert_eq!(object.header("content-type"), Some("application/vnd.cray.image.rootfs.squashfs"));
        assert_eq!(object.header("x-amz-meta-md5sum"), Some(md5(&object.body).as_str()));
        assert_eq!(self.bucket.keys().len(), 5, "{:?}", self.bucket.keys());
        assert_eq!(self.bucket.unfinished_uploads(), others);
        let left: Vec<_> = std::fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        (gate.parts(), gate.begun())
    }
}

/// Writes a file of `PARTS` different parts; the last one has one byte.
fn write_parts(file: &Path, seed: u8) {
    let content: Vec<u8> = (seed..).take(PARTS - 1).flat_map(|byte| vec![byte; 16 << 20]).chain([0]).collect();
    std::fs::write(file, content).unwrap();
    call_squashfs(file);
}

#[test]
fn killed_upload_continues_with_missing_parts() {
    assert_eq!(Upload::killed_after(2).again(), (PARTS - 2, 0));
}

#[test]
fn each_part_is_signed_with_its_own_checksum_with_and_without_tls() {
    let upload = Upload::new();
    let content = std::fs::read(&upload.archive).unwrap();
    let expected: Vec<_> = (1..).zip(content.chunks(16 << 20).map(sha256)).collect();
    for with_tls in [false, true] {
        let gate = Gate::start(usize::MAX, Closed::Silent);
        let (mut command, _tls) = upload.through_tls(&gate, with_tls);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let mut signed: Vec<_> = gate.heads().iter().filter_map(|head| signed_part(head)).collect();
        signed.sort_unstable();
        // A loaded machine may send a part again.
        signed.dedup();
        assert_eq!(signed, expected, "with TLS: {with_tls}");
    }
}

/// Number of the part that a request sends, and the SHA-256 that it is signed with.
fn signed_part(head: &str) -> Option<(usize, String)> {
    let number = head.split_once("partNumber=")?.1.split(['&', ' ']).next()?.parse().ok()?;
    let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
    assert!(header("authorization: ")?.contains("x-amz-content-sha256"), "{head}");
    Some((number, header("x-amz-content-sha256: ")?.to_owned()))
}

#[test]
fn upload_dropped_by_the_store_starts_again() {
    let upload = Upload::killed_after(2);
    let listing = text(upload.bucket.ask("GET", "?uploads", b"").body);
    let field = |name: &str| listing.split_once(name).unwrap().1.split('<').next().unwrap().to_owned();
    let (key, id) = (field("<Key>"), field("<UploadId>"));
    assert_eq!(upload.bucket.ask("DELETE", &format!("{key}?uploadId={id}"), b"").status, 204);
    let (parts, begun) = upload.again();
    // The first parts were sent in vain.
    assert!(parts > PARTS && begun == 1, "{parts} {begun}");
}

#[test]
fn upload_of_a_changed_file_is_aborted_and_starts_again() {
    let upload = Upload::killed_after(2);
    write_parts(&upload.archive, 100);
    assert_eq!(upload.again(), (PARTS, 1));
}

#[test]
fn requests_are_signed_with_keys_token_and_region_of_aws_variables() {
    let upload = Upload::new();
    let gate = Gate::start(usize::MAX, Closed::Silent);
    let variables = [
        ("AWS_ACCESS_KEY_ID", "access".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".into()),
        ("AWS_SESSION_TOKEN", "the-token".into()),
        ("AWS_REGION", "eu-north-1".into()),
        ("AWS_ENDPOINT_URL", gate.endpoint.clone()),
    ];
    let store = format!("s3://{}", upload.bucket.name);
    let mut command = ims_sshd(&["upload", "--store", &store, "--archive"], &variables);
    let output = command.arg(&upload.archive).arg(&upload.tree).current_dir(upload.dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let heads = gate.heads();
    // The listing of unfinished uploads is signed by our own code.
    assert!(heads.iter().any(|head| head.contains("uploads=&prefix=")) && heads.len() > PARTS, "{heads:?}");
    for head in heads {
        assert!(head.contains("/eu-north-1/s3/aws4_request"), "{head}");
        assert!(head.contains("x-amz-security-token: the-token"), "{head}");
    }
    // A download has its signature in the URL.
    let key = upload.bucket.keys().into_iter().find(|key| key.ends_with("/kernel")).unwrap();
    let gate = Gate::start(usize::MAX, Closed::Silent);
    let source = format!("s3://{}/{key}", upload.bucket.name);
    let mut prepare = ims_sshd(&["prepare", upload.dir.path().join("parent").to_str().unwrap(), &source], &variables);
    let output = prepare.env("AWS_ENDPOINT_URL", &gate.endpoint).output().unwrap();
    assert!(text(&output.stderr).contains("neither a squashfs nor an archive"), "{output:?}");
    let head = gate.heads().remove(0);
    assert!(
        head.contains("eu-north-1%2Fs3%2Faws4_request") && head.contains("X-Amz-Security-Token=the-token"),
        "{head}"
    );
}

#[test]
fn upload_killed_before_its_id_was_received_is_aborted() {
    let upload = Upload::new();
    let gate = Gate::start(0, Closed::Unheard);
    let mut child = upload.through(&gate).env("IMS_STALL_LIMIT", "100").spawn().unwrap();
    wait_until("the upload to begin", || upload.bucket.unfinished_uploads() == 1);
    child.kill().unwrap();
    child.wait().unwrap();
    // Unfinished uploads of others are left alone.
    assert_eq!(upload.bucket.ask("POST", "other/rootfs?uploads", b"").status, 200);
    assert_eq!(upload.again_beside(1), (PARTS, 1));
}

#[test]
fn upload_completed_with_a_lost_answer_is_complete() {
    let upload = Upload::new();
    let gate = Gate::start(usize::MAX, Closed::EndsUnheard);
    assert_eq!(upload.ended_through(&gate, 0), (PARTS, 1));
}

#[test]
fn upload_with_a_truncated_journal_line_can_be_killed_again() {
    let upload = Upload::killed_after(2);
    let journal = upload.dir.path().join(".ims-sshd.upload");
    let text = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, &text[..text.len() - 3]).unwrap();
    upload.kill_after(1);
    assert_eq!(upload.again(), (PARTS - 2, 0));
}

#[test]
fn upload_to_another_store_aborts_the_unfinished_one() {
    let mut upload = Upload::killed_after(2);
    let before = std::mem::replace(&mut upload.bucket, Bucket::new());
    assert_eq!(upload.again(), (PARTS, 1));
    assert_eq!(before.unfinished_uploads(), 0);
}

#[test]
fn failed_upload_leaves_no_parts() {
    let upload = Upload::new();
    let gate = Gate::start(3, Closed::Refusing);
    let output = upload.through(&gate).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("403 Forbidden"), "{output:?}");
    assert_eq!((upload.bucket.unfinished_uploads(), upload.bucket.keys().len()), (0, 0));
    assert_eq!(upload.again(), (PARTS, 1));
}

#[test]
fn killed_upload_to_a_directory_leaves_no_partial_files() {
    let (dir, tree) = bootable_image();
    let (archive, store) = (dir.path().join("sparse.sqsh"), dir.path().join("store"));
    succeed(Command::new("truncate").args(["-s", "200M"]).arg(&archive));
    call_squashfs(&archive);
    let mut command = ims_sshd(&["upload", "--store"], &[]);
    command.arg(&store).arg("--archive").args([&archive, &tree]).current_dir(dir.path());
    let mut first = command.stdout(Stdio::piped()).spawn().unwrap();
    let files = || -> Vec<String> {
        let found = succeed(Command::new("find").arg(&store).args(["-type", "f", "-printf", "%f\n"]));
        // The directory also has a key file, which authenticates the journal.
        found.lines().filter(|name| !name.starts_with(".ims-sshd.key")).map(str::to_owned).collect()
    };
    wait_until("the upload to begin", || store.exists() && !files().is_empty());
    first.kill().unwrap();
    assert!(!first.wait().unwrap().success(), "killed too late");
    assert_ne!(files(), [""; 0]);
    let open = succeed(Command::new("find").arg(&store).args(["-type", "f", "-perm", "/077"]));
    assert_eq!(open, "", "files that are not whole are nobody else's to read");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut names = files();
    names.sort();
    assert_eq!(names, ["boot_parameters", "initrd", "kernel", "manifest.json", "rootfs"]);
    assert_eq!(report(&output)["ims_image_artifacts"][0]["md5"], md5(&std::fs::read(&archive).unwrap()));
}

/// Waits for its end, and returns its peak memory, in KiB.
fn memory_of(mut child: std::process::Child) -> u64 {
    let mut most = 0;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
        most = most.max(peak.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return most;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// A packed image belongs to one image root: with the kernel of another one it may not boot.
#[test]
fn an_archive_of_another_image_root_is_not_uploaded() {
    let dir = directory();
    let tree = image(dir.path());
    let (parent, store) = (dir.path().join("parent"), dir.path().join("store"));
    let run = |command: &[&str], name: &str| {
        let variables = [("IMAGE_ROOT_ARCHIVE_NAME", name.into()), ("IMAGE_STORE", store.display().to_string())];
        ims_sshd(command, &variables).current_dir(dir.path()).output().unwrap()
    };
    let done = |command: &[&str], name: &str| {
        let output = run(command, name);
        assert!(output.status.success(), "{command:?}: {output:?}");
    };
    let refused = |command: &[&str], name: &str, why: &str| {
        let output = run(command, name);
        assert!(!output.status.success() && text(&output.stderr).contains(why), "{command:?}: {output:?}");
        assert!(!store.exists(), "nothing is published");
    };
    let [parent, tree] = [&parent, &tree].map(|path| path.to_str().unwrap());
    done(&["prepare", parent, tree], "first");
    done(&["package", parent], "first");
    // The next job has another name for its image; the packed one is removed anyway.
    let kept = dir.path().join("kept.sqsh");
    std::fs::copy(format!("{parent}/first.sqsh"), &kept).unwrap();
    succeed(Command::new("cp").args(["-p", &format!("{parent}/first.sqsh")]).arg(format!("{parent}/third.sqsh")));
    done(&["prepare", "--fresh", parent, tree], "second");
    assert!(
        !Path::new(parent).join("first.sqsh").exists(),
        "--fresh removes what was packed of the earlier image root"
    );
    refused(&["upload", parent], "second", "'ims-sshd package' creates it");
    // An archive that was copied, or packed before records existed.
    refused(&["upload", parent], "third", "it was written before the image root was made");
    done(&["package", parent], "second");
    std::fs::rename(format!("{parent}/image-root"), format!("{parent}/moved")).unwrap();
    succeed(Command::new("cp").args(["-a", tree]).arg(format!("{parent}/image-root")));
    refused(&["upload", parent], "second", "it was packed from another image root");

    // Without a parent of its own, each image root has the same archive name.
    let other = dir.path().join("other");
    succeed(Command::new("cp").args(["-a", tree]).arg(&other));
    let other = other.to_str().unwrap();
    done(&["package", tree], "image");
    refused(&["upload", other], "image", "it was packed from another image root");
    refused(&["package", other], "image", "was not packed from this image root");
    std::fs::remove_file(dir.path().join("image.sqsh")).unwrap();
    done(&["package", other], "image");
    done(&["upload", other], "image");
}

#[test]
fn fresh_keeps_a_source_inside_the_volume() {
    let dir = directory();
    let tree = image(dir.path());
    let parent = dir.path().join("parent");
    std::fs::create_dir(&parent).unwrap();
    let source = parent.join("image.sqsh");
    std::fs::rename(squashfs_of(&tree), &source).unwrap();
    for fresh in [&["prepare"][..], &["prepare", "--fresh"]] {
        let output = ims_sshd(fresh, &[]).args([&parent, &source]).output().unwrap();
        assert!(output.status.success() && source.exists(), "{output:?}");
    }
}

#[test]
fn unknown_job_is_refused_before_anything_is_fetched_or_uploaded() {
    const UNKNOWN: &str = "00000000-0000-4000-8000-000000000404";
    let (dir, tree, squashfs) = packed_image();
    let [tree, squashfs, store, parent, work] =
        [tree, squashfs, dir.path().join("store"), dir.path().join("parent"), dir.path().join("work")]
            .map(|path| path.display().to_string());
    for arguments in [
        vec!["prepare", &parent, &squashfs],
        vec!["upload", "--name", "compute", "--store", &store, "--archive", &squashfs, &tree],
        vec!["customize", &squashfs, "--output", &store, "--work", &work, "--", "true"],
    ] {
        let ims = ImsServer::start();
        let mut variables = ims.variables();
        variables.push(("IMS_JOB_ID", UNKNOWN.into()));
        let output = ims_sshd(&arguments, &variables).current_dir(dir.path()).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        let refusal = format!("cannot find job {UNKNOWN} in IMS at {}: the server answers 404 Not Found: ", ims.url);
        assert_eq!(said.matches(&refusal).count(), 1, "{arguments:?}: {said}");
        assert!(said.contains("see IMS_JOB_ID and IMS_URL"), "{arguments:?}: {said}");
        assert!(!Path::new(&parent).exists(), "{arguments:?}: {said}");
        assert!(!Path::new(&store).exists(), "{arguments:?}: {said}");
        assert!(ims.state().images.is_empty() && ims.state().changes.is_empty(), "{arguments:?}: {said}");
    }
}

#[test]
fn bucket_in_a_directory_has_links_like_those_of_a_server() {
    let (dir, tree, squashfs) = packed_image();
    let (ims, buckets) = (ImsServer::start(), dir.path().join("buckets"));
    std::fs::create_dir(&buckets).unwrap();
    let mut variables = ims.variables();
    variables.extend([("S3_ENDPOINT", format!("file://{}", buckets.display())), ("IMS_JOB_ID", String::new())]);
    let upload = |variables: &[(&str, String)]| {
        let mut upload = ims_sshd(&["upload", "--name", "compute", "--archive"], variables);
        upload.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap()
    };
    let output = upload(&variables);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report = report(&output);
    let (record, id) = (&report["ims_image_record"], report["ims_image_record"]["id"].as_str().unwrap());
    assert_eq!(record["link"]["path"], format!("s3://boot-images/{id}/manifest.json"));
    assert_eq!(record["link"]["type"], "s3");
    let manifest = std::fs::read(buckets.join(format!("boot-images/{id}/manifest.json"))).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    for artifact in manifest["artifacts"].as_array().unwrap() {
        let path = artifact["link"]["path"].as_str().unwrap().strip_prefix("s3://").unwrap();
        assert_eq!(artifact["link"]["type"], "s3");
        assert_eq!(artifact["md5"], md5(&std::fs::read(buckets.join(path)).unwrap()), "{path}");
    }
    for bucket in ["..", ".hidden", "boot-images/prefix"] {
        variables.push(("IMAGE_STORE", format!("s3://{bucket}")));
        let output = upload(&variables);
        assert_eq!(output.status.code(), Some(2), "{bucket}: {}", text(&output.stderr));
    }
    assert_eq!(std::fs::read_dir(&buckets).unwrap().count(), 1);
}

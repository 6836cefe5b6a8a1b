//! Making an image root from a source, or leaving nothing.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use testbed::file_server::{Fault, FileServer};
use testbed::ims_server::ImsServer;
use testbed::job::*;
use testbed::name_server::with_names;
use testbed::s3_server::Bucket;
use testbed::*;

fn prepare(parent: &Path, source: &str, variables: &[(&str, String)]) -> Output {
    ims_sshd(&["prepare", &parent.display().to_string(), source], variables).output().unwrap()
}

/// Checks that nothing was left in a directory. A failed `prepare` removes the one that it has created.
pub fn is_empty(parent: &Path) {
    if !parent.exists() {
        return;
    }
    let left: Vec<_> = walk(parent).into_iter().filter(|path| path != parent).collect();
    assert!(left.is_empty(), "{left:?}");
}

pub fn refused(parent: &Path, source: &str, reason: &str) {
    let output = prepare(parent, source, &[]);
    assert_eq!(output.status.code(), Some(1), "{source}: {output:?}");
    assert!(text(&output.stderr).contains(reason), "{source}: expected '{reason}': {}", text(&output.stderr));
    is_empty(parent);
}

pub fn same_tree(a: &Path, b: &Path) {
    let list =
        "cd \"$0\" && find . -exec stat -c '%n %f %u %g %Y' {} + | sort && find . -type f -exec md5sum {} + | sort";
    let of = |tree: &Path| succeed(Command::new("sh").args(["-c", list]).arg(tree));
    assert_eq!(of(a), of(b));
}

#[test]
fn every_kind_of_source_becomes_the_same_tree() {
    let (dir, tree, squashfs) = packed_image();
    let mut sources = vec![tree.clone(), squashfs];
    for (suffix, option) in [("tar", None), ("tar.gz", Some("-z")), ("tar.xz", Some("-J")), ("tar.zst", Some("--zstd"))]
    {
        let file = dir.path().join(format!("image.{suffix}"));
        succeed(Command::new("tar").args(option).args(["-c", "-f"]).arg(&file).arg("-C").arg(&tree).arg("."));
        sources.push(file);
    }
    for (number, source) in sources.iter().enumerate() {
        let parent = dir.path().join(format!("parent-{number}"));
        let output = prepare(&parent, &source.display().to_string(), &[]);
        assert!(output.status.success(), "{}: {output:?}", source.display());
        same_tree(&tree, &parent.join("image-root"));
    }
    let bucket = Bucket::new();
    bucket.put("a/rootfs", &std::fs::read(&sources[1]).unwrap());
    let parent = dir.path().join("parent-s3");
    let output = prepare(&parent, &format!("s3://{}/a/rootfs", bucket.name), &bucket.variables());
    assert!(output.status.success(), "{output:?}");
    same_tree(&tree, &parent.join("image-root"));
    let names: Vec<_> = std::fs::read_dir(&parent).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!names.iter().any(|n| n == "image.sqsh"), "the archive is gone: {names:?}");
}

#[test]
fn damaged_sources_are_refused_and_leave_nothing() {
    let (dir, tree) = bootable_image();
    let squashfs = std::fs::read(squashfs_of(&tree)).unwrap();
    let parent = dir.path().join("parent");
    let named = |name: &str, content: &[u8]| {
        let file = dir.path().join(name);
        std::fs::write(&file, content).unwrap();
        file.display().to_string()
    };
    refused(&parent, &named("page", b"<html>404</html>"), "neither a squashfs nor an archive of tar or cpio");
    refused(&parent, &named("short", &squashfs[..squashfs.len() / 2]), "cut off");
    refused(&parent, &named("long", &[squashfs.as_slice(), &[1; 5000]].concat()), "something follows");
    let mut damaged = squashfs.clone();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 4096].fill(0xaa);
    refused(&parent, &named("damaged", &damaged), "cannot unpack");
    refused(&parent, "/nowhere/image", "No such file");

    let tar = dir.path().join("image.tar");
    succeed(Command::new("tar").args(["-c", "-f"]).arg(&tar).arg("-C").arg(&tree).arg("."));
    let tar = std::fs::read(tar).unwrap();
    refused(&parent, &named("short.tar", &tar[..tar.len() / 1024 * 512]), "cut off");
    refused(&parent, &named("long.tar", &[tar.as_slice(), &[1; 512]].concat()), "cut off, or something follows it");
    let packed = feed(Command::new("gzip").arg("-c"), &tar).stdout;
    refused(&parent, &named("short.gz", &packed[..packed.len() / 2]), "cannot unpack");
    refused(&parent, &named("long.gz", &[packed.as_slice(), &[1; 512]].concat()), "cannot unpack");
}

#[test]
fn members_outside_the_root_are_refused_and_write_nothing_there() {
    let dir = directory();
    let parent = dir.path().join("parent");
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    // A tar archive that no tar would write.
    let make = "
import io, sys, tarfile
archive, kind, outside = sys.argv[1:]
with tarfile.open(archive, 'w') as tar:
    def add(name, **fields):
        member = tarfile.TarInfo(name)
        for key, value in fields.items(): setattr(member, key, value)
        content = b'' if 'linkname' in fields else b'hostile'
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    if kind == 'dots': add('../../outside/made')
    if kind == 'link':
        add('way', type=tarfile.SYMTYPE, linkname=outside)
        add('way/made')
    if kind == 'hardlink':
        add('copy', type=tarfile.LNKTYPE, linkname=outside + '/secret')
";
    std::fs::write(outside.join("secret"), "secret").unwrap();
    for kind in ["dots", "link", "hardlink"] {
        let archive = dir.path().join(format!("{kind}.tar"));
        succeed(Command::new("/usr/bin/python3").args(["-c", make]).arg(&archive).arg(kind).arg(&outside));
        refused(&parent, &archive.display().to_string(), "cannot unpack");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1, "{kind}");
    }
    // A squashfs in which names were replaced.
    let tree = dir.path().join("plain");
    std::fs::create_dir_all(tree.join("XXXXXXXXXX")).unwrap();
    std::fs::write(tree.join("XXXXXXXXXX/made"), "hostile").unwrap();
    let file = dir.path().join("plain.sqsh");
    succeed(Command::new("mksquashfs").args([&tree, &file]).args([
        "-noI",
        "-noD",
        "-noF",
        "-noX",
        "-quiet",
        "-no-progress",
    ]));
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.windows(10).position(|w| w == b"XXXXXXXXXX").unwrap();
    bytes[at..at + 10].copy_from_slice(b"../outside");
    std::fs::write(&file, bytes).unwrap();
    refused(&parent, &file.display().to_string(), "cannot unpack");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn download_resumes_after_ten_resets() {
    let (dir, tree, content) = served_image();
    let faults: Vec<_> = (1..=10).map(|n| Fault::ResetAfter(content.len() / 12 * (n % 2) + n)).collect();
    let server = FileServer::start(content.clone(), &faults);
    let parent = dir.path().join("parent");
    let output = prepare(&parent, &server.url, &[("DOWNLOAD_MD5SUM", md5(&content))]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
    let requests = server.requests.lock().unwrap().clone();
    assert_eq!(requests.len(), 11);
    let ranges: Vec<_> = requests.iter().map(|r| r.range.unwrap_or(0)).collect();
    assert!(ranges.is_sorted() && ranges[10] > 0, "nothing is fetched twice: {ranges:?}");
    assert!(requests[10].if_match.is_some());
    assert!(!text(&output.stderr).contains("Signature"), "a presigned URL is a key");
}

#[test]
fn server_errors_closed_connections_and_silence_are_retried() {
    let (dir, tree, content) = served_image();
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::CloseAfter(1000),
        Fault::Silence,
        Fault::Drip,
        Fault::CloseAfter(5000),
        Fault::Status(429),
    ];
    let server = FileServer::start(content, &faults);
    let parent = dir.path().join("parent");
    let output = prepare(&parent, &server.url, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
}

#[test]
fn server_that_sends_too_slowly_is_given_up() {
    let dir = directory();
    let server = FileServer::start(vec![0; 1 << 20], &vec![Fault::Drip; 100]);
    let parent = dir.path().join("parent");
    let began = Instant::now();
    let output = prepare(&parent, &server.url, &[("IMS_RETRY_LIMIT", "3".into()), ("IMS_STALL_LIMIT", "1".into())]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("IMS_STALL_LIMIT"), "{}", text(&output.stderr));
    assert!(began.elapsed().as_secs() < 10);
    is_empty(&parent);
}

#[test]
fn file_that_changes_during_the_download_is_fetched_again() {
    let (dir, tree, content) = served_image();
    let other: Vec<_> = content.iter().map(|byte| !byte).collect();
    let server = FileServer::start(other, &[Fault::ResetAfter(5000), Fault::Change]);
    let parent = dir.path().join("parent");
    let output = prepare(&parent, &server.url, &[("DOWNLOAD_MD5SUM", md5(&content))]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
}

#[test]
fn file_that_shrinks_during_the_download_is_truncated() {
    let (dir, tree, content) = served_image();
    let length = content.len();
    let faults = [Fault::CloseAfter(length + 50_000), Fault::Shorten(length)];
    let server = FileServer::start([content.as_slice(), &vec![1; 100_000]].concat(), &faults);
    let parent = dir.path().join("parent");
    let output = prepare(&parent, &server.url, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
}

#[test]
fn file_that_keeps_changing_is_given_up() {
    let dir = directory();
    let faults = [Fault::ResetAfter(100_000), Fault::Status(412)].repeat(30);
    let server = FileServer::start(vec![0; 1 << 20], &faults);
    let parent = dir.path().join("parent");
    let output = prepare(&parent, &server.url, &[("IMS_RETRY_LIMIT", "1".into())]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("it has changed on the server"), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("IMS_RETRY_LIMIT"), "{}", text(&output.stderr));
    is_empty(&parent);
}

#[test]
fn unexpected_answers_to_range_requests_are_handled() {
    let (dir, tree, content) = served_image();
    for (number, fault) in [Fault::OtherRange, Fault::Whole, Fault::ShortRange(3000)].into_iter().enumerate() {
        let server = FileServer::start(content.clone(), &[Fault::ResetAfter(5000), fault]);
        let parent = dir.path().join(format!("parent-{number}"));
        let output = prepare(&parent, &server.url, &[]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        same_tree(&tree, &parent.join("image-root"));
    }
    let server = FileServer::start(content, &[Fault::ResetAfter(5000), Fault::LongRange]);
    refused(&dir.path().join("long"), &server.url, "it is longer than the server announced");
}

#[test]
fn wrong_checksum_is_refused_in_a_variable_or_etag() {
    let (dir, _, content) = served_image();
    let parent = dir.path().join("parent");
    let wrong = md5(b"something else");
    let ims = ImsServer::start();
    let server = FileServer::start(content.clone(), &[]);
    let mut variables = ims.variables();
    variables.push(("DOWNLOAD_MD5SUM", wrong.clone()));
    let output = prepare(&parent, &server.url, &variables);
    assert!(text(&output.stderr).contains(&format!("expected {wrong}")), "{}", text(&output.stderr));
    is_empty(&parent);
    assert_eq!(ims.statuses(), ["fetching_image", "error"]);
    let server = FileServer::with_etag(content.clone(), &wrong, &[]);
    refused(&parent, &server.url, &format!("expected {wrong}"));
    let here = squashfs_of(&dir.path().join("tree")).display().to_string();
    let output = prepare(&parent, &here, &[("DOWNLOAD_MD5SUM", wrong.clone())]);
    assert!(text(&output.stderr).contains(&format!("expected {wrong}")), "{}", text(&output.stderr));
    is_empty(&parent);
    let server = FileServer::start(Vec::new(), &[Fault::Status(403)]);
    refused(&parent, &server.url, "403 Forbidden");
}

/// The init container of a pod fails, and nothing else tells IMS.
#[test]
fn refused_source_or_variable_sets_the_jobs_status_to_error() {
    let (dir, _, squashfs) = packed_image();
    let image = squashfs.display().to_string();
    let parent = dir.path().join("parent");
    for (source, wrong) in [
        ("", None),
        ("ftp://example.com/image", None),
        (image.as_str(), Some(("DOWNLOAD_MD5SUM", "zz"))),
        (image.as_str(), Some(("SSH_JAIL", "maybe"))),
        (image.as_str(), Some(("IMS_RETRY_LIMIT", "long"))),
        (image.as_str(), Some(("LOG_LEVEL", "verbose"))),
    ] {
        let ims = ImsServer::start();
        let mut variables = ims.variables();
        variables.extend(wrong.map(|(name, value)| (name, value.to_owned())));
        let output = prepare(&parent, source, &variables);
        assert_eq!(output.status.code(), Some(2), "{source} {wrong:?}: {output:?}");
        assert_eq!(ims.statuses(), ["error"], "{source} {wrong:?}: {output:?}");
        assert!(!parent.exists());
    }
    // Without a job or an IMS, the refusal is the only message.
    let output = prepare(&parent, &image, &[("IMS_JOB_ID", "../images".into()), ("SSH_JAIL", "maybe".into())]);
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("IMS_JOB_ID") && said.lines().count() == 1, "{said}");
}

#[test]
fn sha256_is_verified_in_addition_to_md5() {
    let (dir, tree) = bootable_image();
    let here = squashfs_of(&tree).display().to_string();
    let content = std::fs::read(&here).unwrap();
    let (right, wrong) = (sha256(&content), sha256(b"something else"));
    let server = FileServer::start(content.clone(), &[Fault::ResetAfter(5000)]);
    let parent = dir.path().join("parent");
    let parent_text = parent.display().to_string();
    for source in [&here, &server.url] {
        for (by_option, sum, md5_sum, goes) in [
            (true, &wrong, None, false),
            (false, &wrong, Some(md5(&content)), false),
            (false, &right, Some(md5(b"something else")), false),
            (true, &right.to_uppercase(), Some(md5(&content)), true),
            (false, &right, None, true),
        ] {
            let mut variables: Vec<_> = md5_sum.iter().map(|sum| ("DOWNLOAD_MD5SUM", sum.clone())).collect();
            // An option overrides the variable.
            variables.push(("DOWNLOAD_SHA256SUM", if by_option { "0".repeat(64) } else { sum.clone() }));
            let mut command = ims_sshd(&["prepare", &parent_text, source], &variables);
            if by_option {
                command.args(["--sha256", sum]);
            }
            let output = command.output().unwrap();
            assert_eq!(output.status.success(), goes, "{source}: {}", text(&output.stderr));
            if goes {
                same_tree(&tree, &parent.join("image-root"));
                std::fs::remove_dir_all(&parent).unwrap();
            } else {
                let expected = if *sum == wrong { format!("expected {wrong}") } else { "its MD5 is".into() };
                assert!(text(&output.stderr).contains(&expected), "{source}: {}", text(&output.stderr));
                is_empty(&parent);
            }
        }
    }
    let output = prepare(&parent, tree.to_str().unwrap(), &[("DOWNLOAD_SHA256SUM", right.clone())]);
    assert!(text(&output.stderr).contains("it is a directory, which has no checksum"), "{output:?}");
    for command in ["customize", "enter"] {
        let output = ims_sshd(&[command, tree.to_str().unwrap(), "--sha256", &right], &[]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{command}: {output:?}");
    }
    let output = ims_sshd(&["enter", &here, "--sha256", &wrong, "--", "true"], &[]).output().unwrap();
    assert!(text(&output.stderr).contains(&format!("expected {wrong}")), "{output:?}");
}

#[test]
fn plain_http_without_a_checksum_causes_a_warning() {
    let (dir, _, content) = served_image();
    let server = FileServer::start(content.clone(), &[]);
    let warning = "without TLS and without a checksum";
    for (number, (variables, warned)) in [
        (vec![], true),
        (vec![("DOWNLOAD_MD5SUM", md5(&content))], false),
        (vec![("DOWNLOAD_SHA256SUM", sha256(&content))], false),
    ]
    .into_iter()
    .enumerate()
    {
        let output = prepare(&dir.path().join(format!("parent-{number}")), &server.url, &variables);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(text(&output.stderr).contains(warning), warned, "{}", text(&output.stderr));
    }
}

#[test]
fn etags_that_are_not_an_md5_are_not_verified() {
    let (dir, tree, content) = served_image();
    let wrong = md5(b"something else");
    let weak = format!("W/\"{wrong}\"");
    for (number, (etag, fault)) in [
        (&wrong, Fault::Described("x-amz-server-side-encryption: aws:kms")),
        (&wrong, Fault::Described("x-amz-server-side-encryption-customer-algorithm: AES256")),
        (&wrong, Fault::Described("X-Static-Large-Object: True")),
        (&wrong, Fault::Described("X-Object-Manifest: parts/rootfs")),
        (&weak, Fault::Described("server: nginx")),
    ]
    .into_iter()
    .enumerate()
    {
        let server = FileServer::with_etag(content.clone(), etag, &[fault]);
        let parent = dir.path().join(format!("parent-{number}"));
        let output = prepare(&parent, &server.url, &[]);
        assert!(output.status.success(), "{fault:?}: {}", text(&output.stderr));
        same_tree(&tree, &parent.join("image-root"));
    }
}

/// A weak ETag may stay when the bytes change (RFC 9110, 8.8.1).
#[test]
fn download_with_a_weak_etag_resumes_only_if_a_checksum_verifies_it() {
    let (dir, tree, content) = served_image();
    let cut = Fault::ResetAfter(5000);
    for (number, (variables, resumes)) in [
        (vec![], false),
        (vec![("DOWNLOAD_SHA256SUM", sha256(&content))], true),
        (vec![("DOWNLOAD_MD5SUM", md5(&content))], true),
    ]
    .into_iter()
    .enumerate()
    {
        let server = FileServer::with_etag(content.clone(), "W/\"1\"", &[cut]);
        let parent = dir.path().join(format!("same-{number}"));
        let output = prepare(&parent, &server.url, &variables);
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        same_tree(&tree, &parent.join("image-root"));
        let requests = server.requests.lock().unwrap().clone();
        assert_eq!((requests.len(), requests[1].range.is_some(), requests[1].if_match.clone()), (2, resumes, None));
        assert_eq!(said.contains("no strong validator"), !resumes, "{said}");
    }
    let other: Vec<_> = content.iter().map(|byte| !byte).collect();
    let server = FileServer::with_etag(other, "W/\"1\"", &[cut, Fault::Change]);
    let sum = [("DOWNLOAD_SHA256SUM", sha256(&content))];
    let output = prepare(&dir.path().join("changed"), &server.url, &sum);
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &dir.path().join("changed/image-root"));
}

#[test]
fn disk_that_is_too_small_or_fills_up_is_an_error() {
    let (dir, tree) = bootable_image();
    std::fs::write(tree.join("zeros"), vec![0; 64 << 20]).unwrap();
    let content = std::fs::read(squashfs_of(&tree)).unwrap();
    let server = FileServer::start(content.clone(), &[]);
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    // 16 MB: enough for the archive, but not for its content. Mounted for programs of this test only.
    let mounted = |size: usize| {
        let script = format!(
            "mount -t tmpfs -o size={size} tmpfs {0} && {IMS_SSHD} prepare {0}/parent '{1}'; code=$?; ls -A {0}/parent; exit $code",
            disk.display(),
            server.url
        );
        Command::new("unshare").args(["-m", "sh", "-c", &script]).env("IMS_RETRY_LIMIT", "2").output().unwrap()
    };
    let small = mounted(content.len() / 2 / 4096 * 4096);
    assert!(text(&small.stderr).contains("are free"), "{small:?}");
    let full = mounted(content.len() * 4 / 4096 * 4096);
    assert!(text(&full.stderr).contains("cannot unpack"), "{full:?}");
    for output in [small, full] {
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    }
}

#[test]
fn prepare_killed_at_any_moment_succeeds_when_run_again() {
    let (dir, tree) = bootable_image();
    std::fs::write(tree.join("random"), feed(Command::new("head").args(["-c", "20M", "/dev/urandom"]), b"").stdout)
        .unwrap();
    let content = std::fs::read(squashfs_of(&tree)).unwrap();
    let server = FileServer::start(content, &[]);
    let parent = dir.path().join("parent");
    let parent_text = parent.display().to_string();
    let moments: [(&str, &dyn Fn() -> bool); 3] = [
        ("fetching", &|| parent.join("image.sqsh.part").exists()),
        ("unpacking", &|| parent.join(".ims-sshd.unpacking").exists()),
        ("done", &|| parent.join("image-root").exists()),
    ];
    for (name, has_come) in moments {
        let mut child = ims_sshd(&["prepare", &parent_text, &server.url], &[]).spawn().unwrap();
        wait_until(name, has_come);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    // unsquashfs of the killed program.
    wait_until("its programs to end", || processes_with(&parent_text).is_empty());
    let output = prepare(&parent, &server.url, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
    assert!(!parent.join("image.sqsh").exists() || parent.join("image-root").exists());
}

#[test]
fn an_overlay_shows_the_image_and_keeps_its_source() {
    let (dir, tree, squashfs) = packed_image();
    let before = std::fs::read(&squashfs).unwrap();
    let parent = dir.path().join("parent");
    let script = "set -e; $0 prepare --open overlay $1 $2; cp -a $1/image-root $1/copy; echo more > $1/image-root/etc/more; \
                  umount $1/image-root $1/overlay/lower; $0 prepare --open overlay $1 $2; cat $1/image-root/etc/more";
    let mut shell = Command::new("unshare");
    shell.args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&parent, &squashfs]);
    assert_eq!(succeed(&mut shell), "more\n", "the next one to mount it finds what was changed");
    same_tree(&tree, &parent.join("copy"));
    assert_eq!(std::fs::read(&squashfs).unwrap(), before);
}

/// Users who see the mounts cannot use the image's devices and setuid programs; inside the jail, sudo and su
/// work.
#[test]
fn an_overlay_is_mounted_nodev_and_nosuid_and_setuid_programs_work_in_the_jail_alone() {
    let dir = directory();
    let parent = dir.path().join("parent");
    let source = dir.path().join("image.sqsh");
    let tree = dir.path().join("tree");
    succeed(Command::new("mkdir").arg("-p").arg(tree.join("dev")));
    let root = cache().join("debian");
    let script = "set -e; tree=$3; mkdir -p $tree/usr/bin $tree/usr/lib $tree/etc; ln -s usr/bin $tree/bin; ln -s usr/lib $tree/lib; \
                  ln -s usr/lib64 $tree/lib64; cp -a $4/usr/lib64 $tree/usr/; cp $4/etc/passwd $tree/etc; \
                  cp -a $4/usr/lib/x86_64-linux-gnu $tree/usr/lib/; cp -a $4/usr/bin/dash $4/usr/bin/id $4/usr/bin/setpriv $tree/usr/bin; \
                  ln -s dash $tree/usr/bin/sh; cp $4/usr/bin/id $tree/usr/bin/as-root; chmod 4755 $tree/usr/bin/as-root; \
                  mknod $tree/null c 1 3; chmod 666 $tree/null; mksquashfs $tree $2 -quiet -no-progress; \
                  $0 prepare --open overlay $1 $2; cat /proc/self/mountinfo; ! echo opened > $1/image-root/null || echo DEVICE; \
                  as='setpriv --reuid 1000 --clear-groups'; \
                  echo outside $($as $1/image-root/usr/bin/as-root -u); \
                  echo inside $(IMS_JAIL_TIER=namespace $0 enter $1/image-root -- $as as-root -u); \
                  umount $1/image-root $1/overlay/lower";
    let mut command = Command::new("unshare");
    let output =
        command.args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&parent, &source, &tree, &root]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stdout);
    for place in ["parent/image-root", "parent/overlay/lower"] {
        let mount = said.lines().find(|line| line.contains(place)).unwrap();
        assert!(mount.contains("nosuid") && mount.contains("nodev"), "{mount}");
    }
    assert!(said.contains("outside 1000\ninside 0\n") && !said.contains("DEVICE"), "{output:?}");
}

#[test]
fn changes_in_an_overlay_survive_a_source_that_cannot_be_mounted() {
    let (dir, _, squashfs) = packed_image();
    let wrong = dir.path().join("wrong");
    std::fs::write(&wrong, "<html>").unwrap();
    let parent = dir.path().join("parent");
    let output = ims_sshd(&["prepare", "--open", "overlay"], &[]).args([&parent, &wrong]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    is_empty(&parent);
    let script = "set -e; $0 prepare --open overlay $1 $2; echo more > $1/image-root/etc/more; \
                  umount $1/image-root $1/overlay/lower; ! $0 prepare --open overlay $1 $3; \
                  $0 prepare --open overlay $1 $2; cat $1/image-root/etc/more";
    let mut shell = Command::new("unshare");
    shell.args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&parent, &squashfs, &wrong]);
    assert_eq!(succeed(&mut shell), "more\n");
}

#[test]
fn lower_layer_that_was_left_mounted_is_not_mounted_twice() {
    let (dir, _, squashfs) = packed_image();
    let parent = dir.path().join("parent");
    let script = "set -e; $0 prepare --open overlay $1 $2; echo new > $1/image-root/etc/new; umount $1/image-root; \
                  $0 prepare --open overlay $1 $2; cat $1/image-root/etc/new; umount $1/image-root $1/overlay/lower; \
                  ! grep \" $1/\" /proc/self/mountinfo";
    let mut shell = Command::new("unshare");
    let said = succeed(shell.args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&parent, &squashfs]));
    assert_eq!(said, "new\n");
}

#[test]
fn image_root_of_an_ended_job_is_gone_on_with_only_by_fresh() {
    let (dir, _, squashfs) = packed_image();
    let (parent, squashfs) = (dir.path().join("parent"), squashfs.display().to_string());
    assert!(prepare(&parent, &squashfs, &[]).status.success());
    for (phase, how) in [("failed", "its image was marked failed"), ("published", "its image is published")] {
        let journal = format!("tag {{\"job\":null,\"phase\":\"{phase}\",\"told\":false}}\n");
        let marks = [".ims-sshd.publication", "failed", "exiting"].map(|name| parent.join(name));
        for mark in &marks {
            std::fs::write(mark, &journal).unwrap();
        }
        let refused = prepare(&parent, &squashfs, &[]);
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(said.contains(how) && said.contains("--fresh drops its image root"), "{said}");
        assert!(marks.iter().all(|mark| mark.exists()));
        // A pod that starts over has a sidecar that ends at once.
        let in_pod = prepare(&parent, &squashfs, &[("IMS_ACTION", "customize".into())]);
        let said = text(&in_pod.stderr);
        assert!(in_pod.status.success() && said.contains(how) && said.contains("--fresh begins anew"), "{said}");
        let mut fresh = ims_sshd(&["prepare", "--fresh", &parent.display().to_string(), &squashfs], &[]);
        let fresh = fresh.output().unwrap();
        assert!(fresh.status.success(), "{fresh:?}");
        assert!(prepare(&parent, &squashfs, &[]).status.success());
    }
}

#[test]
fn overlay_in_use_is_not_mounted_twice() {
    let (dir, _, squashfs) = packed_image();
    let parent = dir.path().join("parent");
    // In use by a visible mount, and by one that was unmounted lazily with a file open.
    let elsewhere = "mkfifo $1/begun; unshare -m sh -c 'echo > $0/begun; exec sleep 60' $1 & read line < $1/begun; rm $1/begun; \
                     umount $1/image-root";
    let open = "exec 3< $1/image-root/etc/passwd; umount -l $1/image-root";
    for (holding, holder) in [(elsewhere, "by process "), (open, "by another mount, or by a file that is open in one")]
    {
        let script = format!(
            "set -e; $0 prepare --open overlay $1 $2; {holding}; umount $1/overlay/lower; \
             ! $0 prepare --open overlay $1 $2; echo refused"
        );
        let mut shell = Command::new("unshare");
        shell.args(["-m", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", &script, &*IMS_SSHD]);
        let output = shell.args([&parent, &squashfs]).output().unwrap();
        assert!(output.status.success(), "{holder}: {output:?}");
        let said = text(&output.stderr);
        assert!(said.contains("are in use") && said.contains(holder), "{holder}: {said}");
        let mut again = Command::new("unshare");
        let again = again.args(["-m", &*IMS_SSHD, "prepare", "--open", "overlay"]).args([&parent, &squashfs]);
        succeed(again);
    }
}

#[test]
fn terminated_prepare_leaves_nothing() {
    let dir = directory();
    let server = FileServer::start(vec![0; 1 << 20], &[Fault::Silence]);
    let parent = dir.path().join("parent");
    let mut child = ims_sshd(&["prepare", &parent.display().to_string(), &server.url], &[]).spawn().unwrap();
    wait_until("the request", || !server.requests.lock().unwrap().is_empty());
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let began = Instant::now();
    assert!(!child.wait().unwrap().success());
    assert!(began.elapsed().as_secs() < 10);
    is_empty(&parent);
}

#[test]
fn host_names_are_resolved_by_the_static_program() {
    let (dir, tree) = bootable_image();
    let squashfs = std::fs::read(squashfs_of(&tree)).unwrap();
    with_names(dir.path(), "images.example.test", "in-file.example.test", || {
        for (number, name) in ["images.example.test", "in-file.example.test"].iter().enumerate() {
            let server = FileServer::start(squashfs.clone(), &[]);
            let parent = dir.path().join(format!("parent-{number}"));
            let output = prepare(&parent, &server.url.replace("127.0.0.1", name), &[]);
            assert!(output.status.success(), "{name}: {output:?}");
            same_tree(&tree, &parent.join("image-root"));
        }
        let url = "http://unknown.example.test/rootfs";
        let output = prepare(&dir.path().join("unknown"), url, &[("IMS_RETRY_LIMIT", "1".into())]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("Name or service not known"), "{}", text(&output.stderr));
    });
}

#[test]
fn default_access_list_of_the_volume_does_not_come_into_the_image() {
    let (dir, tree, squashfs) = packed_image();
    let [tar, cpio] = ["image.tar", "image.cpio"].map(|name| dir.path().join(name));
    succeed(Command::new("tar").args(["-c", "-f"]).arg(&tar).arg("-C").arg(&tree).arg("."));
    let pack = "cd \"$0\" && find . | cpio -o -H newc --quiet > \"$1\"";
    succeed(Command::new("sh").args(["-c", pack]).arg(&tree).arg(&cpio));
    for (number, source) in [&tree, &squashfs, &tar, &cpio].into_iter().enumerate() {
        for open in ["unpack", "overlay"] {
            if open == "overlay" && number > 1 {
                continue;
            }
            let parent = dir.path().join(format!("parent-{number}-{open}"));
            std::fs::create_dir(&parent).unwrap();
            succeed(Command::new("setfacl").args(["-d", "-m", "u:1234:rwx"]).arg(&parent));
            let root = parent.join("image-root");
            let mut command = ims_sshd(&["prepare", "--open", open], &[]);
            succeed(command.args([&parent, source]));
            std::fs::write(root.join("etc/new"), "").unwrap();
            let said = succeed(Command::new("getfacl").args(["-R", "-p", "-s"]).arg(&root));
            assert_eq!(said, "", "{} {open}", source.display());
            if open == "overlay" {
                succeed(Command::new("umount").arg("-R").arg(&root));
            }
            let _ = Command::new("sh").args(["-c", "umount \"$0\"/overlay/* 2>/dev/null"]).arg(&parent).status();
        }
    }
}

#[test]
fn directory_with_a_mount_below_it_is_refused_before_any_work() {
    let (dir, tree) = bootable_image();
    std::fs::create_dir_all(tree.join("run/secrets")).unwrap();
    let script = "mount -t tmpfs tmpfs $2/run/secrets && echo secret > $2/run/secrets/key && exec $0 prepare --open $3 \
        $1 $2";
    for open in ["unpack", "overlay"] {
        let parent = dir.path().join("parent");
        let mut run = Command::new("unshare");
        run.args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&parent, &tree]).arg(open);
        let output = run.output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let why = format!("something is mounted on {}", tree.join("run/secrets").display());
        assert!(said.contains(&why) && said.contains("unmount it"), "{said}");
        assert!(!parent.exists());
    }
}

#[test]
fn mount_made_while_a_directory_is_copied_is_not_copied() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, tree) = bootable_image();
    std::fs::create_dir(tree.join("late")).unwrap();
    std::fs::write(tree.join("late/own"), "").unwrap();
    let programs = dir.path().join("programs");
    std::fs::create_dir(&programs).unwrap();
    // Stops before the real cp begins.
    let cp = "#!/bin/sh\nkill -STOP $$\nexec /bin/cp \"$@\"\n";
    std::fs::write(programs.join("cp"), cp).unwrap();
    std::fs::set_permissions(programs.join("cp"), PermissionsExt::from_mode(0o755)).unwrap();
    let script = "PATH=$3:$PATH $0 prepare $1 $2 & run=$!
        until cp=$(pgrep -P $run -x cp) && grep -q '^State:.T' /proc/$cp/status; do sleep 0.02; done
        mount -t tmpfs tmpfs $2/late && touch $2/late/secret; kill -CONT $cp; wait $run";
    // Without CAP_SYS_ADMIN, nothing can be shown alone.
    let without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"];
    for program in [&[][..], &without] {
        let parent = dir.path().join("parent");
        let _ = std::fs::remove_dir_all(&parent);
        let script = script.replace("$0", &[program, &["$0"]].concat().join(" "));
        let mut run = Command::new("unshare");
        run.args(["-m", "sh", "-c", &script, &*IMS_SSHD]).args([&parent, &tree, &programs]);
        let output = run.output().unwrap();
        let said = text(&output.stderr);
        if program.is_empty() {
            assert!(output.status.success(), "{said}");
            same_tree(&tree, &parent.join("image-root"));
        } else {
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains("something is mounted on"), "{said}");
            is_empty(&parent);
        }
    }
}

/// One at a time on an image root parent: the second would remove what the first unpacks.
#[test]
fn second_prepare_of_a_parent_is_refused_and_the_first_completes() {
    let (dir, tree, squashfs) = packed_image();
    let parent = dir.path().join("parent");
    let server = FileServer::start(std::fs::read(&squashfs).unwrap(), &[Fault::Silence]);
    // Its server is silent for that long.
    let mut command = ims_sshd(&["prepare"], &[("IMS_STALL_LIMIT", "6".into())]);
    let mut first = Ended::new(command.arg(&parent).arg(&server.url).spawn().unwrap());
    wait_until("the first to fetch", || !server.requests.lock().unwrap().is_empty());
    let why = |step: &str| {
        let parent = parent.display();
        format!("cannot claim {parent} for this {step}: 'ims-sshd prepare' has it, as process {}; wait", first.id())
    };
    let ims = ImsServer::start();
    let before = walk(&parent);
    for options in [&[][..], &["--fresh"]] {
        let mut second = ims_sshd(&["prepare"], &ims.variables());
        let second = second.args(options).args([&parent, &squashfs]).output().unwrap();
        assert_eq!(second.status.code(), Some(1), "{second:?}");
        assert!(text(&second.stderr).contains(&why("prepare")), "{second:?}");
    }
    assert_eq!((walk(&parent), ims.statuses()), (before, vec![]), "nothing is touched, and the job goes on");
    assert!(first.wait().unwrap().success());
    same_tree(&tree, &parent.join("image-root"));
    assert!(!parent.join(".ims-sshd.sidecar").exists());
}

/// A container that is killed is started again, and its lock ends with it.
#[test]
fn killed_prepare_does_not_keep_the_next_one_away() {
    let (dir, tree, squashfs) = packed_image();
    let parent = dir.path().join("parent");
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let source = format!("http://{}/image.sqsh", silent.local_addr().unwrap());
    let mut first = Ended::new(ims_sshd(&["prepare"], &[]).arg(&parent).arg(source).spawn().unwrap());
    let _request = silent.accept().unwrap();
    first.kill().unwrap();
    first.wait().unwrap();
    let next = prepare(&parent, squashfs.to_str().unwrap(), &[]);
    assert!(next.status.success(), "{next:?}");
    same_tree(&tree, &parent.join("image-root"));
}

/// An image root that is being replaced is neither packed nor published nor changed, and one that is changed is not
/// replaced.
#[test]
fn image_root_that_is_being_replaced_is_used_by_nobody_else() {
    let (dir, _, squashfs) = packed_image();
    let parent = dir.path().join("parent");
    let image_root = parent.join("image-root");
    let output = prepare(&parent, squashfs.to_str().unwrap(), &[]);
    assert!(output.status.success(), "{output:?}");
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let source = format!("http://{}/image.sqsh", silent.local_addr().unwrap());
    let mut command = ims_sshd(&["prepare", "--fresh"], &[("IMS_STALL_LIMIT", "60".into())]);
    let first = Ended::new(command.arg(&parent).arg(&source).spawn().unwrap());
    let _request = silent.accept().unwrap();
    let held = format!("'ims-sshd prepare' has it, as process {}", first.id());
    let refused = |arguments: &[&str], place: &Path| {
        let mut command = ims_sshd(arguments, &[]);
        command.arg(place).args(["true"].iter().filter(|_| arguments[0] == "enter"));
        let output = command.current_dir(dir.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert!(text(&output.stderr).contains(&held), "{arguments:?}: {output:?}");
    };
    for place in [&parent, &image_root] {
        refused(&["package", "--kernel", "auto", "--archive", "a.sqsh"], place);
    }
    refused(&["upload", "--kernel", "auto", "--store", "store"], &parent);
    refused(&["enter"], &image_root);
    refused(&["enter", "--discard"], &image_root);
    drop(first);

    let script = "echo open; read wait";
    let mut command = ims_sshd(&["enter"], &[]);
    command.arg(&image_root).args(["sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut open = Ended::new(command.spawn().unwrap());
    let mut said = BufReader::new(open.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "open");
    let mut fresh = ims_sshd(&["prepare", "--fresh"], &[]);
    let fresh = fresh.args([&parent, &squashfs]).output().unwrap();
    assert_eq!(fresh.status.code(), Some(1), "{fresh:?}");
    assert!(text(&fresh.stderr).contains("another build environment is open on it"), "{fresh:?}");
    assert!(image_root.join("etc").exists());
    drop(open.stdin.take());
}

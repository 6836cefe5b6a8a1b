//! The image root parent is a volume that the other containers of the pod write to. Nothing there makes the sidecar
//! pack, publish, delete or request anything that is not its own job's.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use ims_sshd::sys::process::output_within;
use serde_json::{Value, json};
use testbed::file_server::FileServer;
use testbed::ims_server::{Fault, JOB};
use testbed::job::*;
use testbed::s3_server::{Closed, Gate};
use testbed::*;

/// Directory with an image root that belongs to the sidecar and not to the job.
fn secrets(job: &Job) -> PathBuf {
    let secrets = job.volume.dir.path().join("secrets");
    std::fs::create_dir(&secrets).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(&job.volume.image_root).arg(secrets.join("image-root")));
    std::fs::write(secrets.join("image-root/client-secret"), "secret").unwrap();
    secrets
}

fn create(job: &Job, further: &[(&'static str, &str)]) -> Output {
    let further: Vec<_> = [("IMS_ACTION", "create")].into_iter().chain(further.iter().copied()).collect();
    job.sidecar(Mode::Plain, &further).output().unwrap()
}

#[test]
fn linked_build_directory_or_image_root_is_refused() {
    for linked in ["build", "build/image-root"] {
        let job = Job::laid_out("build/image-root");
        let secrets = secrets(&job);
        let target = if linked == "build" { secrets.clone() } else { secrets.join("image-root") };
        // The link refers to one directory below the volume's root and to another below the sidecar's.
        let inside = job.volume.parent.join(target.strip_prefix("/").unwrap());
        std::fs::create_dir_all(inside.parent().unwrap()).unwrap();
        std::fs::rename(job.volume.parent.join(linked), &inside).unwrap();
        symlink(&target, job.volume.parent.join(linked)).unwrap();
        let output = create(&job, &[]);
        assert_eq!(output.status.code(), Some(1), "{linked}: {output:?}");
        assert!(text(&output.stderr).contains("symbolic link"), "{linked}: {output:?}");
        assert_eq!(job.ims.status(), "error");
        job.nothing_is_left();
    }
}

/// Output of a create job in which `before` and `after` run around mksquashfs: a session could do that at this
/// moment, but the confined mksquashfs cannot. Our own packer can only be stopped, see `tests/publish/packer.rs`.
fn create_meanwhile(job: &Job, before: &str, after: &str) -> Output {
    let dir = job.volume.dir.path().join("programs");
    std::fs::create_dir(&dir).unwrap();
    let shown = dir.display();
    let program = dir.join("mksquashfs");
    let wait = |name: &str| format!("until [ -e {shown}/{name} ]; do sleep 0.05; done");
    let script = format!("#!/bin/sh\nset -e\n{}\n/usr/bin/mksquashfs \"$@\"\nexec sh {shown}/packed\n", wait("before"));
    std::fs::write(&program, script).unwrap();
    std::fs::write(dir.join("packed"), wait("after")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{shown}:/usr/sbin:/usr/bin:/sbin:/bin");
    std::thread::scope(|scope| {
        let output = scope.spawn(|| create(job, &[("PATH", &path), ("IMAGE_PACKER", "mksquashfs")]));
        for (program, script, done) in [("mksquashfs", before, "before"), ("packed", after, "after")] {
            wait_until(program, || !processes_with(&format!("{shown}/{program}")).is_empty());
            succeed(Command::new("sh").args(["-e", "-c", script]));
            std::fs::write(dir.join(done), "").unwrap();
        }
        output.join().unwrap()
    })
}

fn published_is_the_jobs_own(job: &Job, output: &Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", text(&output.stderr));
    job.is_published(output);
    let published = job.unpacked();
    assert!(published.join("boot/vmlinuz").exists(), "{what}");
    assert!(!published.join("client-secret").exists(), "{what}: the sidecar's own files are published");
}

#[test]
fn renaming_the_image_root_while_it_is_packed_changes_nothing() {
    for renamed in ["build", "build/image-root"] {
        let job = Job::laid_out("build/image-root");
        let secrets = secrets(&job);
        let target = if renamed == "build" { secrets.clone() } else { secrets.join("image-root") };
        let (place, target) = (job.volume.parent.join(renamed), target.display());
        let place = place.display();
        let output = create_meanwhile(&job, &format!("mv {place} {place}.away\nln -s {target} {place}"), "");
        published_is_the_jobs_own(&job, &output, renamed);
    }
}

#[test]
fn links_in_place_of_the_archive_are_neither_written_through_nor_published() {
    let replace = |name: &str, to: &Path| format!("rm -f {name}\nln -s {} {name}\n", to.display());
    for (what, before, after) in [("part, before", true, false), ("part, after", false, true)] {
        let job = Job::laid_out("build/image-root");
        let secret = job.volume.dir.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        let part = job.volume.parent.join("compute-ö.sqsh.part").display().to_string();
        let plant = replace(&part, &secret);
        // Left by an earlier session: both names point elsewhere.
        for name in ["compute-ö.sqsh", "compute-ö.sqsh.part"] {
            symlink(&secret, job.volume.parent.join(name)).unwrap();
        }
        let [before, after] = [before, after].map(|now| if now { plant.as_str() } else { "" });
        let output = create_meanwhile(&job, before, after);
        assert_eq!(std::fs::read(&secret).unwrap(), b"secret", "{what}");
        published_is_the_jobs_own(&job, &output, what);
    }
}

#[test]
fn damaged_inventory_of_any_kind_costs_the_report_and_not_the_image() {
    let makes = [
        ("it is a fifo", "mkfifo $0"),
        ("cannot read the inventory of the image as it was", "ln -s /etc/passwd $0"),
        ("larger than", "truncate -s 100G $0"),
        ("it is damaged", "echo root:x:0:0 > $0"),
    ];
    for (kind, make) in makes {
        let job = Job::laid_out("build/image-root");
        let inventory = job.volume.parent.join(".ims-sshd.inventory");
        succeed(Command::new("sh").args(["-c", make]).arg(inventory));
        let changes = job.volume.dir.path().join("changes.json");
        let mut sidecar = job.sidecar(Mode::Plain, &[("IMS_ACTION", "create")]);
        let output = sidecar.arg("--changes").arg(&changes).output().unwrap();
        assert!(text(&output.stderr).contains(kind), "{kind}: {}", text(&output.stderr));
        published_is_the_jobs_own(&job, &output, kind);
        assert!(!changes.exists(), "{kind}");
    }
}

/// Files of the journal.
const JOURNAL: [&str; 2] = [".ims-sshd.publication", ".ims-sshd.upload"];

/// A job whose sidecar was killed during an upload, with images of others in the same bucket and IMS.
struct Killed {
    job: Job,
    /// Image of the job.
    own: String,
    /// A published image of somebody else, and an unpublished one of somebody else with the same name as the job's.
    others: [String; 2],
    /// An unfinished upload of somebody else.
    upload: String,
    journal: [String; 2],
}

impl Killed {
    fn new() -> Self {
        let job = Job::laid_out("build/image-root");
        let random = feed(Command::new("head").args(["-c", "20M", "/dev/urandom"]), b"").stdout;
        std::fs::write(job.volume.image_root.join("random"), random).unwrap();
        let own = kill_amid_an_upload(&job);
        let link = json!({"path": "s3://b/k", "etag": "e", "type": "s3"});
        let others = [("victim", link), ("compute-ö", Value::Null)].map(|(name, link)| {
            let record = job.ims.state().register(name, "x86_64", &link);
            record["id"].as_str().unwrap().to_owned()
        });
        for id in &others {
            job.bucket.put(&format!("{id}/rootfs"), b"of others");
            job.bucket.put(&format!("{id}/kernel"), b"of others");
        }
        let begun = text(job.bucket.ask("POST", &format!("{}/rootfs?uploads", others[0]), b"").body);
        let upload = begun.split_once("<UploadId>").unwrap().1.split('<').next().unwrap().to_owned();
        let journal = JOURNAL.map(|name| std::fs::read_to_string(job.volume.parent.join(name)).unwrap());
        Self { job, own, others, upload, journal }
    }

    /// Ends the job with this journal, and returns the requests to IMS and to the store.
    fn give_up(&self, journal: &[String; 2]) -> Vec<String> {
        for (name, text) in JOURNAL.iter().zip(journal) {
            std::fs::write(self.job.volume.parent.join(name), text).unwrap();
        }
        self.job.volume.touch("pod_error");
        self.job.ims.state().job["status"] = "packaging_artifacts".into();
        self.job.ims.state().requests.clear();
        let gate = Gate::start(usize::MAX, Closed::Silent);
        let output = create(&self.job, &[("S3_ENDPOINT", &gate.endpoint)]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(self.job.ims.status(), "error");
        gate.requests().into_iter().chain(std::mem::take(&mut self.job.ims.state().requests)).collect()
    }

    /// Checks that only this job's own was requested, and that records and objects of others still exist.
    fn is_only_its_own(&self, requests: &[String], what: &str) {
        let (own, bucket) = (&self.own, &self.job.bucket.name);
        let ims = ["GET", "DELETE"].map(|method| format!("{method} /apis/ims/images/{own}"));
        let job = ["GET", "PATCH"].map(|method| format!("{method} /apis/ims/jobs/{JOB}"));
        let whole = ["POST /token", "GET /apis/ims/images"].map(str::to_owned).into_iter().chain(ims).chain(job);
        let whole: Vec<_> = whole.collect();
        for request in requests {
            let (_, path) = request.split_once(' ').unwrap();
            let of_image = path.starts_with(&format!("/{bucket}/{own}/"))
                || path.starts_with(&format!("/{bucket}/?uploads")) && path.ends_with(&format!("prefix={own}%2F"));
            // The keys are in the body; those of others are checked below.
            let deletes = *request == format!("POST /{bucket}?delete");
            assert!(whole.contains(request) || of_image || deletes, "{what}: {request}");
        }
        for id in &self.others {
            assert!(self.job.ims.state().images.contains_key(id), "{what}: the record {id} is gone");
            for key in ["rootfs", "kernel"] {
                assert_eq!(self.job.bucket.get(&format!("{id}/{key}")).body, b"of others", "{what}");
            }
        }
        let begun = text(self.job.bucket.ask("GET", "?uploads", b"").body);
        assert!(begun.contains(&self.upload), "{what}: others' upload is aborted");
    }
}

/// Runs a sidecar, and kills it when it sends the first part; returns its image.
fn kill_amid_an_upload(job: &Job) -> String {
    let before: Vec<_> = job.ims.state().images.keys().cloned().collect();
    let gate = Gate::start(0, Closed::Silent);
    let further = [("IMS_ACTION", "create"), ("S3_ENDPOINT", &gate.endpoint), ("IMS_STALL_LIMIT", "100")];
    let mut sidecar = job.sidecar(Mode::Plain, &further).spawn().unwrap();
    wait_until("a part to be sent", || gate.parts() > 0);
    sidecar.kill().unwrap();
    sidecar.wait().unwrap();
    let images = job.ims.state().images.clone();
    images.into_keys().find(|id| !before.contains(id)).unwrap()
}

/// Replaces fields of the first JSON object in a file of the journal.
fn with(journal: &str, fields: &[(&str, Value)]) -> String {
    let begin = journal.find('{').unwrap();
    let end = begin + journal[begin..].find('\n').unwrap_or(journal.len() - begin);
    let mut object: Value = serde_json::from_str(&journal[begin..end]).unwrap();
    for (name, value) in fields {
        object[name] = value.clone();
    }
    format!("{}{object}{}", &journal[..begin], &journal[end..])
}

#[test]
fn forged_journal_makes_the_sidecar_touch_nothing_of_others() {
    let killed = Killed::new();
    let [publication, upload] = &killed.journal;
    let [published, same_name] = &killed.others;
    let bucket = &killed.job.bucket.name;
    let elsewhere = killed.job.volume.dir.path().join("elsewhere");
    std::fs::create_dir_all(elsewhere.join(published)).unwrap();
    std::fs::write(elsewhere.join(published).join("rootfs#1"), "of others").unwrap();
    let ids = [published, same_name, "../../smd/hsm/v2/State/Components", "x/../..?a=b#c"];
    let mut forged: Vec<(String, [String; 2])> = Vec::new();
    for id in ids {
        for (field, value) in [("image", json!(id)), ("request", json!(id)), ("job", json!(id)), ("phase", json!(id))] {
            forged.push((format!("{field} {id}"), [with(publication, &[(field, value)]), upload.clone()]));
        }
        for field in ["url", "place", "id", "md5", "part"] {
            forged.push((format!("{field} {id}"), [publication.clone(), with(upload, &[(field, json!(id))])]));
        }
        let all = [
            ("url", json!(format!("s3://{bucket}/{id}/rootfs"))),
            ("place", json!(format!("{id}/rootfs"))),
            ("id", json!(killed.upload)),
        ];
        forged.push((format!("an upload to {id}"), [publication.clone(), with(upload, &all)]));
        let image = with(publication, &[("image", json!(id))]);
        forged.push((format!("both {id}"), [image, with(upload, &all)]));
    }
    for value in [Value::Null, json!([7])] {
        for field in ["image", "request", "job", "phase"] {
            forged.push((format!("{field} {value}"), [with(publication, &[(field, value.clone())]), upload.clone()]));
        }
    }
    let unheard = [("image", Value::Null), ("request", json!(killed.own))];
    forged.push(("an image unheard of".into(), [with(publication, &unheard), upload.clone()]));
    let here = [
        ("url", json!(format!("file://{}/{published}/rootfs", elsewhere.display()))),
        ("place", json!(format!("{published}/rootfs"))),
    ];
    forged.push(("a directory".into(), [publication.clone(), with(upload, &here)]));
    for text in ["", "{", "null", "\n\n", "{}\n{}\n"] {
        forged.push((format!("text {text:?}"), [text.into(), text.into()]));
    }
    for (what, journal) in &forged {
        killed.is_only_its_own(&killed.give_up(journal), what);
    }
    assert_eq!(std::fs::read(elsewhere.join(published).join("rootfs#1")).unwrap(), b"of others");
    println!("{} forged journals", forged.len());
}

#[test]
fn journal_rolls_back_only_what_this_job_created() {
    let killed = Killed::new();
    assert!(killed.job.ims.state().images.contains_key(&killed.own) && killed.job.bucket.unfinished_uploads() == 2);
    let requests = killed.give_up(&killed.journal);
    killed.is_only_its_own(&requests, "its own");
    assert!(!killed.job.ims.state().images.contains_key(&killed.own));
    assert_eq!((killed.job.bucket.unfinished_uploads(), killed.job.bucket.keys().len()), (1, 4));
    for name in JOURNAL {
        assert!(!killed.job.volume.parent.join(name).exists());
    }
}

#[test]
fn rollback_leaves_images_of_others() {
    let others: [&dyn Fn(&Killed); 2] =
        [&|killed| killed.job.ims.state().images.get_mut(&killed.own).unwrap()["name"] = "another".into(), &|killed| {
            killed.job.bucket.put_of_job(&format!("{}/kernel", killed.own), b"of others", &killed.others[0]);
        }];
    for (number, make) in others.iter().enumerate() {
        let killed = Killed::new();
        make(&killed);
        let before = (killed.job.bucket.keys(), killed.job.bucket.unfinished_uploads());
        let requests = killed.give_up(&killed.journal);
        assert!(!requests.iter().any(|request| request.contains("DELETE") || request.contains("?delete")), "{number}");
        assert!(killed.job.ims.state().images.contains_key(&killed.own), "{number}");
        assert_eq!((killed.job.bucket.keys(), killed.job.bucket.unfinished_uploads()), before, "{number}");
    }
}

#[test]
fn journal_copied_from_another_volume_rolls_back_nothing() {
    let killed = Killed::new();
    let mut other = Job::laid_out("build/image-root");
    std::fs::write(other.volume.image_root.join("random"), vec![7; 20 << 20]).unwrap();
    (other.bucket, other.ims) = (killed.job.bucket.share(), killed.job.ims.share());
    let image = kill_amid_an_upload(&other);
    let theirs = JOURNAL.map(|name| std::fs::read_to_string(other.volume.parent.join(name)).unwrap());
    let requests = killed.give_up(&theirs);
    killed.is_only_its_own(&requests, "of another volume");
    assert!(killed.job.ims.state().images.contains_key(&image));
}

#[test]
fn links_left_by_an_earlier_job_on_the_volume_are_not_followed() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let server = FileServer::start(std::fs::read(&squashfs).unwrap(), &[]);
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("file"), "of others").unwrap();
    let is_as_it_was = |what: &str| {
        assert_eq!(std::fs::read(elsewhere.join("file")).unwrap(), b"of others", "{what}");
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 1, "{what}");
    };
    for (number, (open, place, action)) in [
        ("overlay", "overlay", "customize"),
        ("overlay", "overlay/upper", "customize"),
        ("overlay", "overlay/work", "customize"),
        ("overlay", "overlay/lower", "customize"),
        ("overlay", "image-root", "customize"),
        ("unpack", "image-root", "customize"),
        ("unpack", "build", "create"),
    ]
    .into_iter()
    .enumerate()
    {
        let parent = dir.path().join(format!("parent-{number}"));
        let place = parent.join(place);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        symlink(&elsewhere, &place).unwrap();
        let mut command = Command::new("unshare");
        command.args(["-m", &*IMS_SSHD, "prepare", "--open", open]).arg(&parent).arg(&squashfs);
        let output = command.env("IMS_ACTION", action).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}: {output:?}", place.display());
        assert!(text(&output.stderr).contains("it is a symbolic link; remove it"), "{output:?}");
        is_as_it_was(open);
    }
    let parent = dir.path().join("parent");
    std::fs::create_dir(&parent).unwrap();
    for name in ["image.sqsh.part", "image.sqsh", ".ims-sshd.unpacking", ".ims-sshd.inventory"] {
        symlink(elsewhere.join(if name.contains("unpacking") { "" } else { "file" }), parent.join(name)).unwrap();
    }
    let prepare = || ims_sshd(&["prepare", parent.to_str().unwrap(), &server.url], &[]).output().unwrap();
    let output = prepare();
    assert!(text(&output.stderr).contains("image.sqsh exists, and was not fetched"), "{output:?}");
    is_as_it_was("a link in the place of the archive");
    std::fs::remove_file(parent.join("image.sqsh")).unwrap();
    let output = prepare();
    assert!(output.status.success(), "{output:?}");
    assert!(parent.join("image-root/etc/passwd").exists());
    is_as_it_was("files");
}

#[test]
fn special_files_on_the_volume_are_neither_followed_nor_waited_for() {
    let names = [
        "ready",
        "exiting",
        "build_failed",
        "pod_error",
        "transfer.sqsh",
        ".ims-sshd.publication",
        ".ims-sshd.upload",
        ".ims-sshd.inventory",
        ".ims-sshd.sidecar.resolv-conf",
        "compute-ö.sqsh",
        "compute-ö.sqsh.part",
    ];
    let mut published = 0;
    for make in ["ln -s $1 $0", "mkfifo $0", "mkdir $0", "mknod $0 c 1 5"] {
        for name in names {
            let job = Job::laid_out("build/image-root");
            let elsewhere = job.volume.dir.path().join("elsewhere");
            std::fs::write(&elsewhere, "of others").unwrap();
            succeed(Command::new("sh").args(["-c", make]).arg(job.volume.parent.join(name)).arg(&elsewhere));
            let mut sidecar = job.sidecar(Mode::Plain, &[("IMS_ACTION", "create"), ("IMS_START_LIMIT", "1")]);
            let output = output_within(sidecar.spawn().unwrap(), Duration::from_secs(90)).unwrap();
            let output = output.unwrap_or_else(|| panic!("{name}, {make}: the sidecar does not end"));
            assert_eq!(std::fs::read(&elsewhere).unwrap(), b"of others", "{name}, {make}");
            if output.status.success() {
                published_is_the_jobs_own(&job, &output, name);
                published += 1;
            } else {
                assert_eq!(job.ims.status(), "error", "{name}, {make}: {output:?}");
                job.nothing_is_left();
            }
        }
    }
    assert!(published > 15, "{published}");
}

fn within(sidecar: std::process::Child) -> Output {
    output_within(sidecar, Duration::from_mins(1)).unwrap().expect("the sidecar does not end")
}

/// IMS names a success, and the volume is new or has no journal.
#[test]
fn success_reported_by_ims_is_verified() {
    type Prepare = fn(&Job) -> Value;
    const IMAGE: &str = "00000000-0000-4000-8000-000000000001";
    fn published(job: &Job) -> Value {
        job.bucket.put(&format!("{IMAGE}/manifest.json"), b"{}");
        let etag = job.bucket.get(&format!("{IMAGE}/manifest.json")).header("etag").unwrap().replace('"', "");
        let path = format!("s3://{}/{IMAGE}/manifest.json", job.bucket.name);
        json!({"path": path, "etag": etag, "type": "s3"})
    }
    let cases: [(&str, Prepare, Option<&str>); 7] = [
        ("nothing", |_| Value::Null, Some("names no image")),
        ("an id that is none", |_| json!("../jobs"), Some("names no image")),
        ("an image without a record", |_| json!(JOB), Some("has no record")),
        (
            "an image without a link",
            |job| job.ims.state().register("x", "", &Value::Null)["id"].clone(),
            Some("no link"),
        ),
        (
            "a link to nothing",
            |job| {
                let path = format!("s3://{}/{IMAGE}/manifest.json", job.bucket.name);
                let link = json!({"path": path, "etag": "e", "type": "s3"});
                job.ims.state().register("x", "", &link)["id"].clone()
            },
            Some("manifest.json"),
        ),
        (
            "another link",
            |job| {
                let mut link = published(job);
                link["path"] = "s3://elsewhere/manifest.json".into();
                job.ims.state().register("x", "", &link)["id"].clone()
            },
            Some("s3://elsewhere/manifest.json"),
        ),
        (
            "a published image",
            |job| {
                let link = published(job);
                job.ims.state().register("x", "", &link)["id"].clone()
            },
            None,
        ),
    ];
    for (what, prepare, refused) in cases {
        let job = Job::new();
        let image = prepare(&job);
        let mut state = job.ims.state();
        (state.job["status"], state.job["resultant_image_id"]) = ("success".into(), image);
        drop(state);
        let objects = job.bucket.keys();
        let output = within(job.sidecar(Mode::Plain, &[]).spawn().unwrap());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(refused.map_or(0, |_| 1)), "{what}: {said}");
        assert!(said.contains(refused.unwrap_or("published before")), "{what}: {said}");
        assert_eq!(report(&output)["result"], if refused.is_some() { "failure" } else { "success" }, "{what}");
        // A waiting environment is closed; the job's status and objects stay.
        let verdict = if refused.is_some() { "failed" } else { "complete" };
        assert!(job.volume.signal(verdict).exists(), "{what}: {said}");
        assert!(!job.volume.signal("ready").exists(), "{what}");
        assert_eq!((job.ims.statuses(), job.bucket.keys()), (Vec::new(), objects), "{what}: {said}");
    }
    let job = Job::new();
    job.ims.fail("GET /jobs", Fault::Record(json!({"id": IMAGE, "status": "success", "resultant_image_id": IMAGE})));
    let output = within(job.sidecar(Mode::Plain, &[]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("the record of another"), "{output:?}");
    assert!(job.volume.signal("failed").exists());
}

#[test]
fn answers_of_ims_without_the_values_that_were_set_are_errors() {
    let image = "00000000-0000-4000-8000-000000000001";
    for (request, answer, is_asked_again) in [
        ("PATCH /jobs", json!({}), true),
        ("PATCH /jobs", Value::Null, true),
        ("PATCH /jobs", json!({"id": image, "status": "waiting_on_user"}), false),
        ("PATCH /jobs", json!({"id": JOB, "status": "creating"}), false),
        ("PATCH /images", json!({}), true),
        ("PATCH /images", json!({"id": image, "link": null}), false),
        ("PATCH /images", json!({"id": JOB, "link": null}), false),
    ] {
        let job = Job::laid_out("build/image-root");
        job.ims.fail(request, Fault::Record(answer.clone()));
        let output = create(&job, &[]);
        let said = text(&output.stderr);
        assert!(job.ims.is_well());
        assert_eq!(output.status.success(), is_asked_again, "{request} {answer}: {said}");
        assert_eq!(job.ims.status(), if is_asked_again { "success" } else { "error" }, "{request} {answer}: {said}");
        let why = if is_asked_again { "the answer of IMS is not the expected record" } else { "IMS answers" };
        assert!(said.contains(why), "{request} {answer}: {said}");
        if is_asked_again {
            job.is_published(&output);
        } else {
            job.nothing_is_left();
        }
    }
}

/// State of a sidecar that was killed after it had uploaded the manifest.
#[test]
fn complete_image_is_found_again_after_a_kill_without_ims() {
    let alone = [("IMS_URL", ""), ("OAUTH_CONFIG_DIR", ""), ("IMS_ACTION", "create")];
    let job = Job::laid_out("build/image-root");
    let journal = job.volume.parent.join(".ims-sshd.publication");
    let mut sidecar = job.sidecar(Mode::Plain, &alone).spawn().unwrap();
    let mut amid = String::new();
    while sidecar.try_wait().unwrap().is_none() {
        let now = std::fs::read_to_string(&journal).unwrap_or_default();
        if now.contains("\"image\":\"") && now.ends_with('\n') {
            amid = now;
        }
    }
    let first = sidecar.wait_with_output().unwrap();
    assert!(first.status.success() && amid.contains("\"phase\":\"packed\""), "{amid} {first:?}");
    let objects = |job: &Job| job.bucket.keys().into_iter().map(|k| (job.bucket.get(&k).body, k)).collect::<Vec<_>>();
    let published = objects(&job);

    std::fs::write(&journal, &amid).unwrap();
    let again = within(job.sidecar(Mode::Plain, &alone).spawn().unwrap());
    assert!(again.status.success() && text(&again.stderr).contains("was published before"), "{again:?}");
    assert_eq!(report(&again), report(&first));
    assert!(objects(&job) == published, "{:?}", job.bucket.keys());

    // Somebody restored an old journal, and the image is another one.
    std::fs::write(&journal, &amid).unwrap();
    std::fs::write(job.volume.image_root.join("etc/new"), "new").unwrap();
    let packed = squashfs_of(&job.volume.image_root);
    std::fs::rename(packed, job.volume.parent.join("compute-ö.sqsh")).unwrap();
    let other = within(job.sidecar(Mode::Plain, &alone).spawn().unwrap());
    assert!(other.status.success(), "{other:?}");
    let all = objects(&job);
    assert!(all.len() == 2 * published.len() && published.iter().all(|object| all.contains(object)), "{other:?}");
}

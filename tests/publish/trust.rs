//! The image root parent is a volume that the other containers of the pod write to. What stands there never makes the sidecar pack, publish,
//! delete or call anything but what is its own job's.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::job::*;
use crate::support::*;

/// A directory with an image root that is the sidecar's and not the job's.
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
        // The link means one directory below the volume's root and another below the sidecar's.
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

/// A mksquashfs that runs `script` beside the real one, whose arguments it has: what a session could do at that moment.
fn meanwhile(job: &Job, script: &str) -> String {
    let dir = job.volume.dir.path().join("programs");
    std::fs::create_dir(&dir).unwrap();
    let program = dir.join("mksquashfs");
    std::fs::write(&program, format!("#!/bin/sh\nset -e\n{script}\n")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", dir.display())
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
        let path = meanwhile(
            &job,
            &format!("mv {place} {place}.away\nln -s {target} {place}\nexec /usr/bin/mksquashfs \"$@\""),
        );
        published_is_the_jobs_own(&job, &create(&job, &[("PATH", &path)]), renamed);
    }
}

#[test]
fn links_in_place_of_the_archive_are_neither_written_through_nor_published() {
    let replace = |name: &str, to: &Path| format!("rm -f {name}\nln -s {} {name}\n", to.display());
    let run = "/usr/bin/mksquashfs \"$@\"\n";
    for (what, before, after) in [("part, before", true, false), ("part, after", false, true)] {
        let job = Job::laid_out("build/image-root");
        let secret = job.volume.dir.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        let part = job.volume.parent.join("compute-ö.sqsh.part").display().to_string();
        let plant = replace(&part, &secret);
        let script = [before.then_some(plant.as_str()), Some(run), after.then_some(plant.as_str())];
        let path = meanwhile(&job, &script.into_iter().flatten().collect::<String>());
        // From an earlier session: both names lead elsewhere.
        for name in ["compute-ö.sqsh", "compute-ö.sqsh.part"] {
            symlink(&secret, job.volume.parent.join(name)).unwrap();
        }
        let output = create(&job, &[("PATH", &path)]);
        assert_eq!(std::fs::read(&secret).unwrap(), b"secret", "{what}");
        published_is_the_jobs_own(&job, &output, what);
    }
}

#[test]
fn damaged_inventory_of_any_kind_costs_the_report_and_not_the_image() {
    let makes = [
        ("it is a fifo", "mkfifo $0"),
        ("cannot read what the image was before", "ln -s /etc/passwd $0"),
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

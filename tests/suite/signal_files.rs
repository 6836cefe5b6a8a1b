//! Signal files from an earlier run, of a wrong file type, or on a volume without events.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testbed::*;

#[test]
fn marks_made_after_ready_and_before_the_start_close_at_once() {
    for (marks, verdict) in
        [(&["complete"][..], "complete"), (&["failed"], "failed"), (&["complete", "failed"], "failed")]
    {
        for mode in MODES {
            let volume = Volume::new(Image::Busybox);
            volume.touch("ready");
            for mark in marks {
                volume.touch(mark);
            }
            let mut environment = volume.start(mode);
            assert_eq!(environment.end(), 0, "{}", environment.log_text());
            for name in ["complete", "failed"] {
                assert_eq!(environment.signal(name).exists(), name == verdict, "{marks:?}");
            }
            assert!(is_regular(&environment.signal("exiting")));
        }
    }
}

/// The upstream sidecar removes such marks before it creates `ready`; a person may forget to.
#[test]
fn marks_older_than_ready_belong_to_an_earlier_job_and_are_removed() {
    for mode in MODES {
        let volume = Volume::new(Image::Busybox);
        volume.touch("complete");
        volume.touch("failed");
        // Sleep longer than a tick of the clock that the kernel takes file times from.
        std::thread::sleep(Duration::from_millis(50));
        volume.touch("ready");
        let environment = volume.start(mode).ready();
        for name in ["complete", "failed"] {
            environment.wait_for_log(&format!("removed '{name}', which is older than 'ready'"));
            assert!(!environment.signal(name).exists());
        }
    }
}

#[test]
fn mark_of_an_earlier_pods_sidecar_does_not_close_a_new_environment() {
    let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    let here = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for (host, made, counts) in [
        ("another", hour_ago, false),
        ("another", hour_ago + Duration::from_secs(3500), true),
        (here.trim(), hour_ago, true),
    ] {
        let volume = Volume::new(Image::Busybox);
        let mark = volume.parent.join("failed");
        std::fs::write(&mark, format!("by the sidecar on {host}, instead of 'ready'\n")).unwrap();
        std::fs::File::open(&mark).unwrap().set_modified(made).unwrap();
        let mut environment = volume.start(Mode::Plain);
        if counts {
            assert_eq!(environment.end(), 0, "{}", environment.log_text());
            continue;
        }
        environment.wait_for_log("removed 'failed' of an earlier pod: the sidecar on another created it at ");
        drop(environment.ready());
    }
}

#[test]
fn environment_waiting_beside_signal_files_of_an_earlier_run_shows_waiting_and_can_be_marked_failed() {
    let volume = Volume::new(Image::Busybox);
    for name in ["complete", "exiting"] {
        volume.touch(name);
    }
    let mut environment = volume.start(Mode::Jailed);
    environment.wait_for_log("waiting for 'ready'");
    let said = environment.status(&[]);
    assert!(said.contains(": waiting") && !said.contains("marked"), "{said}");
    let mark = |verdict: &str| Command::new(&IMS_SSHD).arg(verdict).arg(&environment.parent).output().unwrap();
    let refused = text(&mark("complete").stderr).to_owned();
    assert!(refused.contains("it waits for 'ready'"), "{refused}");
    assert!(mark("fail").status.success());
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("failed").exists() && environment.signal("exiting").exists());
}

#[test]
fn missing_parent_is_an_error_that_names_it_after_30_seconds() {
    let volume = Volume::new(Image::Busybox);
    std::fs::rename(&volume.parent, volume.dir.path().join("elsewhere")).unwrap();
    let mut environment = volume.start(Mode::Jailed);
    environment.wait_for_log("does not exist: waiting up to 30 s");
    std::thread::sleep(Duration::from_secs(29));
    assert_eq!(environment.end(), 1);
    let place = environment.parent.display();
    environment.wait_for_log(&format!(
        "cannot open the image root parent {place}: it does not exist after 30 s; mount the volume"
    ));
}

/// Kinds of files that can have the name of a signal file without being one.
const ODD: [&str; 6] = ["a directory", "a full directory", "a link", "a dangling link", "a fifo", "a socket"];

fn make_odd(kind: &str, at: &Path, outside: &Path) {
    match kind {
        "a directory" => std::fs::create_dir(at).unwrap(),
        "a full directory" => {
            std::fs::create_dir(at).unwrap();
            std::fs::write(at.join("content"), "").unwrap();
        }
        "a link" => symlink(outside.join("target"), at).unwrap(),
        "a dangling link" => symlink(outside.join("nothing"), at).unwrap(),
        "a fifo" => nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRUSR).unwrap(),
        _ => drop(UnixListener::bind(at).unwrap()),
    }
}

#[test]
fn file_that_is_not_regular_with_a_signal_files_name_blocks_nothing_and_fails_the_image() {
    let one_after_another = |mode: Mode| {
        for (at, kind) in ODD.into_iter().enumerate() {
            for name in ["ready", "complete", "failed", "exiting"] {
                // Create it before the environment opens; for the marks, in half of the cases while it is open.
                let late = matches!(name, "complete" | "failed") && at % 2 == usize::from(mode == Mode::Plain);
                let volume = Volume::new(Image::Busybox);
                let outside = volume.dir.path().join("outside");
                std::fs::create_dir(&outside).unwrap();
                std::fs::write(outside.join("target"), "text").unwrap();
                let odd = volume.signal(name);
                let mut environment = if late {
                    let environment = volume.start(mode).ready();
                    make_odd(kind, &odd, &outside);
                    environment
                } else {
                    make_odd(kind, &odd, &outside);
                    if name != "ready" {
                        volume.touch("ready");
                    }
                    volume.start(mode)
                };
                let code = i32::from(matches!(name, "ready" | "exiting"));
                let word = format!("cannot use {} as a signal file: it is ", odd.display());
                environment.fails_visibly(code, &[&word]);
                assert_eq!(std::fs::read(outside.join("target")).unwrap(), b"text", "{kind} {name}");
                assert!(!outside.join("nothing").exists(), "{kind} {name}: a file was created through a link");
                assert_eq!(environment.image_root.join("tmp/failed").exists(), mode == Mode::Jailed);
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in MODES.map(|mode| scope.spawn(move || one_after_another(mode))) {
            thread.join().unwrap();
        }
    });
}

#[test]
fn file_that_is_not_regular_is_no_mark_in_the_jail_and_stays_unless_it_is_an_empty_directory() {
    let odd = [
        ("mkdir /tmp/complete /tmp/failed", 0, false),
        ("mkdir /tmp/failed", 0, false),
        // A non-empty directory cannot be removed, so no mark can be made: the image fails.
        ("mkdir -p /tmp/complete/full", 1, true),
        ("touch /tmp/other; ln -s other /tmp/complete; ln -s nothing /tmp/failed", 0, true),
    ];
    for (number, (make, code, stays)) in odd.into_iter().enumerate() {
        let volume = Volume::new(Image::Busybox);
        let made = |text: &str| {
            succeed(Command::new("sh").args(["-c", &text.replace("/tmp", "tmp")]).current_dir(&volume.image_root))
        };
        made("mkdir -p /tmp");
        if number == 0 {
            // The first case is one that came with the image.
            made(make);
        }
        let mut environment = volume.start(Mode::Jailed).ready();
        if number > 0 {
            environment.says(make);
        }
        // Wake the init, which looks for marks again.
        environment.says("touch /tmp/other2");
        assert!(environment.entrypoint.try_wait().unwrap().is_none());
        assert_eq!(environment.complete(), code, "{make}: {}", environment.log_text());
        assert_eq!(environment.signal("complete").exists(), code == 0, "{make}");
        assert_eq!(environment.signal("failed").exists(), code != 0, "{make}");
        let stayed = environment.image_root.join("tmp/complete").symlink_metadata().is_ok();
        assert_eq!(stayed, stays, "{make}: {}", environment.log_text());
    }
}

#[test]
fn tmp_that_cannot_be_opened_fails_the_image_with_one_error() {
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    environment.says("rm -rf /tmp; ln -s tmp /tmp");
    let code = environment.complete();
    let log = environment.log_text();
    assert!(environment.signal("failed").exists() && environment.signal("exiting").exists(), "{code}: {log}");
    let word = "look for /tmp/failed in the image: Too many levels of symbolic links";
    assert_eq!(log.matches(word).count(), 1, "{log}");
    assert!(!log.contains("marked failed while closing"), "{log}");
}

#[test]
fn earlier_renamed_file_does_not_prevent_exiting() {
    let volume = Volume::new(Image::Busybox);
    for name in ["complete", "complete.directory"] {
        std::fs::create_dir_all(volume.signal(name).join("content")).unwrap();
    }
    volume.touch("ready");
    volume.start(Mode::Plain).fails_visibly(0, &["as a signal file: it is a directory"]);
}

/// Mounts a FUSE file system in place of the volume, and returns the directory behind it. Files written into that
/// directory appear in the volume without an event.
fn mirrored(volume: &Volume) -> (Mounted, Ended, PathBuf) {
    let backing = volume.dir.path().join("backing");
    std::fs::rename(&volume.parent, &backing).unwrap();
    std::fs::create_dir(&volume.parent).unwrap();
    let mut command = Command::new("bindfs");
    command.args(["-f", "-o", "dev,suid"]).arg(&backing).arg(&volume.parent);
    let daemon = Ended::killed(command.stdin(Stdio::null()).spawn().unwrap());
    wait_until("bindfs", || volume.image_root.exists());
    (Mounted(volume.parent.clone()), daemon, backing)
}

#[test]
fn signal_files_are_polled_where_the_file_system_raises_no_event() {
    for (mode, mark) in [(Mode::Jailed, "complete"), (Mode::Plain, "complete"), (Mode::Plain, "failed")] {
        let volume = Volume::new(Image::Busybox);
        let (mounted, daemon, backing) = mirrored(&volume);
        let mut environment = volume.start_with(mode, &[("LOG_LEVEL", "debug")]);
        environment.wait_for_log("waiting for 'ready'");
        let seen = |what: &str, word: &str, environment: &Environment| {
            // Sleep, so that this does not fall on a poll that is just due.
            std::thread::sleep(Duration::from_millis(300));
            let began = Instant::now();
            std::fs::write(backing.join(what), "").unwrap();
            environment.wait_for_log(word);
            let took = began.elapsed();
            assert!(took < Duration::from_secs(3), "{mode:?}: '{what}' was seen after {took:?}");
            eprintln!("{mode:?}: '{what}' seen after {took:?} without an event");
        };
        seen("ready", "state=Preparing", &environment);
        environment.wait_for("sshd_listening");
        assert_eq!(environment.says("echo open"), "open");
        seen(mark, "marked in the image root parent", &environment);
        assert_eq!(environment.end(), 0, "{}", environment.log_text());
        assert!(backing.join(mark).exists() && backing.join("exiting").exists());
        drop(environment);
        drop((mounted, daemon));
    }
}

#[test]
fn signal_files_work_on_a_volume_without_rename_noreplace() {
    let volume = Volume::new(Image::Busybox);
    let (mounted, daemon, backing) = mirrored(&volume);
    std::fs::create_dir(backing.join("complete")).unwrap();
    symlink("nowhere", backing.join("failed")).unwrap();
    std::fs::write(backing.join("ready"), "").unwrap();
    let mut environment = volume.start(Mode::Jailed);
    environment.fails_visibly(0, &["as a signal file: it is a symbolic link"]);
    drop(environment);
    drop((mounted, daemon));
}

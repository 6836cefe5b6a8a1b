//! `ims-sshd customize` without a person at a terminal: a script or a command runs in the image, which is published by
//! the same command line.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::job::*;
use testbed::*;

use crate::customize::nothing_stays;

fn customize(dir: &Path, source: &str, end: &[&str]) -> Output {
    let mut command = ims_sshd(&["customize", source, "--output", "out", "--work", "work", "--json"], &[]);
    command.args(["--kernel", "vmlinuz", "--initrd", "initrd"]).args(end).current_dir(dir);
    command.output().unwrap()
}

/// Script on this machine, without an execute bit.
fn script(dir: &Path, name: &str, lines: &str) -> String {
    std::fs::write(dir.join(name), lines).unwrap();
    format!("./{name}")
}

#[test]
fn script_runs_inside_the_image_only() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let marker = dir.path().join("marker");
    let lines = format!("echo \"$0\" \"$SITE\" $(id -u); : > /etc/scripted; ! touch {}\n", marker.display());
    // The first line names an interpreter in the image, one with an argument, or none.
    for (name, first) in [("install.sh", "#!/bin/sh\n"), ("with-e", "#! /bin/sh -e\n"), ("no line", "")] {
        let file = script(dir.path(), name, &format!("{first}{lines}"));
        let output = customize(dir.path(), &squashfs, &["--script", &file, "--env", "SITE=a b"]);
        assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
        let shown = if name.contains(' ') { "script" } else { name };
        let said = text(&output.stdout);
        assert!(said.starts_with(&format!("/run/.ims-sshd/{shown} a b 0\n")), "{said}");
        assert!(!marker.exists() && !Path::new("/etc/scripted").exists(), "it ran on this machine");
        let files = published(dir.path());
        assert!(files.contains("etc/scripted") && !files.contains("ims-sshd"), "{files}");
        nothing_stays(dir.path());
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
}

#[test]
fn unusable_script_is_refused_by_the_name_of_the_option() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    std::fs::write(dir.path().join("empty"), "").unwrap();
    for (option, file, why) in [
        ("--script", "./missing", "No such file"),
        ("--script", ".", "Is a directory"),
        ("--script", "/dev/zero", "at most 64 MiB"),
        ("--script", "./empty", "it is empty"),
        ("--host-script", "./missing", "No such file"),
        ("--host-script", ".", "expected a regular file"),
    ] {
        let output = customize(dir.path(), &squashfs, &[option, file]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{option} {file}: {said}");
        assert!(said.contains(&format!("{option} is '{file}': ")) && said.contains(why), "{option} {file}: {said}");
        assert!(!dir.path().join("work").exists(), "refused before anything was made");
    }
    let nonesuch = script(dir.path(), "nonesuch", "#!/bin/nonesuch\n");
    let output = customize(dir.path(), &squashfs, &["--script", &nonesuch]);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    assert!(!dir.path().join("out").exists());
    let mut chrooted = ims_sshd(&["customize", &squashfs, "--output", "out", "--work", "work"], &[]);
    let output = chrooted.args(["--script", "./nonesuch"]).env("IMS_JAIL_TIER", "chroot").current_dir(dir.path());
    assert!(text(output.output().unwrap().stderr).contains("cannot run --script in the image: "));
}

#[test]
fn successful_command_publishes_and_a_failed_one_sets_the_exit_code() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let failed = customize(dir.path(), &squashfs, &["--", "sh", "-c", "touch /etc/first; exit 9"]);
    assert_eq!(failed.status.code(), Some(9), "{failed:?}");
    assert!(text(&failed.stderr).contains("to resume: "), "{failed:?}");
    assert!(!dir.path().join("out").exists());
    let killed = customize(dir.path(), &squashfs, &["sh", "-c", "kill -KILL $$"]);
    assert!(!killed.status.success() && !dir.path().join("out").exists(), "{killed:?}");
    // Options after the name of the command belong to the command.
    let output = customize(dir.path(), &squashfs, &["touch", "--yes", "/etc/second"]);
    assert!(!output.status.success(), "touch has no --yes: {output:?}");
    let output = customize(dir.path(), &squashfs, &["cp", "-p", "/etc/first", "/etc/second"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(report(&output)["result"], "success");
    let files = published(dir.path());
    assert!(files.contains("etc/first") && files.contains("etc/second"), "{files}");
    nothing_stays(dir.path());
}

#[test]
fn command_line_in_the_status_continues_from_any_directory() {
    let (dir, _, squashfs) = packed_image();
    let named = dir.path().join("going on with it.sqsh");
    std::fs::rename(&squashfs, &named).unwrap();
    // The first time it fails.
    let lines = "test -e /etc/first && exit 0\ntouch '/etc/first'; exit 9";
    let failed = customize(dir.path(), "going on with it.sqsh", &["--fresh", "sh", "-c", lines]);
    assert_eq!(failed.status.code(), Some(9), "{failed:?}");
    let said = text(&failed.stderr);
    let (_, pasted) = said.split_once("to resume: ").unwrap();
    assert!(pasted.starts_with(&*IMS_SSHD) && !pasted.contains("--fresh"), "{said}");

    let status = succeed(&mut ims_sshd(&["status", "going-on-with-it"], &[]));
    let (_, shown) = status.split_once("  resume: ").unwrap();
    let shown = shown.lines().next().unwrap();
    assert_eq!(shown, format!("cd {} && {}", dir.path().display(), pasted.lines().next().unwrap()), "{status}");
    let json = succeed(&mut ims_sshd(&["status", "--json", "going-on-with-it"], &[]));
    assert!(json.contains("\"command\":\"customize\""), "{json}");
    let pasted = Command::new("bash").args(["-c", shown]).current_dir("/").output().unwrap();
    assert_eq!(pasted.status.code(), Some(0), "{pasted:?}");
    assert!(published(dir.path()).contains("etc/first"));
    nothing_stays(dir.path());
}

#[test]
fn failed_command_overrides_complete() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let failed = customize(dir.path(), &squashfs, &["--", "sh", "-c", "touch /tmp/complete /etc/new; exit 5"]);
    assert_eq!(failed.status.code(), Some(5), "{failed:?}");
    assert!(text(&failed.stderr).contains("to resume: "), "{failed:?}");
    assert!(!dir.path().join("out").exists());
    let output = customize(dir.path(), &squashfs, &["--", "test", "!", "-e", "/tmp/complete"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(published(dir.path()).contains("etc/new"));
    nothing_stays(dir.path());
}

#[test]
fn signal_overrides_the_exit_code_of_the_command() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let lines = "trap 'echo end > /etc/new; exit 0' TERM INT HUP\necho begun\nwhile :; do sleep 0.1; done\n";
    let file = script(dir.path(), "patient", lines);
    let common = ["--output", "out", "--work", "work"];
    for (command, end, signal, code) in [
        ("customize", &["--", "sh", "-c", lines][..], Signal::SIGTERM, 143),
        ("customize", &["--script", &file], Signal::SIGINT, 130),
        ("customize", &["--script", &file], Signal::SIGHUP, 129),
        ("enter", &["--yes", "--", "sh", "-c", lines], Signal::SIGINT, 130),
    ] {
        let mut run = ims_sshd(&[command, &squashfs], &[]);
        run.args(common).args(["--kernel", "vmlinuz", "--initrd", "initrd"]).args(end).current_dir(dir.path());
        let mut run = Ended::new(run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
        let mut begun = [0; 6];
        std::io::Read::read_exact(run.stdout.as_mut().unwrap(), &mut begun).unwrap();
        kill(Pid::from_raw(run.id().cast_signed()), signal).unwrap();
        let status = run.wait().unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(run.stderr.as_mut().unwrap(), &mut said).unwrap();
        assert_eq!(status.code(), Some(code), "{command} {end:?} {signal}: {said}");
        assert!(said.contains(&format!("received {signal}: the image is not published")), "{said}");
        assert!(!dir.path().join("out").exists(), "{command} {signal}");
    }
    let output = customize(dir.path(), &squashfs, &["--", "sh", "-c", "read said < /etc/new; test $said = end"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    nothing_stays(dir.path());
}

/// `ims-sshd` on a terminal, with kept changes and a store in `dir`.
fn on_a_terminal(dir: &Path, arguments: &[&str]) -> Terminal {
    let mut run = Command::new("env");
    run.args(["--default-signal=INT,QUIT,TSTP", "-C"]).arg(dir).arg(&*IMS_SSHD);
    Terminal::with(run.args(arguments))
}

#[test]
fn typed_signal_ends_an_unattended_command_that_handles_it() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let common = ["--output", "out", "--work", "work", "--kernel", "vmlinuz", "--initrd", "initrd"];
    for (number, (command, further, key, code)) in
        [("customize", &[][..], 'c', 130), ("customize", &[], '\\', 131), ("enter", &["--yes"], 'c', 130)]
            .into_iter()
            .enumerate()
    {
        let seconds = (Pid::this().as_raw() * 10 + i32::try_from(number).unwrap()).to_string();
        let lines = format!("trap 'echo heard-$((1 + 1))' INT QUIT; sleep {seconds}; echo half > /etc/new; exit 0");
        let end = ["--", "sh", "-c", &lines];
        let mut terminal = on_a_terminal(dir.path(), &[&[command, &squashfs][..], &common, further, &end].concat());
        wait_in_front(&seconds);
        terminal.key(key);
        terminal.see("heard-2");
        let (status, screen) = terminal.end();
        assert_eq!(status, code, "{command} {key}: {screen}");
        assert!(screen.contains("the image is not published"), "{screen}");
        assert_eq!(screen.matches("heard-2").count(), 1, "the command hears it once: {screen}");
        assert!(!dir.path().join("out").exists(), "{command} {key}");
    }
    let output = customize(dir.path(), &squashfs, &["--", "sh", "-c", "read said < /etc/new; test $said = half"]);
    assert_eq!(output.status.code(), Some(0), "the changes are kept: {output:?}");
    nothing_stays(dir.path());
}

#[test]
fn typed_signal_is_the_commands_own_where_a_person_decides() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let seconds = (Pid::this().as_raw() * 10 + 9).to_string();
    let lines = format!("trap 'echo caught' INT; sleep {seconds}; touch /etc/new");
    let enter = ["enter", &squashfs, "--output", "out", "--work", "work", "--kernel", "vmlinuz"];
    let mut terminal = on_a_terminal(dir.path(), &[&enter[..], &["--", "sh", "-c", &lines]].concat());
    wait_in_front(&seconds);
    terminal.key('c');
    terminal.see("caught");
    terminal.see("Publish the changed image");
    terminal.line("y");
    let (status, screen) = terminal.end();
    assert_eq!(status, 0, "{screen}");
    assert!(published(dir.path()).contains("etc/new"));
    nothing_stays(dir.path());
}

#[test]
fn useless_options_and_invalid_values_are_refused_as_typed() {
    let dir = directory();
    let tree = image(dir.path()).display().to_string();
    let squashfs = squashfs_of(Path::new(&tree)).display().to_string();
    let output = ["--output", "out"];
    for (arguments, wanted) in [
        (&["customize", &squashfs][..], "--output is missing"),
        (&["customize", &squashfs], "ims-sshd customize"),
        (&["customize", "./missing"], "SOURCE is './missing': No such file"),
        (&["enter", &tree, "--exclude", "boot", "true"], "--output <STORE>"),
        (&["enter", &squashfs, "--changes", "changes.json", "true"], "--output <STORE>"),
        (&["customize", &squashfs, output[0], output[1], "--port", "22", "true"], "--port <PORT>"),
        (&["customize", &squashfs, output[0], output[1], "--script", "x", "--plain"], "--plain"),
        (&["customize", &squashfs, output[0], output[1], "--script", "x", "true"], "--script <FILE>"),
        (&["enter", &squashfs, output[0], output[1], "--compression", "lz4"], "'lz4' for '--compression"),
        (&["package", "--kernel", "../vmlinuz"], "'../vmlinuz' for '--kernel"),
        (&["package", "--name", "../x"], "'../x' for '--name"),
        (&["customize", &squashfs, output[0], output[1], "--name", "."], "'.' for '--name"),
        (&["upload", "--initrd", "a/b"], "'a/b' for '--initrd"),
        (&["upload", "--ims-url", "ims"], "'ims' for '--ims-url"),
        (&["prepare", "--sha256", "no", &squashfs], "'no' for '--sha256"),
        (&["package", "--exclude", "boot/../etc"], "without '..'"),
        (&["package", "--exclude", "/"], "below the image root"),
        (&["package", "--exclude", "... ."], "below the image root"),
        (&["enter", &tree, "--json", "true"], "--output <STORE>"),
        (&["enter", &tree, "--discard", "--in-place"], "--in-place"),
        (&["enter", &tree, "--script", "x", "true"], "--script <FILE>"),
        (&["package", "--name", "compute", "--archive", "x.sqsh"], "--archive <FILE>"),
        (&["package", "--kernel-parameters", "x"], "tip: --kernel-parameters is an option of 'ims-sshd customize'"),
        (&["customize", &tree, "--discard"], "tip: --discard is an option of 'ims-sshd enter'\n"),
        (&["enter", &tree, "--plain"], "tip: --plain is an option of 'ims-sshd customize'\n"),
        (&["enter", &tree, "--port=22"], "tip: --port is an option of 'ims-sshd customize'\n"),
        (&["enter", &tree, "--env", "PATH=/x", "true"], "PATH is set at login"),
        (&["enter", &tree, "--env", "a-b=c", "true"], "letters, digits"),
        (&["enter", &tree, "--env", "NOT_SET_HERE", "true"], "that is set"),
        (&["enter", &tree, "--env", "A=b\nc", "true"], "without control characters"),
    ] {
        let refused = ims_sshd(arguments, &[]).current_dir(dir.path()).output().unwrap();
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(wanted), "{arguments:?}: {said}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "nothing was made: {left:?}");
}

#[test]
fn early_checks_refuse_and_late_failures_keep_the_changes() {
    let (dir, tree) = bootable_image();
    for (name, versioned) in [("vmlinuz", "vmlinuz-6.1.0"), ("initrd", "initrd-6.1.0")] {
        std::fs::rename(tree.join("boot").join(name), tree.join("boot").join(versioned)).unwrap();
    }
    let squashfs = squashfs_of(&tree).display().to_string();
    std::fs::write(dir.path().join("text.txt"), "").unwrap();
    let run = |options: &[&str], command: &str| {
        let mut customize = ims_sshd(&["customize", &squashfs, "--work", "work"], &[]);
        customize.args(options).args(["sh", "-c", command]).current_dir(dir.path()).output().unwrap()
    };
    for (options, why) in [
        (&["--output", "text.txt"][..], "name a directory that can be written to"),
        (&["--output", "/proc/x"], "name a directory that can be written to"),
        (&["--output", "s3://images"], "the store's keys are not set"),
        (&["--output", "ftp://images"], "expected s3://BUCKET"),
        (&["--output", "out", "--kernel", "vmlinuz-9"], "/boot holds initrd-6.1.0, "),
        (&["--output", "out", "--initrd", "initrd-9"], "name files of /boot with --kernel and --initrd"),
        (&["--output", "out", "--changes", "no/where/changes.json"], "no/where"),
        (&["--output", "out", "--exclude", "../boot"], "without '..'"),
    ] {
        let refused = run(options, "touch /etc/begun; echo begun");
        let said = text(&refused.stderr);
        assert!(!refused.status.success() && said.contains(why), "{options:?}: {said}");
        assert_eq!(text(&refused.stdout), "", "{options:?}: the command ran");
        assert!(!said.contains("Generic") && !said.contains("IMAGE_ROOT"), "{said}");
    }
    // The command itself removes the initrd.
    let late = run(&["--output", "out", "--initrd", "initrd-6.1.0"], "mv /boot/initrd-6.1.0 /boot/mine");
    let said = text(&late.stderr);
    assert!(late.status.code() == Some(1) && said.contains("cannot find the initrd"), "{said}");
    assert!(said.contains("to publish the image, without "), "{said}");
    let corrected = run(&["--output", "out", "--initrd", "mine"], "test -e /boot/mine");
    assert!(corrected.status.success(), "{corrected:?}");
    assert!(published(dir.path()).contains("boot/mine"));
    nothing_stays(dir.path());
}

#[test]
fn changes_that_fill_the_disk_can_be_continued_or_dropped() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    std::fs::create_dir(dir.path().join("disk")).unwrap();
    // Fills the disk completely.
    let script = "mount -t tmpfs -o size=6m tmpfs disk; run() { $0 \"$@\" 2>&1; echo \"ended $?\"; }
        fill() { run enter $1 --work disk --output out --yes -- sh -c 'dd if=/dev/zero of=/full bs=4096; exit 3'; }
        fill $1; run customize $1 --work disk --output out --kernel vmlinuz --initrd initrd -- rm /full
        fill $1; run customize $1 --work disk --output out --kernel vmlinuz --initrd initrd --fresh -- test ! -e /full
        fill $1; run enter $1 --work disk --output out --discard -- test -e /full; ls disk/ims-sshd";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, &*IMS_SSHD, &squashfs])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let said = text(&output.stdout);
    let ended: Vec<_> = said.lines().filter(|line| line.starts_with("ended ")).collect();
    assert_eq!(ended, ["ended 3", "ended 0"].repeat(3), "{said}");
    assert!(said.trim_end().ends_with("ended 0"), "nothing is kept: {said}");
    assert_eq!(said.matches("the new image may not fit").count(), 1, "{said}");
}

#[test]
fn store_too_small_for_a_directory_causes_a_warning_and_then_an_error() {
    let (dir, tree) = bootable_image();
    // Random data, which does not compress.
    let random = std::fs::File::open("/dev/urandom").unwrap();
    std::io::copy(&mut std::io::Read::take(random, 4 << 20), &mut std::fs::File::create(tree.join("random")).unwrap())
        .unwrap();
    std::fs::create_dir(dir.path().join("small")).unwrap();
    let script = "mount -t tmpfs -o size=1m tmpfs small; $0 customize tree --work work --output small \
        --kernel vmlinuz --initrd initrd -- sh -c 'touch /boot/new; echo ran'; code=$?; find small; exit $code";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), "ran\nsmall\n"), "{said}");
    let (warned, refused) = (said.find("may not fit"), said.find("cannot store the new image in the store"));
    assert!(warned.is_some() && warned < refused, "{said}");
    assert!(said.contains("to publish the image, without "), "{said}");
}

#[test]
fn image_is_compressed_like_its_source_by_default() {
    let (dir, tree) = bootable_image();
    let compression = |published: &str| {
        let images = std::fs::read_dir(dir.path().join("out")).unwrap().map(|e| e.unwrap().path().join("rootfs"));
        let shown = succeed(Command::new("unsquashfs").arg("-s").args(images));
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
        assert!(shown.contains(published), "{published}: {shown}");
    };
    for (made, named, published) in [
        (&["-comp", "zstd"][..], None, "Compression zstd"),
        (&["-comp", "xz"], None, "Compression xz"),
        (&["-comp", "zstd"], Some("gzip"), "Compression gzip"),
        (&["-noI", "-noD", "-noF", "-noX"], None, "Data is uncompressed"),
        // A new image cannot be compressed like this.
        (&["-comp", "lzo"], None, "Compression gzip"),
    ] {
        let squashfs = dir.path().join("source.sqsh");
        succeed(Command::new("mksquashfs").args([&tree, &squashfs]).args(["-noappend", "-quiet"]).args(made));
        let options: Vec<_> = named.into_iter().flat_map(|named| ["--compression", named]).collect();
        let output = customize(dir.path(), squashfs.to_str().unwrap(), &[&options[..], &["true"]].concat());
        assert!(output.status.success(), "{output:?}");
        compression(published);
    }
}

#[test]
fn paths_on_the_command_line_may_be_relative() {
    let dir = directory();
    squashfs_of(&image(dir.path()));
    for step in [
        &["prepare", "work", "./tree.sqsh"][..],
        &["package", "--kernel", "vmlinuz", "--initrd", "initrd", "work"],
        &["upload", "--kernel", "vmlinuz", "--initrd", "initrd", "--store", "out", "work"],
    ] {
        succeed(ims_sshd(step, &[]).current_dir(dir.path()));
    }
    assert!(published(dir.path()).contains("bin/busybox"));
}

#[test]
fn help_shows_the_actual_defaults() {
    let help = |command| text(ims_sshd(&[command, "--help"], &[]).output().unwrap().stdout);
    for command in ["customize", "enter", "package", "upload"] {
        assert_eq!(help(command).matches("[default: auto]").count(), 2, "{command}");
    }
    let sidecar = help("sidecar");
    assert!(sidecar.contains("[default: vmlinuz]") && sidecar.contains("[default: initrd]"), "{sidecar}");
    let scripts = help("customize");
    assert!(scripts.contains("not in the image"), "{scripts}");
}

/// Paths in the only image in the store `out` of `dir`.
pub fn published(dir: &Path) -> String {
    let all = std::fs::read_dir(dir.join("out")).unwrap().map(|e| e.unwrap().path());
    let images: Vec<_> = all.filter(|image| image.is_dir()).collect();
    assert_eq!(images.len(), 1, "{images:?}");
    succeed(Command::new("unsquashfs").arg("-l").arg(images[0].join("rootfs")))
}

/// The line of a message is pasted, with other options too.
#[test]
fn command_that_has_succeeded_is_not_run_again_to_publish_its_changes() {
    let (dir, _, squashfs) = packed_image();
    let dir = dir.path();
    std::fs::create_dir(dir.join("shared")).unwrap();
    let squashfs = squashfs.display().to_string();
    let bind = format!("{}:/mnt", dir.join("shared").display());
    // It makes a file in place of the store.
    let lines = "echo line >> /etc/fstab; echo ran; touch /mnt/out";
    std::fs::write(dir.join("script"), lines).unwrap();
    let run = |options: &[&str], end: &[&str]| {
        let mut command = ims_sshd(&["customize", &squashfs, "--work", "work", "--kernel", "vmlinuz"], &[]);
        command.args(["--initrd", "initrd", "--bind", &bind]).args(options).args(end).current_dir(dir);
        command.output().unwrap()
    };
    let fstab = |store: &str| {
        let image = std::fs::read_dir(dir.join(store)).unwrap().next().unwrap().unwrap().path();
        let fstab = succeed(Command::new("unsquashfs").arg("-cat").arg(image.join("rootfs")).arg("etc/fstab"));
        std::fs::remove_dir_all(dir.join(store)).unwrap();
        fstab
    };
    let no_store = || std::fs::remove_file(dir.join("shared/out")).unwrap();
    let (command, script) = (&["--", "sh", "-c", lines][..], &["--script", "./script"][..]);
    for end in [command, script] {
        let failed = run(&["--output", "shared/out"], end);
        let said = text(&failed.stderr);
        assert!(failed.status.code() == Some(1) && text(&failed.stdout) == "ran\n", "{failed:?}");
        let what = if end == script { "script" } else { "command" };
        let told = format!("; to publish the image, without running the {what} again: ");
        let (_, pasted) = said.split_once(&told).unwrap_or_else(|| panic!("{said}"));
        no_store();
        let pasted = pasted.lines().next().unwrap();
        let pasted = Command::new("bash").args(["-c", pasted]).current_dir(dir).output().unwrap();
        assert!(pasted.status.success() && pasted.stdout.is_empty(), "{pasted:?}");
        assert_eq!(fstab("shared/out"), "line\n");
        nothing_stays(dir);
        // A corrected option is no other command.
        assert!(!run(&["--output", "shared/out"], end).status.success());
        let corrected = run(&["--output", "other"], end);
        assert!(corrected.status.success() && corrected.stdout.is_empty(), "{corrected:?}");
        assert_eq!(fstab("other"), "line\n");
        no_store();
        // Another command is run, and so is the same one with `--fresh`.
        assert!(!run(&["--output", "shared/out"], end).status.success());
        no_store();
        let further = run(&["--output", "other"], &["--", "sh", "-c", "echo further >> /etc/fstab"]);
        assert!(further.status.success(), "{further:?}");
        assert_eq!(fstab("other"), "line\nfurther\n");
        assert!(!run(&["--output", "shared/out"], end).status.success());
        no_store();
        let fresh = run(&["--output", "other", "--fresh"], end);
        assert!(fresh.status.success() && text(&fresh.stdout) == "ran\n", "{fresh:?}");
        assert_eq!(fstab("other"), "line\n");
        no_store();
    }
    // The script itself was changed, and then a command failed that had succeeded before.
    assert!(!run(&["--output", "shared/out"], script).status.success());
    no_store();
    std::fs::write(dir.join("script"), "echo changed >> /etc/fstab; exit 3").unwrap();
    assert_eq!(run(&["--output", "shared/out"], script).status.code(), Some(3));
    assert!(!run(&["--output", "shared/out"], command).status.success());
    assert_eq!(run(&["--output", "other"], &["--", "false"]).status.code(), Some(1));
    let again = run(&["--output", "other"], command);
    assert!(again.status.success() && text(&again.stdout) == "ran\n", "{again:?}");
    assert_eq!(fstab("other"), "line\nchanged\nline\nline\n");
    nothing_stays(dir);
}

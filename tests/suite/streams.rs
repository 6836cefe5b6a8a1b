//! Streams of `ims-sshd enter`: they work like the caller's, and no file of the caller enters the jail.

use std::fs::Metadata;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Output, Stdio};

use rustix::fs::{Mode, OFlags};
use testbed::*;

/// Runs a line in the caller's shell, in a directory with an image; `$enter` enters the image.
fn shell(volume: &Volume, tier: &str, line: &str) -> Output {
    // A directory that other users reach is warned of.
    std::fs::set_permissions(volume.dir.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let mut shell = Command::new("bash");
    shell.args(["-c", line]).current_dir(volume.dir.path()).env("IMS_JAIL_TIER", tier);
    shell.env("enter", format!("{IMS_SSHD} enter {} --", volume.image_root.display()));
    shell.stdin(Stdio::null()).output().unwrap()
}

/// Asserts that the line prints `said` and succeeds.
fn says(volume: &Volume, tier: &str, line: &str, said: &str) {
    let output = shell(volume, tier, line);
    assert!(output.status.success() && text(&output.stdout) == said, "{tier}: {line}: {output:?}");
}

/// Attributes that a process can change on a file that it has open.
fn state(found: &Metadata) -> (u32, u32, u32, i64, i64) {
    (found.mode(), found.uid(), found.gid(), found.ctime(), found.ctime_nsec())
}

/// Changes mode, owner, content and attributes of a file by all names of its descriptor.
const CHANGE: &str = "for fd in 0 1 2; do
    chmod 4777 /proc/self/fd/$fd; busybox chown 1:1 /proc/self/fd/$fd; echo changed 1<>/proc/self/fd/$fd; touch /dev/fd/$fd
done";

#[test]
fn files_as_streams_of_enter_cannot_be_changed_from_inside() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Busybox);
        let dir = volume.dir.path();
        for name in ["in", "out", "err"] {
            std::fs::write(dir.join(name), name).unwrap();
        }
        succeed(Command::new("mkfifo").arg(dir.join("fifo")));
        std::fs::write(volume.image_root.join("change"), CHANGE).unwrap();
        let look = |name: &str| std::fs::metadata(dir.join(name)).unwrap();
        let before = state(&look("in"));
        let output = shell(&volume, tier, "$enter sh /change < in >> out 2>> err");
        assert!(output.status.code().is_some(), "{output:?}");
        shell(&volume, tier, "$enter sh /change 0<> fifo 1<> fifo 2>> err; $enter sh /change < in 2>&1 | cat");
        assert_eq!(state(&look("in")), before, "{tier}");
        assert_eq!(std::fs::read_to_string(dir.join("in")).unwrap(), "in", "{tier}");
        let found = look("fifo");
        assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o644, 0, 0), "{tier}: a fifo");
        for name in ["out", "err"] {
            let found = look(name);
            assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o644, 0, 0), "{tier}: {name}");
            assert!(std::fs::read_to_string(dir.join(name)).unwrap().starts_with(name), "{tier}: {name}");
        }

        // The machine's own /dev/null. Setting even its current mode and owner would change its ctime.
        let null = || state(&std::fs::metadata("/dev/null").unwrap());
        let before = null();
        for line in ["< /dev/null > /dev/null", "0<> /dev/null", "0> /dev/null"] {
            let line = format!("$enter sh -c 'chmod 666 /proc/self/fd/0; busybox chown 0:0 /proc/self/fd/0' {line}");
            shell(&volume, tier, &line);
        }
        assert_eq!(null(), before, "{tier}");
        says(
            &volume,
            tier,
            "$enter sh -c 'cat; echo gone > /dev/stdout; echo here >&2' < /dev/null 2>&1 > /dev/null | grep -v INFO",
            "here\n",
        );
    }
}

/// Shared device nodes that isatty(3) takes for the caller's terminal.
#[test]
fn shared_terminal_devices_of_the_machine_cannot_be_changed_from_inside() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Busybox);
        let dir = volume.dir.path();
        // The test's own nodes are the same devices as the machine's.
        succeed(
            Command::new("sh").args(["-c", "mknod tty c 5 0; mknod ptmx c 5 2; chmod 644 tty ptmx"]).current_dir(dir),
        );
        let look = |name: &str| state(&std::fs::metadata(dir.join(name)).unwrap());
        let before = ["tty", "ptmx"].map(look);
        std::fs::write(
            volume.image_root.join("change"),
            "test -t 0 && echo terminal\nchmod 4777 /proc/self/fd/0; busybox chown 1:1 /dev/stdin",
        )
        .unwrap();
        let output = shell(&volume, tier, "script -qefc \"$enter sh /change < tty\" /dev/null");
        assert!(text(&output.stdout).contains("terminal"), "{tier}: {output:?}");
        shell(&volume, tier, "timeout 20 $enter sh /change <> ptmx");
        assert_eq!(["tty", "ptmx"].map(look), before, "{tier}");
    }
}

#[test]
fn enter_ends_on_sigterm_although_nobody_reads_its_output() {
    let volume = Volume::new(Image::Busybox);
    // Exit code 124 means that SIGTERM was enough.
    let line = "mkfifo full; exec 9<> full; timeout -k 20 2 $enter sh -c 'head -c 200000 /dev/zero' > full; echo $?";
    assert_eq!(text(&shell(&volume, "namespace", line).stdout), "124\n");
}

#[test]
fn o_path_descriptor_as_stream_is_refused() {
    let volume = Volume::new(Image::Busybox);
    let file = volume.dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for tier in NAMESPACE_TIERS {
        let named: OwnedFd = rustix::fs::open(&file, OFlags::PATH, Mode::empty()).unwrap();
        let mut enter = Command::new(&IMS_SSHD);
        enter.arg("enter").arg(&volume.image_root).args(["--", "true"]).env("IMS_JAIL_TIER", tier);
        let output = enter.stdin(named).output().unwrap();
        assert!(!output.status.success() && text(&output.stderr).contains("(O_PATH)"), "{tier}: {output:?}");
    }
}

/// Flags of a pipe are shared by all processes that inherited the descriptor.
#[test]
fn session_cannot_change_flags_of_the_callers_pipes() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Debian);
        let (from, to) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (input, held) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut enter = Command::new(&IMS_SSHD);
        enter.arg("enter").arg(&volume.image_root).args(["--", "python3", "-c"]).env("IMS_JAIL_TIER", tier);
        enter.arg("import os\nfor fd in range(3): os.set_blocking(fd, False)\nprint('set')");
        let [stdin, stdout, stderr] = [&input, &to, &to].map(|end| end.try_clone().unwrap());
        assert!(enter.stdin(stdin).stdout(stdout).stderr(stderr).status().unwrap().success());
        for end in [&input, &to] {
            assert!(!rustix::fs::fcntl_getfl(end).unwrap().contains(OFlags::NONBLOCK), "{tier}");
        }
        drop((held, to, enter));
        let said = std::io::read_to_string(std::fs::File::from(from)).unwrap();
        assert!(said.contains("set\n"), "{tier}: {said}");
    }
}

#[test]
fn files_work_as_streams_of_enter() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Busybox);
        let dir = volume.dir.path();
        let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
        let says = |line: &str, said: &str| says(&volume, tier, line, said);

        // Any content, more than a pipe holds, in both directions at once.
        succeed(
            Command::new("dd")
                .args(["if=/dev/urandom", "bs=1M", "count=20", "status=none"])
                .arg(format!("of={}", dir.join("in").display())),
        );
        says("$enter cat < in > out 2> err; echo $?", "0\n");
        assert!(read("in") == read("out"), "{tier}");
        says("$enter cat < in | cmp - in; $enter sh -c 'cat > /root/copy' < in > out; cat out", "");
        assert!(read("in") == std::fs::read(volume.image_root.join("root/copy")).unwrap());

        // The caller and other programs continue in the same file.
        says("(echo 1; $enter echo 2; echo 3) > log; $enter echo 4 >> log; cat log", "1\n2\n3\n4\n");
        let script = "i=0; while [ $i -lt 300 ]; do echo out $i; echo err $i >&2; i=$((i + 1)); done";
        let lines: String = (0..300).map(|i| format!("out {i}\nerr {i}\n")).collect();
        says(&format!("$enter sh -c '{script}' > log 2>&1; grep -v INFO log"), &lines);

        // Unread input is left to the next reader.
        says("seq 3 > list; while read i; do echo $i; $enter true; done < list", "1\n2\n3\n");
        says("seq 30000 > list; ($enter sh -c 'read a; read b; echo $b'; head -n 1) < list", "2\n3\n");

        // End of input, exit codes and signals, and readers that end first.
        says("$enter cat < /dev/null; : > empty; $enter cat < empty; $enter sh -c 'exit 7' < in > out; echo $?", "7\n");
        says("$enter sh -c 'kill -KILL $$' < in > out 2> err; echo $?", "137\n");
        says("$enter yes < in | head -n 1; $enter cat < in | head -c 0; echo ended", "y\nended\n");
        says("$enter sh -c 'sleep 6546 & exec echo done' < in > out 2> err; cat out", "done\n");
        says("$enter sh -c 'yes & sleep 0.2' < in > /dev/zero 2>&1; echo ended", "ended\n");
        assert!(processes_with("sleep 6546").is_empty());
        says("mkfifo fifo; (echo by fifo > fifo &) ; $enter cat < fifo", "by fifo\n");
        let one = "$enter sh -c 'read a; echo $a' <&8";
        says(&format!("mkfifo line; exec 8<> line; seq 3000 >&8; {one}; {one}; read a <&8; echo $a"), "1\n2\n3\n");
        says("mkfifo long; (seq 100000 > long &) ; $enter cat < long > got; seq 100000 | cmp - got", "");
        says("$enter head -c 3 < /dev/zero | od -An -c | tr -d ' '", "\\0\\0\\0\n");

        // Output that the caller's file cannot take is reported as an error.
        let output = shell(&volume, tier, "$enter echo lost > /dev/full");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains("cannot write standard output: No space left"), "{output:?}");
        // An error while entering goes to the caller's standard error.
        let output = shell(&volume, tier, "$enter no-such-program > out 2> err; echo $?; cat err");
        assert!(text(&output.stdout).starts_with("127\n"), "{output:?}");
        assert!(text(&output.stdout).contains("no-such-program"), "{output:?}");
    }
}

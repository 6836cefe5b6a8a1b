//! Descriptors of image files in processes outside the jail. A file that is open for writing at the close fails the
//! image.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Stdio};

use ims_sshd::sys::seqpacket::Packets;
use nix::sys::signal::{Signal, kill};
use rustix::fs::{AtFlags, Mode as FileMode, OFlags};
use rustix::io::Errno;
use testbed::*;

/// Listens outside on an abstract socket. Its name belongs to the network namespace, which sessions share with the
/// container.
struct Collector {
    name: String,
    listener: UnixListener,
}

impl Collector {
    fn listen(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        Self { listener: UnixListener::bind_addr(&address).unwrap(), name }
    }

    /// Makes a session send the descriptor that the Python expression `opened` returns, and receives it.
    fn receive(&self, environment: &Environment, opened: &str) -> OwnedFd {
        have_sent(environment, &self.name, opened);
        self.accept()
    }

    /// Receives a descriptor that was sent.
    fn accept(&self) -> OwnedFd {
        let (stream, _) = self.listener.accept().unwrap();
        let (_, mut descriptors) = Packets::from_fd(stream.into()).receive_with().unwrap().unwrap();
        descriptors.pop().unwrap()
    }
}

/// Makes a session send the descriptor that the Python expression `opened` returns to the abstract socket `name`.
fn have_sent(environment: &Environment, name: &str, opened: &str) {
    let output = feed(environment.ssh(&[]).arg("python3"), sending(name, opened).as_bytes());
    assert!(output.status.success(), "{output:?}");
}

/// Python program that sends the descriptor that the expression `opened` returns to the abstract socket `name`.
fn sending(name: &str, opened: &str) -> String {
    format!(
        "import os, socket\n\
             s = socket.socket(socket.AF_UNIX); s.connect('\\0{name}')\n\
             socket.send_fds(s, [b'x'], [{opened}])\n"
    )
}

#[test]
fn directory_changed_in_place_is_not_opened_while_a_process_outside_has_a_file_of_an_earlier_run_open() {
    let volume = Volume::new(Image::Debian);
    let root = volume.image_root.to_str().unwrap();
    let run =
        |arguments: &[&str]| Command::new(&IMS_SSHD).args(arguments).current_dir(volume.dir.path()).output().unwrap();
    let collector = Collector::listen("in-place");
    let opened = "os.open('/root/kept', os.O_RDWR | os.O_CREAT)";
    let sent = run(&["enter", root, "--in-place", "--", "python3", "-c", &sending(&collector.name, opened)]);
    let said = String::from_utf8_lossy(&sent.stderr);
    assert!(sent.status.code() == Some(1) && said.contains("is open for writing outside the jail"), "{said}");
    // Until now it was in the queue of the socket.
    let kept = collector.accept();
    let holder = format!("process {} (", std::process::id());
    for command in [
        &["enter", root, "--", "touch", "/root/ran"][..],
        &["enter", root, "--in-place", "--output", "out", "--yes", "--", "touch", "/root/ran"],
        &["customize", root, "--work", "work", "--", "touch", "/root/ran"],
        &["package", root, "--archive", "packed.sqsh"],
    ] {
        let refused = run(command);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains(&holder), "{command:?}: {said}");
        assert!(said.contains("which a session of an earlier run passed on; end that process"), "{command:?}: {said}");
    }
    assert!(!volume.image_root.join("root/ran").exists());
    drop(kept);
    let entered = run(&["enter", root, "--", "touch", "/root/ran"]);
    assert!(entered.status.success() && volume.image_root.join("root/ran").exists(), "{entered:?}");
}

#[test]
fn image_with_a_file_open_for_writing_outside_is_failed() {
    for tier in NAMESPACE_TIERS {
        let variables = [("IMS_JAIL_TIER", tier), ("IMS_CLOSE_GRACE", "1")];
        let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &variables).ready();
        let collector = Collector::listen(&format!("kept-{tier}"));
        let kept = collector.receive(&environment, "os.open('/root/kept', os.O_WRONLY | os.O_CREAT)");
        let code = environment.complete();
        rustix::io::write(&kept, b"late").unwrap();
        let holder = format!("process {} (", std::process::id());
        assert_eq!(code, 1, "{tier}: {}", environment.log_text());
        assert!(environment.signal("failed").exists() && environment.signal("exiting").exists(), "{tier}");
        assert!(!environment.signal("complete").exists(), "{tier}");
        let log = environment.log_text();
        for words in [&holder, "outside the jail has a file of the image root open for writing", "end that process"] {
            assert!(log.contains(words), "{tier}: {words}: {log}");
        }
    }
}

/// Python program that receives a file from an abstract socket, maps it and closes the descriptor.
const MAPS: &str = "import ctypes, os, socket, sys\n\
    s = socket.socket(socket.AF_UNIX); s.bind('\\0' + sys.argv[1]); s.listen(); print('listens', flush=True)\n\
    _, (file,), _, _ = socket.recv_fds(s.accept()[0], 1, 1)\n\
    mmap = ctypes.CDLL(None).mmap; mmap.restype = ctypes.c_void_p\n\
    assert mmap(None, ctypes.c_size_t(4096), 3, 1, file, ctypes.c_long(0)) != ctypes.c_void_p(-1).value\n\
    os.close(file); print('maps', flush=True); sys.stdin.read()\n";

#[test]
fn image_with_a_file_mapped_outside_or_in_a_socket_queue_is_failed_with_the_reason_in_the_log() {
    let open = "os.open('/root/kept', os.O_RDWR | os.O_CREAT)";
    let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &[("IMS_CLOSE_GRACE", "1")]).ready();
    let collector = Collector::listen("queued");
    have_sent(&environment, &collector.name, open);
    assert_eq!(environment.complete(), 1, "{}", environment.log_text());
    let log = environment.log_text();
    assert!(log.contains("a file of the image root is open for writing outside the jail"), "{log}");
    assert!(log.contains("the queue of a socket"), "{log}");

    let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &[("IMS_CLOSE_GRACE", "1")]).ready();
    let name = format!("mapped-{}", std::process::id());
    let mut python = Command::new("python3");
    python.args(["-c", MAPS, &name]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut maps = Ended::new(python.spawn().unwrap());
    let mut said = std::io::BufRead::lines(std::io::BufReader::new(maps.stdout.take().unwrap()));
    assert_eq!(said.next().unwrap().unwrap(), "listens");
    have_sent(&environment, &name, open);
    assert_eq!(said.next().unwrap().unwrap(), "maps");
    assert_eq!(environment.complete(), 1, "{}", environment.log_text());
    let log = environment.log_text();
    let holder = format!("process {} (", maps.id());
    assert!(log.contains(&holder) && log.contains("outside the jail has a file of the image root mapped"), "{log}");
}

#[test]
fn file_sent_outside_may_be_closed_during_the_grace_period_and_gives_no_write_access_afterwards() {
    for tier in NAMESPACE_TIERS {
        let variables = [("IMS_JAIL_TIER", tier), ("IMS_CLOSE_GRACE", "25")];
        let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &variables).ready();
        let collector = Collector::listen(&format!("closed-{tier}"));
        let file = collector.receive(&environment, "os.open('/root/file', os.O_RDWR | os.O_CREAT)");
        let directory = collector.receive(&environment, "os.open('/root', os.O_RDONLY)");
        let root = collector.receive(&environment, "os.open('/', os.O_PATH)");
        let read = collector.receive(&environment, "os.open('/root/file', os.O_RDONLY)");
        environment.touch("complete");
        environment.wait_for_log("waiting for it to close the file");
        rustix::io::write(&file, b"in time").unwrap();
        drop(file);
        assert_eq!(environment.end(), 0, "{tier}: {}", environment.log_text());
        assert!(environment.signal("complete").exists(), "{tier}");
        assert_eq!(std::fs::read_to_string(environment.image_root.join("root/file")).unwrap(), "in time");
        let flags = OFlags::WRONLY | OFlags::CREATE;
        let refused = |result: rustix::io::Result<OwnedFd>| assert_eq!(result.unwrap_err(), Errno::ROFS, "{tier}");
        refused(rustix::fs::openat(&directory, "file", flags, FileMode::RUSR));
        refused(rustix::fs::openat(&directory, "new", flags, FileMode::RUSR));
        refused(rustix::fs::openat(&root, "root/new", flags, FileMode::RUSR));
        let again = format!("/proc/self/fd/{}", read.as_raw_fd());
        refused(rustix::fs::open(again, OFlags::WRONLY, FileMode::empty()));
        assert_eq!(rustix::fs::fchmod(&read, FileMode::RWXU), Err(Errno::ROFS), "{tier}");
        assert_eq!(rustix::fs::unlinkat(&directory, "file", AtFlags::empty()), Err(Errno::ROFS), "{tier}");
    }
}

#[test]
fn jail_is_not_made_again_while_a_process_outside_can_write_through_the_old_one() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    let collector = Collector::listen("renewed");
    let kept = collector.receive(&environment, "os.open('/root/kept', os.O_WRONLY | os.O_CREAT)");
    kill(environment.jails_init(), Signal::SIGKILL).unwrap();
    environment.wait_for_log("waiting for it to close the file");
    drop(kept);
    wait_until("the next jail", || environment.run("true").status.success());
    assert_eq!(environment.complete(), 0, "{}", environment.log_text());
}

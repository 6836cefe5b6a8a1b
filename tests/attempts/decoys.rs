//! Targets outside the jail, created by `attempts decoys DIRECTORY`, announced as variables, removed when standard
//! input closes.

use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::PidfdFlags;

use crate::outside::MARK;
use crate::sys::{self, Handle};

/// Creates everything in `directory`, prints `OUTSIDE_<name>=<value>` lines and an empty one, and waits. The caller
/// removes the contents of the directory.
pub fn stay(directory: &Path) -> std::io::Result<()> {
    let secret = format!("{MARK}{}", random()?);
    let number = i32::from_str_radix(&random()?[..7], 16).expect("it is hexadecimal");

    let file = directory.join("file");
    std::fs::write(&file, &secret)?;
    let open = File::open(&file)?;

    let socket = directory.join("socket");
    let abstract_name = format!("decoy-{number}");
    speak(UnixListener::bind(&socket)?, &secret);
    speak(UnixListener::bind_addr(&SocketAddr::from_abstract_name(&abstract_name)?)?, &secret);

    let memory = sys::SharedMemory::make(number, secret.as_bytes())?;
    let queue = CString::new(format!("/decoy-{number}")).expect("a name");
    sys::make_queue(&queue, secret.as_bytes())?;
    let key = CString::new(format!("decoy-{number}")).expect("a name");
    // A container's seccomp profile may deny it.
    let user_key = sys::add_key(&key, secret.as_bytes(), sys::USER_KEYRING);

    let terminal = nix::pty::openpty(None, None)?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&terminal.slave)))?;
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["victim", &secret])
        .env("SECRET", &secret)
        .current_dir(directory)
        .stdin(terminal.slave)
        .stdout(Stdio::piped())
        .stderr(open.try_clone()?)
        .spawn()?;
    // It prints a line once it has its terminal.
    std::io::BufReader::new(victim.stdout.take().expect("a pipe")).read_line(&mut String::new())?;
    let process = rustix::process::Pid::from_child(&victim);
    let neighbours_socket = format!("neighbour-{number}");
    let mut neighbour = Command::new(std::env::current_exe()?)
        .args(["neighbour", &neighbours_socket])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    std::io::BufReader::new(neighbour.stdout.take().expect("a pipe")).read_line(&mut String::new())?;
    let handle_on_process = rustix::process::pidfd_open(process, PidfdFlags::empty())?;

    for (name, value) in [
        ("FILE", file.display().to_string()),
        ("HANDLE", handle(open)),
        ("SOCKET", socket.display().to_string()),
        ("ABSTRACT_SOCKET", abstract_name),
        ("NEIGHBOUR", neighbours_socket),
        ("SHARED_MEMORY", number.to_string()),
        ("QUEUE", queue.to_string_lossy().into_owned()),
        ("KEY", key.to_string_lossy().into_owned()),
        ("TERMINAL", path.display().to_string()),
        ("PROCESS", process.to_string()),
        // Kernels before 6.14 and 6.18 have no file handles for these.
        ("PROCESS_HANDLE", handle(handle_on_process)),
        ("NAMESPACE_HANDLE", handle(File::open("/proc/self/ns/mnt")?)),
    ] {
        println!("OUTSIDE_{name}={value}");
    }
    println!();
    std::io::stdin().read_to_end(&mut Vec::new())?;

    for mut process in [victim, neighbour] {
        process.kill()?;
        process.wait()?;
    }
    memory.remove();
    sys::remove_queue(&queue);
    if let Ok(user_key) = user_key {
        sys::remove_key(user_key, sys::USER_KEYRING);
    }
    Ok(())
}

/// A file handle, or an invalid one if the file system or the container's seccomp profile denies it.
fn handle(fd: impl std::os::fd::AsFd) -> String {
    Handle::of(fd).map_or_else(|_| "0".into(), |handle| handle.to_string())
}

fn random() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.map(|byte| format!("{byte:02x}")).concat())
}

/// Sends the secret to everybody who connects.
fn speak(listener: UnixListener, secret: &str) {
    let secret = secret.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = (&stream).write_all(secret.as_bytes());
        }
    });
}

/// `attempts victim`: a process with a secret in its memory, with standard input as its controlling terminal.
pub fn victim() -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    nix::unistd::setsid()?;
    // A namespace of its own to enter, if it may create one.
    let _ = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS);
    rustix::process::ioctl_tiocsctty(std::io::stdin())?;
    println!();
    loop {
        std::thread::park();
    }
}

/// `attempts neighbour SOCKET FILE`: a process of root without capabilities, which any other process of root may
/// therefore inspect. It has a file open, listens at an abstract socket, and answers one byte to every connection and
/// message.
pub fn neighbour(socket: &str, file: &Path) -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let _open = File::open(file)?;
    let none = rustix::thread::CapabilitySet::empty();
    let sets = rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets)?;
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(socket)?)?;
    println!();
    for stream in listener.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || {
            let mut message = [0; 16];
            loop {
                if stream.write_all(b".").is_err() || !matches!(stream.read(&mut message), Ok(1..)) {
                    break;
                }
            }
        });
    }
    Ok(())
}

/// `attempts with-session-key NAME SECRET PROGRAM…`: starts a program with a key in its session keyring.
pub fn with_session_key(arguments: &[&str]) -> std::io::Result<()> {
    let [name, secret, program, rest @ ..] = arguments else { panic!("NAME SECRET PROGRAM…") };
    sys::new_session_keyring()?;
    let name = CString::new(*name).expect("a name");
    sys::add_key(&name, secret.as_bytes(), sys::SESSION_KEYRING)?;
    Err(std::os::unix::process::CommandExt::exec(Command::new(program).args(rest)))
}

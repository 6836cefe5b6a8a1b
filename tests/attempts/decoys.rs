//! What attempts are after: made outside, by `attempts decoys FOLDER`, told of as variables, gone when standard input ends.

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

/// Makes everything in `folder`, prints `OUTSIDE_<name>=<value>` lines and an empty one, and waits. What lies in the folder is
/// left to whoever made it.
pub fn stay(folder: &Path) -> std::io::Result<()> {
    let secret = format!("{MARK}{}", random()?);
    let number = i32::from_str_radix(&random()?[..7], 16).expect("it is hexadecimal");

    let file = folder.join("file");
    std::fs::write(&file, &secret)?;
    let open = File::open(&file)?;

    let socket = folder.join("socket");
    let abstract_name = format!("decoy-{number}");
    speak(UnixListener::bind(&socket)?, &secret);
    speak(UnixListener::bind_addr(&SocketAddr::from_abstract_name(&abstract_name)?)?, &secret);

    let memory = sys::SharedMemory::make(number, secret.as_bytes())?;
    let queue = CString::new(format!("/decoy-{number}")).expect("a name");
    sys::make_queue(&queue, secret.as_bytes())?;
    let key = CString::new(format!("decoy-{number}")).expect("a name");
    let user_key = sys::add_key(&key, secret.as_bytes(), sys::USER_KEYRING)?;

    let terminal = nix::pty::openpty(None, None)?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&terminal.slave)))?;
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["victim", &secret])
        .env("SECRET", &secret)
        .current_dir(folder)
        .stdin(terminal.slave)
        .stdout(Stdio::piped())
        .stderr(open.try_clone()?)
        .spawn()?;
    // One line says that it sits at its terminal.
    std::io::BufReader::new(victim.stdout.take().expect("a pipe")).read_line(&mut String::new())?;
    let process = rustix::process::Pid::from_child(&victim);
    let handle_on_process = rustix::process::pidfd_open(process, PidfdFlags::empty())?;

    for (name, value) in [
        ("FILE", file.display().to_string()),
        ("HANDLE", Handle::of(open)?.to_string()),
        ("SOCKET", socket.display().to_string()),
        ("ABSTRACT_SOCKET", abstract_name),
        ("SHARED_MEMORY", number.to_string()),
        ("QUEUE", queue.to_string_lossy().into_owned()),
        ("KEY", key.to_string_lossy().into_owned()),
        ("TERMINAL", path.display().to_string()),
        ("PROCESS", process.to_string()),
        // Kernels before 6.14 and 6.18 know no handles on these.
        ("PROCESS_HANDLE", Handle::of(handle_on_process).map_or_else(|_| "0".into(), |h| h.to_string())),
        (
            "NAMESPACE_HANDLE",
            Handle::of(File::open("/proc/self/ns/mnt")?).map_or_else(|_| "0".into(), |h| h.to_string()),
        ),
    ] {
        println!("OUTSIDE_{name}={value}");
    }
    println!();
    std::io::stdin().read_to_end(&mut Vec::new())?;

    victim.kill()?;
    victim.wait()?;
    memory.remove();
    sys::remove_queue(&queue);
    sys::remove_key(user_key, sys::USER_KEYRING);
    Ok(())
}

fn random() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.map(|byte| format!("{byte:02x}")).concat())
}

/// Tells the secret to everybody who connects.
fn speak(listener: UnixListener, secret: &str) {
    let secret = secret.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = (&stream).write_all(secret.as_bytes());
        }
    });
}

/// `attempts victim`: a process that sits at the terminal that is its standard input, with a secret in its memory.
pub fn victim() -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    nix::unistd::setsid()?;
    // Something else to enter than what everybody is in.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS)?;
    rustix::process::ioctl_tiocsctty(std::io::stdin())?;
    println!();
    loop {
        std::thread::park();
    }
}

/// `attempts with-session-key NAME SECRET PROGRAM…`: starts a program with a session keyring in which there is a key.
pub fn with_session_key(arguments: &[&str]) -> std::io::Result<()> {
    let [name, secret, program, rest @ ..] = arguments else { panic!("NAME SECRET PROGRAM…") };
    sys::new_session_keyring()?;
    let name = CString::new(*name).expect("a name");
    sys::add_key(&name, secret.as_bytes(), sys::SESSION_KEYRING)?;
    Err(std::os::unix::process::CommandExt::exec(Command::new(program).args(rest)))
}

//! Paths that lead out of this process's root directory.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::outcome::{Held, Outcome, Step, any};
use crate::outside::{file, file_below, read_secret, read_secret_at, visible_processes};

/// Deeper than any directory.
const UP: &str = "../../../../../../../../../../../../../../../../";

/// From a working directory outside the root, `..` leads further up.
fn climb() -> Outcome {
    for _ in 0..64 {
        rustix::process::chdir("..").step("go up")?;
    }
    rustix::process::chroot(".").step("take the top for the root")?;
    read_secret(&file())
}

fn directory(name: &str) -> PathBuf {
    let path = Path::new("/").join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir(&path).expect("a directory in one's own root can be made");
    path
}

/// A second chroot leaves the working directory outside it.
pub fn double_chroot() -> Outcome {
    let inner = directory("double");
    let changed = rustix::process::chroot(&inner).step("chroot once more");
    let outcome = changed.and_then(|()| climb());
    let _ = std::fs::remove_dir(&inner);
    outcome
}

/// A second chroot leaves an open directory outside it too.
pub fn chroot_fchdir() -> Outcome {
    let inner = directory("fchdir");
    let top = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("/ can be opened");
    let changed = rustix::process::chroot(&inner).step("chroot once more");
    let outcome = changed.and_then(|()| rustix::process::fchdir(&top).step("go back")).and_then(|()| climb());
    let _ = std::fs::remove_dir(&inner);
    outcome
}

/// A descriptor of a directory outside, left open by the caller.
pub fn inherited_descriptors() -> Outcome {
    any(3..1024, |number| {
        let link = PathBuf::from(format!("/proc/self/fd/{number}"));
        any([file_below(&link), file_below(&link.join(UP)), link], |path| read_secret(&path))
    })
}

/// A working directory outside.
pub fn inherited_working_directory() -> Outcome {
    any([".", UP], |up| read_secret_at(rustix::fs::CWD, &file_below(Path::new(up))))
}

/// `..` above `/`.
pub fn dot_dot() -> Outcome {
    let magic = ["/proc/self/root", "/proc/self/cwd", "/proc/thread-self/root"].map(|link| Path::new(link).join(UP));
    any([Path::new("/").to_owned(), Path::new("/").join(UP)].into_iter().chain(magic), |top| {
        read_secret(&file_below(&top))
    })
}

fn of_visible_processes(links: &[&str]) -> Outcome {
    any(visible_processes(), |process| {
        any(links, |link| {
            let link = PathBuf::from(format!("/proc/{process}/{link}"));
            any([file_below(&link), file_below(&link.join(UP))], |path| read_secret(&path))
        })
    })
}

/// The root of another process.
pub fn roots_of_processes() -> Outcome {
    of_visible_processes(&["root"])
}

/// The root of another process's thread.
pub fn roots_of_threads() -> Outcome {
    any(visible_processes(), |process| {
        let thread = format!("/proc/{process}/task/{process}/root");
        read_secret(&file_below(Path::new(&thread)))
    })
}

/// The working directory of another process.
pub fn working_directories_of_processes() -> Outcome {
    of_visible_processes(&["cwd"])
}

/// Descriptors of another process.
pub fn descriptors_of_processes() -> Outcome {
    any(visible_processes(), |process| {
        let directory = PathBuf::from(format!("/proc/{process}/fd"));
        let descriptors = std::fs::read_dir(&directory).step(format!("list {}", directory.display()))?;
        any(descriptors.flatten(), |descriptor| {
            any([descriptor.path(), file_below(&descriptor.path())], |path| read_secret(&path))
        })
    })
}

/// The program of another process, if it is outside this root.
pub fn programs_of_processes() -> Outcome {
    any(visible_processes(), |process| {
        let link = format!("/proc/{process}/exe");
        let program = rustix::fs::open(&link, OFlags::RDONLY, Mode::empty()).step(format!("open {link}"))?;
        let found = rustix::fs::fstat(&program).step(format!("look at {link}"))?;
        let path = std::fs::read_link(&link).step(format!("read {link}"))?;
        let here = rustix::fs::statat(rustix::fs::CWD, &path, AtFlags::empty());
        if here.is_ok_and(|here| (here.st_dev, here.st_ino) == (found.st_dev, found.st_ino)) {
            return Err(Held::by(format!("open {link}"), "it is a program of this root"));
        }
        Ok(format!("{link} is {} outside", path.display()))
    })
}

/// Attributes of the program of another process, if it is outside this root. Removing a missing one changes nothing.
pub fn attributes_of_programs() -> Outcome {
    any(visible_processes(), |process| {
        let link = format!("/proc/{process}/exe");
        let found = rustix::fs::stat(&link).step(format!("look at {link}"))?;
        let path = std::fs::read_link(&link).step(format!("read {link}"))?;
        let here = rustix::fs::statat(rustix::fs::CWD, &path, AtFlags::empty());
        if here.is_ok_and(|here| (here.st_dev, here.st_ino) == (found.st_dev, found.st_ino)) {
            return Err(Held::by(format!("change {link}"), "it is a program of this root"));
        }
        match rustix::fs::removexattr(&link, "user.ims-sshd-none") {
            Err(rustix::io::Errno::NODATA) | Ok(()) => Ok(format!("can change attributes of {}", path.display())),
            Err(e) => Err(e).step(format!("remove an attribute of {link}")),
        }
    })
}

/// A file by its handle instead of a path.
pub fn file_handle() -> Outcome {
    let handle: crate::sys::Handle = crate::outside::told("HANDLE").parse().expect("a handle");
    let root = rustix::fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("/ can be opened");
    let file = handle.open(root.as_fd(), libc::O_RDONLY).step("open_by_handle_at")?;
    read_secret(Path::new(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))))
}

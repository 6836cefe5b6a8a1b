//! Devices: nodes created here, and nodes found in the image.

use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use crate::outcome::{Held, Outcome, Step, any};

/// Directories that may be file systems of their own; the root first.
const DIRECTORIES: [&str; 9] =
    ["/", "/tmp", "/var/tmp", "/root", "/run", "/dev", "/dev/shm", "/dev/mqueue", "/dev/pts"];

fn open(path: &Path) -> Outcome {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).step(format!("open {}", path.display()))?;
    Ok(format!("opened {}", path.display()))
}

fn make_and_open(kind: FileType, major: u32, minor: u32) -> Outcome {
    any(DIRECTORIES, |directory| {
        let path = Path::new(directory).join(format!("node-{}", std::process::id()));
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, Mode::from_raw_mode(0o600), device)
            .step(format!("make device {major}:{minor} in {directory}"))?;
        let outcome = open(&path);
        let _ = std::fs::remove_file(path);
        outcome
    })
}

/// Major and minor numbers of all disks of the machine.
fn disks() -> Vec<(u32, u32)> {
    let disks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let number = |disk: std::fs::DirEntry| {
        let text = std::fs::read_to_string(disk.path().join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    disks.filter_map(number).collect()
}

/// A new node of each of the machine's disks.
pub fn disk() -> Outcome {
    any(disks(), |(major, minor)| make_and_open(FileType::BlockDevice, major, minor))
}

/// A new node of the kernel log.
pub fn kernel_log() -> Outcome {
    make_and_open(FileType::CharacterDevice, 1, 11)
}

/// A new node of /dev/fuse, for a file system of the session's own, which the kernel would trust.
pub fn fuse() -> Outcome {
    make_and_open(FileType::CharacterDevice, 10, 229)
}

/// A new node of /dev/loop-control, for loop devices.
pub fn loop_control() -> Outcome {
    make_and_open(FileType::CharacterDevice, 10, 237)
}

/// A new node of /dev/net/tun, for network devices.
pub fn tun() -> Outcome {
    make_and_open(FileType::CharacterDevice, 10, 200)
}

/// A new node of the machine's console screen.
pub fn console_screen() -> Outcome {
    make_and_open(FileType::CharacterDevice, 7, 0)
}

/// `/planted-disk`, a node of a disk contained in the image.
pub fn planted_node() -> Outcome {
    open(Path::new("/planted-disk"))
}

/// All nodes in /dev: only those on the list of harmless ones may be there.
pub fn found_nodes() -> Outcome {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    const HARMLESS: [(u32, u32); 6] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0)];
    let nodes = std::fs::read_dir("/dev").step("list /dev")?.flatten();
    any(nodes, |node| {
        let found = node.metadata().step(format!("look at {}", node.path().display()))?;
        let device = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
        let kind = found.file_type();
        if !(kind.is_char_device() || kind.is_block_device()) || HARMLESS.contains(&device) {
            return Err(Held::by(format!("find a device in {}", node.path().display()), "it is harmless"));
        }
        Ok(format!("{} is device {}:{}", node.path().display(), device.0, device.1))
    })
}

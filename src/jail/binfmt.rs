//! The kernel's table of interpreters for foreign programs (binfmt_misc), and our entry in it.
//!
//! The table belongs to the user namespace (since Linux 6.7; before, to the machine), so all other containers of the
//! node share it. The table is reached through a detached mount of our own. Existing entries are never changed, because
//! another environment or the node may use them. Our entry has a unique name and is removed when its environment
//! closes.
//!
//! Since Linux 6.7 the entries vanish with the last mount of the table, so our mount stays open as long as its entry is
//! needed.

use std::fmt::Write as _;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::fs::{Dir, Mode, OFlags};
use rustix::mount::MountAttrFlags;

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::programs::{self, Program};
use crate::sys::architecture::{Architecture, HEADER};
use crate::sys::mounts::{self, Detached};
use crate::sys::tree::Tree;

/// One entry of the table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Entry {
    /// Name of the entry's file.
    pub name: String,
    /// True if the entry is enabled.
    pub(crate) enabled: bool,
    /// Path of the interpreter.
    pub(crate) interpreter: PathBuf,
    /// Flags, as in a registration.
    pub(crate) flags: String,
    /// Offset of the magic in a file.
    offset: usize,
    magic: Vec<u8>,
    /// Bits of the magic that are compared; all if empty.
    mask: Vec<u8>,
}

impl Entry {
    /// Parses an entry's file as the kernel shows it; `None` if the entry matches by file extension, or if it is no
    /// entry.
    pub(crate) fn parse(name: &str, text: &str) -> Option<Self> {
        let value = |field: &str| text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(' '));
        Some(Self {
            name: name.to_owned(),
            enabled: text.lines().next() == Some("enabled"),
            interpreter: value("interpreter")?.into(),
            flags: value("flags:").unwrap_or_default().to_owned(),
            offset: value("offset")?.parse().ok()?,
            magic: bytes(value("magic")?)?,
            mask: value("mask").map_or(Some(Vec::new()), bytes)?,
        })
    }

    /// True if the kernel would use this entry for a file that begins with `header`.
    pub(crate) fn takes(&self, header: &[u8]) -> bool {
        let masks = self.mask.iter().copied().chain(std::iter::repeat(0xff));
        let Some(place) = header.get(self.offset..).and_then(|rest| rest.get(..self.magic.len())) else { return false };
        self.enabled && place.iter().zip(&self.magic).zip(masks).all(|((byte, magic), mask)| (byte ^ magic) & mask == 0)
    }

    /// True if the interpreter was opened at registration (flag `F`), so every jail has it; otherwise the kernel looks
    /// it up by path.
    fn is_opened_at_registration(&self) -> bool {
        self.flags.contains('F')
    }

    fn belongs_to_an_environment(&self) -> bool {
        self.name.starts_with(PREFIX)
    }
}

/// Prefix of the entries of environments.
const PREFIX: &str = "ims-sshd-";

fn bytes(hexadecimal: &str) -> Option<Vec<u8>> {
    let digit = |at: usize| hexadecimal.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    (0..hexadecimal.len()).step_by(2).map(digit).collect()
}

/// The entry that runs programs for `architecture` in a jail and that no environment removes at its end.
///
/// The kernel takes the entry registered last, and the table hides the order, so one matching entry without `F`
/// disqualifies all.
pub(crate) fn serving(entries: &[Entry], architecture: Architecture) -> Option<&Entry> {
    let takes = |entry: &&Entry| architecture.headers().iter().all(|header| entry.takes(header));
    let mut matching = entries.iter().filter(takes);
    if !matching.clone().all(Entry::is_opened_at_registration) {
        return None;
    }
    matching.find(|entry| !entry.belongs_to_an_environment())
}

/// The line that registers `interpreter` under `name`.
///
/// `F`: the kernel opens the interpreter now, so every jail has it. `P`: the interpreter gets the program's argv[0],
/// which login shells and busybox evaluate. `O`: the interpreter gets the program as an open descriptor. Not `C`: QEMU
/// would run setuid programs with their owner's rights, and its variables would let a user write as root.
pub(crate) fn registration(name: &str, architecture: Architecture, interpreter: &Path) -> String {
    let escaped = |bytes: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "\\x{byte:02x}");
            text
        })
    };
    let [magic, other_type] = architecture.headers();
    let mut mask = [0xff; HEADER];
    // Ignore the OS ABI byte of the ELF header.
    mask[7] = 0;
    mask[16] = !(magic[16] ^ other_type[16]);
    format!(":{name}:M:0:{}:{}:{}:POF", escaped(&magic), escaped(&mask), interpreter.display())
}

/// Path of the static QEMU for `architecture` in distributions and in this project's container image.
pub(crate) fn interpreter(architecture: Architecture) -> PathBuf {
    format!("/usr/bin/qemu-{}-static", architecture.name()).into()
}

/// The entry that runs programs for another architecture.
#[derive(Debug)]
pub(crate) enum Interpreter {
    /// An entry that was there before.
    Registered(Entry),
    /// An entry that cannot be seen from here, but works.
    Unseen,
    /// Our entry.
    Own(Registration),
}

impl Interpreter {
    /// The mount of the table with our entry, which must stay open.
    pub(crate) fn table(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Own(registration) => Some(registration.table.0.as_fd()),
            Self::Registered(_) | Self::Unseen => None,
        }
    }
}

/// Our entry, removed when dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    table: Table,
    name: String,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Err(e) = self.table.remove(&self.name) {
            tracing::warn!(
                "cannot remove the interpreter {} from the kernel's table: {e}; write -1 to its file in binfmt_misc",
                self.name
            );
        }
    }
}

/// Makes programs for `architecture` run in every jail of this user namespace, through an existing entry or one of our
/// own, named after `owner` (letters and digits). A jail that must confine sets `own`, so that its QEMU is a copy: a
/// session could otherwise change mode and owner of the container's or the node's QEMU through /proc/PID/exe.
///
/// After registering an entry, the calling thread has a mount namespace of its own.
pub(crate) fn provide(architecture: Architecture, owner: &str, own: bool) -> Result<Interpreter> {
    let attempted = || format!("set up emulation of {} programs", architecture.name());
    let interpreter = interpreter(architecture);
    let works = || !own && architecture.runs();
    if !interpreter.exists() && works() {
        // Do not open the table: its first mount in a user namespace would create an empty table, which hides the
        // node's.
        return Ok(Interpreter::Unseen);
    }
    let table = match Table::open() {
        Ok(table) => table,
        Err(_) if works() => return Ok(Interpreter::Unseen),
        Err(e) => {
            let why = Error::new(attempted()).because(format!("binfmt_misc cannot be mounted: {e}"));
            return Err(why).advise(if own {
                "the container needs CAP_SYS_ADMIN (privileged), or the node Linux 6.7"
            } else {
                "the container needs CAP_SYS_ADMIN (privileged), or the node a registered QEMU with flag F for all its containers"
            });
        }
    };
    let name = format!("{PREFIX}{}-{owner}", architecture.name());
    // Remove an entry that a killed environment of the same owner has left behind.
    table.remove(&name).attempt(attempted)?;
    if !table.is_on().attempt(attempted)? {
        return Err(Error::new(attempted()).because("binfmt_misc is switched off"))
            .advise("echo 1 > /proc/sys/fs/binfmt_misc/status on the node");
    }
    if !own && let Some(entry) = serving(&table.entries().attempt(attempted)?, architecture) {
        return Ok(Interpreter::Registered(entry.clone()));
    }
    if !interpreter.exists() {
        return Err(Error::new(attempted()).because(format!("{} does not exist", interpreter.display())))
            .advise("install qemu-user-static (Fedora appends the architecture to the package's name), or use an image for this machine's architecture");
    }
    register_copy(&table, &name, architecture, &interpreter).attempt(|| {
        format!("register {} as the interpreter of programs for {}", interpreter.display(), architecture.name())
    })?;
    Ok(Interpreter::Own(Registration { table, name }))
}

/// Registers a read-only copy of `interpreter` under the interpreter's own path, which `ps` shows. The kernel resolves
/// the path once, in this thread's mount namespace, where the copy covers the interpreter's directory during the
/// registration.
fn register_copy(table: &Table, name: &str, architecture: Architecture, interpreter: &Path) -> Result<()> {
    let (Some(directory), Some(file)) = (interpreter.parent(), interpreter.file_name()) else {
        return Err(Error::new("copy the interpreter").because("it has no directory"));
    };
    let (copy, _) = programs::copy([&Program { name: file.to_string_lossy().into(), file: interpreter.into() }])?;
    let register = || -> io::Result<()> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        mounts::make_all_private()?;
        copy.attach(Tree::open(directory)?)?;
        let registered = table.register(&registration(name, architecture, interpreter));
        mounts::unmount(directory)?;
        registered
    };
    register().attempt(|| "write to binfmt_misc")
}

/// An open mount of the table.
#[derive(Debug)]
struct Table(Tree);

impl Table {
    fn open() -> io::Result<Self> {
        let attributes =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        Ok(Self(Tree::from_fd(Detached::filesystem("binfmt_misc", &[], attributes)?.into())))
    }

    fn is_on(&self) -> io::Result<bool> {
        Ok(self.0.read("status", LARGEST_ENTRY)? == b"enabled\n")
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for found in Dir::new(self.0.reopen()?)? {
            let name = found?.file_name().to_string_lossy().into_owned();
            // Skips the directory itself, the file `register`, and entries that were removed after they were listed.
            if let Ok(text) = self.0.read(&name, LARGEST_ENTRY) {
                entries.extend(Entry::parse(&name, &String::from_utf8_lossy(&text)));
            }
        }
        Ok(entries)
    }

    fn register(&self, line: &str) -> io::Result<()> {
        self.write("register", line)
    }

    /// Removes an entry; a missing one is no error.
    fn remove(&self, name: &str) -> io::Result<()> {
        match self.write(name, "-1") {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let file = self.0.open_at(name, OFlags::WRONLY, Mode::empty())?;
        // Write in one call, because the kernel parses each write as a complete line.
        rustix::io::write(file, text.as_bytes()).map(drop).map_err(Into::into)
    }
}

/// Maximum size of an entry's file, in bytes; the kernel shows an entry in one page.
const LARGEST_ENTRY: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OTHERS: &str = "enabled\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: POF\noffset 0\n\
         magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n";

    fn entry(name: &str, text: &str) -> Entry {
        Entry::parse(name, text).unwrap()
    }

    #[test]
    fn binfmt_misc_entry_is_parsed() {
        let found = entry("qemu-aarch64", OTHERS);
        assert!(found.enabled && found.is_opened_at_registration());
        assert_eq!(found.interpreter, Path::new("/usr/libexec/qemu-binfmt/aarch64-binfmt-P"));
        assert!(Architecture::Aarch64.headers().iter().all(|h| found.takes(h)));
        assert!(Architecture::X86_64.headers().iter().all(|h| !found.takes(h)));
        assert_eq!(Entry::parse("java", "enabled\ninterpreter /usr/bin/java\nflags: \nextension .jar\n"), None);
        for file in ["enabled\n", "disabled\n", ""] {
            assert_eq!(Entry::parse("status", file), None);
        }
        let exact = entry("exact", "enabled\ninterpreter /x\nflags: \noffset 2\nmagic 4c46\n");
        assert!(exact.takes(b"\x7fELF") && !exact.takes(b"\x7fEL") && !exact.takes(b""));
    }

    #[test]
    fn only_an_entry_that_works_in_every_jail_is_reused() {
        let without = |old: &str, new: &str| OTHERS.replace(old, new);
        let decide = |entries: &[Entry]| serving(entries, Architecture::Aarch64).map(|e| e.name.clone());
        let good = entry("good", OTHERS);
        let by_path = entry("by-path", &without("POF", "PO"));
        let off = entry("off", &without("enabled", "disabled"));
        let another_job = entry("ims-sshd-aarch64-1", OTHERS);
        assert_eq!(decide(std::slice::from_ref(&good)).as_deref(), Some("good"));
        assert_eq!(decide(&[]), None);
        assert_eq!(decide(std::slice::from_ref(&by_path)), None);
        assert_eq!(decide(std::slice::from_ref(&off)), None);
        assert_eq!(decide(std::slice::from_ref(&another_job)), None, "it ends with its environment");
        assert_eq!(decide(&[off, another_job, good.clone()]).as_deref(), Some("good"));
        assert_eq!(decide(&[good.clone(), by_path]), None, "the kernel may take either");
        assert_eq!(serving(&[good], Architecture::X86_64), None);
    }

    #[test]
    fn registration_matches_both_elf_types_of_its_architecture_only() {
        for architecture in Architecture::ALL {
            let line = registration("x", architecture, Path::new("/usr/bin/qemu"));
            let fields: Vec<_> = line.split(':').collect();
            assert_eq!((fields[1], fields[2], fields[6], fields[7]), ("x", "M", "/usr/bin/qemu", "POF"));
            let shown = |field: &str| field.replace("\\x", "");
            let text = format!(
                "enabled\ninterpreter {}\nflags: {}\noffset {}\nmagic {}\nmask {}\n",
                fields[6],
                fields[7],
                fields[3],
                shown(fields[4]),
                shown(fields[5])
            );
            let entry = entry("x", &text);
            for other in Architecture::ALL {
                assert!(other.headers().iter().all(|header| entry.takes(header) == (other == architecture)));
            }
            let mut linux_abi = architecture.headers()[1];
            linux_abi[7] = 3;
            assert!(entry.takes(&linux_abi));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_entries_do_not_panic(text in "(enabled\n|interpreter /x\n|flags: F\n|offset 99\n|magic 7F4\n|magic é0\n|mask 0\n|.{0,20}\n){0,9}") {
            if let Some(entry) = Entry::parse("x", &text) {
                entry.takes(&Architecture::Aarch64.headers()[0]);
            }
        }
    }
}

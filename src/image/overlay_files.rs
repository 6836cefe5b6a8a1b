//! Finds files that belong to an overlay in a squashfs, such as an image with podman's storage. An overlay above the
//! squashfs would take them for its own: it hides whiteouts, and attributes that begin with `trusted.overlay.`.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FileType;

use crate::error::{Attempt, Error, Result};
use crate::image::kind::Opened;
use crate::image::upper_layer::STATE;
use crate::squashfs::{Fault, Reader};
use crate::sys::process::OWN_PROGRAM;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::transfer::confinement::Confined;

/// First argument of the child process, which reads the squashfs confined, as the packer does.
const CHILD: &str = "find-overlay-files-as-child";

/// Directory in which the child starts. Every confined program may read it anyway.
const DIRECTORY: &str = "/usr";

/// Number of bytes of a path that are shown; an image may nest directories without end.
const LONGEST_SHOWN: usize = 4096;

/// Returns the path of the first file of an overlay in the squashfs `archive`, if there is one. Fails only if a signal
/// interrupts: a squashfs that cannot be read here may be one that the kernel can mount.
pub(crate) fn first_in(work: &Work, archive: &Opened) -> Result<Option<PathBuf>> {
    let attempted = format!("look for files of an overlay in {}", archive.shown.display());
    work.unless_interrupted(ask(work, archive, &attempted)).or_else(|error| {
        if error.is_interruption() {
            return Err(error);
        }
        tracing::info!("{error}");
        Ok(None)
    })
}

fn ask(work: &Work, archive: &Opened, attempted: &str) -> Result<Option<PathBuf>> {
    let own = File::open(OWN_PROGRAM).attempt(|| "open this program's own file")?;
    let directory = Tree::open(Path::new(DIRECTORY)).attempt(|| format!("open {DIRECTORY}"))?;
    let squashfs = archive.as_fd().try_clone_to_owned().attempt(|| attempted)?;
    let confined = Confined::inspecting(&directory, squashfs).reading([own.as_fd()].into_iter())?;
    let output = work.run(attempted, Command::new(OWN_PROGRAM).arg(CHILD), Some(&confined), |_| {})?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::new(attempted).because(if said.is_empty() { output.status.to_string() } else { said }));
    }
    Ok((!output.stdout.is_empty()).then(|| OsString::from_vec(output.stdout).into()))
}

/// Reads the squashfs on standard input if this process was started for that, and returns the exit code; otherwise
/// returns `None`.
pub fn run_as_child() -> Option<u8> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != CHILD || words.next().is_some() {
        return None;
    }
    let _ = rustix::thread::set_name(c"ims-sshd");
    let found = io::stdin().as_fd().try_clone_to_owned().map_err(Fault::from).and_then(|file| first(file.into()));
    let told = found.map_err(|fault| fault.to_string()).and_then(|path| {
        let path = path.map(|path| Path::new("/").join(path)).unwrap_or_default();
        let shown = path.as_os_str().as_bytes();
        let shown = shown.get(..LONGEST_SHOWN).unwrap_or(shown);
        io::Write::write_all(&mut io::stdout(), shown).map_err(|e| e.to_string())
    });
    Some(match told {
        Ok(()) => 0,
        Err(why) => {
            eprint!("{why}");
            1
        }
    })
}

/// Path of the first file of an overlay in a squashfs, in which anything may be wrong, or written by an attacker.
fn first(squashfs: File) -> std::result::Result<Option<PathBuf>, Fault> {
    let mut first = None;
    let walked = Reader::open(squashfs)?.walk(true, &mut |entry| {
        let is_state = |(name, _): &(Vec<u8>, Vec<u8>)| name.starts_with(STATE);
        let kind = FileType::from_raw_mode(entry.kind());
        let is_whiteout = || kind == FileType::CharacterDevice && entry.device() == Some((0, 0));
        if first.is_none() && (entry.xattrs.iter().any(is_state) || is_whiteout()) {
            first = Some(entry.path.to_owned());
        }
        Ok(())
    });
    if first.is_some() { Ok(first) } else { walked.map(|()| None) }
}

//! The command line's SOURCE.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::volume;

/// Refuses any user but root.
pub(crate) fn need_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new("open an image root").because("only root may").advise("run it as root, with sudo"))
}

/// Path of the image root that `source` names, without symbolic links.
pub(crate) fn image_root(source: &Path) -> Result<PathBuf> {
    need_root()?;
    let refuse = |why: String| Error::bad_input(format!("SOURCE is '{}': {why}", source.display()));
    let real = named::resolve(source).map_err(|e| refuse(e.to_string()))?;
    match real.is_dir() {
        _ if real == Path::new("/") => Err(refuse("this is the machine's own root; expected an unpacked image".into())),
        true => {
            let tree = Tree::open(&real).map_err(|e| refuse(e.to_string()))?;
            volume::image_root::check(&tree, &real, false, refuse).map(|()| real)
        }
        false => Err(refuse("expected a directory, an unpacked image".into())),
    }
}

/// The directory that `source` names; `None` if it does not name one.
pub(crate) fn directory_of(source: &str) -> Option<PathBuf> {
    std::fs::canonicalize(source).ok().filter(|path| path.is_dir())
}

//! The command line's SOURCE.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::publish::source::Source;
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

/// The source that the command line `named`. A path on this machine becomes one without symbolic links.
pub(crate) fn resolve(named: &str) -> Result<Source> {
    need_root()?;
    match Source::parse(named)? {
        Source::Here(path) => match named::resolve(&path) {
            Ok(real) => Ok(Source::Here(real)),
            Err(e) => Err(Error::bad_input(format!("SOURCE is '{}': {e}", path.display()))),
        },
        fetched => Ok(fetched),
    }
}

/// The directory that `source` is; `None` if it is not one.
pub(crate) fn directory_of(source: &Source) -> Option<PathBuf> {
    match source {
        Source::Here(path) => Some(path.clone()).filter(|path| path.is_dir()),
        _ => None,
    }
}

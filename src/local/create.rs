//! `ims-sshd create`: from a recipe to a published image, on one machine.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::error::{Attempt, Error, Result};
use crate::image::exclude::Pattern;
use crate::local::source::need_root;
use crate::local::steps;
use crate::publish::settings::Settings;
use crate::recipe::{fetch, kiwi, repositories};
use crate::sys::named;
use crate::volume::layout::{BUILD, RECIPE};
use crate::volume::open_tree;

/// Directory in which recipes are built, below that for changes.
pub const DIRECTORY: &str = "ims-sshd.create";

/// Name of the directory of the image root, kiwi-ng's layout.
const BUILT: &str = "build";

/// Arguments of the command line.
#[derive(Debug)]
pub struct Creation {
    /// Where the recipe comes from.
    pub source: String,
    /// File of values for its templates, and further values.
    pub values: (Option<PathBuf>, Vec<(String, String)>),
    /// Profiles to build.
    pub profiles: Vec<String>,
    /// How long its repositories are waited for.
    pub limit: Duration,
    /// The certificate of the site's authority.
    pub authority: Option<PathBuf>,
    /// Keys of repositories.
    pub signing_keys: Vec<PathBuf>,
    /// Patterns of paths that are not packed.
    pub exclude: Vec<Pattern>,
    /// Settings of a create job, whose image root parent is this build's own directory.
    pub settings: Settings,
}

/// Fetches, builds, packs and publishes. What was built stays if that fails, and goes when it is published.
pub fn run(creation: &Creation) -> Result<u8> {
    need_root()?;
    let settings = &creation.settings;
    let place = make(&settings.job.parent)?;
    let volume = open_tree(&place)?;
    let attempted = || format!("build in {}", place.display());
    let lock = volume.reopen().attempt(attempted)?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::new(attempted())
            .because("another 'ims-sshd create' of this recipe is at work")
            .advise("wait for its end")
    })?;
    // A run that failed has left them, for whoever looks for the reason.
    let clear =
        |names: &[&str]| names.iter().try_for_each(|name| volume.remove_whole(name.as_ref())).attempt(attempted);
    clear(&[RECIPE, BUILT, BUILD])?;
    let (values, set) = creation.values.clone();
    let recipe = place.join(RECIPE);
    let wanted = fetch::Wanted { directory: recipe.clone(), source: creation.source.clone(), values, set };
    fetch::run(settings, &wanted)?;
    repositories::run(settings, &recipe, &creation.profiles, creation.limit)?;
    let wanted = kiwi::Wanted {
        recipe,
        profiles: creation.profiles.clone(),
        ca_rpm: None,
        authority: creation.authority.clone(),
        is_authority_optional: true,
        signing_keys: creation.signing_keys.clone(),
    };
    kiwi::run(settings, &wanted)?;
    steps::pack(settings, None, None, &creation.exclude, None)?;
    steps::upload(settings, None, None, None)?;
    drop(volume);
    std::fs::remove_dir_all(&place).attempt(|| format!("remove {}", place.display()))?;
    Ok(0)
}

/// Makes the directory; users must not reach setuid programs of the image root.
fn make(place: &Path) -> Result<PathBuf> {
    let attempted = || format!("create the directory {}", place.display());
    let real = named::resolve_beginning(place).attempt(attempted)?;
    let above = real.parent().unwrap_or(Path::new("/"));
    for directory in [above, real.as_path()] {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(Error::new(attempted()).because(e)),
            _ => {}
        }
    }
    let found = std::fs::symlink_metadata(&real).attempt(attempted)?;
    let is_private = found.is_dir() && std::os::unix::fs::MetadataExt::mode(&found) & named::WRITABLE == 0;
    if !is_private {
        let refused = Error::new(attempted()).because("other users can write to it");
        return Err(refused.advise("name another directory with --work"));
    }
    Ok(real)
}

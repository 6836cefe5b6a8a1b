//! `ims-sshd create`: builds an image from a recipe and publishes it, on one machine.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::error::{Attempt, Error, Result};
use crate::image::exclude::Pattern;
use crate::jailer::open;
use crate::local::command_line::CommandLine;
use crate::local::customize::{self, Customization};
use crate::local::remote::publish_transferred;
use crate::local::run::{End, Reports, Run};
use crate::local::{source, steps, work_directory};
use crate::publish::manifest::say_result;
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::recipe::{fetch, kiwi, repositories, sandbox};
use crate::remote::build::{self as offloaded, Node};
use crate::store::{self, Store};
use crate::sys::named;
use crate::transfer::interruptible;
use crate::volume::layout::{CREATED_IMAGE_ROOT, KEY, PUBLICATION, RECIPE, UPLOAD};
use crate::volume::signal_files::SignalFiles;
use crate::volume::{holds, open_tree};

/// Directory in which recipes are built, below the directory for changes.
pub const DIRECTORY: &str = "ims-sshd.create";

/// Records of a publication that was interrupted; the next one continues with them or rolls them back.
const KEPT: [&str; 3] = [PUBLICATION, UPLOAD, KEY];

/// Shells, of which the image root must have one, or no session can begin.
const SHELLS: [&str; 2] = ["bin/sh", "usr/bin/sh"];

/// Arguments of the command line.
#[derive(Debug)]
pub struct Creation {
    /// Location of the recipe.
    pub source: String,
    /// File with values for the recipe's templates, and further values.
    pub values: (Option<PathBuf>, Vec<(String, String)>),
    /// Profiles of the recipe to build.
    pub profiles: Vec<String>,
    /// Time for which to wait for the recipe's repositories.
    pub limit: Duration,
    /// The certificate of the site's certificate authority.
    pub authority: Option<PathBuf>,
    /// Files with the public signing keys of repositories.
    pub signing_keys: Vec<PathBuf>,
    /// Patterns of paths that are not packed.
    pub exclude: Vec<Pattern>,
    /// True if the image root of a build that failed is opened over SSH.
    pub has_debug_shell: bool,
    /// The host that builds the image; `None` for this machine.
    pub node: Option<Node>,
    /// The command line.
    pub command_line: CommandLine,
    /// Settings of a create job, whose image root parent is this build's own directory.
    pub settings: Settings,
}

/// Fetches the recipe, then builds, packs and publishes the image. The build's files stay if a step fails, and are
/// removed after publication.
pub fn run(mut creation: Creation) -> Result<u8> {
    source::need_root()?;
    if let Some(node) = &mut creation.node {
        // The node waits for the repositories, since it may not reach the same ones as this machine.
        node.wait = Some(creation.limit);
        node.returns_tree = creation.has_debug_shell;
        node.exclude = creation.exclude.iter().map(ToString::to_string).collect();
    }
    let creation = &creation;
    let work = std::path::absolute(&creation.settings.job.parent)
        .attempt(|| format!("create the directory {}", creation.settings.job.parent.display()))?;
    let wanted = kiwi::Wanted {
        recipe: work.join(RECIPE),
        profiles: creation.profiles.clone(),
        ca_rpm: None,
        authority: creation.authority.clone(),
        is_authority_optional: true,
        signing_keys: creation.signing_keys.clone(),
        are_lines_errors: true,
    };
    check(creation, &wanted)?;
    let place = work_directory::own(&work)?;
    let wanted = kiwi::Wanted { recipe: place.join(RECIPE), ..wanted };
    let result = build_and_publish(creation, &wanted, &place);
    // A run that has fetched nothing leaves the directory empty; remove_dir fails if anything is there.
    let _ = std::fs::remove_dir(&place);
    result
}

/// Refuses arguments that a later step would refuse, before any work is done.
fn check(creation: &Creation, wanted: &kiwi::Wanted) -> Result<()> {
    let settings = &creation.settings;
    if let Source::Here(path) = Source::parse(&creation.source)? {
        named::resolve(&path).map_err(|e| Error::bad_input(format!("RECIPE is '{}': {e}", path.display())))?;
    }
    kiwi::check_files(settings, wanted)?;
    if creation.has_debug_shell {
        open::program()?;
    }
    if creation.node.is_none() {
        settings.packing.packer.check()?;
        sandbox::check_namespaces()?;
    }
    interruptible(&settings.network, |work| work.wait(Store::check(&settings.store, &settings.network)).map(drop))
}

fn build_and_publish(creation: &Creation, wanted: &kiwi::Wanted, place: &Path) -> Result<u8> {
    let settings = &creation.settings;
    let url = settings.store.url.as_deref().unwrap_or_default();
    if let Some(output) = store::named_directory(url)
        && holds(place, &output)?
    {
        let why = format!("expected a directory outside {}, which is removed at the end", place.display());
        return Err(Error::bad_input(format!("--output is '{url}': {why}")));
    }
    let volume = open_tree(place)?;
    let attempted = || format!("build in {}", place.display());
    let lock = volume.reopen().attempt(attempted)?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        Error::new(attempted())
            .because("another 'ims-sshd create' of this recipe is at work")
            .advise("wait for its end")
    })?;
    // Remove what a failed run has left behind so that its failure could be examined.
    for name in volume.names().attempt(attempted)?.iter().filter(|name| !KEPT.iter().any(|kept| *name == kept)) {
        volume.remove_whole(name).attempt(attempted)?;
    }
    let (values, set) = creation.values.clone();
    let recipe = wanted.recipe.clone();
    let fetched = fetch::Wanted { directory: recipe.clone(), source: creation.source.clone(), values, set };
    fetch::run(settings, &fetched)?;
    if creation.node.is_none() {
        // Refuse a recipe that cannot be built before its repositories are waited for.
        kiwi::Buildable::read(&open_tree(&recipe)?, &creation.profiles, settings.job.arch())?;
        repositories::run(settings, &recipe, &creation.profiles, creation.limit)?;
    }
    let built = match &creation.node {
        Some(node) => offloaded::run(settings, wanted, node),
        None => kiwi::run(settings, wanted),
    };
    let is_packed = built.is_ok() && creation.node.is_some();
    if let Err(failed) = built {
        let code = mend(creation, place, failed)?;
        if code != 0 {
            return Ok(code);
        }
    }
    if is_packed {
        publish(settings, place)?;
    } else {
        steps::pack(settings, None, None, &creation.exclude, None)?;
        steps::upload(settings, None, None, None)?;
    }
    drop(volume);
    std::fs::remove_dir_all(place).attempt(|| format!("remove {}", place.display()))?;
    Ok(0)
}

/// Publishes the packed image that has come from a node.
fn publish(settings: &Settings, place: &Path) -> Result<()> {
    let missing = || Error::new(format!("open {}", place.display())).because("it has been removed");
    let files = SignalFiles::open(place)?.ok_or_else(missing)?;
    interruptible(&settings.network, |work| {
        let ims = settings.ims_client(work);
        say_result(&publish_transferred(work, settings, &ims, &files)?);
        Ok(())
    })
}

/// If the image root of a failed build is there, opens it over SSH; returns 0 if it was marked complete. `failed` is
/// the error of the build.
fn mend(creation: &Creation, place: &Path, failed: Error) -> Result<u8> {
    let image_root = place.join(CREATED_IMAGE_ROOT);
    if !creation.has_debug_shell || failed.is_interruption() || !image_root.is_dir() {
        return Err(failed);
    }
    let root = open_tree(&image_root)?;
    if SHELLS.iter().all(|shell| root.open_at(shell, OFlags::PATH, Mode::empty()).is_err()) {
        return Err(failed.advise_also("no shell is opened: the image root has none yet"));
    }
    drop(root);
    tracing::error!("{failed}");
    tracing::info!(
        "opening the image root of the failed build; if it is marked complete, it is published as it then is"
    );
    let named = image_root.display().to_string();
    let run = Run {
        source: source::resolve(&named)?,
        named,
        command_line: creation.command_line.clone(),
        name: Some(creation.settings.name.clone()),
        in_place: true,
        fresh: false,
        discards: false,
        unattended: None,
        end: End::Published,
        settings: None,
        node: None,
        work: work_directory::DEFAULT.into(),
        exclude: Vec::new(),
        // `create` prints the result itself.
        reports: Reports { changes: None, result: true },
    };
    let shell = Customization {
        port: None,
        listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
        authorized_key: None,
        jailed: true,
        binds: Vec::new(),
        variables: Vec::new(),
        host_script: None,
    };
    let code = customize::run(run, &shell)?;
    if code == 0 {
        kiwi::clean(&open_tree(&image_root)?)?;
    }
    Ok(code)
}

//! `ims-sshd fetch-recipe`: fetches a recipe into a directory and fills in its templates. Leaves nothing behind if it
//! fails.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use crate::error::{Advise, Attempt, Error, Result};
use crate::image::kind::{Content, Kind, Opened};
use crate::image::unpack::unpack;
use crate::ims::records::Status;
use crate::publish::download;
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::recipe::description::{self, Description};
use crate::recipe::outcome;
use crate::recipe::template::{Renderer, Values, fill_in, parse_values};
use crate::store;
use crate::sys::attributes::Node;
use crate::sys::file_kind::FileKind;
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::volume::layout::RECIPE;
use crate::volume::open_tree;

/// File, in a pod, with the values for the recipe's templates.
pub const DEFAULT_VALUES: &str = "/etc/cray/template_dictionary";

/// Directory of a recipe whose content kiwi-ng copies into the image, with modes, ACLs and capabilities but without
/// owners. Directories that have the name of a profile are copied in the same way (`kiwi/system/setup.py`).
const OVERLAY: &str = "root";

/// Extended attributes that grant rights.
const RIGHTS: [&str; 3] = ["security.capability", "system.posix_acl_access", "system.posix_acl_default"];

/// Maximum length of the file with the values, in bytes.
const LONGEST_VALUES: usize = 4 << 20;

/// Arguments of the command line.
#[derive(Debug)]
pub struct Wanted {
    /// Directory that the recipe is written to.
    pub directory: PathBuf,
    /// Path or URL of the recipe.
    pub source: String,
    /// File with values; if `None`, [`DEFAULT_VALUES`] is used if it exists.
    pub values: Option<PathBuf>,
    /// Additional values, which override those in the file.
    pub set: Vec<(String, String)>,
}

/// Fetches a recipe and reports the job's status to IMS.
pub fn run(settings: &Settings, wanted: &Wanted) -> Result<u8> {
    outcome::step(settings, Some(Status::FetchingRecipe), |work| {
        let source = Source::parse(&wanted.source)?;
        fetch(work, settings, &source, wanted)
    })
}

/// Unpacks `archive`, which contains a recipe with filled-in templates, into the image root parent.
pub(crate) fn unpack_filled_in(settings: &Settings, archive: &Path) -> Result<()> {
    let work = Work::begin(&settings.network)?;
    let recipe = unpack_recipe(&work, &Opened::open(archive)?, &open_tree(&settings.job.parent)?, RECIPE)?;
    check(&recipe)?;
    // Keep other users out of the directory, whatever owners and modes the files in it have.
    let user = (Some(rustix::process::geteuid()), Some(rustix::process::getegid()));
    rustix::fs::chownat(&recipe, ".", user.0, user.1, AtFlags::empty())
        .and_then(|()| rustix::fs::chmodat(&recipe, ".", Mode::RWXU, AtFlags::empty()))
        .attempt(|| format!("set owner and mode of {RECIPE}"))
}

fn fetch(work: &Work, settings: &Settings, source: &Source, wanted: &Wanted) -> Result<()> {
    let values = values(wanted)?;
    let directory = named::resolve_beginning(&wanted.directory)
        .attempt(|| format!("create the directory {}", wanted.directory.display()))?;
    let (Some(parent), Some(name)) = (directory.parent(), directory.file_name().and_then(OsStr::to_str)) else {
        return Err(Error::bad_input(format!(
            "the recipe's directory is '{}': expected a directory with a name",
            directory.display()
        )));
    };
    std::fs::create_dir_all(parent).attempt(|| format!("create the directory {}", parent.display()))?;
    let is_job = settings.job.id.is_some();
    if !is_job {
        named::refuse_changeable(parent, true)
            .attempt(|| format!("create the directory {}", directory.display()))
            .advise("name one in a directory that only you can change, as well as all directories above it")?;
    }
    let volume = open_tree(parent)?;
    // A job's volume contains nothing else, so an existing directory may be replaced. Elsewhere it may be somebody's
    // work.
    if !is_job && volume.look(name).attempt(|| format!("look for {}", directory.display()))?.is_some() {
        let refused = Error::new(format!("create the directory {}", directory.display())).because("it exists");
        return Err(refused.advise("remove it, or name another one"));
    }
    let staging = Staging { volume: &volume, names: ["part", "unpacking"].map(|end| format!(".{name}.{end}")) };
    staging.remove();
    let [part, unpacking] = &staging.names;
    let archive = open(work, settings, source, &volume, part)?;
    // Unpack in a private directory, since the recipe's own directory gets the owner and mode that it has in its
    // source.
    let private = volume.make_private(unpacking).attempt(|| format!("create the directory {unpacking}"))?;
    let tree = unpack_recipe(work, &archive, &private, RECIPE)?;
    let nested = nested(&tree)?;
    let recipe = match &nested {
        Some(name) => tree.directory_without_links(name).attempt(|| format!("open {name}"))?,
        None => tree,
    };
    check(&recipe)?;
    fill_in(&Renderer { work, directory: &private }, &recipe, values.as_ref())?;
    let described = Description::read(&recipe)?;
    // In a pod, containers of IMS also read the recipe, and may run as another user.
    let mode = if is_job { 0o755 } else { 0o700 };
    let overlays: Vec<_> = described.profiles.iter().map(|(name, _)| &**name).chain([OVERLAY]).collect();
    own(&recipe, &overlays)
        .and_then(|()| Ok(rustix::fs::chmodat(&recipe, ".", Mode::from_raw_mode(mode), AtFlags::empty())?))
        .attempt(|| format!("set owners and modes in {}", directory.display()))?;
    volume.remove_whole(OsStr::new(name)).attempt(|| format!("remove {}", directory.display()))?;
    let from = nested.map_or_else(|| RECIPE.to_owned(), |nested| format!("{RECIPE}/{nested}"));
    private.rename_over(&from, &volume, name).attempt(|| format!("create the directory {}", directory.display()))?;
    tracing::info!(
        "the recipe '{}' is {}, its description {}",
        described.name,
        directory.display(),
        described.file.display()
    );
    Ok(())
}

/// Temporary files on the volume, which are removed at the end.
struct Staging<'a> {
    volume: &'a Tree,
    names: [String; 2],
}

impl Staging<'_> {
    fn remove(&self) {
        for name in &self.names {
            let _ = self.volume.remove_whole(OsStr::new(name));
        }
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Returns the values for the templates; `None` if no values were given at all.
fn values(wanted: &Wanted) -> Result<Option<Values>> {
    let file = wanted.values.clone().or_else(|| Some(DEFAULT_VALUES.into()).filter(|file: &PathBuf| file.exists()));
    let mut values = match &file {
        None => None,
        Some(file) => {
            let shown = file.display().to_string();
            let text = std::fs::read(file).attempt(|| format!("read the values in {shown}"))?;
            if text.len() > LONGEST_VALUES {
                return Err(Error::new(format!("read the values in {shown}")).because("it is too long"));
            }
            Some(parse_values(&text, &shown)?)
        }
    };
    if !wanted.set.is_empty() {
        values.get_or_insert_with(BTreeMap::new).extend(wanted.set.iter().cloned());
    }
    Ok(values)
}

/// Opens the recipe's archive or directory; downloads the recipe first if its source is a URL.
fn open(work: &Work, settings: &Settings, source: &Source, volume: &Tree, part: &str) -> Result<Opened> {
    let url = match source {
        Source::Here(path) => {
            let Opened { shown, content } = Opened::open(path)?;
            let content = match content {
                Content::File(file) if settings.expected.is_given() => {
                    Content::File(settings.expected.check(work, file, &shown.display().to_string(), Some(volume))?)
                }
                Content::Directory(_) if settings.expected.is_given() => {
                    let refused = Error::new(format!("use {} as a recipe", shown.display()));
                    return Err(refused
                        .because("it is a directory, which has no checksum")
                        .advise("leave the checksum out"));
                }
                content => content,
            };
            return Ok(Opened { shown, content });
        }
        Source::Web(url) => url.clone(),
        Source::S3(bucket, key) => work.wait(store::sign(bucket, key, &settings.store, &settings.network))?,
    };
    let file = download::fetch(work, &url, &settings.expected, volume, part, 2)?;
    Ok(Opened { shown: volume.shown().join(part), content: Content::File(file) })
}

/// Refuses a file that is not a tar archive.
pub fn check_archive(path: &Path) -> Result<()> {
    check_kind(&Opened::open(path)?)
}

fn check_kind(archive: &Opened) -> Result<()> {
    let refuse = |why: String| {
        let attempted = format!("use {} as a recipe", archive.shown.display());
        Err(Error::new(attempted).because(why).advise("a recipe is a tar archive or a directory"))
    };
    match archive.kind() {
        Ok(None | Some(Kind::Tar(_))) => Ok(()),
        Ok(Some(_)) => refuse("it is a squashfs or a cpio archive".into()),
        Err(e) => refuse(e.reason()),
    }
}

/// Unpacks or copies the recipe in a confined process.
fn unpack_recipe(work: &Work, archive: &Opened, volume: &Tree, name: &str) -> Result<Tree> {
    check_kind(archive)?;
    let attempted = || format!("use {} as a recipe", archive.shown.display());
    let unpacked = unpack(work, archive, volume, name);
    work.unless_interrupted(unpacked)
        .map_err(|e| if e.is_interruption() { e } else { Error::new(attempted()).because(e.reason()) })
}

/// Makes this user the owner of the whole recipe, whose scripts run as root. Removes setuid, setgid and sticky bits,
/// write permission of group and others, ACLs and file capabilities, except in `overlays`: their modes and attributes
/// become those of the image.
fn own(recipe: &Tree, overlays: &[&str]) -> std::io::Result<()> {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    recipe.walk(|path, directory, name, found| {
        let node = Node { directory, name };
        let (mut wanted, mut attributes) = (*found, node.attributes()?);
        (wanted.st_uid, wanted.st_gid) = (user, group);
        if !path.iter().next().is_some_and(|top| overlays.iter().any(|overlay| top == *overlay)) {
            wanted.st_mode &= !(0o7000 | named::WRITABLE);
            attributes.retain(|name, _| !RIGHTS.iter().any(|right| name == right));
        }
        node.take(&wanted, &attributes)
    })
}

/// Returns the name of the only entry of `tree` if this entry is a directory that contains the description, as in the
/// archive of a Git repository.
fn nested(tree: &Tree) -> Result<Option<String>> {
    if description::is_there(tree) {
        return Ok(None);
    }
    let names = tree.names().attempt(|| "read the recipe's directory")?;
    let [name] = names.as_slice() else { return Ok(None) };
    let is_recipe = tree.directory_without_links(name).is_ok_and(|below| description::is_there(&below));
    Ok(name.to_str().filter(|_| is_recipe).map(str::to_owned))
}

/// Refuses devices, pipes and sockets, which a recipe never needs. Also refuses links at the recipe's top that lead out
/// of the recipe, since kiwi-ng would read other files through them. Links further down are content of the image, and
/// may lead anywhere.
fn check(recipe: &Tree) -> Result<()> {
    let refuse = |path: &Path, why: String| {
        let refused = Error::new(format!("use {} as a part of a recipe", path.display())).because(why);
        Err(refused.advise("leave it out of the archive"))
    };
    let mut wrong = None;
    let walked = recipe.walk(|path, _, _, found| {
        let kind = FileType::from_raw_mode(found.st_mode);
        let why = match kind {
            FileType::Directory | FileType::RegularFile => None,
            FileType::Symlink if path.components().count() > 1 => None,
            FileType::Symlink => leads_out(recipe, path),
            _ => Some(format!("it is {}", FileKind::of(found))),
        };
        if let (None, Some(why)) = (&wrong, why) {
            wrong = Some((path.to_owned(), why));
        }
        Ok(())
    });
    walked.attempt(|| "read the recipe")?;
    wrong.map_or(Ok(()), |(path, why)| refuse(&path, why))
}

fn leads_out(recipe: &Tree, path: &Path) -> Option<String> {
    match recipe.beneath(path) {
        Ok(handle) => {
            let _ = handle.as_fd();
            None
        }
        Err(e) if Errno::from_io_error(&e) == Some(Errno::XDEV) => {
            Some("it is a link that leads out of the recipe".into())
        }
        Err(e) => Some(format!("it is a link that leads nowhere: {e}")),
    }
}

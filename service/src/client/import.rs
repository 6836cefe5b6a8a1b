//! `ims images import` and `ims recipes import` bring an image or a recipe of this machine into the service's store.
//! This process itself reads the source and writes to the store, with its own rights, so that the service opens no path
//! on behalf of others.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Output, Stdio};

use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::local::names;
use ims_sshd::recipe::fetch::check_archive;
use ims_sshd::sys::process::terminate_after_us;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;
use uuid::Uuid;

use super::arguments::{ImportImage, ImportRecipe, RecipeType};
use super::connection::Service;
use super::requests::{self, DELETED_RECIPES, IMAGES, RECIPES};
use super::value::Value;
use crate::records::Location;
use crate::runner::programs;
use crate::signals::{INTERRUPTS, Signals};
use crate::store::Store;

/// Beginning of the name of an import's directory; an ID follows.
const WORK: &str = "import.";

/// A directory that is removed with its content when this value is dropped.
struct Work {
    path: PathBuf,
    /// Locked, so that another import does not take the directory for one that a killed import left behind.
    _lock: File,
}

impl Work {
    fn below(directory: &Path) -> Result<Self> {
        let path = directory.join(format!("{WORK}{}", Uuid::new_v4()));
        let attempted = || format!("create {}", path.display());
        // Keep other users out: they must not reach setuid programs of an image.
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(directory).attempt(attempted)?;
        // Locks the directory of all imports for a moment: no other import sees this one without its lock.
        let all = locked(directory, FlockOperation::LockExclusive).attempt(attempted)?;
        remove_left_over(directory);
        make(&path).attempt(attempted)?;
        let lock = locked(&path, FlockOperation::NonBlockingLockExclusive).attempt(attempted)?;
        drop(all);
        Ok(Self { path, _lock: lock })
    }
}

fn locked(directory: &Path, operation: FlockOperation) -> std::io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = File::from(rustix::fs::open(directory, flags, Mode::empty())?);
    rustix::fs::flock(&opened, operation)?;
    Ok(opened)
}

/// Removes directories that killed imports of this user left in `directory`.
fn remove_left_over(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        let id = name.to_str().and_then(|name| name.strip_prefix(WORK));
        let is_own =
            |lock: &File| lock.metadata().is_ok_and(|found| found.uid() == rustix::process::geteuid().as_raw());
        if id.is_some_and(|id| Uuid::parse_str(id).is_ok())
            && locked(&path, FlockOperation::NonBlockingLockExclusive).is_ok_and(|lock| is_own(&lock))
            && removed(&path)
        {
            eprintln!("ims: removed {}, which a killed import left behind", path.display());
        }
    }
}

/// Removes the directory of an import; returns whether that succeeded.
fn removed(directory: &Path) -> bool {
    let removed = std::fs::remove_dir_all(directory);
    let removed = removed.inspect_err(|error| {
        eprintln!("ims: cannot remove {}: {error}; remove it by hand", directory.display());
    });
    removed.is_ok()
}

impl Drop for Work {
    fn drop(&mut self) {
        removed(&self.path);
    }
}

/// Imports an image, and returns its record.
pub(super) async fn image(service: &Service, wanted: &ImportImage) -> Result<Value> {
    let attempted = || format!("import {}", wanted.source);
    let name = wanted.name.clone().unwrap_or_else(|| names::of_source(&wanted.source));
    let source = std::path::absolute(&wanted.source).ok().filter(|path| path.exists());
    let source = source.map_or_else(|| wanted.source.clone(), |path| path.display().to_string());
    let variables = programs::store_variables(&wanted.store.settings()?);
    let work = Work::below(&wanted.work)?;
    let access = service.variables(&work.path)?;
    let mut interrupts = Signals::receive(&INTERRUPTS)?;
    let mut run = async |words: &[&str]| {
        let mut command = Command::new(programs::ims_sshd());
        command.args(words).current_dir(&work.path).stdin(Stdio::null());
        command.envs(variables.clone()).envs(access.clone()).env_remove("IMS_JOB_ID").env("LOG_LEVEL", "WARNING");
        command.envs(wanted.arch.map(|arch| ("BUILD_ARCH", arch.word())));
        let boot = [("KERNEL_FILENAME", &wanted.kernel), ("INITRD_FILENAME", &wanted.initrd)];
        command.envs(boot.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))));
        let output = output_of(&mut command, &mut interrupts).await?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        // The program has already printed its error.
        let step = words.first().copied().unwrap_or_default();
        Err(Error::new(attempted()).because(format!("'ims-sshd {step}' failed, {}", output.status)))
    };
    let archive = format!("{name}.sqsh");
    // The steps keep their files in the current directory if the source is not an image root.
    let root = if Path::new(&source).is_dir() { source.as_str() } else { "." };
    if root == "." {
        run(&["prepare", ".", &source]).await?;
    }
    run(&["package", root, "--archive", &archive]).await?;
    let said = run(&["upload", root, "--archive", &archive, "--name", &name]).await?;
    let id = id_in(&said).ok_or_else(|| Error::new(attempted()).because("'ims-sshd upload' did not name the image"))?;
    service.ask(&IMAGES.describe(&id)).await
}

/// Returns the standard output of a program; its standard error goes to that of this process. A signal to this process
/// is passed on, so that the program removes what it has made. Then the error is that of an interruption.
async fn output_of(command: &mut Command, interrupts: &mut Signals) -> Result<Output> {
    let attempted = format!("start {}", command.as_std().get_program().display());
    terminate_after_us(command.as_std_mut());
    // A process group of its own, so that a signal from the terminal comes once.
    let child = command.process_group(0).stdout(Stdio::piped()).spawn().attempt(|| attempted.clone())?;
    let pid = child.id().map(|pid| Pid::from_raw(pid.cast_signed()));
    let mut output = pin!(child.wait_with_output());
    let signal = tokio::select! {
        output = &mut output => return output.attempt(|| attempted.clone()),
        signal = interrupts.next() => signal,
    };
    // The child is not reaped yet, so the ID is still its own.
    let _ = pid.map(|pid| kill(pid, signal));
    let _ = output.await;
    Err(Error::interrupted(signal))
}

/// Returns the ID of the image from the report of an upload.
fn id_in(said: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Record {
        id: String,
    }
    #[derive(Deserialize)]
    struct Report {
        ims_image_record: Record,
    }
    serde_json::from_slice::<Report>(said).ok().map(|report| report.ims_image_record.id)
}

/// Bucket of recipes; upstream's clients use the same.
const RECIPES_BUCKET: &str = "ims";

/// Imports a recipe, and returns its record.
pub(super) async fn recipe(service: &Service, wanted: &ImportRecipe) -> Result<Value> {
    let shown = wanted.source.display().to_string();
    let attempted = || format!("import {shown}");
    let mut interrupts = Signals::receive(&INTERRUPTS)?;
    let content = if wanted.source.is_dir() {
        let mut tar = Command::new("tar");
        tar.args(["-cz", "--numeric-owner", "-C"]).arg(&wanted.source).arg(".").stdin(Stdio::null());
        let output = output_of(&mut tar, &mut interrupts).await?;
        if !output.status.success() {
            return Err(Error::new(attempted()).because(format!("'tar' failed, {}", output.status)));
        }
        output.stdout
    } else {
        check_archive(&wanted.source)?;
        std::fs::read(&wanted.source).attempt(attempted)?
    };
    let store = Store::open(&wanted.store.settings()?)?;
    let name = wanted.name.clone().unwrap_or_else(|| names::of_source(&shown));
    let distribution = wanted.linux_distribution;
    let request = requests::new_recipe(&name, RecipeType::Kiwi, distribution, None, &wanted.build)?;
    let record = service.ask(&request).await?;
    let id = record.text("id").ok_or_else(|| Error::new(attempted()).because("the service answers no ID"))?;
    let at = Location { bucket: RECIPES_BUCKET.into(), key: format!("recipes/{id}/recipe.tar.gz") };
    let linked = async {
        let etag = store.put(&at, content).await.attempt(|| format!("upload {at}"))?;
        let link = json!({ "path": at.to_string(), "etag": etag, "type": "s3" });
        service.ask(&RECIPES.update(id, json!({ "link": link }))).await
    };
    let linked = tokio::select! {
        linked = linked => linked,
        signal = interrupts.next() => Err(Error::interrupted(signal)),
    };
    let failed = match linked {
        Err(failed) => failed,
        linked => return linked,
    };
    // Remove the object and the record, also from the deleted recipes, so that nothing of the failed import remains.
    let _ = store.remove(&at).await;
    for request in [RECIPES.delete(id), DELETED_RECIPES.delete(id)] {
        if let Err(error) = service.ask(&request).await {
            eprintln!("ims: {error}");
        }
    }
    Err(failed)
}

//! `ims images import` and `ims recipes import` bring an image or a recipe of this machine into the service's store.
//! This process itself reads the source and writes to the store, with its own rights, so that the service opens no path
//! on behalf of others.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::local::names;
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
use crate::store::Store;

/// A directory that is removed with its content when this value is dropped.
struct Work(PathBuf);

impl Work {
    fn below(directory: &Path) -> Result<Self> {
        let path = directory.join(format!("import.{}", Uuid::new_v4()));
        // Keep other users out: they must not reach setuid programs of an image.
        DirBuilder::new().recursive(true).mode(0o700).create(&path).attempt(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("ims: cannot remove {}: {error}; remove it by hand", self.0.display());
        }
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
    let access = service.variables(&work.0)?;
    let run = async |words: &[&str]| {
        let mut command = Command::new(programs::ims_sshd());
        command.args(words).current_dir(&work.0).stdin(Stdio::null());
        command.envs(variables.clone()).envs(access.clone()).env_remove("IMS_JOB_ID").env("LOG_LEVEL", "WARNING");
        command.envs(wanted.arch.map(|arch| ("BUILD_ARCH", arch.word())));
        let boot = [("KERNEL_FILENAME", &wanted.kernel), ("INITRD_FILENAME", &wanted.initrd)];
        command.envs(boot.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))));
        let output = output_of(&mut command).await.attempt(|| "start ims-sshd")?;
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

/// Returns the standard output of a program; its standard error goes to that of this process.
async fn output_of(command: &mut Command) -> std::io::Result<std::process::Output> {
    command.stdout(Stdio::piped()).spawn()?.wait_with_output().await
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
    let content = if wanted.source.is_dir() {
        let mut tar = Command::new("tar");
        tar.args(["-cz", "--numeric-owner", "-C"]).arg(&wanted.source).arg(".").stdin(Stdio::null());
        let output = output_of(&mut tar).await.attempt(|| "start tar")?;
        if !output.status.success() {
            return Err(Error::new(attempted()).because(format!("'tar' failed, {}", output.status)));
        }
        output.stdout
    } else {
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
    let failed = match linked.await {
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

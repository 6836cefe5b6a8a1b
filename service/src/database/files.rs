//! Upstream's files, one JSON array for each table. They are imported at the first start, and again whenever they have
//! been replaced. `ims export` writes them, so that a site can go back to upstream's service.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use ims_sshd::error::{Attempt, Error, Result as Started};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{Change, Database, Result};
use crate::records::{Deleted, Image, Job, Kind, Node, PublicKey, Recipe, Record, new_id, now, wire};

/// Calls a generic function with the record type of each table.
macro_rules! for_each_table {
    ($function:ident($($argument:expr),*)) => {
        $function::<PublicKey>($($argument),*).await?;
        $function::<Recipe>($($argument),*).await?;
        $function::<Image>($($argument),*).await?;
        $function::<Job>($($argument),*).await?;
        $function::<Node>($($argument),*).await?;
        $function::<Deleted<PublicKey>>($($argument),*).await?;
        $function::<Deleted<Recipe>>($($argument),*).await?;
        $function::<Deleted<Image>>($($argument),*).await?;
    };
}

/// Imports the files in `directory` that are new or have been replaced since the last import or export.
pub async fn import(database: &Database, directory: &Path) -> Started<()> {
    for_each_table!(import_table(database, directory));
    Ok(())
}

/// Writes each table as a file into `directory`.
pub async fn export(database: &Database, directory: &Path) -> Started<()> {
    for_each_table!(export_table(database, directory));
    Ok(())
}

/// Creates, if they are missing, the files that upstream's manual tells administrators to replace for an import: the
/// manual first checks that they exist. Only for a database that no other replica uses. Each replica would create files
/// of its own, and import the files of another replica as replaced ones.
pub async fn make_missing(database: &Database, directory: &Path) -> Started<()> {
    for name in [Kind::PublicKeys, Kind::Recipes, Kind::Images].into_iter().filter_map(Kind::file) {
        let path = directory.join(name);
        let attempted = || format!("make {}", path.display());
        if std::fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        let new = tempfile::Builder::new().permissions(Permissions::from_mode(0o644)).tempfile_in(directory);
        let mut file = new.attempt(attempted)?;
        file.write_all(b"[]").attempt(attempted)?;
        // Record the file's state before the file gets its name: after a kill in between, the next start must not
        // import it.
        let state = state(file.path()).ok_or_else(|| Error::new(attempted()).because("it is gone already"))?;
        let mut change = database.change(&[]).await.attempt(attempted)?;
        change.set_imported(name, &state).await.attempt(attempted)?;
        change.commit().await.attempt(attempted)?;
        file.persist_noclobber(&path).map_err(|e| Error::new(attempted()).because(e.error))?;
    }
    Ok(())
}

async fn import_table<R: Record>(database: &Database, directory: &Path) -> Started<()> {
    let Some(name) = R::KIND.file() else { return Ok(()) };
    let path = directory.join(name);
    let attempted = || format!("import {}", path.display());
    let Some(state) = state(&path) else { return Ok(()) };
    let text = std::fs::read(&path).attempt(attempted)?;
    import_text::<R>(database, name, &state, &text).await.attempt(attempted)
}

async fn import_text<R: Record>(database: &Database, name: &str, state: &str, text: &[u8]) -> Result<()> {
    let mut change = database.change(&[R::KIND]).await?;
    if change.imported(name).await?.as_deref() == Some(state) {
        return Ok(());
    }
    match serde_json::from_slice::<Vec<&RawValue>>(text) {
        Ok(items) => replace::<R>(&mut change, name, items).await?,
        Err(error) => {
            let reason = format!("{name} is no JSON array: {error}");
            set_aside(&mut change, R::KIND, &String::from_utf8_lossy(text), &reason).await?;
        }
    }
    change.set_imported(name, state).await?;
    change.commit().await
}

/// Replaces the records of a table by those in a file. Old records that the file lacks are set aside, not lost.
async fn replace<R: Record>(change: &mut Change, name: &str, items: Vec<&RawValue>) -> Result<()> {
    let before: Vec<R> = change.records().await?;
    change.clear(R::KIND).await?;
    let (mut records, mut ids) = (Vec::new(), BTreeSet::new());
    for item in items {
        let reason = match record::<R>(item.get()) {
            Ok(record) if ids.insert(record.id().to_owned()) => {
                records.push(record);
                continue;
            }
            Ok(record) => format!("{name} has an earlier record with the ID {}", record.id()),
            Err(reason) => format!("a record in {name} is wrong: {reason}"),
        };
        set_aside(change, R::KIND, item.get(), &reason).await?;
    }
    for record in before.iter().filter(|record| !ids.contains(record.id())) {
        let reason = format!("{name} was replaced by a file without this record");
        set_aside(change, R::KIND, &wire::compact(record), &reason).await?;
    }
    change.fill(&records).await?;
    let count = records.len();
    tracing::info!("imported {count} records from {name}");
    Ok(())
}

/// Parses a record as upstream does: unknown fields are dropped, and missing fields get their defaults.
fn record<R: Record>(item: &str) -> std::result::Result<R, String> {
    let mut item: Value = serde_json::from_str(item).map_err(|e| e.to_string())?;
    let fields = item.as_object_mut().ok_or("it is no object")?;
    if R::KIND != Kind::Nodes {
        fields.entry("id").or_insert_with(|| json!(new_id()));
        for time in ["created", "deleted"] {
            let time = fields.entry(time).or_insert_with(|| json!(now()));
            // Upstream parses the zone `Z` and writes it back as `+00:00`.
            if let Some(text) = time.as_str().and_then(|text| text.strip_suffix('Z')) {
                *time = json!(format!("{text}+00:00"));
            }
        }
    }
    serde_json::from_value(item).map_err(|e| e.to_string())
}

async fn set_aside(change: &mut Change, kind: Kind, text: &str, reason: &str) -> Result<()> {
    tracing::warn!("set aside: {reason}; see the table set_aside of the database");
    change.set_aside(kind, text, reason).await
}

async fn export_table<R: Record>(database: &Database, directory: &Path) -> Started<()> {
    let Some(name) = R::KIND.file() else { return Ok(()) };
    let path = directory.join(name);
    let attempted = || format!("write {}", path.display());
    let mut change = database.change(&[R::KIND]).await.attempt(attempted)?;
    let records: Vec<R> = change.records().await.attempt(attempted)?;
    let mut file = tempfile::NamedTempFile::new_in(directory).attempt(attempted)?;
    file.write_all(wire::spaced(&records).as_bytes()).attempt(attempted)?;
    file.as_file().sync_all().attempt(attempted)?;
    file.persist(&path).map_err(|e| Error::new(attempted()).because(e.error))?;
    // Record the file's state, so that the next start does not take the file for a replaced one and import it.
    let state = state(&path).ok_or_else(|| Error::new(attempted()).because("it is gone already"))?;
    change.set_imported(name, &state).await.attempt(attempted)?;
    change.commit().await.attempt(attempted)
}

/// Returns the modification time and size of a file as a text, which changes when another file replaces the file.
fn state(path: &Path) -> Option<String> {
    let metadata = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
    Some(format!("{}.{:09} {}", metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

//! Multipart upload of a large file. Uploaded parts are recorded, so that after a crash only the missing parts are
//! sent.

use std::fs::File;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::error::{Attempt, Error, Result};
use crate::publish::journal::{JournalDirectory, MOST_PARTS, Upload};
use crate::store::error::cause;
use crate::store::place::Place;
use crate::store::requests::Slice;
use crate::store::{Description, Store};
use crate::transfer::checksum::Sha256;
use crate::transfer::progress::Progress;
use crate::transfer::{AT_A_TIME, Fault, Outage, Work, retry};

/// Size of a part, in bytes.
pub(crate) const PART: u64 = 16 << 20;

/// Sends files to a store.
pub(crate) struct Sender<'a> {
    /// Sends requests.
    pub(crate) work: &'a Work,
    /// The store.
    pub(crate) store: &'a Store,
    /// Settings of the store. A recorded upload to another store is aborted with the same keys.
    pub(crate) settings: &'a Place,
    /// Directory of the journal.
    pub(crate) directory: &'a JournalDirectory<'a>,
}

/// A file to send.
pub(crate) struct Large<'a> {
    /// Key of the object.
    pub(crate) place: &'a str,
    /// Content of the object.
    pub(crate) content: &'a Arc<File>,
    /// Size, in bytes.
    pub(crate) size: u64,
    /// MD5, in hexadecimal digits.
    pub(crate) md5: &'a str,
    /// SHA-256 of each part, unless the store is a directory.
    pub(crate) parts: &'a [Sha256],
    /// Media type and metadata of the object.
    pub(crate) description: &'a Description,
}

impl Sender<'_> {
    /// Sends the missing parts of `object`. A failed upload stays recorded, for [`Sender::abort`] or the next run.
    pub(crate) fn send(&self, object: &Large) -> Result<()> {
        let attempted = format!("upload {}", self.store.url_of(object.place));
        let mut unfinished = self.unfinished(object)?;
        loop {
            let goes_on = unfinished.is_some();
            let sent = self.work.wait(async {
                match self.try_send(object, unfinished.take()).await {
                    Ok(()) => Ok(true),
                    Err(Fault::Final(error)) => Err(error),
                    Err(Fault::Transient(cause)) if goes_on => {
                        let url = self.store.url_of(object.place);
                        tracing::warn!("cannot continue the unfinished upload of {url}: {cause}; starting a new one");
                        Ok(false)
                    }
                    Err(Fault::Transient(cause)) => Err(Error::new(&attempted).because(cause)),
                }
            });
            if sent? {
                return Upload::clear(self.directory);
            }
            self.forget()?;
        }
    }

    /// Finds an unfinished upload of the same content to the same key. Aborts any other recorded upload, whose parts
    /// would take space in the store.
    fn unfinished(&self, object: &Large) -> Result<Option<Upload>> {
        let url = self.store.url_of(object.place);
        match Upload::read(self.directory)? {
            Some(upload) if upload.url == url && upload.md5 == object.md5 && upload.part == part_of(object.size) => {
                upload.write(self.directory)?;
                Ok(Some(upload))
            }
            _ => self.forget().map(|()| None),
        }
    }

    /// Aborts the recorded upload; only warns if the store refuses that.
    fn forget(&self) -> Result<()> {
        if let Err(error) = self.abort() {
            self.work.heed()?;
            tracing::warn!("{error}; left in the store, delete it by hand");
        }
        Ok(())
    }

    /// Aborts the recorded upload. If the upload is in another store, uses the keys of this store there: keys apply to
    /// all buckets of a server.
    pub(crate) fn abort(&self) -> Result<()> {
        let Some(upload) = Upload::read(self.directory)? else { return Ok(()) };
        let attempted = format!("abort the unfinished upload of {}", upload.url);
        let url = upload.url.strip_suffix(&upload.place).map(str::to_owned);
        let store = Store::open(&Place { url, ..self.settings.clone() }, &self.work.network)?;
        let limit = self.work.network.retry_limit;
        self.work.wait(retry(limit, &attempted, &Outage::default(), async || {
            store.abort(&upload.place, &upload.id).await.map_err(|e| Fault::Transient(cause(&e)))
        }))?;
        Upload::clear(self.directory)
    }

    /// Continues the upload `unfinished`, or starts a new one. Treats every error of the store as transient: the store
    /// may have dropped the old upload, and may accept a new one.
    async fn try_send(&self, object: &Large<'_>, unfinished: Option<Upload>) -> std::result::Result<(), Fault> {
        let told = |error: object_store::Error| Fault::Transient(cause(&error));
        let part = part_of(object.size);
        let mut upload = match unfinished {
            Some(upload) => upload,
            None => {
                let id = self.store.begin(object.place, object.description).await.map_err(told)?;
                let (url, place) = (self.store.url_of(object.place), object.place.to_owned());
                let begun = Upload { url, place, md5: object.md5.to_owned(), part, id, parts: Vec::new() };
                begun.write(self.directory)?;
                begun
            }
        };
        let mut missing = (0..usize::try_from(object.size.div_ceil(part)).unwrap_or(MOST_PARTS))
            .filter(|number| !matches!(upload.parts.get(*number), Some(Some(_))))
            .collect::<Vec<_>>()
            .into_iter();
        let there = upload.parts.iter().flatten().count() as u64;
        if there > 0 {
            let url = self.store.url_of(object.place);
            tracing::info!("{there} parts of {url} were uploaded before; uploading the {} missing ones", missing.len());
        }
        let mut progress = Progress::begin("uploading", Some(object.size));
        progress.at(there * part);
        let mut sending = JoinSet::new();
        loop {
            if sending.len() < AT_A_TIME
                && let Some(number) = missing.next()
            {
                let at = number as u64 * part;
                let length = part.min(object.size - at);
                let content = Slice { file: object.content.clone(), at, length };
                let sha256 = object.parts.get(number).copied();
                let sent = self.store.put_part(object.place, &upload.id, number, content, sha256);
                sending.spawn(async move { (number, length, sent.await) });
            } else if let Some(ended) = sending.join_next().await {
                let (number, length, etag) = ended.attempt(|| "send a part")?;
                upload.add(self.directory, number, &etag.map_err(told)?)?;
                progress.add(length);
            } else {
                break;
            }
        }
        let parts = upload.parts.into_iter().flatten().collect();
        match self.store.complete(object.place, &upload.id, parts).await {
            // An earlier attempt or run may have completed the upload without receiving the response. Some stores then
            // no longer know the upload's ID.
            Err(_) if self.store.holds(object.place, object.size, object.md5).await => Ok(()),
            ended => ended.map_err(told),
        }
    }
}

/// Size, in bytes, of a part of an object of `size` bytes.
pub(crate) fn part_of(size: u64) -> u64 {
    PART.max(size.div_ceil(MOST_PARTS as u64))
}

//! A large file goes to a store in parts. Which of them are there is noted, so that whoever begins again after a crash sends the others
//! alone.

use std::fs::File;
use std::os::unix::fs::FileExt;

use tokio::task::JoinSet;

use crate::error::{Attempt, Error, Result};
use crate::publish::journal::{JournalDirectory, MOST_PARTS, Upload};
use crate::store::error::cause;
use crate::store::place::Place;
use crate::store::{Description, Store};
use crate::transfer::progress::Progress;
use crate::transfer::{AT_A_TIME, Fault, Work, retry};

/// As much as goes in one request. What is under way is in memory.
pub(crate) const PART: u64 = 16 << 20;

/// Who sends it, and where to.
pub(crate) struct Sender<'a> {
    /// Servers.
    pub(crate) work: &'a Work,
    /// The store.
    pub(crate) store: &'a Store,
    /// What opens another one.
    pub(crate) settings: &'a Place,
    /// Where it is noted.
    pub(crate) directory: &'a JournalDirectory<'a>,
}

/// What is sent.
pub(crate) struct Large<'a> {
    /// Its key.
    pub(crate) place: &'a str,
    /// The file.
    pub(crate) content: &'a File,
    /// Its size, in bytes.
    pub(crate) size: u64,
    /// What it comes to.
    pub(crate) md5: &'a str,
    /// What is told of it.
    pub(crate) description: &'a Description,
}

impl Sender<'_> {
    /// Sends what of `object` is not there yet. What fails stays noted, for [`Sender::abort`] or for the next one.
    pub(crate) fn send(&self, object: &Large) -> Result<()> {
        let attempted = format!("upload {}", self.store.url_of(object.place));
        let mut noted = self.noted(object)?;
        loop {
            let goes_on = noted.is_some();
            let sent = self.work.wait(async {
                match self.try_send(object, noted.take()).await {
                    Ok(()) => Ok(true),
                    Err(Fault::Final(error)) => Err(error),
                    Err(Fault::Transient(cause)) if goes_on => {
                        let url = self.store.url_of(object.place);
                        tracing::warn!("cannot go on with the unfinished upload of {url}: {cause}; uploading it anew");
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

    /// An unfinished upload of the same content to the same place. Any other is aborted: it is no object, and takes
    /// space all the same.
    fn noted(&self, object: &Large) -> Result<Option<Upload>> {
        let url = self.store.url_of(object.place);
        match Upload::read(self.directory)? {
            Some(upload) if upload.url == url && upload.md5 == object.md5 && upload.part == part_of(object.size) => {
                upload.write(self.directory)?;
                Ok(Some(upload))
            }
            _ => self.forget().map(|()| None),
        }
    }

    /// Aborts the recorded upload, and goes on where the store refuses that.
    fn forget(&self) -> Result<()> {
        if let Err(error) = self.abort() {
            self.work.heed()?;
            tracing::warn!("{error}; left in the store, delete it by hand");
        }
        Ok(())
    }

    /// Aborts the recorded upload. One in another store is aborted with the keys of this one, which are good for all buckets of a server.
    pub(crate) fn abort(&self) -> Result<()> {
        let Some(upload) = Upload::read(self.directory)? else { return Ok(()) };
        let attempted = format!("abort the unfinished upload of {}", upload.url);
        let url = upload.url.strip_suffix(&upload.place).map(str::to_owned);
        let store = Store::open(&Place { url, ..self.settings.clone() }, &self.work.network)?;
        let limit = self.work.network.retry_limit;
        self.work.wait(retry(limit, &attempted, async || {
            store.abort(&upload.place, &upload.id).await.map_err(|e| Fault::Transient(cause(&e)))
        }))?;
        Upload::clear(self.directory)
    }

    /// What the store refuses of one upload, because it has forgotten it, it may take of another.
    async fn try_send(&self, object: &Large<'_>, noted: Option<Upload>) -> std::result::Result<(), Fault> {
        let told = |error: object_store::Error| Fault::Transient(cause(&error));
        let part = part_of(object.size);
        let mut upload = match noted {
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
                let read = || format!("read what is uploaded to {}", self.store.url_of(object.place));
                let mut bytes = vec![0; usize::try_from(length).attempt(read)?];
                object.content.read_exact_at(&mut bytes, at).attempt(read)?;
                let sent = self.store.put_part(object.place, &upload.id, (number, at), bytes);
                sending.spawn(async move { (number, length, sent.await) });
            } else if let Some(ended) = sending.join_next().await {
                let (number, length, mark) = ended.attempt(|| "send a part")?;
                upload.add(self.directory, number, &mark.map_err(told)?)?;
                progress.add(length);
            } else {
                break;
            }
        }
        let parts = upload.parts.into_iter().flatten().collect();
        match self.store.complete(object.place, &upload.id, parts).await {
            // An earlier try, or run, may have ended it unheard. Then some stores know nothing of it any more.
            Err(_) if self.store.holds(object.place, object.size, object.md5).await => Ok(()),
            ended => ended.map_err(told),
        }
    }
}

/// How large a part is of an object of this size.
fn part_of(size: u64) -> u64 {
    PART.max(size.div_ceil(MOST_PARTS as u64))
}

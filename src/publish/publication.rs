//! Publishing: uploads the files of an image, its manifest last, and registers the image in IMS.

use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::SystemTime;

use md5::{Digest, Md5};
use serde_json::{Map, Value, json};

use crate::error::{Attempt, Error, Result};
use crate::image::boot::{BootFile, BootFiles};
use crate::ims::client::Ims;
use crate::ims::id::Id;
use crate::ims::records::{self, Artifact, Link, Status};
use crate::publish::journal::{Journal, JournalDirectory, Phase, Upload};
use crate::publish::manifest::{self, Identity};
use crate::publish::multipart::{Large, PART, Sender, part_of};
use crate::publish::settings::Settings;
use crate::store::error::cause;
use crate::store::{Description, MD5, Owner, SHA256, Store};
use crate::transfer::Work;
use crate::transfer::checksum::{OfFile, looks_like_md5, sums_of};
use crate::transfer::progress::size_in_words;

/// Key of each file of an image, below the image's ID, and its media type.
const ROOTFS: (&str, &str) = ("rootfs", "application/vnd.cray.image.rootfs.squashfs");
const KERNEL: (&str, &str) = ("kernel", "application/vnd.cray.image.kernel");
const INITRD: (&str, &str) = ("initrd", "application/vnd.cray.image.initrd");
const DEBUG_KERNEL: (&str, &str) = ("debug_kernel", "application/vnd.cray.image.debug.kernel");
const PARAMETERS: (&str, &str) = ("boot_parameters", "application/vnd.cray.image.parameters.boot");
const MANIFEST: (&str, &str) = ("manifest.json", "application/json");

/// All keys that an image can have.
const KEYS: [&str; 6] = [ROOTFS.0, KERNEL.0, INITRD.0, DEBUG_KERNEL.0, PARAMETERS.0, MANIFEST.0];

/// An image to publish.
pub(crate) struct Image {
    /// The packed image.
    pub(crate) rootfs: File,
    /// SHA-256 of the packed image when it was packed, if that was recorded.
    pub(crate) recorded: Option<String>,
    /// Kernel, initrd and parameters; `None` for an image that is never booted.
    pub(crate) boot: Option<BootFiles>,
    /// The kernel with its symbols.
    pub(crate) debug_kernel: Option<File>,
}

/// One file of an image.
struct Piece {
    key: &'static str,
    media_type: &'static str,
    content: Arc<File>,
    sums: OfFile,
    size: u64,
}

/// Publishes an image, and rolls back one that was published in part.
pub(crate) struct Publication<'a> {
    /// Sends requests.
    pub(crate) work: &'a Work,
    /// The settings of the job.
    pub(crate) settings: &'a Settings,
    /// Client of IMS.
    pub(crate) ims: &'a Ims<'a>,
    /// Directory of the journal.
    pub(crate) directory: &'a JournalDirectory<'a>,
}

impl Publication<'_> {
    /// Uploads and registers `image`, and returns the report to print. Rolls back on failure.
    pub(crate) fn publish(&self, journal: &mut Journal, image: Image) -> Result<Value> {
        let store = Store::open(&self.settings.store, &self.work.network)?;
        let mut is_published = false;
        let recorded = image.recorded.clone();
        let result = self.pieces(image, &store).and_then(|pieces| {
            is_published = self.forget_published(&store, journal, &pieces)?;
            self.refuse_changed(&pieces, recorded.as_deref())?;
            self.carry_out(&store, journal, &pieces, is_published)
        });
        let recorded = match &result {
            Err(_) if journal.is_told || is_published => journal.write(self.directory),
            Err(_) if self.roll_back(&store, journal) => self.begin_again(journal),
            // Not everything could be rolled back, so keep the journal: the next run tries again.
            Err(_) => journal.write(self.directory),
            // Even if this cannot be recorded, the image stays published.
            Ok(_) => self.end(journal, Phase::Published),
        };
        if let Err(error) = recorded {
            tracing::warn!("{error}");
        }
        result
    }

    /// Rolls back an image that a killed run has published in part. The journal keeps what cannot be rolled back.
    pub(crate) fn give_up(&self, journal: &mut Journal) -> Result<()> {
        if journal.image.is_none() && journal.request.is_none() || journal.is_told {
            return Ok(());
        }
        let store = Store::open(&self.settings.store, &self.work.network)?;
        self.work.roll_back();
        self.forget_published(&store, journal, &[])?;
        if !self.roll_back(&store, journal) {
            return Ok(());
        }
        journal.forget_image();
        self.directory.clear()
    }

    /// Removes the image, which was rolled back, from the journal. If the environment has finished, the journal still
    /// says so, and the next run of the sidecar publishes the environment's image.
    fn begin_again(&self, journal: &mut Journal) -> Result<()> {
        journal.forget_image();
        if journal.phase < Phase::Packing {
            return self.directory.clear();
        }
        Upload::clear(self.directory)?;
        journal.write(self.directory)
    }

    /// Records that the sidecar has finished; without a sidecar, removes the journal.
    pub(crate) fn end(&self, journal: &mut Journal, phase: Phase) -> Result<()> {
        let link = journal.link.take();
        journal.forget_image();
        if journal.phase < Phase::Packing {
            return self.directory.clear();
        }
        (journal.phase, journal.link) = (phase, link);
        Upload::clear(self.directory)?;
        journal.write(self.directory)
    }

    /// Checks whether an earlier run published the image in the journal completely. Without an IMS, it did if the
    /// manifest is in the store, since the manifest is uploaded last. With an IMS and outside a job, it did if the
    /// image's record has the link in the journal, since the link is set last. Returns true if such an image consists
    /// of `pieces`, so that nothing has to be uploaded again. Any other complete image is removed from the journal:
    /// somebody may have restored an old journal, and the image must be neither overwritten nor deleted.
    fn forget_published(&self, store: &Store, journal: &mut Journal, pieces: &[Piece]) -> Result<bool> {
        let Some(id) = journal.image.clone() else { return Ok(false) };
        let is_complete = if self.ims.is_there() {
            self.settings.job.id.is_none() && self.is_linked(&id, journal)?
        } else {
            // In a directory, an image is renamed from its ID to its name when it is complete, so an image that still
            // has its ID as its name is not complete.
            let manifest = format!("{id}/{}", MANIFEST.0);
            let attempted = format!("inspect {}", store.url_of(&manifest));
            !self.is_named(store) && self.wait(&attempted, store.is_there(&manifest))?
        };
        if !is_complete {
            return Ok(false);
        }
        tracing::info!("image {id} was published before");
        let is_there = |piece: &Piece| {
            let place = format!("{id}/{}", piece.key);
            self.work.wait(async { Ok(store.holds(&place, piece.size, &piece.sums.md5).await) })
        };
        let mut is_same = !pieces.is_empty();
        for piece in pieces {
            is_same = is_same && is_there(piece)?;
        }
        if is_same {
            journal.is_own_link = true;
        } else {
            journal.forget_image();
        }
        Ok(is_same)
    }

    /// Returns whether the record of the image in the journal has the link in the journal.
    fn is_linked(&self, id: &Id, journal: &Journal) -> Result<bool> {
        let link = journal.link.as_ref();
        if link.is_none() {
            return Ok(false);
        }
        let is_ours =
            |record: records::Image| record.link.as_ref() == link && self.differs(&record, id, journal, link).is_none();
        Ok(self.ims.image(id)?.is_some_and(is_ours))
    }

    fn carry_out(&self, store: &Store, journal: &mut Journal, pieces: &[Piece], is_published: bool) -> Result<Value> {
        let (mut record, is_new) = self.register(journal)?;
        let (id, is_published) = (record.id.clone(), is_published && !is_new);
        if !self.is_place_ours(store, &id, is_new)? {
            // Forget the image, so that the rollback deletes nothing of it.
            journal.forget_image();
            let upload = Error::new(format!("upload to {}", store.url_of(id.as_str())));
            return Err(upload
                .because("an existing object belongs to somebody else")
                .advise("nothing was written; find out who publishes there, and delete the image's record by hand"));
        }
        let mut described = store.shown(id.as_str());
        let artifacts = if let Some(link) = journal.link.as_ref().filter(|_| record.link.is_some()) {
            // An earlier run uploaded everything. The record was compared with the journal.
            self.check_manifest(store, &id, link)?;
            Vec::new()
        } else {
            let (artifacts, link, uploaded) = self.upload(store, &id, pieces, is_published)?;
            described = uploaded;
            journal.link = Some(link.clone());
            journal.write(self.directory)?;
            journal.is_own_link = true;
            record = self.link(journal, &id, link)?;
            artifacts
        };
        let job = self.ims.set_resultant_image(&id)?;
        let ended = self.tell_success(journal, &id)?;
        tracing::info!("the image is {described}");
        Ok(json!({
            "ims_image_artifacts": artifacts,
            "ims_image_record": record,
            "ims_job_record": ended.or(job).map_or_else(|| json!({}), |job| json!(job)),
            "result": "success",
        }))
    }

    /// Sets the link in the image's record, and returns the record. If the response is lost or unexpected, IMS may have
    /// set the link nevertheless, so this reads the record to find out.
    fn link(&self, journal: &Journal, id: &Id, link: Link) -> Result<records::Image> {
        let unknown = match self.ims.link_image(id, &link) {
            Ok(record) => return Ok(record.unwrap_or_else(|| self.local_record(id.clone(), Some(link)))),
            Err(unknown) => unknown,
        };
        let found = self.ims.image(id).ok().flatten().filter(|record| record.link.as_ref() == Some(&link));
        match found.filter(|record| self.difference(record, id, journal).is_none()) {
            Some(record) => {
                tracing::warn!("{unknown}; the record of image {id} has the link all the same: going on");
                Ok(record)
            }
            None => Err(unknown),
        }
    }

    /// Sets the job's status to success. This comes last, because it ends the job, its volume and this pod. Once IMS
    /// may have the status, nothing is rolled back, even after a signal. Returns the job's record.
    fn tell_success(&self, journal: &mut Journal, id: &Id) -> Result<Option<records::Job>> {
        if self.settings.job.id.is_none() || !self.ims.is_there() {
            return Ok(None);
        }
        journal.is_told = true;
        journal.write(self.directory).inspect_err(|_| journal.is_told = false)?;
        // From here on, a signal only shortens the wait.
        self.work.roll_back();
        let refused = match self.ims.set_status(Status::Success) {
            Ok(job) => return Ok(job),
            Err(refused) => refused,
        };
        // An earlier attempt may have succeeded although its response was lost. IMS refuses any status change of a
        // finished job, even to the same status, so ask for the job.
        let unknown = match self.ims.job() {
            Ok(Some(job)) if job.status == Status::Success => return Ok(Some(job)),
            // The server may still carry out a request whose wait a signal cut short.
            Ok(_) if self.work.is_in_a_hurry() => refused,
            Err(silent) if !self.ims.lacks_job() => {
                tracing::error!("{refused}");
                silent
            }
            _ => {
                journal.is_told = false;
                return Err(refused);
            }
        };
        let place = self.settings.store.url.as_deref().unwrap_or_default();
        Err(Error::new(format!("find out whether IMS knows the job as a success: {unknown}"))
            .because(format!("IMS may know the image as published; therefore image {id} stays in IMS and in {place}"))
            .advise(
                "run the same command again on this volume: it asks IMS and goes on; without the volume, see the job's \
                 status in IMS",
            ))
    }

    /// Verifies an image that IMS names as the result of a job: its record and its manifest must exist and match.
    pub(crate) fn look_at(&self, id: &Id) -> Result<records::Image> {
        let attempted = || Error::new(format!("verify image {id}"));
        let record = self.ims.image(id)?.ok_or_else(|| attempted().because("it has no record in IMS"))?;
        let Some(link) = &record.link else { return Err(attempted().because("its record has no link")) };
        if let Some(why) = record.difference(id, None, Some(link)) {
            return Err(attempted().because(why));
        }
        let store = Store::open(&self.settings.store, &self.work.network)?;
        let manifest = format!("{id}/{}", MANIFEST.0);
        let url = store.url_of(&manifest);
        let (etag, _) = self.wait(&format!("inspect {url}"), store.head(&manifest))?;
        if link.path != url || link.etag != etag {
            return Err(attempted().because(format!("its link is {link}, and the store has {url}, ETag {etag}")));
        }
        Ok(record)
    }

    /// Creates the image's record, or finds the one that an earlier run created. The flag is true if nothing can have
    /// been uploaded for the image yet.
    fn register(&self, journal: &mut Journal) -> Result<(records::Image, bool)> {
        let name = &self.settings.name;
        if !self.ims.is_there() {
            let is_new = journal.image.is_none();
            let id = journal.image.take().map_or_else(Id::random, Ok)?;
            journal.image = Some(id.clone());
            journal.write(self.directory)?;
            return Ok((self.local_record(id, None), is_new));
        }
        if let Some(id) = &journal.image
            && let Some(record) = self.ims.image(id)?
        {
            let Some(why) = self.difference(&record, id, journal) else { return Ok((record, false)) };
            tracing::warn!("image {id} was not created by this job: {why}; left as it is, and another one is created");
            journal.forget_image();
        }
        let asked_before = journal.request.as_ref().map(|request| self.ims.find_image(request)).transpose()?.flatten();
        let is_new = journal.request.is_none();
        let request = journal.request.take().map_or_else(Id::random, Ok)?;
        journal.request = Some(request.clone());
        let record = match asked_before {
            Some(record) => record,
            None => {
                journal.write(self.directory)?;
                let made = self.ims.create_image(name, self.settings.job.arch(), &request);
                if made.is_err() && is_new && !self.ims.has_asked() {
                    journal.request = None;
                }
                made?
            }
        };
        // Forget the request for a refused record, so that the rollback does not delete that record.
        self.ims.refuse_foreign(&record, name, &request).inspect_err(|_| journal.request = None)?;
        journal.image = Some(record.id.clone());
        if !self.ims.takes_metadata() {
            // The record could not store the request's ID, so it cannot be found by that.
            journal.request = None;
        }
        journal.write(self.directory)?;
        tracing::info!(image = record.id.as_str(), "registered the image '{name}' in IMS");
        Ok((record, true))
    }

    /// Reason why `record` does not belong to the image `id` of this job; `None` if it may. Outside a job, a record
    /// with a link that this run has neither set nor compared belongs to an image whose publication has ended.
    fn difference(&self, record: &records::Image, id: &Id, journal: &Journal) -> Option<String> {
        let is_known = self.settings.job.id.is_some() || journal.is_own_link;
        self.differs(record, id, journal, journal.link.as_ref().filter(|_| is_known))
    }

    /// Like [`Self::difference`], except that the record may have `link`.
    fn differs(&self, record: &records::Image, id: &Id, journal: &Journal, link: Option<&Link>) -> Option<String> {
        let Settings { name, job, .. } = self.settings;
        if record.name != *name {
            return Some(format!("its name is {:?}", record.name));
        }
        // An older IMS has no architectures.
        if let Some(told) = record.arch.as_deref().filter(|told| !told.is_empty() && *told != job.arch()) {
            return Some(format!("its arch is {told:?}"));
        }
        record.difference(id, journal.request.as_ref(), link)
    }

    /// Verifies that the manifest of a linked image is the one that was uploaded.
    fn check_manifest(&self, store: &Store, id: &Id, link: &Link) -> Result<()> {
        let place = format!("{id}/{}", MANIFEST.0);
        let attempted = format!("go on with image {id}");
        let (etag, _) = self.wait(&format!("inspect {}", store.url_of(&place)), store.head(&place))?;
        if link.path == store.url_of(&place) && link.etag == etag {
            return Ok(());
        }
        Err(Error::new(attempted)
            .because(format!("{} is not the manifest that an earlier run has uploaded", store.url_of(&place)))
            .advise("find out who writes to the store; run it again for a new image"))
    }

    /// Returns whether the store has a directory for each image's name. In IMS, several images may share a name.
    fn is_named(&self, store: &Store) -> bool {
        store.is_directory() && !self.ims.is_there()
    }

    /// Files of an image, with their checksums. Large files also have a checksum for each part, unless the store is a
    /// directory, which gets no requests that could be signed with them.
    fn pieces(&self, image: Image, store: &Store) -> Result<Vec<Piece>> {
        let (kernel, initrd, parameters) = match image.boot {
            Some(boot) => (Some(boot.kernel), boot.initrd, boot.parameters),
            None => (None, None, None),
        };
        let content = |file: Option<BootFile>| file.map(|file| file.content);
        let files = [
            (ROOTFS, Some(image.rootfs)),
            (KERNEL, content(kernel)),
            (INITRD, content(initrd)),
            (DEBUG_KERNEL, image.debug_kernel),
            (PARAMETERS, content(parameters)),
        ];
        let piece = |((key, media_type), content): ((&'static str, &'static str), File)| {
            let size = content.metadata().attempt(|| format!("read the size of {key}"))?.len();
            let part = (size > PART && !store.is_directory()).then(|| part_of(size));
            let sums = sums_of(self.work, &content, key, part)?;
            Ok(Piece { key, media_type, content: content.into(), sums, size })
        };
        files.into_iter().filter_map(|(what, content)| Some((what, content?))).map(piece).collect()
    }

    /// Refuses a packed image whose SHA-256 differs from the recorded one. Times would not show a change, because they
    /// can be set.
    fn refuse_changed(&self, pieces: &[Piece], recorded: Option<&str>) -> Result<()> {
        let is_same = |piece: &Piece| piece.key != ROOTFS.0 || recorded.is_none_or(|sum| sum == piece.sums.sha256);
        if pieces.iter().all(is_same) {
            return Ok(());
        }
        Err(Error::new(format!("publish {}", self.settings.archive()))
            .because("its content was changed since it was packed")
            .advise("'ims-sshd package' packs it again"))
    }

    /// Uploads everything unless it `is_published`. Returns the artifacts, the link to the manifest, and a text for the
    /// log with location and size.
    fn upload(
        &self,
        store: &Store,
        id: &Id,
        pieces: &[Piece],
        is_published: bool,
    ) -> Result<(Vec<Artifact>, Link, String)> {
        let mut name = if self.is_named(store) { store.free_name(&self.directory_name()) } else { id.to_string() };
        let (mut artifacts, mut keys, mut total) = (Vec::new(), Vec::new(), 0);
        for &Piece { key, media_type, ref content, ref sums, size } in pieces {
            let OfFile { md5, sha256, parts } = sums;
            let mut metadata = vec![(MD5, md5.clone()), (SHA256, sha256.clone())];
            metadata.push(("x-shasta-ims-image-name", self.settings.name.clone()));
            metadata.extend(self.owner_metadata(id));
            let place = format!("{id}/{key}");
            let url = store.url_of(&format!("{name}/{key}"));
            if !is_published {
                let description = Description { media_type, metadata };
                self.put(store, &Large { place: &place, content, size, md5, parts, description: &description })?;
            }
            let etag = self.etag(store, &place, size, md5)?;
            if !is_published {
                tracing::info!(md5, etag, "uploaded {url}");
            }
            artifacts.push(Artifact {
                link: Link::new(url, etag),
                md5: md5.clone(),
                media_type: media_type.to_owned(),
            });
            keys.push(key);
            total += size;
        }
        let mut link = if is_published {
            let manifest = format!("{id}/{}", MANIFEST.0);
            let url = store.url_of(&manifest);
            let (etag, _) = self.wait(&format!("inspect {url}"), store.head(&manifest))?;
            Link::new(url, etag)
        } else {
            self.put_manifest(store, id, &name, &artifacts)?
        };
        if let Err(error) = self.sweep(store, id) {
            self.work.heed()?;
            tracing::warn!("{error}; an unfinished upload, if there is one, is left in the store");
        }
        let attempted = |name: &str| format!("rename the image to {}", store.shown(name));
        while !store.place(id.as_str(), &name).attempt(|| attempted(&name))? {
            // Another run has taken the name.
            name = store.free_name(&self.directory_name());
            for (artifact, key) in artifacts.iter_mut().zip(&keys) {
                artifact.link.path = store.url_of(&format!("{name}/{key}"));
            }
            link = self.put_manifest(store, id, &name, &artifacts)?;
        }
        keys.push(MANIFEST.0);
        let wanted = self.directory_name();
        let is_second = self.is_named(store) && name != wanted;
        let earlier = if is_second { format!("; {} is an earlier one", store.shown(&wanted)) } else { String::new() };
        let described = format!("{}, {}: {}{earlier}", store.shown(&name), size_in_words(total), keys.join(", "));
        Ok((artifacts, link, described))
    }

    /// Uploads the manifest of an image that will be called `name` in the store, and returns the link to it.
    fn put_manifest(&self, store: &Store, id: &Id, name: &str, artifacts: &[Artifact]) -> Result<Link> {
        let identity = Identity { id, name: &self.settings.name };
        let text = manifest::text(artifacts, SystemTime::now(), self.is_named(store).then_some(identity));
        let md5 = format!("{:x}", Md5::digest(&text));
        let (place, size) = (format!("{id}/{}", MANIFEST.0), text.len() as u64);
        let description = Description { media_type: MANIFEST.1, metadata: vec![(MD5, md5.clone())] };
        self.wait(&format!("upload {}", store.url_of(&place)), store.put(&place, text, &description))?;
        let etag = self.etag(store, &place, size, &md5)?;
        Ok(Link::new(store.url_of(&format!("{name}/{}", MANIFEST.0)), etag))
    }

    /// Name of the image's directory, in a store that is a directory.
    fn directory_name(&self) -> String {
        let is_kept = |c: char| c.is_alphanumeric() || "._-+".contains(c);
        let name: String = self.settings.name.chars().map(|c| if is_kept(c) { c } else { '_' }).take(200).collect();
        match name.trim_start_matches('.') {
            "" => "image".into(),
            name => name.to_owned(),
        }
    }

    /// Object metadata that distinguishes this image's objects from others'.
    fn owner_metadata(&self, id: &Id) -> [(&'static str, String); 2] {
        let job = self.settings.job.id.clone().unwrap_or_default();
        [("x-shasta-ims-image-id", id.to_string()), ("x-shasta-ims-job-id", job)]
    }

    /// Uploads one file; a large one in parts.
    fn put(&self, store: &Store, object: &Large) -> Result<()> {
        if object.size > PART {
            return self.sender(store).send(object);
        }
        let attempted = format!("upload {}", store.url_of(object.place));
        let mut bytes = vec![0; usize::try_from(object.size).attempt(|| attempted.clone())?];
        object.content.read_exact_at(&mut bytes, 0).attempt(|| attempted.clone())?;
        self.wait(&attempted, store.put(object.place, bytes, object.description))
    }

    fn sender<'a>(&'a self, store: &'a Store) -> Sender<'a> {
        Sender { work: self.work, store, settings: &self.settings.store, directory: self.directory }
    }

    /// ETag of an object that was uploaded. Refuses an object of another size, or one that was uploaded in one request
    /// and has an ETag that is an MD5 but not `md5`.
    fn etag(&self, store: &Store, place: &str, size: u64, md5: &str) -> Result<String> {
        let attempted = format!("inspect {}", store.url_of(place));
        let refuse = |why: String| Err(Error::new(&attempted).because(why));
        let (etag, found) = self.wait(&attempted, store.head(place))?;
        if found != size {
            return refuse(format!("it has {found} bytes, expected {size}"));
        }
        // The ETag of an object in parts is not its MD5; the store has compared the SHA-256 of each part.
        let is_other = size <= PART && looks_like_md5(&etag) && !etag.eq_ignore_ascii_case(md5);
        if is_other && self.wait(&attempted, store.can_have_md5(place))? {
            return refuse(format!("its MD5 there is {etag}, expected {md5}"));
        }
        Ok(etag)
    }

    fn wait<T>(&self, attempted: &str, work: impl Future<Output = object_store::Result<T>>) -> Result<T> {
        self.work.wait(async { work.await.map_err(|e| Error::new(attempted).because(cause(&e))) })
    }

    /// Record of an image without an IMS.
    fn local_record(&self, id: Id, link: Option<Link>) -> records::Image {
        let (name, arch) = (self.settings.name.clone(), Some(self.settings.job.arch().to_owned()));
        records::Image { id, name, link, arch, metadata: None, further: Map::new() }
    }

    /// Aborts unfinished uploads that only the store knows, because their ID was never received.
    fn sweep(&self, store: &Store, id: &Id) -> Result<()> {
        let image = id.as_str();
        self.wait(&format!("look for unfinished uploads to {}", store.url_of(image)), store.sweep(image))
    }

    /// Deletes the objects and the record of an unfinished image, even after a signal. Leaves an image that may be
    /// somebody else's. Returns true if nothing of this job is left. The record stays as long as there may be objects,
    /// because it says whose they are.
    fn roll_back(&self, store: &Store, journal: &Journal) -> bool {
        const AGAIN: &str = "run the same command again, which rolls it back, or delete it by hand";
        self.work.roll_back();
        let image = match (&journal.image, &journal.request) {
            (Some(id), _) => Ok(Some(id.clone())),
            // IMS may have created the record although its ID was never received.
            (None, Some(request)) => self.ims.find_image(request).map(|record| Some(record?.id)),
            (None, None) => Ok(None),
        };
        let id = match image {
            Ok(Some(id)) => id,
            Ok(None) => return true,
            Err(error) => {
                tracing::error!("{error}; if the image was registered, its record is left in IMS: {AGAIN}");
                return false;
            }
        };
        match self.foreign(store, &id, journal) {
            Ok(None) => {}
            Ok(Some(why)) => {
                tracing::error!("image {id} was not created by this job: {why}; left as it is");
                return true;
            }
            Err(error) => {
                if self.ims.is_there() {
                    tracing::error!("{error}; image {id} is left in the store and in IMS: {AGAIN}");
                } else {
                    tracing::error!(
                        "{error}; objects of image {id} may still exist in the store: run the same command again, which \
                         goes on with them or deletes them"
                    );
                }
                return false;
            }
        }
        let aborted = self.sender(store).abort();
        // The rootfs is deleted last, because its metadata shows a later run that the objects are this job's.
        let deleted = KEYS.iter().rev().try_for_each(|key| {
            let key = format!("{id}/{key}");
            self.wait(&format!("delete {}", store.url_of(&key)), store.delete(&key))
        });
        let swept = self.sweep(store, &id);
        let objects = [(aborted, "an unfinished upload"), (deleted, "objects"), (swept, "unfinished uploads")];
        let mut failed: Vec<_> = objects.into_iter().filter_map(|(done, what)| Some((done.err()?, what))).collect();
        if failed.is_empty() {
            failed.extend(self.ims.delete_image(&id).err().map(|error| (error, "the record")));
        } else if self.ims.is_there() {
            tracing::error!(
                "the record of image {id} stays in IMS, since objects of the image may still exist in the store"
            );
        }
        for (error, what) in &failed {
            tracing::error!("{error}; {what} of image {id} may still exist: {AGAIN}");
        }
        if failed.is_empty() {
            tracing::info!("nothing is left of image {id}");
        }
        failed.is_empty()
    }

    /// Reason why an image is somebody else's, according to its record and its objects; `None` if it is this job's.
    fn foreign(&self, store: &Store, id: &Id, journal: &Journal) -> Result<Option<String>> {
        if let Some(why) = self.ims.image(id)?.and_then(|record| self.difference(&record, id, journal)) {
            return Ok(Some(why));
        }
        let is_ours = self.is_place_ours(store, id, false)?;
        Ok((!is_ours).then(|| "one of its objects is another job's".into()))
    }

    /// Returns whether all objects of an image are this job's; an image that `is_new` has none. A manifest has no
    /// metadata that names an owner, and belongs to the owner of the other objects. Files in a directory have no
    /// metadata: the journal says that the image is this job's.
    fn is_place_ours(&self, store: &Store, id: &Id, is_new: bool) -> Result<bool> {
        let metadata = self.owner_metadata(id);
        let look = |key: &&str| {
            let key = format!("{id}/{key}");
            self.wait(&format!("inspect {}", store.url_of(&key)), store.owner(&key, &metadata))
        };
        let owners = KEYS.iter().map(look).collect::<Result<Vec<_>>>()?;
        let has_ours = owners.contains(&Owner::Ours) || store.is_directory();
        let is_fine = |(key, owner): (&&str, &Owner)| match owner {
            Owner::Nobody => true,
            Owner::Another => false,
            Owner::Ours => !is_new,
            Owner::Untold => !is_new && has_ours && (*key == MANIFEST.0 || store.is_directory()),
        };
        Ok(KEYS.iter().zip(&owners).all(is_fine))
    }
}

//! Artifacts go to the store, the manifest last, and the image is registered.

use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use md5::{Digest, Md5};
use serde_json::{Value, json};

use crate::error::{Attempt, Error, Result};
use crate::image::boot::{BootFile, BootFiles};
use crate::ims::client::{Ims, Status, id_of};
use crate::ims::id::Id;
use crate::publish::journal::{Journal, Notes, Phase, Upload};
use crate::publish::manifest::{self, Artifact, Identity};
use crate::publish::multipart::{Large, PART, Sender};
use crate::publish::settings::Settings;
use crate::store::error::cause;
use crate::store::{Description, MD5, Owner, Store};
use crate::transfer::Work;
use crate::transfer::checksum::md5_of;

/// Keys below the image's, with their types.
const ROOTFS: (&str, &str) = ("rootfs", "application/vnd.cray.image.rootfs.squashfs");
const KERNEL: (&str, &str) = ("kernel", "application/vnd.cray.image.kernel");
const INITRD: (&str, &str) = ("initrd", "application/vnd.cray.image.initrd");
const DEBUG_KERNEL: (&str, &str) = ("debug_kernel", "application/vnd.cray.image.debug.kernel");
const PARAMETERS: (&str, &str) = ("boot_parameters", "application/vnd.cray.image.parameters.boot");
const MANIFEST: (&str, &str) = ("manifest.json", "application/json");

/// All that can be of an image.
const KEYS: [&str; 6] = [ROOTFS.0, KERNEL.0, INITRD.0, DEBUG_KERNEL.0, PARAMETERS.0, MANIFEST.0];

/// What is published.
pub(crate) struct Image {
    /// The packed image.
    pub(crate) rootfs: File,
    /// What boots it; nothing of one that is never booted.
    pub(crate) boot: Option<BootFiles>,
    /// The kernel with its symbols.
    pub(crate) debug_kernel: Option<File>,
}

/// One file of it.
struct Piece {
    key: &'static str,
    media_type: &'static str,
    content: File,
    md5: String,
    size: u64,
}

/// Where it is published, and what is noted of it.
pub(crate) struct Publication<'a> {
    /// Servers.
    pub(crate) work: &'a Work,
    /// The variables.
    pub(crate) settings: &'a Settings,
    /// Registers it.
    pub(crate) ims: Ims<'a>,
    /// Where the journal is.
    pub(crate) notes: &'a Notes<'a>,
}

/// A size for people.
fn in_words(bytes: u64) -> String {
    let (unit, name) = if bytes < 1 << 20 { (1_u64 << 10, "KiB") } else { (1 << 20, "MiB") };
    format!("{} {name}", bytes.div_ceil(unit))
}

impl Publication<'_> {
    /// Uploads and registers `image`, and returns what is printed of it. What fails is rolled back.
    pub(crate) fn publish(&mut self, journal: &mut Journal, image: Image) -> Result<Value> {
        let store = Store::open(&self.settings.store, &self.work.network)?;
        let mut is_published = false;
        let result = self.pieces(image).and_then(|pieces| {
            is_published = self.forget_published(&store, journal, &pieces)?;
            self.carry_out(&store, journal, &pieces, is_published)
        });
        let noted = match &result {
            Err(_) if journal.is_told || is_published => journal.write(self.notes),
            Err(_) if self.roll_back(&store, journal) => self.begin_again(journal),
            // What is left is known to the next run.
            Err(_) => journal.write(self.notes),
            // A published image stays published, even if the record of it was replaced.
            Ok(_) => self.end(journal, Phase::Published),
        };
        if let Err(error) = noted {
            tracing::warn!("{error}");
        }
        result
    }

    /// Rolls back what an earlier run has published in part that was killed, where nothing more is published. What cannot be rolled back
    /// stays in the journal.
    pub(crate) fn give_up(&mut self, journal: &mut Journal) -> Result<()> {
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
        self.notes.clear()
    }

    /// Forgets what was rolled back, and not that the environment has ended: a sidecar that is run again publishes its image.
    fn begin_again(&self, journal: &mut Journal) -> Result<()> {
        journal.forget_image();
        if journal.phase < Phase::Packing {
            return self.notes.clear();
        }
        Upload::clear(self.notes)?;
        journal.write(self.notes)
    }

    /// Records that a job has ended; outside a job nothing stays recorded.
    pub(crate) fn end(&self, journal: &mut Journal, phase: Phase) -> Result<()> {
        let link = journal.link.take();
        journal.forget_image();
        if journal.phase < Phase::Packing {
            return self.notes.clear();
        }
        (journal.phase, journal.link) = (phase, link);
        Upload::clear(self.notes)?;
        journal.write(self.notes)
    }

    /// Forgets an image that is whole, unless it is made of `pieces`: then it is the one that is to be published, and nothing is left to do
    /// to it. Without an IMS its manifest says that it is whole, which comes last. Notes of that time, put back by somebody, make it neither
    /// overwritten nor deleted. Returns whether it is the one.
    fn forget_published(&self, store: &Store, journal: &mut Journal, pieces: &[Piece]) -> Result<bool> {
        // An image of a directory is not published before it has its name, and has left its id's place then.
        let is_asked = !self.ims.is_there() && !self.is_named(store);
        let Some(id) = journal.image.clone().filter(|_| is_asked) else { return Ok(false) };
        let manifest = format!("{id}/{}", MANIFEST.0);
        if !self.wait(&format!("look at {}", store.url_of(&manifest)), store.is_there(&manifest))? {
            return Ok(false);
        }
        tracing::info!("image {id} was published before");
        let is_there = |piece: &Piece| {
            let place = format!("{id}/{}", piece.key);
            self.work.wait(async { Ok(store.holds(&place, piece.size, &piece.md5).await) })
        };
        let mut is_same = !pieces.is_empty();
        for piece in pieces {
            is_same = is_same && is_there(piece)?;
        }
        if !is_same {
            journal.forget_image();
        }
        Ok(is_same)
    }

    fn carry_out(
        &mut self,
        store: &Store,
        journal: &mut Journal,
        pieces: &[Piece],
        is_published: bool,
    ) -> Result<Value> {
        let (mut record, is_new) = self.register(journal)?;
        let id = id_of(&record).ok_or_else(|| Error::new("publish the image").because("its record has no id"))?;
        if !self.is_place_ours(store, &id, is_new)? {
            // And nothing of it is deleted.
            journal.forget_image();
            let upload = Error::new(format!("upload to {}", store.url_of(id.as_str())));
            return Err(upload
                .because("an object that is there is not this job's")
                .advise("nothing was written; see who publishes there, and delete the image's record by hand"));
        }
        let mut described = store.shown(id.as_str());
        let artifacts = if let Some(link) = journal.link.as_ref().filter(|_| !record["link"].is_null()) {
            // An earlier run got as far as this: all is uploaded. Its record was compared with the journal.
            self.check_manifest(store, &id, link)?;
            Vec::new()
        } else {
            let (artifacts, link, uploaded) = self.upload(store, &id, pieces, is_published)?;
            described = uploaded;
            journal.link = Some(link.clone());
            journal.write(self.notes)?;
            record = self.ims.link_image(&id, &link)?.unwrap_or_else(|| self.local_record(&id, &link));
            artifacts
        };
        let job = self.ims.set_resultant_image(&id)?;
        let ended = self.tell_success(journal, &id)?;
        tracing::info!("the image is {described}");
        Ok(json!({
            "ims_image_artifacts": artifacts.iter().map(Artifact::entry).collect::<Vec<_>>(),
            "ims_image_record": record,
            "ims_job_record": ended.or(job).unwrap_or_else(|| json!({})),
            "result": "success",
        }))
    }

    /// Tells IMS last, which ends the job, its volume and this pod. Nothing may be rolled back once IMS knows, whatever signal comes.
    /// Returns the job's record.
    fn tell_success(&mut self, journal: &mut Journal, id: &Id) -> Result<Option<Value>> {
        if self.settings.job.id.is_none() || !self.ims.is_there() {
            return Ok(None);
        }
        journal.is_told = true;
        journal.write(self.notes).inspect_err(|_| journal.is_told = false)?;
        // A signal shortens the wait.
        self.work.roll_back();
        let refused = match self.ims.set_status(Status::Success) {
            Ok(job) => return Ok(job),
            Err(refused) => refused,
        };
        // Of a job that has ended it is refused, though it be the same: the answer to an earlier try may have been lost.
        let unknown = match self.ims.job() {
            Ok(Some(job)) if job["status"] == Status::Success.name() => return Ok(Some(job)),
            // A try that a signal has cut off may still be carried out.
            Ok(_) if self.work.is_in_a_hurry() => refused,
            Ok(_) => {
                journal.is_told = false;
                return Err(refused);
            }
            Err(silent) => {
                tracing::error!("{refused}");
                silent
            }
        };
        let place = self.settings.store.url.as_deref().unwrap_or_default();
        Err(Error::new(format!("find out whether IMS knows the job as a success: {unknown}"))
            .because(format!("IMS may know the image as published, so that image {id} stays in IMS and in {place}"))
            .advise("run the same again on this volume, which asks IMS and goes on; without the volume see the job's status in IMS"))
    }

    /// Looks at an image that IMS says a job has published, and returns its record.
    pub(crate) fn look_at(&mut self, id: &Id) -> Result<Value> {
        let attempted = || Error::new(format!("look at image {id}"));
        let record = self.ims.image(id)?.ok_or_else(|| attempted().because("it has no record in IMS"))?;
        let link = &record["link"];
        if link.is_null() {
            return Err(attempted().because("its record has no link"));
        }
        if let Some(why) = Ims::difference(&record, id, None, Some(link)) {
            return Err(attempted().because(why));
        }
        let store = Store::open(&self.settings.store, &self.work.network)?;
        let manifest = format!("{id}/{}", MANIFEST.0);
        let url = store.url_of(&manifest);
        let (etag, _) = self.wait(&format!("look at {url}"), store.head(&manifest))?;
        if link["path"] != url || link["etag"] != etag {
            return Err(attempted().because(format!("its link is {link}, and the store has {url}, ETag {etag}")));
        }
        Ok(record)
    }

    /// The new image's record; one that an earlier run has made is found again. Tells whether nothing can have been uploaded for it yet.
    fn register(&mut self, journal: &mut Journal) -> Result<(Value, bool)> {
        let name = &self.settings.name;
        if !self.ims.is_there() {
            let is_new = journal.image.is_none();
            let id = journal.image.take().map_or_else(Id::random, Ok)?;
            journal.image = Some(id.clone());
            journal.write(self.notes)?;
            return Ok((json!({ "id": id.as_str(), "name": name, "arch": self.settings.job.arch() }), is_new));
        }
        if let Some(id) = &journal.image
            && let Some(record) = self.ims.image(id)?
        {
            let Some(why) = self.difference(&record, id, journal) else { return Ok((record, false)) };
            tracing::warn!("image {id} is not what this job began: {why}; left as it is, and another one is made");
            journal.forget_image();
        }
        let asked_before = journal.request.as_ref().map(|request| self.ims.find_image(request)).transpose()?.flatten();
        let is_new = journal.request.is_none();
        let request = journal.request.take().map_or_else(Id::random, Ok)?;
        journal.request = Some(request.clone());
        let record = match asked_before {
            Some(record) => record,
            None => {
                journal.write(self.notes)?;
                let made = self.ims.create_image(name, self.settings.job.arch(), &request);
                if made.is_err() && is_new && !self.ims.has_asked() {
                    journal.request = None;
                }
                made?
            }
        };
        // No record that is refused is deleted.
        self.ims.refuse_foreign(&record, name, &request).inspect_err(|_| journal.request = None)?;
        let Some(id) = id_of(&record) else {
            return Err(Error::new(format!("register the image '{name}'"))
                .because(format!("the id of its record is {}: expected a UUID", record["id"])));
        };
        journal.image = Some(id.clone());
        if !self.ims.takes_metadata() {
            // No record tells of it.
            journal.request = None;
        }
        journal.write(self.notes)?;
        tracing::info!(image = id.as_str(), "registered the image '{name}' in IMS");
        Ok((record, true))
    }

    /// What of a record cannot be of the image `id` that this job has begun. One that is linked is published: a job ends with it, so that
    /// without a job it is done.
    fn difference(&self, record: &Value, id: &Id, journal: &Journal) -> Option<String> {
        let Settings { name, job, .. } = self.settings;
        if record["name"] != **name {
            return Some(format!("its name is {}", record["name"]));
        }
        // An older IMS knows no architectures.
        if record["arch"].as_str().is_some_and(|told| !told.is_empty() && told != job.arch()) {
            return Some(format!("its arch is {}", record["arch"]));
        }
        let link = journal.link.as_ref().filter(|_| job.id.is_some());
        Ims::difference(record, id, journal.request.as_ref(), link)
    }

    /// Makes sure that the manifest of a linked image is the one that was uploaded.
    fn check_manifest(&self, store: &Store, id: &Id, link: &Value) -> Result<()> {
        let place = format!("{id}/{}", MANIFEST.0);
        let attempted = format!("go on with image {id}");
        let (etag, _) = self.wait(&format!("look at {}", store.url_of(&place)), store.head(&place))?;
        if link["path"] == store.url_of(&place) && link["etag"] == etag {
            return Ok(());
        }
        Err(Error::new(attempted)
            .because(format!("{} is not the manifest that an earlier run has uploaded", store.url_of(&place)))
            .advise("see who writes to the store; run it again for a new image"))
    }

    /// Returns whether images are known by a name in this store. IMS knows them by their ids, and has one name for several.
    fn is_named(&self, store: &Store) -> bool {
        store.is_directory() && !self.ims.is_there()
    }

    /// What an image consists of, with checksums.
    fn pieces(&self, image: Image) -> Result<Vec<Piece>> {
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
            let md5 = md5_of(self.work, &content, key)?;
            let size = content.metadata().attempt(|| format!("read the size of {key}"))?.len();
            Ok(Piece { key, media_type, content, md5, size })
        };
        files.into_iter().filter_map(|(what, content)| Some((what, content?))).map(piece).collect()
    }

    /// Uploads everything, unless it `is_published`; returns the artifacts, the manifest's link, and the place and size for people.
    fn upload(
        &self,
        store: &Store,
        id: &Id,
        pieces: &[Piece],
        is_published: bool,
    ) -> Result<(Vec<Artifact>, Value, String)> {
        let mut name = if self.is_named(store) { store.free_name(&self.directory_name()) } else { id.to_string() };
        let (mut artifacts, mut keys, mut total) = (Vec::new(), Vec::new(), 0);
        for &Piece { key, media_type, ref content, ref md5, size } in pieces {
            let mut metadata = vec![(MD5, md5.clone()), ("x-shasta-ims-image-name", self.settings.name.clone())];
            metadata.extend(self.marks(id));
            let place = format!("{id}/{key}");
            let url = store.url_of(&format!("{name}/{key}"));
            if !is_published {
                let description = Description { media_type, metadata };
                self.put(store, &Large { place: &place, content, size, md5, description: &description })?;
            }
            let etag = self.etag(store, &place, size)?;
            if !is_published {
                tracing::info!(md5, etag, "uploaded {url}");
            }
            artifacts.push(Artifact { path: url, etag, md5: md5.clone(), media_type });
            keys.push(key);
            total += size;
        }
        let mut link = if is_published {
            let manifest = format!("{id}/{}", MANIFEST.0);
            let url = store.url_of(&manifest);
            let (etag, _) = self.wait(&format!("look at {url}"), store.head(&manifest))?;
            Artifact { path: url, etag, md5: String::new(), media_type: MANIFEST.1 }.link()
        } else {
            self.put_manifest(store, id, &name, &artifacts)?
        };
        if let Err(error) = self.sweep(store, id) {
            self.work.heed()?;
            tracing::warn!("{error}; an unfinished upload, if there is one, is left in the store");
        }
        let attempted = |name: &str| format!("give the image its place {}", store.shown(name));
        while !store.place(id.as_str(), &name).attempt(|| attempted(&name))? {
            // Another run of this name was faster.
            name = store.free_name(&self.directory_name());
            for (artifact, key) in artifacts.iter_mut().zip(&keys) {
                artifact.path = store.url_of(&format!("{name}/{key}"));
            }
            link = self.put_manifest(store, id, &name, &artifacts)?;
        }
        keys.push(MANIFEST.0);
        let wanted = self.directory_name();
        let is_second = self.is_named(store) && name != wanted;
        let earlier = if is_second { format!("; {} is an earlier one", store.shown(&wanted)) } else { String::new() };
        let described = format!("{}, {}: {}{earlier}", store.shown(&name), in_words(total), keys.join(", "));
        Ok((artifacts, link, described))
    }

    /// Uploads the manifest of an image whose place will be `name`, and returns its link.
    fn put_manifest(&self, store: &Store, id: &Id, name: &str, artifacts: &[Artifact]) -> Result<Value> {
        let identity = Identity { id: id.as_str(), name: &self.settings.name };
        let text = manifest::text(artifacts, SystemTime::now(), self.is_named(store).then_some(identity));
        let md5 = format!("{:x}", Md5::digest(&text));
        let (place, size) = (format!("{id}/{}", MANIFEST.0), text.len() as u64);
        let description = Description { media_type: MANIFEST.1, metadata: vec![(MD5, md5.clone())] };
        self.wait(&format!("upload {}", store.url_of(&place)), store.put(&place, text, &description))?;
        let etag = self.etag(store, &place, size)?;
        let path = store.url_of(&format!("{name}/{}", MANIFEST.0));
        Ok(Artifact { path, etag, md5, media_type: MANIFEST.1 }.link())
    }

    /// The image's name as that of a directory.
    fn directory_name(&self) -> String {
        let is_kept = |c: char| c.is_alphanumeric() || "._-+".contains(c);
        let name: String = self.settings.name.chars().map(|c| if is_kept(c) { c } else { '_' }).take(200).collect();
        match name.trim_start_matches('.') {
            "" => "image".into(),
            name => name.to_owned(),
        }
    }

    /// Metadata of an object that tells this image's from others'.
    fn marks(&self, id: &Id) -> [(&'static str, String); 2] {
        let job = self.settings.job.id.clone().unwrap_or_default();
        [("x-shasta-ims-image-id", id.to_string()), ("x-shasta-ims-job-id", job)]
    }

    /// Uploads one file, a large one in parts.
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
        Sender { work: self.work, store, settings: &self.settings.store, notes: self.notes }
    }

    fn etag(&self, store: &Store, place: &str, size: u64) -> Result<String> {
        let attempted = format!("look at {}", store.url_of(place));
        match self.wait(&attempted, store.head(place))? {
            (etag, found) if found == size => Ok(etag),
            (_, found) => Err(Error::new(attempted).because(format!("it has {found} bytes, expected {size}"))),
        }
    }

    fn wait<T>(&self, attempted: &str, work: impl Future<Output = object_store::Result<T>>) -> Result<T> {
        self.work.wait(async { work.await.map_err(|e| Error::new(attempted).because(cause(&e))) })
    }

    fn local_record(&self, id: &Id, link: &Value) -> Value {
        json!({ "id": id.as_str(), "name": self.settings.name, "arch": self.settings.job.arch(), "link": link })
    }

    /// What no run has noted: a store that has begun an upload may be the only one who knows.
    fn sweep(&self, store: &Store, id: &Id) -> Result<()> {
        let image = id.as_str();
        self.wait(&format!("look for uploads to {} that were begun", store.url_of(image)), store.sweep(image))
    }

    /// Leaves neither objects nor a record of an image that is none, whatever signal comes. What cannot be this job's is left. Returns
    /// whether nothing of this job's is left: as long as objects may be, their record stays, which tells whose they are.
    fn roll_back(&mut self, store: &Store, journal: &Journal) -> bool {
        const AGAIN: &str = "run the same again, which rolls it back, or delete it by hand";
        self.work.roll_back();
        let image = match (&journal.image, &journal.request) {
            (Some(id), _) => Ok(Some(id.clone())),
            // It may have been asked for, and the answer was not noted.
            (None, Some(request)) => self.ims.find_image(request).map(|record| id_of(&record?)),
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
        match self.was_made_here(store, &id, journal) {
            Ok(None) => {}
            Ok(Some(why)) => {
                tracing::error!("image {id} is not what this job began: {why}; left as it is");
                return true;
            }
            Err(error) => {
                tracing::error!("{error}; image {id} is left in the store and in IMS: {AGAIN}");
                return false;
            }
        }
        let aborted = self.sender(store).abort();
        // The object that tells whose they are goes last.
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
            tracing::error!("the record of image {id} stays in IMS, since something of it may be left in the store");
        }
        for (error, what) in &failed {
            tracing::error!("{error}; {what} of image {id} may be left: {AGAIN}");
        }
        if failed.is_empty() {
            tracing::info!("nothing is left of image {id}");
        }
        failed.is_empty()
    }

    /// What of an image is somebody else's, its record or an object, by what they say themselves.
    fn was_made_here(&mut self, store: &Store, id: &Id, journal: &Journal) -> Result<Option<String>> {
        if let Some(why) = self.ims.image(id)?.and_then(|record| self.difference(&record, id, journal)) {
            return Ok(Some(why));
        }
        let is_ours = self.is_place_ours(store, id, false)?;
        Ok((!is_ours).then(|| "an object of it is another job's".into()))
    }

    /// Returns whether all objects of an image are this job's; one that `is_new` has none. A manifest has no marks, and is whose the others
    /// are. A directory's files have none either: that of an image that was begun before is this job's by the journal.
    fn is_place_ours(&self, store: &Store, id: &Id, is_new: bool) -> Result<bool> {
        let marks = self.marks(id);
        let look = |key: &&str| {
            let key = format!("{id}/{key}");
            self.wait(&format!("look at {}", store.url_of(&key)), store.owner(&key, &marks))
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

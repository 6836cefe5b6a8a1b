//! `ims-sshd sidecar`: runs next to the build environment in a pod. Lets the environment open, reports the job's status
//! to IMS, and publishes the image after the environment has closed. Never waits for an environment that is gone.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};

use crate::environment::stage::{Shown, Stage};
use crate::error::{Attempt, Error, Result};
use crate::image::authorities::put_authorities;
use crate::image::boot;
use crate::image::exclude::Pattern;
use crate::image::inventory::write_changes;
use crate::image::packing::Archive;
use crate::ims::client::Ims;
use crate::ims::id::Id;
use crate::ims::records::{self, Status};
use crate::jail::resolv_conf::RESOLV_CONF;
use crate::jailer::resolv_conf::{self, ENVIRONMENT, SIDECAR};
use crate::job::action::Action;
use crate::pod::pod_files;
use crate::printable::Printable;
use crate::publish::basis;
use crate::publish::journal::{Journal, JournalDirectory, Phase};
use crate::publish::manifest::say_result;
use crate::publish::packed;
use crate::publish::publication::{Image, Publication};
use crate::publish::settings::Settings;
use crate::sshd::public_keys::check_public_keys;
use crate::store::Store;
use crate::sys::poll;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::verdict::{Markers, Verdict};
use crate::volume::image_root;
use crate::volume::layout::{BUILD_FAILED, EXITING, POD_ERROR, READY, SOURCE, SSHD_LISTENING, TRANSFER};
use crate::volume::signal_files::{LOOK_EVERY, SignalFiles, Stamp, Step, Watch};

/// Maximum size of `build_failed`, which may hold the reason of a failed build, in bytes.
const LONGEST_REASON: u64 = 16 << 10;

/// Time without a claim on the volume after which the environment counts as gone. While its container restarts, an
/// environment has no claim.
const GONE: Duration = Duration::from_secs(5);

/// Poll interval for the environment's claim, once 'exiting' exists.
const LOOK_SOON: Duration = Duration::from_millis(20);

/// Time for the environment to close after this container was asked to terminate.
const CLOSE_TIME: Duration = Duration::from_secs(20);

/// Maximum size of `failed`, which may hold the reason why the image failed, in bytes.
const LONGEST_CAUSE: u64 = 200;

/// Report of an image that was packed without a store to publish it in.
fn packed_only(archive: &Path) -> Value {
    json!({ "archive": archive, "ims_image_artifacts": [], "published": false, "result": "success" })
}

/// Options that only the command line has.
#[derive(Debug, Clone)]
pub struct Places {
    /// Public keys of users who may log in.
    pub authorized_keys: PathBuf,
    /// Configuration of sshd; `None` for the default.
    pub sshd_config: Option<PathBuf>,
    /// Directory from which sshd in the other container reads keys and configuration.
    pub sshd_directory: PathBuf,
    /// Directory of CA certificates for the image.
    pub authorities: PathBuf,
    /// Patterns below the image root to leave out of the image.
    pub exclude: Vec<Pattern>,
    /// File to write the changes to.
    pub changes: Option<PathBuf>,
}

/// Verdict with which the environment closed.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Well,
    Failed,
}

/// Runs a sidecar from start to end. Refused `settings` are reported to the build environment and, if an IMS is named,
/// to IMS. `given` are the argument and variables that the settings were read from.
pub fn run(
    settings: Result<Settings>,
    given: (Option<PathBuf>, Vec<(OsString, OsString)>),
    places: &Places,
) -> Result<u8> {
    let (argument, variables) = given;
    let named = variables.iter().filter(|(name, _)| name == "IMAGE_ROOT_PARENT").cloned();
    let parent = Settings::read(argument, named.collect::<Vec<_>>()).ok().map(|read| read.job.parent);
    let (mut phase, mut is_told) = (Phase::Begun, false);
    let (settings, refusal) = match settings {
        Ok(settings) => (settings, None),
        Err(refusal) => {
            let to_report = Settings::to_report(variables).or_else(|_| Settings::read(None, []))?;
            (to_report, Some(refusal))
        }
    };
    let work = Work::begin(&settings.network)?;
    let ims = settings.ims_client(&work);
    let files = refusal.map_or(Ok(()), Err).and_then(|()| {
        let files = SignalFiles::open(&settings.job.parent)?;
        files.ok_or_else(|| {
            Error::new(format!("open {}", settings.job.parent.display()))
                .because("it does not exist")
                .advise("mount the volume there, or set IMAGE_ROOT_PARENT")
        })
    });
    let files = match files {
        Ok(files) => files,
        Err(error) => {
            // Close the environment only if no other sidecar is running.
            let files = parent.and_then(|parent| SignalFiles::open(&parent).ok()?);
            if let Some(files) = files
                && let Ok(_claim) = files.claim_for(Step::Sidecar)
            {
                close_environment(&files);
            }
            return conclude(&work, &ims, Err(error), false);
        }
    };
    // If another sidecar runs on this volume, only that one reports to IMS.
    let _claim = files.claim_for(Step::Sidecar)?;
    let mut live = || {
        let directory = JournalDirectory::new(&files, &settings);
        let journal = Journal::read(&directory)?;
        let mut sidecar = Sidecar {
            work: &work,
            settings: &settings,
            places,
            files: &files,
            old: [None; 2],
            directory: &directory,
            journal,
            ims: &ims,
            has_published: false,
        };
        sidecar.old = sidecar.stamps();
        let result = sidecar.live();
        // Roll back before the failure is reported to IMS, since the report ends the job and deletes its volume.
        // `publish` rolls back by itself.
        if result.is_err()
            && !sidecar.has_published
            && let Err(e) = sidecar.publication().give_up(&mut sidecar.journal)
        {
            tracing::error!("{e}");
        }
        (phase, is_told) = (sidecar.journal.phase, sidecar.journal.is_told);
        result
    };
    let result = live();
    if result.is_err() && phase < Phase::Packing {
        close_environment(&files);
    } else if result.is_err() && (settings.job.id.is_none() || settings.ims.is_none()) {
        // Only without IMS: with IMS the error ends the job, so the step cannot be repeated.
        tracing::warn!(
            "the failed step can be repeated: 'ims-sshd sidecar' continues from there, without another session"
        );
    }
    conclude(&work, &ims, result, is_told)
}

/// Marks the image failed to close an environment that waits for `ready` or is open, because nobody would publish its
/// image.
fn close_environment(files: &SignalFiles) {
    let stands = |name| files.stands(name).unwrap_or(false);
    // Leave a closed environment alone. 'exiting' does not prove that it has closed: without 'ready', an earlier
    // environment left 'exiting' behind; while the volume is claimed, a session created 'exiting'.
    if stands(READY) && stands(EXITING) && !files.is_claimed() {
        return;
    }
    if let Err(e) = files.mark_instead_of_ready(Verdict::Failed) {
        tracing::error!("{e}");
    }
}

/// Reports a failure to IMS and on standard output. If IMS may know the job as a success, the job keeps its status.
fn conclude(work: &Work, ims: &Ims, result: Result<u8>, is_told: bool) -> Result<u8> {
    let error = match work.unless_interrupted(result) {
        Err(error) => error,
        done => return done,
    };
    work.roll_back();
    if !is_told && let Err(untold) = ims.set_status(Status::Error) {
        tracing::error!("{untold}");
    }
    say_result(&json!({ "error": error.to_string(), "result": "failure" }));
    Err(error)
}

struct Sidecar<'a> {
    work: &'a Work,
    settings: &'a Settings,
    places: &'a Places,
    files: &'a SignalFiles,
    /// `failed` and `exiting` as they were at start.
    old: [Option<Stamp>; 2],
    directory: &'a JournalDirectory<'a>,
    journal: Journal,
    ims: &'a Ims<'a>,
    /// True if the publication has started.
    has_published: bool,
}

impl<'a> Sidecar<'a> {
    fn live(&mut self) -> Result<u8> {
        let action = self.settings.job.required_action()?;
        // This container may have restarted after the job ended; then nothing is left to do.
        if let Some(code) = self.ended(action)? {
            return Ok(code);
        }
        if let Some(job) = self.ims.job()? {
            match job.status {
                Status::Success => return self.published_before(&job),
                Status::Error => {
                    return Err(Error::new("publish the image")
                        .because("the job's status is error already")
                        .advise("start a new job"));
                }
                // Without a store the packed image would be lost: its volume is deleted with the job.
                _ if self.settings.store.url.is_none() => {
                    return Err(Error::bad_input(
                        "no store is named: expected S3_BUCKET, IMAGE_STORE or --store, since a job's volume is \
                         deleted with it",
                    ));
                }
                // An earlier run tried to set the status to success, and failed.
                _ => self.journal.is_told = false,
            }
        }
        self.give_up_with_the_pod()?;
        let wants_shell = match action {
            Action::Customize => true,
            Action::Create if !self.files.stands(BUILD_FAILED)? => false,
            Action::Create if self.settings.job.debug => true,
            Action::Create => return Err(self.build_failed("ENABLE_DEBUG=true opens a shell in a failed build")),
        };
        let image_root = self.image_root()?;
        if self.journal.phase < Phase::Packing {
            if wants_shell {
                if self.journal.phase < Phase::Ready && !self.let_open(image_root.as_ref(), action)? {
                    return self.end_as_failed(action);
                }
                let ended = self.shell(image_root.as_ref())?;
                if let Some(image_root) = &image_root {
                    // A killed environment may have left its resolv.conf in the image, in place of this sidecar's.
                    ENVIRONMENT.restore(image_root)?;
                    if SIDECAR.restore(image_root)? == Some(true) {
                        tracing::info!("/{RESOLV_CONF} of the image was changed, and keeps its new content");
                    }
                }
                // Do not publish a tree that was repaired manually: IMS would record it as an image built from the
                // recipe.
                if action == Action::Create && self.settings.ims.is_some() && self.settings.job.id.is_some() {
                    return Err(
                        self.build_failed("correct the recipe; a tree that was mended by hand is not published")
                    );
                }
                if ended == Ended::Failed {
                    return self.end_as_failed(action);
                }
            } else if let Some(image_root) = &image_root {
                put_authorities(image_root, &self.places.authorities)?;
            }
            self.journal.phase = Phase::Packing;
            self.journal.write(self.directory)?;
        } else if wants_shell && !self.files.stands(EXITING)? && !self.files.stands(READY)? {
            // The environment of a restarted pod waits for 'ready', but nothing is left to do: close it.
            tracing::info!("the image was marked complete before: publishing it, without another session");
            self.files.mark_instead_of_ready(Verdict::Complete)?;
        }
        // Without space on the volume, the stage is not shown, but the image may still be uploaded.
        let shown = Shown::begin(self.files.parent(), Stage::Packing).ok();
        let image = self.pack(image_root.as_ref())?;
        // The image may have been marked failed during packing, or before this container restarted.
        if wants_shell && self.is_marked_failed(image_root.as_ref()) {
            return self.end_as_failed(action);
        }
        if let Some(shown) = &shown {
            let _ = shown.next(Stage::Uploading);
        }
        self.publish(image)
    }

    /// Error of a create job whose build failed, with kiwi-ng's own reason if this program has built it.
    fn build_failed(&self, advice: &str) -> Error {
        let reason = self.files.parent().read(BUILD_FAILED, LONGEST_REASON).unwrap_or_default();
        let reason = String::from_utf8_lossy(&reason).trim().to_owned();
        let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        Error::new("publish the image").because(format!("its build failed{why}")).advise(advice)
    }

    /// Returns whether the image has a verdict. An environment creates the verdict file before `exiting`.
    fn has_verdict(&self, image_root: Option<&Tree>) -> Result<bool> {
        Ok(self.files.stands(Verdict::Complete.signal_file())? || self.is_marked_failed(image_root))
    }

    fn is_marked_failed(&self, image_root: Option<&Tree>) -> bool {
        let image_root = image_root.filter(|_| self.settings.job.jailed);
        let marked = image_root::is_marked_failed(self.files, image_root, Markers::Everyone);
        marked.unwrap_or_else(|e| {
            tracing::error!("{e}; the image counts as failed");
            true
        })
    }

    /// Ends the job as failed, and rolls back a publication that an earlier run started.
    fn end_as_failed(&mut self, action: Action) -> Result<u8> {
        tracing::info!("{}", self.failed());
        self.publication().give_up(&mut self.journal)?;
        self.ims.set_status(Status::Error)?;
        self.journal.phase = Phase::Failed;
        self.journal.write(self.directory)?;
        Ok(self.say_failed(action))
    }

    /// Message that the image failed, with the reason if an environment has recorded one.
    fn failed(&self) -> String {
        let why = self.files.parent().read(Verdict::Failed.signal_file(), LONGEST_CAUSE).unwrap_or_default();
        match String::from_utf8_lossy(&why).trim() {
            "" => "the image was marked failed: it is not published".into(),
            why => format!("the image is not published: {}", Printable(why)),
        }
    }

    fn say_failed(&self, action: Action) -> u8 {
        say_result(&json!({ "error": self.failed(), "result": "failure" }));
        u8::from(action == Action::Create)
    }

    /// Exit code of a job that ended in an earlier run; `None` if it did not. Prints the report again, rolls back what
    /// the earlier run could not, and closes an environment that waits.
    fn ended(&mut self, action: Action) -> Result<Option<u8>> {
        let verdict = match self.journal.phase {
            Phase::Published => Verdict::Complete,
            Phase::Failed => Verdict::Failed,
            _ => return Ok(None),
        };
        let again = format!(
            "nothing is left to do; for another image in {}, run 'ims-sshd prepare --fresh' first",
            self.files.path().display()
        );
        // The environment of a restarted pod waits for 'ready', but nothing is left to do: close it.
        if !self.files.stands(EXITING)? && !self.files.stands(READY)? {
            self.files.mark_instead_of_ready(verdict)?;
        }
        if verdict == Verdict::Failed {
            tracing::info!("the job has ended already: {}; {again}", self.failed());
            if self.journal.image.is_some() || self.journal.request.is_some() {
                self.publication().give_up(&mut self.journal)?;
                self.journal.write(self.directory)?;
            }
            return Ok(Some(self.say_failed(action)));
        }
        if let Some(link) = &self.journal.link {
            tracing::info!("the job has ended already: its image is published, {}; {again}", link.path);
            say_result(&json!({ "ims_image_record": { "link": link }, "result": "success" }));
        } else {
            let archive = self.files.path().join(self.settings.archive());
            tracing::info!("the job has ended already: its image is {}; {again}", archive.display());
            say_result(&packed_only(&archive));
        }
        Ok(Some(0))
    }

    /// Ends a job whose status in IMS is success. The status alone proves nothing, and the volume may be new, so the
    /// image is verified first.
    fn published_before(&mut self, job: &records::Job) -> Result<u8> {
        // Whatever the checks below find, the job's status stays, and nothing of the image is rolled back.
        self.journal.is_told = true;
        let refused = |why: &dyn std::fmt::Display| {
            let refused = Error::new("accept the job as published, although its status in IMS is success").because(why);
            refused.advise("nothing was changed; see what answers at IMS_URL, and start a new job for another image")
        };
        let image = job.resultant_image_id.as_deref().and_then(Id::parse);
        let image = image.ok_or_else(|| refused(&"its record names no image (resultant_image_id)"))?;
        let publication = self.publication();
        let record = self.work.unless_interrupted(publication.look_at(&image)).map_err(|e| refused(&e))?;
        if !self.files.stands(EXITING)? && !self.files.stands(READY)? {
            // The environment of a restarted pod waits for 'ready', but nothing is left to do: close it.
            self.files.mark_instead_of_ready(Verdict::Complete)?;
        }
        let place = record.link.as_ref().map_or("", |link| &link.path);
        tracing::info!("the job's image was published before: {place}; nothing is left to do");
        if self.journal.image == Some(image) {
            publication.end(&mut self.journal, Phase::Published)?;
        }
        say_result(&json!({ "ims_image_record": record, "ims_job_record": job, "result": "success" }));
        Ok(0)
    }

    /// Opens the image root; `None` if it is on a remote node, which sends the packed image.
    fn image_root(&self) -> Result<Option<Tree>> {
        let name = self.settings.job.image_root();
        let is_missing = || {
            let found = self.files.parent().handle_without_links(name);
            found.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
        };
        let is_remote = self.settings.job.node.is_some() || self.journal.phase == Phase::Packed;
        if self.files.stands(TRANSFER)? || is_remote && is_missing() {
            return Ok(None);
        }
        image_root::open(self.files, name).map(Some)
    }

    fn give_up_with_the_pod(&self) -> Result<()> {
        if !self.files.stands(POD_ERROR)? {
            return Ok(());
        }
        Err(Error::new("publish the image")
            .because(format!("there is a file '{POD_ERROR}' in {}", self.files.path().display()))
            .advise("see the logs of the pod's other containers: one of them gave the job up"))
    }

    fn stamps(&self) -> [Option<Stamp>; 2] {
        [Verdict::Failed.signal_file(), EXITING].map(|name| self.files.stamp(name))
    }

    /// Checks, before anybody changes the image, that it can be published. Only warns of what a session may still
    /// correct.
    fn check(&mut self, image_root: Option<&Tree>, action: Action) -> Result<()> {
        check_public_keys("--authorized-keys", &self.places.authorized_keys)?;
        // With a job ID, the job's record has been read already, so IMS answers.
        if self.settings.job.id.is_none() {
            self.ims.check()?;
        }
        let archive = Archive { directory: self.files.parent(), name: &self.settings.archive() };
        let advice = "give the image another name (--name, IMAGE_ROOT_ARCHIVE_NAME)";
        packed::refuse_source(self.files.parent(), &archive, self.settings, advice)?;
        let Settings { boot, store, network, job, .. } = self.settings;
        if store.url.is_none() {
            tracing::warn!(
                "no store is named (S3_BUCKET, IMAGE_STORE): the packed image stays in {}, and is deleted with that \
                 volume",
                self.files.path().display()
            );
            return Ok(());
        }
        // Only warn: a session may install a missing boot file. A failed build is not checked, since it has no boot
        // files.
        if let (Action::Customize, Some(image_root)) = (action, image_root) {
            if let Err(missing) = boot::check_named(image_root, boot, job.arch()) {
                tracing::warn!("{missing}; the image is published only if a session corrects that");
            }
            boot::warn_of_missing_initrd(image_root, boot, job.arch());
        }
        self.work.wait(Store::check_soon(store, network))
    }

    /// Returns whether the environment ended as failed, without ever having been open, before this container started:
    /// both `failed` and `exiting` then exist and are newer than `prepare`'s record of the source. Older marks are an
    /// earlier run's.
    fn has_failed_early(&self) -> Result<bool> {
        let Some((_, seconds, nanoseconds)) = self.files.stamp(SOURCE) else { return Ok(false) };
        let is_since = |mark: &Option<Stamp>| mark.is_some_and(|mark| (mark.1, mark.2) > (seconds, nanoseconds));
        // If the volume is claimed, an environment waits for 'ready', and the marks belong to an earlier environment.
        Ok(self.old.iter().all(is_since) && !self.files.stands(READY)? && !self.files.is_claimed())
    }

    /// Prepares all that the environment needs, then creates `ready`. Returns false if the image was marked failed
    /// during the preparation.
    fn let_open(&mut self, image_root: Option<&Tree>, action: Action) -> Result<bool> {
        if self.has_failed_early()? {
            tracing::error!(
                "the build environment ended as failed before this container started; see the log of the container \
                 that runs sshd"
            );
            return Ok(false);
        }
        self.check(image_root, action)?;
        if let (Action::Customize, Some(image_root)) = (action, image_root) {
            put_authorities(image_root, &self.places.authorities)?;
            resolv_conf::lend(image_root)?;
        }
        let keys = &self.places.authorized_keys;
        let keys = std::fs::read_to_string(keys).attempt(|| format!("read the public keys in {}", keys.display()))?;
        pod_files::configure_sshd(&self.places.sshd_directory, &keys, self.places.sshd_config.as_deref())?;
        if self.places.sshd_config.is_some() {
            pod_files::warn_of_unused_keys(&self.places.sshd_directory)?;
        }
        let (now, old) = (self.stamps(), self.old);
        if now.iter().zip(old).any(|(now, old)| now.is_some() && *now != old) {
            if let Some(image_root) = image_root {
                SIDECAR.restore(image_root)?;
            }
            return Ok(false);
        }
        for name in [EXITING, SSHD_LISTENING].into_iter().chain(Verdict::ALL.map(Verdict::signal_file)) {
            if name != SSHD_LISTENING && self.files.stands(name)? {
                tracing::info!("removed the mark '{name}' of an earlier environment");
            }
            self.files.retract(name)?;
        }
        if let Some(image_root) = image_root.filter(|_| self.settings.job.jailed) {
            image_root::remove_old_marks(image_root)?;
        }
        self.journal.phase = Phase::Ready;
        self.journal.write(self.directory)?;
        self.files.touch(READY)?;
        tracing::info!("created '{READY}': the environment may open");
        if !self.files.is_claimed() {
            let seconds = self.settings.start_limit.as_secs();
            tracing::info!("no build environment waits yet; it has {seconds} s to start (IMS_START_LIMIT)");
        }
        Ok(true)
    }

    /// Waits until the environment has closed; fails if it is gone without a verdict.
    fn shell(&mut self, image_root: Option<&Tree>) -> Result<Ended> {
        let mut watch = Watch::new()?;
        let mut last_seen = Instant::now();
        let (mut was_there, mut listened, mut asked_to_end) = (false, false, None);
        let (mut exiting_since, mut is_warned, mut is_doubted) = (None, false, false);
        loop {
            watch.on(self.files.path());
            watch.drain();
            let is_exiting = self.files.stands(EXITING)?;
            let is_claimed = self.files.is_claimed();
            was_there |= is_claimed;
            if is_exiting && !is_claimed && self.has_verdict(image_root)? {
                // 'exiting' counts only if an environment was open here, or if the image is marked failed: a failed
                // image is never published.
                if was_there || listened || self.files.stands(SSHD_LISTENING)? || self.is_marked_failed(image_root) {
                    break;
                }
                if !is_doubted {
                    is_doubted = true;
                    tracing::warn!("'{EXITING}' exists, but no environment was open: ignored");
                }
            }
            self.give_up_with_the_pod()?;
            if !listened && self.files.stands(SSHD_LISTENING)? {
                listened = true;
                match self.ims.set_status(Status::WaitingOnUser) {
                    // A signal has interrupted the request; the signal is handled below.
                    Err(_) if self.work.interrupted().is_some() => {}
                    other => drop(other?),
                }
                // Restart the wait: the request may have taken some time.
                last_seen = Instant::now();
                continue;
            }
            if is_claimed {
                last_seen = Instant::now();
            }
            // An environment drops its claim right after it creates 'exiting'. If the claim stays, a session of a plain
            // job created the file.
            let since = exiting_since.filter(|_| is_exiting).unwrap_or_else(Instant::now);
            exiting_since = is_exiting.then_some(since);
            if is_claimed && !is_warned && since.elapsed() > LOOK_EVERY {
                is_warned = true;
                tracing::warn!("'{EXITING}' exists, but the environment is still open: a session created it; ignored");
            }
            let patience =
                if was_there || listened || is_exiting && !is_doubted { GONE } else { self.settings.start_limit };
            if last_seen.elapsed() > patience {
                let _ = self.files.touch(Verdict::Failed.signal_file());
                let seconds = patience.as_secs();
                if is_exiting && is_doubted {
                    return Err(Error::new("publish the image")
                        .because(format!("'{EXITING}' exists, but no build environment was open on the volume"))
                        .advise("see which container created it; only the one that runs sshd may"));
                }
                if is_exiting {
                    return Err(Error::new("publish the image")
                        .because(format!(
                            "the environment is gone: '{EXITING}' exists, but neither 'complete' nor 'failed'"
                        ))
                        .advise("see the log of the container that runs sshd, and the node's"));
                }
                let limit = if was_there || listened { "" } else { " (IMS_START_LIMIT)" };
                return Err(Error::new("wait for the build environment")
                    .because(format!("it has been gone for {seconds} s{limit} without a verdict"))
                    .advise("see the log of the container that runs sshd, and the node's"));
            }
            if asked_to_end.is_none() && self.work.heed().is_err() {
                // Have the environment close cleanly before this container terminates.
                self.files.touch(Verdict::Failed.signal_file())?;
                asked_to_end = Some(Instant::now());
                self.work.finish_regardless();
                if is_claimed {
                    tracing::info!(
                        "asked to terminate: waiting at most {} s for the build environment to close",
                        CLOSE_TIME.as_secs()
                    );
                }
            }
            // Do not wait for an environment that starts only now: it finds 'failed' and closes by itself.
            if asked_to_end.is_some_and(|since| !is_claimed || since.elapsed() > CLOSE_TIME) {
                break;
            }
            let mut sources = [PollFd::new(&watch, PollFlags::IN), PollFd::new(self.work.signals(), PollFlags::IN)];
            // Poll soon, since the kernel raises no event when the claim is dropped.
            let is_ending = is_exiting && since.elapsed() < LOOK_EVERY;
            let _ = poll::wait(&mut sources, if is_ending { LOOK_SOON } else { LOOK_EVERY });
        }
        if let Some(signal) = self.work.interrupted() {
            return Err(Error::interrupted(signal));
        }
        if !listened && self.files.stands(SSHD_LISTENING)? {
            self.ims.set_status(Status::WaitingOnUser)?;
        }
        Ok(if self.is_marked_failed(image_root) { Ended::Failed } else { Ended::Well })
    }

    /// Packs the image root. Reads everything by descriptor: sessions of a plain job may still run, and rename
    /// anything.
    fn pack(&mut self, image_root: Option<&Tree>) -> Result<Image> {
        self.ims.set_status(Status::PackagingArtifacts)?;
        // Find the boot files now, so that missing ones are reported before packing.
        let has_store = self.settings.store.url.is_some();
        let (parent, settings) = (self.files.parent(), self.settings);
        let is_transferred = self.files.stands(TRANSFER)?;
        if image_root.is_none() && !is_transferred && self.journal.phase < Phase::Packed {
            return Err(Error::new("publish the image")
                .because(format!("the remote job left no {TRANSFER} in {}", self.files.path().display()))
                .advise("see the log of the container that runs sshd, and the node's"));
        }
        let find = || match image_root {
            Some(image_root) => boot::find_if_any(image_root, &settings.boot, settings.job.arch()),
            None => boot::left_in(parent, &settings.boot, settings.job.arch()),
        };
        let boot = if has_store { find()? } else { None };
        let archive = Archive { directory: parent, name: &settings.archive() };
        let rootfs = if is_transferred {
            // Record the phase before the rename: afterwards only the journal says that there is no image root.
            self.journal.phase = Phase::Packed;
            self.journal.write(self.directory)?;
            parent.rename(TRANSFER, archive.name).attempt(|| format!("rename {TRANSFER}"))?;
            tracing::info!("publishing {TRANSFER}, which a remote job packed, as it is");
            archive.open_squashfs()?
        } else if let Some(image_root) = image_root.filter(|_| self.journal.phase < Phase::Packed) {
            let source = basis::of(self.work, settings, parent, image_root, true)?;
            let exclude = &self.places.exclude;
            let (packed, recorded) =
                packed::pack(self.work, parent, image_root, &archive, settings, exclude, source.as_ref())?;
            recorded?;
            tracing::info!("packed {}", archive.shown());
            if let Some(file) = &self.places.changes
                && let Err(error) = write_changes(self.work, self.files.parent(), image_root, file)
            {
                self.work.heed()?;
                tracing::warn!("{error}; the image is published anyway");
            }
            self.journal.phase = Phase::Packed;
            self.journal.write(self.directory)?;
            packed
        } else {
            // The image was packed before a restart. Check the file, since another file may have this name now.
            let packed = archive.open_squashfs()?;
            if let Some(image_root) = image_root {
                packed::check(parent, &archive, &packed, image_root)?;
            }
            packed
        };
        Ok(Image { rootfs, recorded: None, boot, debug_kernel: None })
    }

    fn publish(&mut self, image: Image) -> Result<u8> {
        if self.settings.store.url.is_none() {
            let archive = self.files.path().join(self.settings.archive());
            tracing::warn!(
                "the image is not published: no store is named (S3_BUCKET, IMAGE_STORE); it is {}, and is deleted \
                 with that volume",
                archive.display()
            );
            self.publication().end(&mut self.journal, Phase::Published)?;
            say_result(&packed_only(&archive));
            return Ok(0);
        }
        self.has_published = true;
        let report = self.publication().publish(&mut self.journal, image)?;
        say_result(&report);
        Ok(0)
    }

    fn publication(&self) -> Publication<'a> {
        Publication { work: self.work, settings: self.settings, ims: self.ims, directory: self.directory }
    }
}

//! `ims-sshd sidecar`: what stands beside a pod's build environment, on events. It lets the environment open, tells IMS how far it is,
//! and publishes the image when the environment has ended well. It never waits for one that is gone.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::jail::resolv_conf::{self, ENVIRONMENT, RESOLV_CONF, SIDECAR};
use crate::lifecycle::environment;
use crate::lifecycle::settings::Action;
use crate::lifecycle::signal_files::{BUILD_FAILED, EXITING, LOOK_EVERY, READY, SSHD_LISTENING, SignalFiles, Watch};
use crate::lifecycle::stage::{Shown, Stage};
use crate::local::say_result;
use crate::publish::changes::Inventory;
use crate::publish::ims::{Ims, Status};
use crate::publish::journal::{Journal, Notes, Phase};
use crate::publish::package::{self, Archive};
use crate::publish::prepare::INVENTORY;
use crate::publish::settings::Settings;
use crate::publish::upload::{Image, Publication};
use crate::publish::work::Work;
use crate::publish::{boot, pod_files};
use crate::sys::poll;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;

/// The builder, or who supervises the pod, has given it up.
const POD_ERROR: &str = "pod_error";

/// The packed image of a remote job, whose boot files lie beside it.
pub const TRANSFER: &str = "transfer.sqsh";

/// How long an environment that has listened may be without its claim on the volume: one that is being restarted has none.
const GONE: Duration = Duration::from_secs(5);

/// How long the environment has to close when this container is asked to end.
const CLOSE_TIME: Duration = Duration::from_secs(20);

/// What belongs to the command line alone.
#[derive(Debug, Clone)]
pub struct Places {
    /// Who may log in.
    pub authorized_keys: PathBuf,
    /// How sshd is configured, if not as usual.
    pub sshd_config: Option<PathBuf>,
    /// Where the other container's sshd reads both.
    pub sshd_folder: PathBuf,
    /// Authorities that the image gets.
    pub authorities: PathBuf,
    /// Patterns below the image root that are not packed.
    pub exclude: Vec<String>,
    /// Where to write what has changed.
    pub changes: Option<PathBuf>,
}

/// How the other container ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Well,
    Failed,
}

/// Runs a sidecar from start to end. `settings` that are refused are told IMS, as far as they name one.
pub fn run(
    settings: Result<Settings>,
    variables: Vec<(std::ffi::OsString, std::ffi::OsString)>,
    places: &Places,
) -> Result<u8> {
    let (settings, refusal) = match settings {
        Ok(settings) => (settings, None),
        Err(refusal) => {
            let to_tell = ["IMS_URL", "OAUTH_CONFIG_DIR", "IMS_JOB_ID", "CA_CERT"];
            let few = variables.into_iter().filter(|(name, _)| to_tell.iter().any(|known| name == *known));
            // A job's id that is none is refused again, and IMS cannot be told.
            let to_tell = Settings::read(None, few).or_else(|_| Settings::read(None, []))?;
            (to_tell, Some(refusal))
        }
    };
    let work = Work::begin(&settings.network)?;
    let files = refusal.map_or(Ok(()), Err).and_then(|()| {
        let files = SignalFiles::open(&settings.parent)?;
        files.ok_or_else(|| Error::new(format!("open {}", settings.parent.display())).because("it does not exist"))
    });
    let files = match files {
        Ok(files) => files,
        Err(error) => return conclude(&work, Ims::of(&work, &settings), Err(error)),
    };
    // Where another sidecar is at work, IMS hears of the job from that one.
    let _claim = files.claim_for_sidecar()?;
    let live = || {
        let notes = Notes::new(&files, &settings);
        let journal = Journal::read(&notes)?;
        let ims = Ims::of(&work, &settings);
        let mut sidecar =
            Sidecar { work: &work, settings: &settings, places, files: &files, notes: &notes, journal, ims };
        // Before IMS hears of it: it ends the job, and its volume with it.
        sidecar.live().inspect_err(|_| {
            if let Err(e) = sidecar.publication().give_up(&mut sidecar.journal) {
                tracing::error!("{e}");
            }
        })
    };
    let result = live();
    conclude(&work, Ims::of(&work, &settings), result)
}

/// Whatever goes wrong, IMS hears of it, and whoever started this.
fn conclude(work: &Work, mut ims: Ims, result: Result<u8>) -> Result<u8> {
    let error = match work.unless_interrupted(result) {
        Err(error) => error,
        done => return done,
    };
    work.finish_regardless();
    if let Err(untold) = ims.set_status(Status::Error) {
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
    notes: &'a Notes<'a>,
    journal: Journal,
    ims: Ims<'a>,
}

impl<'a> Sidecar<'a> {
    fn live(&mut self) -> Result<u8> {
        // A container that is started again after the job has ended does nothing more.
        if let Some(job) = self.ims.job()? {
            match job["status"].as_str() {
                Some("success") => return Ok(0),
                Some("error") => return Err(Error::new("go on").because("the job's status is error already")),
                // Its volume goes with the job, and the packed image with that.
                _ if self.settings.store.url.is_none() => {
                    return Err(Error::new("publish the image of a job of IMS")
                        .because("no store is named")
                        .advise("set S3_BUCKET or IMAGE_STORE"));
                }
                _ => {}
            }
        }
        self.give_up_with_the_pod()?;
        let action = self.settings.action.ok_or_else(|| {
            Error::new("start").because("IMS_ACTION is not set").advise("set it to 'customize' or 'create'")
        })?;
        let wants_shell = match action {
            Action::Customize => true,
            Action::Create if !self.files.stands(BUILD_FAILED)? => false,
            Action::Create if self.settings.debug => true,
            Action::Create => {
                return Err(Error::new("publish the image")
                    .because("its build failed")
                    .advise("ENABLE_DEBUG=true opens a shell beside it"));
            }
        };
        let image_root = self.image_root()?;
        if self.journal.phase < Phase::Packing {
            if wants_shell {
                if self.journal.phase < Phase::Ready {
                    self.let_open(image_root.as_ref(), action)?;
                }
                let ended = self.shell(image_root.as_ref())?;
                if let Some(image_root) = &image_root {
                    // An environment that was killed has left its own above it.
                    ENVIRONMENT.take_back(image_root)?;
                    if SIDECAR.take_back(image_root)? == Some(true) {
                        tracing::info!("/{RESOLV_CONF} of the image was changed, and stays as it is");
                    }
                }
                if ended == Ended::Failed {
                    return self.end_as_failed(action);
                }
            } else if let Some(image_root) = &image_root {
                pod_files::put_authorities(image_root, &self.places.authorities)?;
            }
            self.journal.phase = Phase::Packing;
            self.journal.write(self.notes)?;
        }
        // On a full volume nobody is told, and the image may be uploaded all the same.
        let shown = Shown::begin(self.files.parent(), Stage::Packing).ok();
        let image = self.pack(image_root.as_ref())?;
        // A mark that was made since then, or before this container was started again.
        if wants_shell && self.is_marked_failed(image_root.as_ref()) {
            return self.end_as_failed(action);
        }
        if let Some(shown) = &shown {
            let _ = shown.next(Stage::Uploading);
        }
        self.publish(image)
    }

    fn is_marked_failed(&self, image_root: Option<&Tree>) -> bool {
        let marked = environment::is_marked_failed(self.files, image_root.filter(|_| self.settings.jailed));
        marked.unwrap_or_else(|e| {
            tracing::error!("{e}: taken as failed");
            true
        })
    }

    /// Ends the job as failed, and rolls back the publication that an earlier run has begun.
    fn end_as_failed(&mut self, action: Action) -> Result<u8> {
        tracing::info!("the image was marked failed: it is not published");
        self.publication().give_up(&mut self.journal)?;
        self.ims.set_status(Status::Error)?;
        self.notes.clear()?;
        Ok(u8::from(action == Action::Create))
    }

    /// The image root; nothing where it is on another node, and its packed image is, or was, or will be here.
    fn image_root(&self) -> Result<Option<Tree>> {
        let name = self.settings.image_root();
        let is_missing = || {
            let found = self.files.parent().handle_without_links(name);
            found.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
        };
        let is_remote = self.settings.remote || self.journal.phase == Phase::Packed;
        if self.files.stands(TRANSFER)? || is_remote && is_missing() {
            return Ok(None);
        }
        environment::open_image_root(self.files, name).map(Some)
    }

    fn give_up_with_the_pod(&self) -> Result<()> {
        if !self.files.stands(POD_ERROR)? {
            return Ok(());
        }
        Err(Error::new("go on").because(format!("'{POD_ERROR}' stands in {}", self.files.path().display())))
    }

    /// Everything that the environment needs, then `ready`.
    fn let_open(&mut self, image_root: Option<&Tree>, action: Action) -> Result<()> {
        if let (Action::Customize, Some(image_root)) = (action, image_root) {
            pod_files::put_authorities(image_root, &self.places.authorities)?;
            Self::lend_resolv_conf(image_root)?;
        }
        let keys = &self.places.authorized_keys;
        let keys = std::fs::read_to_string(keys).attempt(|| format!("read the public keys in {}", keys.display()))?;
        pod_files::configure_sshd(&self.places.sshd_folder, &keys, self.places.sshd_config.as_deref())?;
        for name in [EXITING, SSHD_LISTENING].into_iter().chain(Verdict::ALL.map(Verdict::signal_file)) {
            self.files.retract(name)?;
        }
        if let Some(image_root) = image_root.filter(|_| self.settings.jailed) {
            environment::remove_old_marks(image_root)?;
        }
        self.journal.phase = Phase::Ready;
        self.journal.write(self.notes)?;
        self.files.touch(READY)?;
        tracing::info!("'{READY}': the environment may open");
        Ok(())
    }

    /// The pod's name servers for the image, until the environment has ended.
    fn lend_resolv_conf(image_root: &Tree) -> Result<()> {
        // An earlier run was killed amid this.
        SIDECAR.take_back(image_root)?;
        match resolv_conf::of_container() {
            // In plain mode, /run is the image's.
            Some(text) if resolv_conf::has_to_be_lent(image_root, &text, false)? => {
                let lent = SIDECAR.lend(image_root, &text);
                lent.attempt(|| "put the pod's /etc/resolv.conf into the image").map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// Waits for the environment's end, and notices when nobody is there who could bring it about.
    fn shell(&mut self, image_root: Option<&Tree>) -> Result<Ended> {
        let mut watch = Watch::new()?;
        let mut last_seen = Instant::now();
        let (mut listened, mut asked_to_end) = (false, None);
        loop {
            watch.on(self.files.path());
            watch.drain();
            if self.files.stands(EXITING)? {
                break;
            }
            self.give_up_with_the_pod()?;
            if !listened && self.files.stands(SSHD_LISTENING)? {
                listened = true;
                match self.ims.set_status(Status::WaitingOnUser) {
                    // A signal came meanwhile, and is heeded below.
                    Err(_) if self.work.interrupted().is_some() => {}
                    other => other?,
                }
            }
            if self.files.is_claimed() {
                last_seen = Instant::now();
            }
            let patience = if listened { GONE } else { self.settings.start_limit };
            if last_seen.elapsed() > patience && !self.files.stands(EXITING)? {
                let _ = self.files.touch(Verdict::Failed.signal_file());
                let seconds = patience.as_secs();
                return Err(Error::new("wait for the build environment")
                    .because(format!("it has been gone for {seconds} s without a word"))
                    .advise("see the log of the container that runs sshd, and the node's"));
            }
            if asked_to_end.is_none() && self.work.heed().is_err() {
                // The environment closes in order, and this container after it.
                self.files.touch(Verdict::Failed.signal_file())?;
                asked_to_end = Some(Instant::now());
                self.work.finish_regardless();
            }
            if asked_to_end.is_some_and(|since| since.elapsed() > CLOSE_TIME) {
                break;
            }
            let mut sources = [PollFd::new(&watch, PollFlags::IN), PollFd::new(self.work.signals(), PollFlags::IN)];
            let _ = poll::wait(&mut sources, LOOK_EVERY);
        }
        if let Some(signal) = self.work.interrupted() {
            return Err(Error::interrupted(signal));
        }
        if !listened && self.files.stands(SSHD_LISTENING)? {
            self.ims.set_status(Status::WaitingOnUser)?;
        }
        Ok(if self.is_marked_failed(image_root) { Ended::Failed } else { Ended::Well })
    }

    /// Packs the image root. Everything is read by descriptors from here on: sessions of a plain job may still be there, and rename what
    /// they like.
    fn pack(&mut self, image_root: Option<&Tree>) -> Result<Image> {
        self.ims.set_status(Status::PackagingArtifacts)?;
        // What is missing is told before anything is packed.
        let has_store = self.settings.store.url.is_some();
        let (parent, settings) = (self.files.parent(), self.settings);
        let is_transferred = self.files.stands(TRANSFER)?;
        if image_root.is_none() && !is_transferred && self.journal.phase < Phase::Packed {
            return Err(Error::new("publish the image")
                .because(format!("the remote job has left no {TRANSFER} in {}", self.files.path().display()))
                .advise("see the log of the container that runs sshd, and the node's"));
        }
        let find = || match image_root {
            Some(image_root) => boot::find(image_root, &settings.boot, settings.arch),
            None => boot::left_in(parent, &settings.boot, settings.arch),
        };
        let boot = has_store.then(find).transpose()?;
        let archive = Archive { folder: parent, name: &settings.archive() };
        let rootfs = if is_transferred {
            // Noted before it is renamed: from then on nothing but this tells that there is no image root.
            self.journal.phase = Phase::Packed;
            self.journal.write(self.notes)?;
            parent.rename(TRANSFER, archive.name).attempt(|| format!("rename {TRANSFER}"))?;
            tracing::info!("{TRANSFER} is what a remote job has packed: published as it is");
            archive.open_squashfs()?
        } else if let Some(image_root) = image_root.filter(|_| self.journal.phase < Phase::Packed) {
            let packed = package::pack(self.work, image_root, &archive, &settings.packing, &self.places.exclude)?;
            tracing::info!("packed {}", archive.shown());
            if let Some(file) = &self.places.changes
                && let Err(error) = write_changes(self.work, self.files.parent(), image_root, file)
            {
                self.work.heed()?;
                tracing::warn!("{error}; the image is published all the same");
            }
            self.journal.phase = Phase::Packed;
            self.journal.write(self.notes)?;
            packed
        } else {
            // Packed before a restart: what has the name by now may be another file.
            archive.open_squashfs()?
        };
        Ok(Image { rootfs, boot, debug_kernel: None })
    }

    fn publish(&mut self, image: Image) -> Result<u8> {
        if self.settings.store.url.is_none() {
            tracing::info!("no store is named (S3_BUCKET, IMAGE_STORE): the packed image stays where it is");
            return self.notes.clear().map(|()| 0);
        }
        let report = self.publication().publish(&mut self.journal, image)?;
        say_result(&report);
        Ok(0)
    }

    fn publication(&self) -> Publication<'a> {
        let ims = Ims::of(self.work, self.settings);
        Publication { work: self.work, settings: self.settings, ims, notes: self.notes }
    }
}

/// Writes what has changed since the inventory in `folder` was made to the new file `to`. The directory may be somebody else's: what has the
/// name there, a link or a fifo perhaps, is replaced, and neither followed nor opened.
pub fn write_changes(work: &Work, folder: &Tree, image_root: &Tree, to: &Path) -> Result<()> {
    let (above, name) = package::output(to, "the report of changes")?;
    let changes = Inventory::load(folder, INVENTORY)?.changes_to(&Inventory::of(work, image_root)?);
    above.replace(name, format!("{changes:#}\n").as_bytes()).attempt(|| format!("write {}", to.display()))
}

//! `ims-sshd customize --node`: an image that is changed and packed on another host, and published from this machine.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use serde_json::Value;

use crate::environment::own_sshd;
use crate::environment::settings;
use crate::environment::stage::Stage;
use crate::error::{Attempt, Error, Result};
use crate::image::boot::{self, BootFiles};
use crate::image::kind::{self, Kind};
use crate::image::packing::{self, Archive};
use crate::ims::client::Ims;
use crate::local::claim::remove_directory;
use crate::local::customize::{
    Customization, Opened, announce, authorized_keys, configure_client, read_variables, refuse_unusable_key,
};
use crate::local::directory;
use crate::local::enter::ended_with;
use crate::local::register::Entry;
use crate::local::run::{Fate, Run, drop_changes, left_in};
use crate::local::run_directory::RunDirectory;
use crate::local::script::Script;
use crate::local::work_directory::WorkDirectory;
use crate::publish::identity::{Identity, Record};
use crate::publish::journal::{Journal, JournalDirectory};
use crate::publish::manifest::say_result;
use crate::publish::prepare;
use crate::publish::publication::{Image, Publication};
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::remote::connection::{Connection, Destination};
use crate::remote::far::Wanted;
use crate::remote::message::{Customize, Task, job_without_ims};
use crate::remote::node_root;
use crate::remote::relay;
use crate::store::Store;
use crate::sys::signals::unblock_signals;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::verdict::Verdict;
use crate::volume::layout::{READY, REMOTE_CHANGES, TRANSFER};
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::StateDirectory;

/// Variables of this process that are passed on to the node.
const PASSED_ON: [&str; 8] = [
    "IMAGE_PACKER",
    "IMS_AGENT_FORWARDING",
    "IMS_CLOSE_GRACE",
    "IMS_JAIL_HOSTNAME",
    "IMS_JAIL_TIER",
    "JOB_ENABLE_DKMS",
    "LOG_LEVEL",
    "SOURCE_DATE_EPOCH",
];

/// Maximum size of a report of changes, in bytes.
const LARGEST_REPORT: u64 = 1 << 30;

/// A customization on a node.
#[derive(Debug)]
pub struct Offloaded {
    /// Options for opening the environment.
    pub wanted: Customization,
    /// The command to run in the image, for a run without people.
    pub command: Vec<OsString>,
    /// The script to run in the image instead of the command.
    pub script: Option<Script>,
}

/// Opens the environment on the node, waits until it closes, and publishes the image. Returns 0 if the image was marked
/// complete; if it was marked failed, 1 or the exit code of the command that failed.
pub fn run(mut run: Run, offloaded: &Offloaded) -> Result<u8> {
    let node = run.node.clone().unwrap_or_default();
    // Refuse unusable arguments before anything is registered.
    Destination::named(&node)?;
    refuse_unusable_key(&offloaded.wanted)?;
    let environment = read_variables(&offloaded.wanted)?;
    let entry = run.register()?;
    entry.set(&[("node", &node)]);
    let mut settings = run.settings.take().ok_or_else(|| Error::bad_input("expected an output"))?;
    let source = run.source.clone();
    if let Source::Here(path) = &source {
        directory::refuse_open_source(&run.named)?;
        settings.packing.compression = settings.packing.compression.or_else(|| kind::compression(path));
    }
    let work = Work::begin(&settings.network)?;
    let ims = settings.ims_client(&work);
    work.unless_interrupted(ims.job())?;
    work.wait(Store::check(&settings.store, &settings.network))?;
    run.reports.changes.as_deref().map(|file| packing::check_output(file, "--changes")).transpose()?;
    let place = work.unless_interrupted(WorkDirectory::claim(&settings.job.parent, &run.place_name(&source)))?;
    place.path().clone_into(&mut settings.job.parent);
    let job = Job {
        run: &run,
        node: &node,
        offloaded,
        environment,
        settings: &settings,
        work: &work,
        ims: &ims,
        place: &place,
    };
    if job.has_packed(&source)? {
        tracing::info!("publishing the image that {} has packed before; --fresh drops it and opens SOURCE", node);
    } else {
        place.clear()?;
        let ended = job.open(&source, &entry);
        let ended = work.unless_interrupted(ended);
        if !matches!(ended, Ok((Fate::Publish, _))) {
            let path = place.path().to_owned();
            work.last(place.remove()).map_err(|e| e.advise_if_interrupted(|| left_in(&path)))?;
            return ended.map(|(_, code)| code);
        }
    }
    entry.record_in(place.files().parent());
    let shown = place.path().display().to_string();
    let published = work.unless_interrupted(job.publish(&entry));
    published.map_err(|e| {
        let name = entry.name();
        let line = &run.command_line.line;
        e.advise_also(&format!(
            "the packed image is kept in {shown}; 'ims-sshd fail {name}' drops it; to resume: {line}"
        ))
    })?;
    work.last(place.remove()).map_err(|e| e.advise_if_interrupted(|| left_in(Path::new(&shown))))?;
    Ok(0)
}

struct Job<'a> {
    run: &'a Run,
    node: &'a str,
    offloaded: &'a Offloaded,
    environment: settings::Settings,
    settings: &'a Settings,
    work: &'a Work,
    ims: &'a Ims<'a>,
    place: &'a WorkDirectory,
}

impl Job<'_> {
    /// Returns whether an earlier run left behind a packed image of `source` that could not be published.
    fn has_packed(&self, source: &Source) -> Result<bool> {
        let files = self.place.files();
        if !files.stands(TRANSFER)? {
            return Ok(false);
        }
        if self.run.fresh {
            return drop_changes(self.ims, self.settings, self.place).map(|()| false);
        }
        let known = Record::on(files.parent(), self.settings)?.read();
        let now = match source {
            Source::Here(path) => Some(Identity::of(source, &kind::Opened::open(path)?, &self.settings.expected)?),
            _ => None,
        };
        let is_same = known.as_ref().is_some_and(|known| match &now {
            Some(now) => known.is_same(now),
            None => known.is_named(source, &self.settings.expected),
        });
        if is_same {
            return Ok(true);
        }
        Err(Record::refusal(
            &self.place.path().join(TRANSFER).display().to_string(),
            source,
            known.as_ref(),
            now.as_ref(),
        ))
    }

    /// Has the node open the image, and receives the image that the node has packed.
    fn open(&self, source: &Source, entry: &Entry) -> Result<(Fate, u8)> {
        let wanted = &self.offloaded.wanted;
        let parent = self.place.path();
        let run = RunDirectory::claim("customize", parent)?;
        let cleared = |e: Error| {
            let _ = remove_directory(run.path());
            e
        };
        let (port, _held) = own_sshd::port(wanted.port, wanted.listen).map_err(cleared)?;
        let address = SocketAddr::new(wanted.listen, port);
        let keys = authorized_keys(wanted.authorized_key.as_deref(), run.path()).map_err(cleared)?;
        self.try_node(source).map_err(cleared)?;
        let image = prepare::squashfs(self.work, self.settings, source).map_err(cleared)?;
        let order = self.order(&entry.name(), &keys.authorized, address, image).map_err(cleared)?;
        let removed = || Error::new(format!("open {}", parent.display())).because("it has been removed");
        let files = SignalFiles::open(parent)?.ok_or_else(removed)?;
        files.touch(READY)?;
        entry.set(&[("image_root_parent", &parent.display().to_string())]);
        let (running, broken) = (RefCell::new(None), RefCell::new(None));
        let listening = |host_key: &str| {
            let begun = configure_client(run.path(), address, keys.identity.as_deref(), host_key)
                .and_then(|login| self.begin(entry, run.path(), &login));
            match begun {
                Ok(thread) => *running.borrow_mut() = thread,
                Err(error) => {
                    *broken.borrow_mut() = Some(error);
                    let _ = mark(parent, Verdict::Failed);
                }
            }
        };
        let outcome = relay::run(parent, Some(files), || Ok(order), listening);
        let command = running.take().map(|thread| thread.join().unwrap_or(1));
        remove_directory(run.path())?;
        let outcome = broken.take().map_or(outcome, Err)?;
        let (why, code) = match (outcome.exit_code, outcome.verdict, command) {
            (0, Some(Verdict::Complete), _) => {
                let usable = self.check_transferred();
                usable.map_err(|e| e.advise_also("no changes are kept; run the command again"))?;
                return Ok((Fate::Publish, 0));
            }
            (0, _, Some(code)) if code != 0 => {
                let what = if self.offloaded.script.is_some() { "script" } else { "command" };
                (ended_with(what, code.into()), code)
            }
            (0, ..) => ("the image was marked failed".into(), 1),
            (code, ..) if code > 128 => ("interrupted".into(), code),
            (code, ..) => ("the job on the node failed".into(), code),
        };
        tracing::warn!("{why}: the image is not published, and no changes are kept");
        Ok((Fate::Discard, code))
    }

    /// Refuses files from the node that [`publish`](Self::publish) would refuse: an image that is kept for another run
    /// would be refused there again.
    fn check_transferred(&self) -> Result<()> {
        let files = self.place.files();
        transferred(self.settings, files)?;
        self.run.reports.changes.as_ref().map_or(Ok(()), |_| read_changes(files.parent()).map(drop))
    }

    /// Connects to the node and leaves again, if the image has to be fetched or packed first, which may take long.
    fn try_node(&self, source: &Source) -> Result<()> {
        if let Source::Here(path) = source
            && kind::Opened::open(path)?.kind()? == Some(Kind::Squashfs)
        {
            return Ok(());
        }
        let state = StateDirectory::of(self.place.path())?;
        let (to, silence) = (Destination::named(self.node)?, self.environment.node_silence);
        let connected = Connection::open(&to, state.path(), silence, &|| self.work.heed()).map(drop);
        state.remove()?;
        connected
    }

    /// The instructions for the node. In the jail, the image is called `label`.
    fn order(&self, label: &str, keys: &Path, listen: SocketAddr, image: std::fs::File) -> Result<Wanted> {
        let Self { run, node, offloaded: Offloaded { wanted, .. }, environment, settings, .. } = self;
        let own = PASSED_ON.into_iter().filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
        let jailed = if wanted.jailed { "True" } else { "False" };
        let from_scratch = if settings.packing.is_from_scratch { "true" } else { "false" };
        let mut variables: Vec<_> = own.collect();
        let named = [
            ("SSH_JAIL", Some(jailed)),
            ("IMAGE_COMPRESSION", settings.packing.compression),
            ("IMAGE_FROM_SCRATCH", Some(from_scratch)),
            ("KERNEL_FILENAME", Some(settings.boot.kernel.as_str())),
            ("INITRD_FILENAME", Some(&settings.boot.initrd)),
            ("KERNEL_PARAMETERS_FILENAME", Some(&settings.boot.parameters)),
        ];
        variables.extend(named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))));
        Ok(Wanted {
            to: Destination::named(node)?,
            job: job_without_ims()?,
            task: Task::Customize(Customize {
                variables,
                keys: std::fs::read_to_string(keys).attempt(|| format!("read {}", keys.display()))?,
                authorities: Vec::new(),
                session_variables: wanted.variables.clone(),
                exclude: run.exclude.iter().map(ToString::to_string).collect(),
                reports_changes: run.reports.changes.is_some(),
                sshd: None,
                script: None,
                image: wanted.jailed.then(|| label.to_owned()),
            }),
            image: Some(image),
            listen: vec![(Some(listen.ip()), listen.port())],
            boot: boot::left_names(&settings.boot, settings.job.arch()),
            silence: environment.node_silence,
        })
    }

    /// Tells people that they can log in, or starts the command in a thread, which is returned.
    fn begin(&self, entry: &Entry, run: &Path, login: &str) -> Result<Option<JoinHandle<u8>>> {
        let parent = self.place.path().to_owned();
        entry.set(&[("login", login)]);
        entry.reach(Stage::Serving);
        let Offloaded { wanted, command, script, .. } = self.offloaded;
        let (words, input) = match script {
            Some(script) => script.piped()?,
            None if command.is_empty() => {
                let source = self.run.shown();
                let opened = Opened {
                    source: &source,
                    image_root: &parent,
                    shown: Path::new(&source),
                    in_place: false,
                    prints_result: self.run.reports.result,
                };
                announce(&opened, Path::new(node_root::PARENT), login, &entry.name(), wanted.jailed);
                return Ok(None);
            }
            None => (command.iter().map(|word| word.to_string_lossy().into_owned()).collect(), Vec::new()),
        };
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(run.join("ssh_config")).args(["-o", "BatchMode=yes", "image", "--"]);
        ssh.arg(shell_words::join(words));
        ssh.stdin(if script.is_some() { Stdio::piped() } else { Stdio::inherit() });
        let mut child = unblock_signals(&mut ssh).spawn().attempt(|| "run ssh")?;
        Ok(Some(std::thread::spawn(move || {
            if let Some(mut to) = child.stdin.take() {
                // Ignore errors: the script may exit before all of it has been read.
                let _ = to.write_all(&input);
            }
            let code = child.wait().ok().and_then(|status| status.code()).unwrap_or(1);
            let verdict = if code == 0 { Verdict::Complete } else { Verdict::Failed };
            if let Err(error) = mark(&parent, verdict) {
                tracing::error!("{error}");
            }
            u8::try_from(code).unwrap_or(1)
        })))
    }

    /// Publishes the image that the node has packed.
    fn publish(&self, entry: &Entry) -> Result<()> {
        let Self { run, settings, work, ims, place, .. } = self;
        entry.reach(Stage::Uploading);
        let parent = place.files().parent();
        if let Some(to) = &run.reports.changes {
            let attempted = || format!("write {}", to.display());
            let text = read_changes(parent)?;
            let (above, name) = packing::output(to, "--changes")?;
            above.replace(name, &text).attempt(attempted)?;
        }
        let report = publish_transferred(work, settings, ims, place.files())?;
        if run.reports.result {
            say_result(&report);
        }
        Ok(())
    }
}

/// Opens the packed image that a node has sent, and its boot files if there are any.
fn transferred(settings: &Settings, files: &SignalFiles) -> Result<(File, Option<BootFiles>)> {
    let parent = files.parent();
    let rootfs = Archive { directory: parent, name: TRANSFER }.open_squashfs()?;
    let arch = settings.job.arch();
    let boot = boot::left_in(parent, &settings.boot, arch)?;
    Ok((rootfs, boot))
}

/// Reads the report of changes that a node has sent.
fn read_changes(parent: &Tree) -> Result<Vec<u8>> {
    parent.read(REMOTE_CHANGES, LARGEST_REPORT).attempt(|| "read the node's report of changes")
}

/// Publishes the packed image that a node has sent, with its boot files if there are any.
pub(crate) fn publish_transferred(work: &Work, settings: &Settings, ims: &Ims, files: &SignalFiles) -> Result<Value> {
    let (rootfs, boot) = transferred(settings, files)?;
    let directory = JournalDirectory::private(files, settings);
    let mut journal = Journal::read(&directory)?;
    let publication = Publication { work, settings, ims, directory: &directory };
    publication.publish(&mut journal, Image { rootfs, recorded: None, boot, debug_kernel: None })
}

fn mark(parent: &Path, verdict: Verdict) -> Result<()> {
    SignalFiles::open(parent)?.map_or(Ok(()), |files| files.touch(verdict.signal_file()))
}

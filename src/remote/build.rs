//! The near side of a build on a node: sends the recipe, keys and certificates to the node, has the node's kiwi-ng
//! build the image root, and receives the packed image.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;

use crate::environment::settings as environment;
use crate::error::{Attempt, Error, Result};
use crate::image::boot::{Names, left_names};
use crate::image::kind::{Content, Opened};
use crate::image::unpack::unpack;
use crate::publish::settings::Settings;
use crate::recipe::kiwi::{self, Offered, Ready};
use crate::remote::connection::Destination;
use crate::remote::entrypoint::{AUTHORITIES, certificates};
use crate::remote::far::give_names;
use crate::remote::message::{Blob, Build, Message, Order, Part, Task, job_of_ims, job_without_ims};
use crate::remote::program::{Incoming, Program};
use crate::remote::transfer::Sending;
use crate::sys::poll;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::volume::layout::{BUILD, CREATED_IMAGE_ROOT, KIWI_LOG, REMOTE_PARTS, REMOTE_RECIPE, REMOTE_TREE, TRANSFER};
use crate::volume::state_directory::StateDirectory;

/// Variables of the job that the build on the node also gets.
const PASSED_ON: [&str; 10] = [
    "BUILD_ARCH",
    "ENABLE_DEBUG",
    "IMAGE_COMPRESSION",
    "IMAGE_PACKER",
    "IMAGE_ROOT_ARCHIVE_NAME",
    "INITRD_FILENAME",
    "KERNEL_FILENAME",
    "KERNEL_PARAMETERS_FILENAME",
    "LOG_LEVEL",
    "SOURCE_DATE_EPOCH",
];

/// Minimum free space on a node for a build, in bytes.
const LEAST_SPACE: u64 = 512 << 20;

/// The node for a build, and what the node is to do and send back.
#[derive(Debug)]
pub struct Node {
    to: Destination,
    job: String,
    silence: Duration,
    variables: Vec<(String, String)>,
    /// Directory of additional CA certificates for the image.
    authorities: Option<PathBuf>,
    /// Time for which the node waits for the repositories; `None` if another step has already waited for them.
    pub wait: Option<Duration>,
    /// Patterns of the paths that are left out of the packed image.
    pub exclude: Vec<String>,
    /// True if the node sends back the image root even if the build fails.
    pub returns_tree: bool,
}

impl Node {
    /// Returns the node of a job in a pod; `None` if the job has no node.
    pub fn of_job(settings: &Settings, variables: Vec<(OsString, OsString)>) -> Result<Option<Self>> {
        let (Some(host), Some(job)) = (&settings.job.node, &settings.job.id) else { return Ok(None) };
        let (silence, key) = environment::of_node(variables.iter().cloned())?;
        let (to, job) = (Destination::of_job(host, key)?, job_of_ims(job)?);
        let authorities = Some(AUTHORITIES.into());
        Ok(Some(Self::new(settings, to, job, silence, variables, authorities)))
    }

    /// Returns the node `host` for a build without IMS.
    pub fn named(settings: &Settings, host: &str, variables: Vec<(OsString, OsString)>) -> Result<Self> {
        let to = Destination::named(host)?;
        let (silence, _) = environment::of_node(variables.iter().cloned())?;
        Ok(Self::new(settings, to, job_without_ims()?, silence, variables, None))
    }

    fn new(
        settings: &Settings,
        to: Destination,
        job: String,
        silence: Duration,
        variables: Vec<(OsString, OsString)>,
        authorities: Option<PathBuf>,
    ) -> Self {
        let passed = variables.into_iter().filter_map(|(name, value)| {
            let name = name.into_string().ok().filter(|name| PASSED_ON.contains(&name.as_str()))?;
            Some((name, value.into_string().ok()?))
        });
        let variables = passed.collect();
        let returns_tree = settings.job.debug;
        Self { to, job, silence, variables, authorities, wait: None, exclude: Vec::new(), returns_tree }
    }
}

/// Builds on the node, and reports the job's status to IMS. Leaves the packed image and its boot files where a remote
/// customize job leaves them.
pub fn run(settings: &Settings, wanted: &kiwi::Wanted, node: &Node) -> Result<u8> {
    kiwi::run_by(settings, |work, parent, volume| Offloaded::begin(work, settings, wanted, node, parent, volume))
}

/// A build that a node has accepted.
struct Offloaded {
    program: Program,
    recipe: Option<File>,
    boot: Names,
    parent: PathBuf,
    _state: State,
}

/// A state directory. Removed when the build ends but only after the connection has closed, since it contains the
/// connection's socket.
struct State(StateDirectory);

impl Drop for State {
    fn drop(&mut self) {
        if let Err(e) = self.0.remove() {
            tracing::warn!("{e}");
        }
    }
}

impl Offloaded {
    /// Reads everything that the node needs, and asks the node whether it can do the build.
    fn begin(
        work: &Work,
        settings: &Settings,
        wanted: &kiwi::Wanted,
        node: &Node,
        parent: &Path,
        volume: &Tree,
    ) -> Result<Self> {
        let offered = Offered::read(settings, wanted)?;
        // This container may have been restarted, so remove leftovers of its earlier run.
        for name in REMOTE_PARTS.into_iter().chain([TRANSFER, REMOTE_TREE, REMOTE_RECIPE]) {
            volume.remove_whole(name.as_ref()).attempt(|| format!("remove {name}"))?;
        }
        let recipe = archive(work, &offered.recipe, volume)?;
        let size = recipe.metadata().attempt(|| format!("read {REMOTE_RECIPE}"))?.len();
        let text = |bytes| String::from_utf8(bytes).attempt(|| "read the certificate of the site's authority");
        let key = |file: &PathBuf| -> Result<(String, Blob)> {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            Ok((name, Blob(kiwi::read_signing_key(file)?)))
        };
        let task = Task::Build(Build {
            variables: node.variables.clone(),
            programs: offered.programs.map(str::to_owned).into(),
            profiles: wanted.profiles.clone(),
            authority: offered.authority.map(text).transpose()?,
            ca_rpm: offered.package.map(Blob),
            signing_keys: offered.keys.iter().map(key).collect::<Result<_>>()?,
            authorities: node.authorities.as_deref().map_or_else(|| Ok(Vec::new()), certificates)?,
            wait: node.wait.map(|limit| limit.as_secs()),
            exclude: node.exclude.clone(),
            returns_tree: node.returns_tree,
        });
        let patience = node.silence.as_secs();
        let order = Order { job: node.job.clone(), size: size + LEAST_SPACE, patience, task };
        // Use a separate state directory. In the state directory of the image root parent, 'status' would find an
        // environment that looks killed.
        let state = State(StateDirectory::of(&parent.join(BUILD))?);
        let program = Program::start(&node.to, order, state.0.path(), &|| work.heed())?;
        let boot = left_names(&settings.boot, settings.job.arch());
        Ok(Self { program, recipe: Some(recipe), boot, parent: parent.to_owned(), _state: state })
    }

    /// Sends the recipe, and receives the results. Returns the reason of the failure if the build failed, and the
    /// received files.
    fn exchange(&mut self, work: &Work, volume: &Tree) -> Result<(Option<String>, Vec<Part>)> {
        let Self { program, recipe, .. } = self;
        let mut incoming = Incoming::default();
        let recipe = recipe.take().ok_or_else(|| program.refused("it was begun before"))?;
        let mut sending = Some(Sending::begin(&mut program.channel, Part::Source, recipe)?);
        let mut built = None;
        loop {
            work.heed()?;
            program.channel.turn()?;
            if let Some(file) = &mut sending
                && file.go_on(&mut program.channel)?
            {
                sending = None;
                tracing::info!("the recipe is on {}, which builds it", program.connection.host());
            }
            while let Some(frame) = program.next()? {
                let message = incoming.take(frame, built.is_some().then_some(volume));
                match message.map_err(|e| program.refused(e))? {
                    None => {}
                    Some(Message::Failed { why }) => return Err(program.refused(why)),
                    Some(Message::Built { failure }) if sending.is_none() && built.is_none() => built = Some(failure),
                    Some(message) => return Err(program.out_of_order(&message)),
                }
            }
            if let (Some(failure), Some(received)) = (&built, incoming.results()?) {
                return Ok((failure.clone(), received));
            }
            // The build itself may take hours. The results are packed by the time that the node says how it ended.
            program.check(sending.is_some() || built.is_some() && !incoming.is_sent())?;
            let mut sources: Vec<_> = program.channel.sources().into_iter().chain(incoming.sources()).collect();
            sources.push(PollFd::new(work.signals(), PollFlags::IN));
            let _ = poll::wait(&mut sources, TICK);
        }
    }

    /// Asks the node to remove everything of the job, and waits until the node has done so.
    fn end(&mut self) {
        let since = Instant::now();
        self.program.channel.say(&Message::End);
        while self.program.channel.turn().is_ok() && !self.program.has_ended(since) {
            let _ = poll::wait(&mut self.program.channel.sources(), TICK);
        }
    }

    /// Unpacks the image root that a failed build has left behind, for people who look for the reason.
    fn unpack(&self, work: &Work, volume: &Tree) -> Result<()> {
        let attempted = || format!("unpack the image root that {} has sent", self.program.connection.host());
        let file = volume.open_regular(REMOTE_TREE, OFlags::RDONLY | OFlags::NOFOLLOW).attempt(attempted)?;
        let (above, name) = CREATED_IMAGE_ROOT.rsplit_once('/').unwrap_or((".", CREATED_IMAGE_ROOT));
        volume.remove_whole(above.as_ref()).attempt(attempted)?;
        let above = volume.make_private(above).attempt(attempted)?;
        let archive = Opened { shown: self.parent.join(REMOTE_TREE), content: Content::File(file) };
        unpack(work, &archive, &above, name)?;
        volume.remove(REMOTE_TREE).attempt(attempted).map(drop)
    }
}

/// Interval at which time limits are checked.
const TICK: Duration = Duration::from_millis(500);

impl Ready for Offloaded {
    fn carry_out(&mut self, work: &Work, volume: &Tree) -> Result<()> {
        let result = self.exchange(work, volume);
        self.end();
        let host = self.program.connection.host().to_owned();
        let given = result.and_then(|(failure, received)| {
            give_names(volume, &received, &self.boot)?;
            if received.contains(&Part::Tree) {
                self.unpack(work, volume)?;
            }
            let log = self.parent.join(KIWI_LOG);
            match failure {
                Some(why) => Err(Error::new(format!("build the recipe on {host}"))
                    .because(why)
                    .advise(format!("kiwi-ng's log is {}", log.display()))),
                None if received.contains(&Part::Image) => {
                    tracing::info!("received the packed image from {host}, whole and unaltered");
                    Ok(())
                }
                None => Err(self.program.refused("it has sent no image")),
            }
        });
        for name in REMOTE_PARTS.into_iter().chain([REMOTE_RECIPE]) {
            volume.remove_whole(name.as_ref()).attempt(|| format!("remove {name}"))?;
        }
        given
    }
}

/// Packs the recipe into an archive.
fn archive(work: &Work, recipe: &Tree, volume: &Tree) -> Result<File> {
    let attempted = "send the recipe";
    volume.create_file(REMOTE_RECIPE).attempt(|| attempted)?;
    let mut tar = Command::new("tar");
    tar.args(["--create", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*", "--file"]);
    tar.arg(volume.shown().join(REMOTE_RECIPE)).arg("-C").arg(recipe.shown()).arg(".");
    let output = work.run(attempted, &mut tar, None, |_| {})?;
    if !output.status.success() {
        return Err(Error::new(attempted).because(String::from_utf8_lossy(&output.stderr).trim()));
    }
    volume.open_regular(REMOTE_RECIPE, OFlags::RDONLY | OFlags::NOFOLLOW).attempt(|| attempted)
}

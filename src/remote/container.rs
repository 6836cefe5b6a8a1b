//! The far side of a job that upstream's prepare has begun: the job's container already runs on the node, with an sshd
//! on a port of the node. This file speaks that container's protocol of signal files. It also makes checks that
//! upstream's scripts omit: the port is open before anybody is told to log in, results have the right length and
//! digest, and the container has ended before its directory is removed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;

use crate::error::{Attempt, Error, Result};
use crate::publish::settings::boot_file;
use crate::remote::channel::Silence;
use crate::remote::connection::{Connection, Heed, greets};
use crate::remote::far::{Far, Told, Wanted, cannot_go_on, part_name, unless_signalled};
use crate::remote::job_directory::JobDirectory;
use crate::remote::message::{Customize, Part, Task};
use crate::remote::transfer::{check_room, check_whole};
use crate::sys::signals::Signals;
use crate::verdict::Verdict;
use crate::volume::layout::{ARCHIVE, BUILD_FAILED, EXITING, KIWI_LOG, POD_ERROR, READY, SSHD_LISTENING, TRANSFER};
use crate::volume::signal_files::SignalFiles;

/// Interval between attempts to reach the container's sshd.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// Time between two heartbeats of the container. `REMOTE_HEARTBEAT_TIMEOUT_COUNT` counts such heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Time limit for removing the container.
const TIME_TO_CLEAR: Duration = Duration::from_secs(30);

/// Time limit for stopping the container, and for the digests of its files.
const TIME_TO_STOP: Duration = Duration::from_mins(30);

/// Maximum number of bytes that are read of the output of a command on the node.
const MOST_OUTPUT: usize = 64 << 10;

/// Parts as which the files next to the packed image are received, whichever file gets which part. The files are boot
/// files, and get their own names afterwards.
const PLACES: [Part; 4] = [Part::Kernel, Part::Initrd, Part::Parameters, Part::Changes];

/// Names that no boot file may have, since other files on the volume have them.
const OTHERS: [&str; 7] = [ARCHIVE, BUILD_FAILED, EXITING, KIWI_LOG, POD_ERROR, READY, SSHD_LISTENING];

/// Script that prints a line each second: the signal files of the container, and in every fifth line whether the
/// container is alive. Arguments: the job's directory, the container.
const LOOK: &str = r#"
number=0
while :; do
    for name in remote_exiting remote_error complete failed; do
        if [ -f "$1/image/$name" ]; then printf '%s ' "$name"; fi
    done
    if [ $((number % 5)) = 0 ]; then
        if podman exec "$2" echo heartbeat >/dev/null 2>&1; then printf 'alive '; else printf 'dead '; fi
    fi
    number=$((number + 1))
    echo
    sleep 1
done
"#;

/// Script that stops the container, so that its files no longer change, and prints length, digest and name of each file
/// that may be a result. Arguments: the job's directory, the container.
const STOP: &str = r#"
cd "$1/image" || exit 1
podman stop -t 3 "$2" >/dev/null 2>&1
for name in *; do
    case $name in image.sqsh | complete | failed | remote_*) continue ;; esac
    if [ -f "./$name" ] && [ ! -L "./$name" ]; then
        size=$(stat -c %s "./$name") && sum=$(sha256sum <"./$name") && echo "$size ${sum%% *} $name" || exit 1
    fi
done
"#;

/// Script that removes the container, its image and its directory. It leaves everything else of podman alone.
/// Arguments: the job's directory, the container, the image.
const CLEAR: &str = r#"
podman stop -t 3 "$2" >/dev/null 2>&1
podman rm -f "$2" >/dev/null 2>&1
podman rmi -f "$3" >/dev/null 2>&1
if [ -d "$1" ] && [ ! -L "$1" ] && [ "$(stat -c %u "$1")" = 0 ]; then rm -rf "$1"; fi
"#;

/// Script that creates a mark for the container: in the image if sessions are jailed, otherwise in the image root
/// parent. Arguments: the container, the mark, and "True" if sessions are jailed.
const MARK: &str = r#"
if [ "$3" = True ]; then place=/mnt/image/image-root/tmp; else place=/mnt/image; fi
podman exec "$1" touch "$place/$2"
"#;

/// State of the container.
enum Step {
    /// The container unpacks the image. The value is the time of the last attempt to reach the container's sshd.
    Opening(Option<Instant>),
    /// Users can log in.
    Open,
    /// The container has reported success, and has been in stopping since this time.
    Stopping(Running, Instant),
    /// The container's files are being received.
    Fetching(Option<Fetching>),
    /// The container has been in removal since this time. The command is `None` if it could not be started.
    Clearing(Option<Running>, Instant),
}

/// A file that the container has made. It is stored under the file name of its part (`place`), and renamed to `name` once
/// all files have arrived.
struct Fetched {
    place: Part,
    name: String,
    size: u64,
    sha256: String,
}

/// A file that is being received from the node.
struct Fetching {
    child: Child,
    file: File,
    /// The file's description; `None` once the file has arrived.
    result: Option<Fetched>,
    /// Number of bytes that have come, and the time since then.
    came: (u64, Silence),
}

impl Drop for Fetching {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running command on the node, and its output so far.
struct Running {
    child: Child,
    output: ChildStdout,
    printed: Vec<u8>,
    is_over: bool,
}

impl Running {
    fn start(connection: &Connection, script: &str, arguments: &[&str]) -> Result<Self> {
        let attempted = || format!("run a command on the build node {}", connection.host());
        let mut command = connection.command(&[&["sh", "-c", script, "sh"], arguments].concat());
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = connection.spawn(command).attempt(attempted)?;
        let output = child.stdout.take().ok_or_else(|| Error::new(attempted()).because("ssh has no pipes"))?;
        let flags = rustix::fs::fcntl_getfl(&output).attempt(attempted)?;
        rustix::fs::fcntl_setfl(&output, flags | OFlags::NONBLOCK).attempt(attempted)?;
        Ok(Self { child, output, printed: Vec::new(), is_over: false })
    }

    /// Reads the output that is available, without blocking.
    fn read(&mut self) -> Result<()> {
        let mut bytes = [0; 4096];
        while !self.is_over && self.printed.len() < MOST_OUTPUT {
            match self.output.read(&mut bytes) {
                Ok(0) => self.is_over = true,
                Ok(length) => self.printed.extend(&bytes[..length]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).attempt(|| "read what the node says"),
            }
        }
        Ok(())
    }

    /// Returns the complete lines that were printed since the last call.
    fn lines(&mut self) -> Vec<String> {
        let end = self.printed.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.printed.drain(..end).collect();
        String::from_utf8_lossy(&lines).lines().map(str::to_owned).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Keywords of sshd's configuration that restrict all sessions or force a command on them.
const CLOSING: [&str; 7] = [
    "allowagentforwarding",
    "allowtcpforwarding",
    "disableforwarding",
    "forcecommand",
    "permitlisten",
    "permitopen",
    "permittty",
];

/// Refuses settings that would have no effect, since upstream has already started the container.
fn refuse_for_container(order: &Customize) -> Result<()> {
    let refused = |what: &str| {
        Err(Error::bad_input(format!(
            "cannot use the container that IMS's own prepare container started on the build node: {what} has no effect \
             there; use this program's prepare"
        )))
    };
    if order.script.is_some() {
        return refused("CUSTOMIZATION_SCRIPT");
    }
    let lines = order.sshd.iter().flatten();
    match lines.clone().find(|(keyword, _)| CLOSING.contains(&keyword.as_str())) {
        Some((keyword, value)) => return refused(&format!("'{keyword} {value}' of sshd's configuration")),
        None => lines.for_each(|(keyword, value)| {
            tracing::warn!(
                "sshd's '{keyword} {value}' has no effect in the container that IMS's own prepare container started"
            );
        }),
    }
    Ok(())
}

/// A container that upstream's prepare has started on a node.
pub(super) struct Container {
    connection: Connection,
    directory: String,
    name: String,
    image: String,
    port: u16,
    here: SocketAddr,
    is_jailed: bool,
    looking: Running,
    /// Number of consecutive heartbeats that have failed.
    missed: u64,
    /// Maximum number of consecutive failed heartbeats that is tolerated.
    limit: u64,
    /// Time when the container was found.
    began: Instant,
    silence: Silence,
    patience: Duration,
    step: Step,
    marking: Option<Running>,
    is_marked_complete: bool,
    to_fetch: VecDeque<Fetched>,
    fetched: Vec<Fetched>,
    /// The error that ended the job; reported after the container was removed.
    error: Option<Error>,
    /// True if the node can no longer be reached.
    is_lost: bool,
}

impl Container {
    /// Connects to the node of a container whose sshd listens on the node's port `port`.
    pub(super) fn begin(wanted: Wanted, port: u16, state: &Path, heed: Heed<'_>) -> Result<Self> {
        let Wanted { to, job, task, listen, silence, .. } = wanted;
        let Task::Customize(order) = task else {
            return Err(Error::new("use a container on a build node").because("it changes images only"));
        };
        refuse_for_container(&order)?;
        let connection = Connection::open(&to, state, silence, heed)?;
        let directory = JobDirectory::path(&job).display().to_string();
        let (name, image) = (format!("ims-{job}"), format!("ims-remote-{job}:1.0.0"));
        let looking = Running::start(&connection, LOOK, &[&directory, &name])?;
        let here = connection.forward(&listen, port, heed)?;
        tracing::info!("the container {name} on {} was started by IMS's own prepare container", connection.host());
        Ok(Self {
            connection,
            directory,
            name,
            image,
            port,
            here,
            is_jailed: order.variables.iter().any(|(name, value)| name == "SSH_JAIL" && value == "True"),
            looking,
            missed: 0,
            limit: silence.as_secs() / HEARTBEAT.as_secs(),
            began: Instant::now(),
            silence: Silence::begin(),
            patience: silence,
            step: Step::Opening(None),
            marking: None,
            is_marked_complete: false,
            to_fetch: VecDeque::new(),
            fetched: Vec::new(),
            error: None,
            is_lost: false,
        })
    }

    fn refused(&self, why: &str) -> Error {
        cannot_go_on(self.connection.host(), why)
    }

    /// Checks the container's signal files and heartbeats.
    fn look(&mut self) -> Result<Option<Told>> {
        self.silence.listen();
        self.looking.read()?;
        for line in self.looking.lines() {
            self.silence.end();
            let has = |word: &str| line.split(' ').any(|found| found == word);
            if has("remote_error") {
                return Err(self.refused("its container has ended with an error ('remote_error')"));
            }
            if has("remote_exiting") {
                let verdict = if has("failed") || !has("complete") { Verdict::Failed } else { Verdict::Complete };
                if verdict == Verdict::Complete {
                    let stopping = Running::start(&self.connection, STOP, &[&self.directory, &self.name])?;
                    self.step = Step::Stopping(stopping, Instant::now());
                }
                tracing::info!("the container {} has closed as {}", self.name, verdict.signal_file());
                return Ok(Some(Told::Closed(verdict, 0)));
            }
            self.missed = match (has("alive"), has("dead")) {
                (true, _) => 0,
                (_, true) => self.missed + 1,
                _ => self.missed,
            };
            if self.missed > self.limit {
                return Err(self.refused(&format!("its container {} does not run any more", self.name)));
            }
        }
        if self.looking.is_over {
            self.is_lost = true;
            let said = self.connection.last_words();
            let lost = self.refused("the other side has closed the connection");
            return Err(if said.is_empty() { lost } else { lost.advise(said) });
        }
        if self.silence.exceeds(self.patience) {
            self.is_lost = true;
            let why = format!("nothing was heard from the other side for {} s", self.patience.as_secs());
            return Err(self.refused(&why));
        }
        Ok(None)
    }

    /// Checks whether the container's sshd sends its greeting.
    fn try_to_reach(&mut self, signals: &Signals) -> Result<Option<Told>> {
        let Step::Opening(tried) = &mut self.step else { return Ok(None) };
        if tried.is_some_and(|tried| tried.elapsed() < TRY_EVERY) {
            return Ok(None);
        }
        *tried = Some(Instant::now());
        if greets(self.here, &|| unless_signalled(signals)).unwrap_or(false) {
            self.step = Step::Open;
            tracing::info!(
                "port {} of {} can be reached on port {}",
                self.port,
                self.connection.host(),
                self.here.port()
            );
            return Ok(Some(Told::Listening(String::new())));
        }
        let said = self.connection.last_words();
        if said.contains("administratively prohibited") {
            return Err(self.refused(&said).advise("AllowTcpForwarding of the node's sshd has to be 'yes' or 'local'"));
        }
        Ok(None)
    }

    /// Continues to receive the container's files.
    fn fetch(&mut self, files: Option<&SignalFiles>) -> Result<()> {
        let parent = files.ok_or_else(|| self.refused("the image root parent is gone"))?.parent();
        let Step::Fetching(fetching) = &mut self.step else { return Ok(()) };
        if let Some(Fetching { child, file, result: Some(result), came: (length, silence) }) = fetching {
            let attempted = || format!("receive {}", result.name);
            let Some(status) = child.try_wait().attempt(attempted)? else {
                // The node goes on sending for as long as it likes, or is silent, while ssh's own keepalives pass.
                let now = file.metadata().attempt(attempted)?.len();
                silence.listen();
                if now > *length {
                    silence.end();
                }
                *length = now;
                if now > result.size {
                    return Err(Error::new(attempted()).because("it is longer than announced"));
                }
                if silence.exceeds(self.patience) {
                    let why = format!("nothing of it has come for {} s", self.patience.as_secs());
                    return Err(Error::new(attempted()).because(why));
                }
                return Ok(());
            };
            if !status.success() {
                return Err(Error::new(attempted()).because(format!("ssh ended: {status}")));
            }
            check_whole(result.place, file, result.size, &result.sha256)?;
        }
        self.fetched.extend(fetching.take().and_then(|mut fetching| fetching.result.take()));
        let Some(result) = self.to_fetch.pop_front() else {
            for Fetched { place, name, .. } in &self.fetched {
                let from = part_name(*place);
                parent.rename(from, name).attempt(|| format!("rename {from} to {name}"))?;
            }
            tracing::info!("received the packed image from {}, whole and unaltered", self.connection.host());
            self.end();
            return Ok(());
        };
        let attempted = || format!("receive {}", result.name);
        let file = parent.create_file(part_name(result.place)).attempt(attempted)?;
        check_room(result.place, result.size, &file)?;
        let path = format!("{}/image/{}", self.directory, result.name);
        let mut command = self.connection.command(&["cat", "--", &path]);
        let to = file.try_clone().attempt(attempted)?;
        let child = self.connection.spawn(command.stdin(Stdio::null()).stdout(to)).attempt(attempted)?;
        self.step = Step::Fetching(Some(Fetching { child, file, result: Some(result), came: (0, Silence::begin()) }));
        Ok(())
    }

    /// After the container has stopped, queues the files that it left behind.
    fn stopped(&mut self) -> Result<()> {
        let Step::Stopping(stopping, since) = &mut self.step else { return Ok(()) };
        stopping.read()?;
        if !stopping.is_over {
            if stopping.printed.len() >= MOST_OUTPUT {
                return Err(self.refused("its container has left too many files"));
            }
            if since.elapsed() > TIME_TO_STOP {
                let why = format!("its container has not stopped within {} min", TIME_TO_STOP.as_secs() / 60);
                return Err(self.refused(&why));
            }
            return Ok(());
        }
        let mut places = PLACES.into_iter();
        let mut image = None;
        for line in stopping.lines() {
            let mut words = line.splitn(3, ' ');
            let (Some(Ok(size)), Some(sha256), Some(name)) = (words.next().map(str::parse), words.next(), words.next())
            else {
                continue;
            };
            let fetched = |place| Fetched { place, name: name.to_owned(), size, sha256: sha256.to_owned() };
            if name == TRANSFER {
                image = Some(fetched(Part::Image));
            } else if boot_file(name).is_ok()
                && !name.starts_with('.')
                && !OTHERS.contains(&name)
                && let Some(place) = places.next()
            {
                self.to_fetch.push_back(fetched(place));
            }
        }
        let image = image.ok_or_else(|| self.refused("its container has left no packed image"))?;
        // Receive the image last: a sidecar takes the image for a sign that all files are there.
        self.to_fetch.push_back(image);
        self.step = Step::Fetching(None);
        Ok(())
    }
}

impl Far for Container {
    fn sources(&self) -> Vec<PollFd<'_>> {
        let running = match &self.step {
            Step::Opening(_) | Step::Open => &self.looking,
            Step::Stopping(running, _) | Step::Clearing(Some(running), _) => running,
            Step::Fetching(_) | Step::Clearing(None, _) => return Vec::new(),
        };
        if running.is_over { Vec::new() } else { vec![PollFd::new(&running.output, PollFlags::IN)] }
    }

    fn mark(&mut self, verdict: Verdict) {
        // Close cleanly only if the image is complete; a failed image is not packed.
        if verdict == Verdict::Complete && matches!(self.step, Step::Open) {
            let jailed = if self.is_jailed { "True" } else { "False" };
            let marking = Running::start(&self.connection, MARK, &[&self.name, verdict.signal_file(), jailed]);
            self.marking = marking.inspect_err(|e| tracing::error!("{e}")).ok();
            self.is_marked_complete = self.marking.is_some();
        }
    }

    fn is_closing(&self) -> bool {
        self.is_marked_complete && matches!(self.step, Step::Open)
    }

    fn opening_since(&self) -> Option<Instant> {
        matches!(self.step, Step::Opening(_)).then_some(self.began)
    }

    fn has_closed(&self) -> bool {
        matches!(self.step, Step::Stopping(..) | Step::Fetching(_))
    }

    fn end(&mut self) {
        if matches!(self.step, Step::Clearing(..)) {
            return;
        }
        let clearing = Running::start(&self.connection, CLEAR, &[&self.directory, &self.name, &self.image]);
        self.step = Step::Clearing(clearing.inspect_err(|e| tracing::error!("{e}")).ok(), Instant::now());
    }

    fn turn(&mut self, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>> {
        self.go_on(files, signals).or_else(|error| {
            if self.is_lost || matches!(self.step, Step::Clearing(..)) {
                return Err(error);
            }
            // The container would go on running, so remove it first and report the error afterwards.
            self.error = Some(error);
            self.end();
            Ok(None)
        })
    }
}

impl Container {
    fn go_on(&mut self, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>> {
        match &mut self.step {
            Step::Opening(_) => match self.look()? {
                None => return self.try_to_reach(signals),
                told => return Ok(told),
            },
            Step::Open => return self.look(),
            Step::Stopping(..) => self.stopped()?,
            Step::Fetching(_) => self.fetch(files)?,
            Step::Clearing(clearing, since) => {
                let is_over = match clearing {
                    Some(clearing) => clearing.read().map(|()| clearing.is_over)?,
                    None => false,
                };
                if !is_over && clearing.is_some() && since.elapsed() < TIME_TO_CLEAR {
                    return Ok(None);
                }
                if is_over {
                    tracing::info!("the container and its directory are removed from the node");
                } else {
                    let (host, name, directory) = (self.connection.host(), &self.name, &self.directory);
                    tracing::warn!("{name} and {directory} may still exist on {host}; remove them by hand");
                }
                return self.error.take().map_or(Ok(Some(Told::Gone)), Err);
            }
        }
        Ok(None)
    }
}

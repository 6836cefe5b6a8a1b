//! Long-running work: requests to servers and subprocesses, both interrupted by signals.

pub mod checksum;
pub(crate) mod confinement;
pub mod network;
pub mod progress;

use std::cell::{Cell, OnceCell};
use std::fs::File;
use std::future::{Future, poll_fn};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::pin::pin;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};
use tokio::runtime::Runtime;

use crate::error::{Attempt, Error, Result, over_file_limit};
use crate::log::redaction;
use crate::sys::named;
use crate::sys::poll;
use crate::sys::process::end_with_us;
use crate::sys::signals::{Signals, unblock_signals};
use crate::transfer::confinement::{Confined, clear_environment};
use crate::transfer::network::{Network, Validate};
use reqwest::redirect::Policy;
use reqwest::{Certificate, ClientBuilder, Response, Url};

/// Poll interval for signals and for the progress of a program.
pub(crate) const TICK: Duration = Duration::from_millis(200);

/// Timeout for one server once a signal has arrived.
const IN_A_HURRY: Duration = Duration::from_secs(2);

/// Name of the package squashfs-tools, for messages.
const SQUASHFS: &str = "squashfs-tools (squashfs on SUSE)";
/// Programs that a machine may lack, and the packages that contain them.
const PACKAGES: [(&str, &str); 4] = [
    ("mksquashfs", SQUASHFS),
    ("unsquashfs", SQUASHFS),
    ("apt-get", "apt"),
    ("ssh-keygen", "openssh-client (openssh on Fedora, EL and SUSE)"),
];

/// Fails if the program is not installed, and names its package. Called early, so that the error does not come after
/// hours of work, when the image is to be packed.
pub(crate) fn installed(program: &str) -> Result<()> {
    // Do not check without $PATH, since execvp(3) then searches a default path.
    let Some(path) = std::env::var_os("PATH") else { return Ok(()) };
    if std::env::split_paths(&path).any(|place| place.join(program).is_file()) {
        return Ok(());
    }
    let package = PACKAGES.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package);
    let missing = Error::new(format!("run {program}")).because("it is not installed");
    Err(missing.advise(format!("install the package {package}")))
}

/// Maximum size of a program's output, in bytes.
const MOST_SAID: u64 = 64 << 20;

/// Maximum number of bytes read of a server's error response.
pub(crate) const MOST_COMPLAINED: usize = 16 << 10;

/// First and longest pause between attempts.
pub(crate) const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// HTTP clients, subprocesses, and the signals that interrupt both.
pub(crate) struct Work {
    runtime: Runtime,
    /// Created on first use: loading the system's CA certificates takes longer than mounting an image.
    client: OnceCell<reqwest::Client>,
    /// Client for requests that read with credentials; created on first use.
    reader: OnceCell<reqwest::Client>,
    /// Client that follows no redirects; created on first use.
    sender: OnceCell<reqwest::Client>,
    /// Client that connects to a socket of this machine; created on first use.
    local: OnceCell<reqwest::Client>,
    signals: Signals,
    /// The signal that interrupted the work.
    interrupted: Cell<Option<Signal>>,
    /// Set during cleanup, which signals do not interrupt.
    deaf: Cell<bool>,
    /// Set during a rollback, which must end soon after a signal.
    is_rollback: Cell<bool>,
    /// Time at which a signal during a rollback shortened the time for servers.
    hurried: Cell<Option<Instant>>,
    /// TLS settings and timeouts.
    pub(crate) network: Network,
}

/// Carries out a command that signals interrupt. If a step fails after a signal, the error is the interruption, since
/// the signal is the reason for the failure.
pub(crate) fn interruptible<T>(network: &Network, carry_out: impl FnOnce(&Work) -> Result<T>) -> Result<T> {
    let work = Work::begin(network)?;
    work.unless_interrupted(carry_out(&work))
}

/// Why an attempt failed.
pub(crate) enum Fault {
    /// A transient error: a retry may succeed.
    Transient(String),
    /// A permanent error.
    Final(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl From<reqwest::Error> for Fault {
    fn from(error: reqwest::Error) -> Self {
        // An invalid request, such as one with a forbidden byte in a header, fails in the same way each time.
        if error.is_builder() {
            return Self::Final(Error::new("build a request").because(in_full(&error)));
        }
        if !error.is_redirect() {
            return Self::Transient(in_full(&error));
        }
        let from = error.url().map_or(String::new(), |url| without_query(url.as_str()));
        let mut cause: &dyn std::error::Error = &error;
        while let Some(below) = cause.source() {
            cause = below;
        }
        Self::Final(Error::new(format!("follow the redirect of {from}")).because(cause))
    }
}

/// Maximum number of concurrent requests of one kind, each on a thread.
pub(crate) const AT_A_TIME: usize = 3;

impl Work {
    /// Blocks the signals that end a program, and reads them instead: they have no default action for PID 1 of a
    /// container. SIGQUIT is among them because a command's terminal may pass it on after the command has ended.
    pub(crate) fn begin(network: &Network) -> Result<Self> {
        // Block signals before any thread starts: threads inherit the mask, and a signal to a thread without it would
        // kill the process.
        let ending = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP];
        let signals = Signals::block(&ending).attempt(|| "block signals")?;
        // Signing and encrypting uploads takes more than one processor, so use several worker threads.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(AT_A_TIME).enable_all().build();
        Ok(Self {
            runtime: runtime.attempt(|| "start an event loop")?,
            client: OnceCell::new(),
            reader: OnceCell::new(),
            sender: OnceCell::new(),
            local: OnceCell::new(),
            signals,
            interrupted: Cell::new(None),
            deaf: Cell::new(false),
            is_rollback: Cell::new(false),
            hurried: Cell::new(None),
            network: network.clone(),
        })
    }

    /// The client for servers other than stores, and for requests without credentials.
    pub(crate) fn client(&self) -> Result<&reqwest::Client> {
        self.make(&self.client, Redirects::Anywhere)
    }

    /// The client for reading with credentials.
    pub(crate) fn reader(&self) -> Result<&reqwest::Client> {
        self.make(&self.reader, Redirects::Once)
    }

    /// The client for requests that change something.
    pub(crate) fn sender(&self) -> Result<&reqwest::Client> {
        self.make(&self.sender, Redirects::Nowhere)
    }

    /// The client for the server that listens on `socket`. All calls must pass the same socket, since there is only one
    /// such client.
    pub(crate) fn local(&self, socket: &Path) -> Result<&reqwest::Client> {
        self.make_for(&self.local, Redirects::Nowhere, |client| client.unix_socket(socket))
    }

    fn make<'a>(&self, cell: &'a OnceCell<reqwest::Client>, redirects: Redirects) -> Result<&'a reqwest::Client> {
        self.make_for(cell, redirects, |client| client)
    }

    fn make_for<'a>(
        &self,
        cell: &'a OnceCell<reqwest::Client>,
        redirects: Redirects,
        place: impl FnOnce(ClientBuilder) -> ClientBuilder,
    ) -> Result<&'a reqwest::Client> {
        if let Some(client) = cell.get() {
            return Ok(client);
        }
        let made = client(&self.network, &Validate::Yes, redirects)?.read_timeout(self.network.stall_limit);
        let made = place(made).build().attempt(SET_UP)?;
        Ok(cell.get_or_init(|| made))
    }

    /// The signal that interrupted the work, if any.
    pub(crate) fn interrupted(&self) -> Option<Signal> {
        self.interrupted.get()
    }

    /// Returns `result`; if it is an error and a signal has arrived, that error is the interruption, since the signal
    /// is the reason for every later failure.
    pub(crate) fn unless_interrupted<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            if error.is_interruption() {
                return error;
            }
            // A walk of a tree fails while a signal is pending, but does not read the signal.
            let _ = self.heed();
            self.interrupted().map_or(error, Error::interrupted)
        })
    }

    /// Returns the result of a removal that comes last. If a signal ended the removal, the error is the interruption,
    /// even after [`Work::finish_regardless`].
    pub(crate) fn last<T>(&self, result: Result<T>) -> Result<T> {
        self.deaf.set(false);
        self.unless_interrupted(result)
    }

    /// Lets no signal interrupt from here on; for cleanup.
    pub(crate) fn finish_regardless(&self) {
        self.deaf.set(true);
    }

    /// Like [`Work::finish_regardless`], for rollback and final reports. After a signal, servers get little time,
    /// because the sender of the signal will kill this program soon.
    pub(crate) fn roll_back(&self) {
        self.finish_regardless();
        self.is_rollback.set(true);
        if self.interrupted().is_some() {
            self.hurried.set(Some(Instant::now()));
        }
    }

    /// True if a signal has shortened the time for servers.
    pub(crate) fn is_in_a_hurry(&self) -> bool {
        self.hurried.get().is_some()
    }

    /// Fails if a signal has arrived during a rollback and the server, which was asked at `began`, has used up its
    /// time.
    fn hurry(&self, began: Instant) -> Result<()> {
        if self.is_rollback.get()
            && self.hurried.get().is_none()
            && self.signals.next().attempt(|| "read signals")?.is_some()
        {
            self.hurried.set(Some(Instant::now()));
        }
        match self.hurried.get() {
            Some(since) if since.max(began).elapsed() >= IN_A_HURRY => {
                let seconds = IN_A_HURRY.as_secs();
                Err(Error::new("wait for a server any longer")
                    .because(format!("a signal arrived, and the server has not answered for {seconds} s")))
            }
            _ => Ok(()),
        }
    }

    /// The signals, for a caller with its own event loop.
    pub(crate) fn signals(&self) -> &Signals {
        &self.signals
    }

    /// Fails if a signal has arrived.
    pub(crate) fn heed(&self) -> Result<()> {
        if self.deaf.get() {
            return Ok(());
        }
        if let Some(signal) = self.signals.next().attempt(|| "read signals")? {
            self.interrupted.set(Some(signal));
        }
        match self.interrupted.get() {
            Some(signal) => Err(Error::interrupted(signal)),
            None => Ok(()),
        }
    }

    /// Runs `work` to completion or until a signal.
    pub(crate) fn wait<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.heed()?;
        let began = Instant::now();
        self.runtime.block_on(async {
            let mut work = pin!(work);
            let mut tick = tokio::time::interval(TICK);
            poll_fn(|context| {
                if let Poll::Ready(result) = work.as_mut().poll(context) {
                    return Poll::Ready(result);
                }
                while tick.poll_tick(context).is_ready() {
                    if let Err(interrupted) = self.heed().and_then(|()| self.hurry(began)) {
                        return Poll::Ready(Err(interrupted));
                    }
                }
                Poll::Pending
            })
            .await
        })
    }

    /// Runs a program to its end and returns its output; calls `look` regularly. A signal to this process kills the
    /// program. The program gets no variable but `$PATH`, and only the rights of `confined` if given. `attempted`
    /// completes "cannot …".
    pub(crate) fn run(
        &self,
        attempted: &str,
        command: &mut Command,
        confined: Option<&Confined>,
        look: impl FnMut(&Child),
    ) -> Result<Output> {
        self.heed()?;
        let name = Path::new(command.get_program()).display().to_string();
        let (attempted, start) = (|| attempted, || format!("start {name}"));
        if !name.contains('/') {
            installed(&name)?;
        }
        clear_environment(command).stdin(Stdio::null());
        // Output goes to files, because a pipe that nobody reads would fill up.
        let (out, err) = (temporary().attempt(attempted)?, temporary().attempt(attempted)?);
        command.stdout(out.try_clone().attempt(attempted)?).stderr(err.try_clone().attempt(attempted)?);
        let said = [&out, &err];
        let status = match confined {
            None => {
                let child = end_with_us(unblock_signals(command)).spawn().attempt(start).attempt(attempted)?;
                self.await_end(attempted(), child, &name, said, None, look)?
            }
            Some(confined) => {
                confined.prepare(command)?;
                // The thread that starts the child is confined as well, and must live as long as the child:
                // PR_SET_PDEATHSIG refers to the parent thread.
                std::thread::scope(|scope| {
                    let (started, child) = mpsc::channel();
                    let (_over, end) = mpsc::channel::<()>();
                    scope.spawn(move || {
                        let child = confined
                            .enter()
                            .and_then(|()| end_with_us(unblock_signals(command)).spawn().attempt(start));
                        let _ = started.send(child);
                        let _ = end.recv();
                    });
                    let child = child.recv().attempt(attempted)?.attempt(attempted)?;
                    self.await_end(attempted(), child, &name, said, Some(confined), look)
                })?
            }
        };
        Ok(Output {
            status,
            stdout: read_from_start(out).attempt(attempted)?,
            stderr: read_from_start(err).attempt(attempted)?,
        })
    }

    fn await_end(
        &self,
        attempted: &str,
        mut child: Child,
        name: &str,
        said: [&File; 2],
        confined: Option<&Confined>,
        mut look: impl FnMut(&Child),
    ) -> Result<ExitStatus> {
        let attempted = || attempted;
        let began = Instant::now();
        loop {
            if let Some(status) = child.try_wait().attempt(attempted)? {
                return Ok(status);
            }
            let too_much = || said.iter().any(|file| file.metadata().is_ok_and(|said| said.len() > MOST_SAID));
            let why = match confined {
                _ if too_much() => Some(format!("the output of {name} is too long")),
                Some(confined) if began.elapsed() > confined.limits.time => {
                    Some(format!("{name} was still at work after {} s", confined.limits.time.as_secs()))
                }
                Some(confined) => confined.full_volume(),
                None => None,
            };
            let ended = why.map_or_else(|| self.heed(), |why| Err(Error::new(attempted()).because(why)));
            if let Err(e) = ended {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(e);
            }
            self.rest(&child).attempt(attempted)?;
            look(&child);
        }
    }

    /// Waits for the end of a child. A signal to this process ends the wait, and the child keeps running.
    pub(crate) fn wait_for(&self, child: &mut Child) -> Result<()> {
        let attempted = || "wait for a program";
        while child.try_wait().attempt(attempted)?.is_none() {
            self.heed()?;
            self.rest(child).attempt(attempted)?;
        }
        Ok(())
    }

    /// Runs a program, and fails if the program fails. Returns the program's standard error output.
    pub(crate) fn succeed(
        &self,
        attempted: &str,
        command: &mut Command,
        confined: Option<&Confined>,
        look: impl FnMut(&Child),
    ) -> Result<String> {
        let output = self.run(attempted, command, confined, look)?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if output.status.success() {
            return Ok(said);
        }
        let lines: Vec<_> = said.lines().collect();
        let mut last = lines[lines.len().saturating_sub(3)..].join(", ");
        if output.status.signal() == Some(libc::SIGXFSZ) {
            last = too_large(confined.map(|confined| confined.limits.file));
        }
        Err(Error::new(attempted).because(if last.is_empty() { output.status.to_string() } else { last }))
    }

    /// Waits for the program's end, a signal, or a tick.
    fn rest(&self, child: &Child) -> std::io::Result<()> {
        let pid = rustix::process::Pid::from_child(child);
        let ended = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let mut sources = [PollFd::new(&ended, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
        match poll::wait(&mut sources, TICK) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Reason why a program was killed by SIGXFSZ: a file became larger than `limit` bytes, or than this process's own
/// limit.
pub(crate) fn too_large(limit: Option<u64>) -> String {
    let own = rustix::process::getrlimit(rustix::process::Resource::Fsize);
    // A confined program starts with the hard limit, others with the soft one.
    let inherited = if limit.is_some() { own.maximum } else { own.current };
    match (inherited, limit) {
        (Some(bytes), limit) if limit.is_none_or(|limit| bytes < limit) => over_file_limit(bytes),
        (_, limit) => format!("a file in it is larger than {} bytes", limit.unwrap_or(u64::MAX)),
    }
}

fn temporary() -> std::io::Result<std::fs::File> {
    rustix::fs::memfd_create("output", rustix::fs::MemfdFlags::CLOEXEC).map(Into::into).map_err(Into::into)
}

fn read_from_start(mut file: std::fs::File) -> std::io::Result<Vec<u8>> {
    use std::io::{Read, Seek};
    let mut text = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut text)?;
    Ok(text)
}

/// Servers that redirects may lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Redirects {
    /// Any server; for requests without credentials.
    Anywhere,
    /// One hop to another server: reqwest drops credentials at that hop, but would add them again at the next one.
    Once,
    /// Only the same server; for requests that have secrets in other headers.
    SameServer,
    /// No server: 307 and 308 would resend the body elsewhere, 301 and 302 would turn the request into a GET.
    Nowhere,
}

/// Maximum length of a chain of redirects.
const MOST_REDIRECTS: usize = 10;

/// Operation in error messages: "cannot set up TLS".
const SET_UP: fn() -> &'static str = || "set up TLS";

/// A client builder with the configured certificates and redirect rules. The caller sets request timeouts.
pub(crate) fn client(network: &Network, validate: &Validate, redirects: Redirects) -> Result<reqwest::ClientBuilder> {
    let mut builder = reqwest::Client::builder()
        .connect_timeout(network.stall_limit)
        .danger_accept_invalid_certs(*validate == Validate::No)
        // A Referer would contain the query of a presigned URL, which is a secret.
        .referer(false)
        .redirect(Policy::custom(move |attempt| match refuse_redirect(attempt.previous(), attempt.url(), redirects) {
            Some(why) => attempt.error(why),
            None => attempt.follow(),
        }))
        .user_agent(concat!("ims-sshd/", env!("CARGO_PKG_VERSION")));
    for certificate in authorities(network, validate)? {
        builder = builder.add_root_certificate(certificate);
    }
    Ok(builder)
}

/// Reason why a redirect to `next` is refused; `None` if it is followed. `previous` are the URLs before it.
fn refuse_redirect(previous: &[Url], next: &Url, redirects: Redirects) -> Option<String> {
    let shown = without_query(next.as_str());
    let server = |url: &Url| (url.host_str().map(str::to_owned), url.port_or_known_default());
    let last = previous.last()?;
    if redirects == Redirects::Nowhere {
        Some(format!("it leads to {shown}, but the request is meant only for the named server"))
    } else if previous.len() > MOST_REDIRECTS {
        Some(format!("it leads to {shown}, after {MOST_REDIRECTS} redirects already"))
    } else if last.scheme() == "https" && next.scheme() != "https" {
        Some(format!("it leads from https to {shown}, where anybody on the way can read and replace the data"))
    } else if redirects == Redirects::Once && server(previous.first()?) != server(last) {
        Some(format!("it leads from another server to {shown}, which must not get the first server's credentials"))
    } else if redirects == Redirects::SameServer && server(last) != server(next) {
        Some(format!("it leads to another server, {shown}, which must not get this one's keys"))
    } else {
        None
    }
}

/// Maximum length of a file of CA certificates, in bytes.
const LONGEST_BUNDLE: u64 = 16 << 20;

/// Trusted CA certificates in addition to the system's.
fn authorities(network: &Network, validate: &Validate) -> Result<Vec<Certificate>> {
    let named = match validate {
        Validate::By(file) => Some(file),
        _ => None,
    };
    let mut found = Vec::new();
    for file in network.ca.iter().chain(named) {
        let attempted = || format!("read the certificates in {}", file.display());
        let pem = match named::read(file, LONGEST_BUNDLE) {
            // Pods set CA_CERT whether or not the file exists.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && network.ca.as_ref() == Some(file) => continue,
            other => other.attempt(attempted)?,
        };
        found.extend(Certificate::from_pem_bundle(&pem).map_err(|e| in_full(&e)).attempt(attempted)?);
    }
    Ok(found)
}

/// Describes an HTTP error with its whole chain of causes, since "error sending request" alone says nothing.
pub(crate) fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(cause) = below {
        let said = cause.to_string();
        if !text.contains(&said) {
            text += ": ";
            text += &said;
        }
        below = cause.source();
    }
    without_query(&text)
}

/// Removes queries from URLs in `text`, and credentials before the host: a presigned URL is a secret.
pub fn without_query(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some(begin) = rest.find("http") {
        let (before, url) = rest.split_at(begin);
        let end = url.find(|c: char| c.is_whitespace() || "()'\"".contains(c)).unwrap_or(url.len());
        let mut shown = url[..end].to_owned();
        if let Some(login) = shown.find("://").and_then(|at| redaction::login(&shown, at + 3)) {
            shown.replace_range(login, "***");
        }
        kept += before;
        kept += shown.split('?').next().unwrap_or_default();
        rest = &url[end..];
    }
    kept + rest
}

/// An outage of a server. It is logged when it begins, and then at growing intervals instead of at every attempt.
#[derive(Debug, Default)]
pub(crate) struct Outage(Mutex<Option<(Instant, Duration)>>);

impl Outage {
    /// Returns whether a failed attempt at `now` is to be logged as a warning.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        let mut outage = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (began, next) = outage.get_or_insert((now, Duration::ZERO));
        let lasted = now.saturating_duration_since(*began);
        let is_due = lasted >= *next;
        if is_due {
            *next = (lasted * 2).max(TOLD_AGAIN);
        }
        is_due
    }

    /// Ends the outage, because the server has answered. The next failure begins a new outage.
    pub(crate) fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Time after which an outage is logged again.
const TOLD_AGAIN: Duration = Duration::from_secs(30);

/// Retries with backoff until success, a permanent error, or the end of `limit`. `attempted` completes "cannot …".
pub(crate) async fn retry<T>(
    limit: Duration,
    attempted: &str,
    outage: &Outage,
    mut attempt: impl AsyncFnMut() -> std::result::Result<T, Fault>,
) -> Result<T> {
    let began = Instant::now();
    let mut pause = PAUSE.0;
    loop {
        let cause = match attempt().await {
            Ok(done) => {
                outage.end();
                return Ok(done);
            }
            Err(Fault::Final(error)) => return Err(error),
            Err(Fault::Transient(cause)) => cause,
        };
        // The last attempt is made when the limit ends.
        let left = limit.saturating_sub(began.elapsed());
        if left.is_zero() {
            let tried = format!("tried for {} s (IMS_RETRY_LIMIT)", began.elapsed().as_secs_f64().round());
            return Err(Error::new(attempted).because(cause).advise(tried));
        }
        if outage.is_due(Instant::now()) {
            let left = left.as_secs_f64().round();
            tracing::warn!("cannot {attempted} yet: {cause}; trying again for {left} s (IMS_RETRY_LIMIT)");
        } else {
            tracing::debug!("cannot {attempted} yet: {cause}; trying again");
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Reads a response of at most `limit` bytes. A signal interrupts the reading, however fast data arrives.
pub(crate) async fn whole(response: Response, limit: usize) -> std::result::Result<Vec<u8>, Fault> {
    let read = format!("read the answer of {}", without_query(response.url().as_str()));
    match beginning(response, limit).await? {
        (text, true) => Ok(text),
        (_, false) => Err(Fault::Final(Error::new(read).because(format!("it is longer than {} MiB", limit >> 20)))),
    }
}

/// Reads at most `limit` bytes of a response; the flag is true if these are the whole response.
async fn beginning(mut response: Response, limit: usize) -> std::result::Result<(Vec<u8>, bool), Fault> {
    let mut text = Vec::new();
    while let Some(piece) = response.chunk().await? {
        let fits = piece.len().min(limit - text.len());
        text.extend_from_slice(&piece[..fits]);
        if fits < piece.len() {
            return Ok((text, false));
        }
        // Lets the signal check run even if data arrives faster than it is read.
        tokio::task::yield_now().await;
    }
    Ok((text, true))
}

/// Reads the beginning of an error response, with secrets masked.
pub(crate) async fn complaint(response: Response) -> String {
    let (text, _) = beginning(response, MOST_COMPLAINED).await.unwrap_or_default();
    redaction::without_known(&String::from_utf8_lossy(&text)).into_owned()
}

/// True if this HTTP status is a transient error.
pub(crate) fn is_transient(status: reqwest::StatusCode) -> bool {
    status.is_server_error() || [408, 425, 429].contains(&status.as_u16())
}

/// Maximum number of characters of a server's response that a message quotes.
pub(crate) const MOST_QUOTED: usize = 300;

/// Minimum timeout of a retry.
pub(crate) const SHORTEST: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    use Redirects::{Anywhere, Nowhere, Once, SameServer};

    #[test]
    fn outage_is_logged_at_growing_distances() {
        let (outage, began) = (Outage::default(), Instant::now());
        let told = |until| -> Vec<u64> {
            (0..until).filter(|&second| outage.is_due(began + Duration::from_secs(second))).collect()
        };
        assert_eq!(told(600), [0, 30, 60, 120, 240, 480]);
        outage.end();
        assert_eq!(told(31), [0, 30]);
    }

    #[test]
    fn redirects_without_tls_without_end_or_with_credentials_elsewhere_are_refused() {
        let refused = |previous: &[&str], next: &str, redirects| {
            let previous: Vec<_> = previous.iter().map(|url| Url::parse(url).unwrap()).collect();
            refuse_redirect(&previous, &Url::parse(next).unwrap(), redirects)
        };
        for (from, to, redirects, goes) in [
            ("https://a/", "https://b/", Anywhere, true),
            ("http://a/", "https://a/", Anywhere, true),
            ("http://a/", "http://b/", Anywhere, true),
            ("https://a/", "http://a/", Anywhere, false),
            ("https://a/", "https://a/x", SameServer, true),
            ("https://a/", "https://a:443/x", SameServer, true),
            ("https://a/", "https://a:8443/", SameServer, false),
            ("https://a/", "https://b/", SameServer, false),
            ("http://a/", "https://a/", SameServer, false),
            ("https://a/", "https://a/x", Nowhere, false),
            ("https://a/", "https://b/", Once, true),
        ] {
            assert_eq!(refused(&[from], to, redirects).is_none(), goes, "{from} {to} {redirects:?}");
        }
        // In this case reqwest compares only the last two servers, and would send the credentials again.
        assert!(refused(&["http://a/", "http://b/"], "http://b/x", Once).is_some());
        assert!(refused(&["http://a/", "http://b/"], "http://a/", Once).is_some());
        assert!(refused(&["http://a/", "http://a/x"], "http://b/", Once).is_none());
        let [ten, eleven] = [10, 11].map(|number| vec!["http://a/"; number]);
        assert!(refused(&ten, "http://a/", Anywhere).is_none() && refused(&eleven, "http://a/", Anywhere).is_some());
        let said = refused(&["https://a/"], "http://b/k?X-Amz-Signature=secret", Anywhere).unwrap();
        assert!(!said.contains("secret"), "{said}");
    }

    #[test]
    fn presigned_url_is_shown_without_its_signature() {
        let text = "error sending request for url (http://s3/b/k?X-Amz-Signature=abc): refused";
        assert_eq!(without_query(text), "error sending request for url (http://s3/b/k): refused");
        assert_eq!(without_query("https://me:a?b@s3/k?sig=abc and http://s3/k"), "https://***@s3/k and http://s3/k");
        assert_eq!(without_query("no url"), "no url");
    }

    #[test]
    fn certificates_are_extracted_from_pem_with_text_around_them() {
        let pem = "# one\n-----BEGIN CERTIFICATE-----\nAAEC\nAwQ=\n-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----\nBQ==\n-----END CERTIFICATE-----\n";
        let read = |pem: &str| Certificate::from_pem_bundle(pem.as_bytes()).map(|found| found.len());
        assert_eq!(read(pem).unwrap(), 2);
        assert!(read("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----").is_err());
        assert_eq!(read("nothing").unwrap(), 0);
    }
}

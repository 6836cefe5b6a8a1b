//! The outer stage of a session, `ims-jail-shell` as forced command: enters the jail and has the inner stage carry out
//! the client's request ([`crate::session::inside`]).

use std::convert::Infallible;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use crate::error::{Attempt, Result};
use crate::jail::enter;
use crate::jail::record::Record;
use crate::jail::streams::Streams;
use crate::jail::tier::Tier;
use crate::session::agent::Outside;
use crate::session::front::{self, Beside};
use crate::session::inside::{Errand, why_no_transfer};
use crate::session::report::{Beginning, Report};
use crate::session::request::Request;
use crate::session::typed::Typed;
use crate::session::variables::client_environment;
use crate::sys::tree::Tree;

/// Enters the jail of the record at `jail` and carries out `request` there. This process ends as the request does.
pub fn run(jail: &Path, request: Request) -> Result<Infallible> {
    // Start the listener first: it must not inherit the descriptors that are opened below.
    let typed = typed_signals(&request);
    let mut streams = Streams::of_this_process()?;
    let record = &Record::read(jail)?;
    let at_terminal = std::io::stdin().is_terminal();
    // Report the session now, while the container's sockets can still be reached.
    let told = Report::begin(jail, Beginning::of_this_session(&request, at_terminal));
    let beside = outside_sftp_directory(jail, record, &request)?;
    let agent = agent_outside(record, &request);
    let joined = enter::join(record)?;
    // `/` is the image root from here on.
    let image_root = Tree::open(Path::new("/")).attempt(|| "open the image root")?;
    // Not in the chroot tier: its /dev is the image's, and may lack the nodes.
    if record.tier != Tier::Chroot {
        streams.open_own_nodes(&image_root)?;
    }
    let agent = agent.and_then(|agent| agent.show(&image_root).ok());
    let mut environment = client_environment(std::env::vars_os(), &record.keep);
    if record.tier == Tier::Chroot && !environment.iter().any(|(name, _)| name == OFFLINE) {
        environment.push((OFFLINE.into(), "1".into()));
    }
    environment.extend(agent.as_ref().map(|agent| ("SSH_AUTH_SOCK".into(), agent.path().into())));
    let transfer = matches!(request, Request::Sftp(_));
    let (job, image) = (record.job.clone(), record.image.clone());
    // A session of `enter` has no login, so a message must not say to log in again.
    let is_login = !matches!(request, Request::Program(_));
    let parent = std::os::unix::process::parent_id();
    let errand = Errand { request, beside: beside.is_some(), job, image, in_place: record.in_place };
    let inner = errand.program(&environment).attempt(|| "build the inner stage's command line")?;
    let ended = |status: &WaitStatus| {
        // Report why a transfer cannot work, since sshd does not forward sftp-server's standard error.
        let failed = transfer && !matches!(status, WaitStatus::Exited(_, 0));
        let reason = if failed { why_no_transfer(&image_root) } else { None };
        told.end(status, reason.as_deref());
        if matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)) && joined.init.ends_within(TIME_TO_FOLLOW) {
            let said = match is_login {
                true => JAIL_ENDED,
                false if std::os::unix::process::parent_id() != parent => KILLED,
                false => "the jail has ended",
            };
            eprintln!("ims-jail-shell: {said}");
        }
    };
    front::run(record, &joined, &inner, streams, beside.as_ref(), Beside { agent, typed }, ended)
}

/// Listens for signals typed at the terminal of `enter`, which the kernel sends to the command's process group only.
fn typed_signals(request: &Request) -> Option<Typed> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let is_at_terminal = stdin.is_terminal() || stdout.is_terminal() || stderr.is_terminal();
    // Without a listener, the command alone gets typed signals.
    (is_at_terminal && matches!(request, Request::Program(_))).then(|| Typed::start().ok()).flatten()
}

/// Tells systemctl that systemd is not running. Older versions of systemctl do not notice that without /proc.
const OFFLINE: &str = "SYSTEMD_OFFLINE";

/// Time for a killed init to end after this session's process: the init's end waits for all other processes of the
/// jail.
const TIME_TO_FOLLOW: Duration = Duration::from_millis(200);

const JAIL_ENDED: &str = "the jail has ended: the environment is closing, or its init was killed; if it is not closing, log in again in \
    a moment";

/// Message to a session of `enter` whose ims-sshd was killed.
const KILLED: &str =
    "ims-sshd was killed, and everything in the image ended with it; 'ims-sshd status' shows what is left";

/// The client's agent, for requests that can use it. `None` in the chroot tier: its only /run is the image's own, which
/// must not get the agent's socket.
fn agent_outside(record: &Record, request: &Request) -> Option<Outside> {
    let wanted = record.tier != Tier::Chroot && matches!(request, Request::Shell | Request::Command(_));
    wanted.then(Outside::of_this_session)?
}

/// In the chroot tier, the directory with the container's sftp-server, open: it is not visible in the image, since
/// nothing can be mounted.
fn outside_sftp_directory(jail: &Path, record: &Record, request: &Request) -> Result<Option<Tree>> {
    if record.tier != Tier::Chroot || !matches!(request, Request::Sftp(_)) {
        return Ok(None);
    }
    let directory = jail.with_file_name("sftp");
    Tree::open(&directory).attempt(|| format!("open {}", directory.display())).map(Some)
}

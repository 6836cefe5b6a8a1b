//! The part of a remote job that runs as the first process of its own mount and PID namespaces. It sets up its root
//! directory, starts itself again in it, opens the environment, and packs the image.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sched::CloneFlags;
use rustix::event::{PollFd, PollFlags};
use rustix::mount::MountAttrFlags;

use crate::environment::own_sshd::{self, HOST_KEY};
use crate::environment::settings::Settings;
use crate::environment::supervisor;
use crate::error::{Attempt, Error, Result};
use crate::image::authorities::put_authorities;
use crate::image::boot;
use crate::image::exclude::Pattern;
use crate::image::inventory::{Inventory, write_changes};
use crate::image::packer;
use crate::image::packing::{self, Archive};
use crate::jailer::resolv_conf::{self, ENVIRONMENT, SIDECAR};
use crate::publish::basis;
use crate::publish::prepare;
use crate::publish::settings as publishing;
use crate::publish::source::Source;
use crate::recipe::{ca_rpm, fetch, kiwi, repositories};
use crate::remote::job_directory::{self, JobDirectory};
use crate::remote::message::{Blob, Build, Customize, Message, Order, Part, Script, Task};
use crate::remote::node_root::{self, BUILD_OWN, BUILD_RESULTS, PARENT, PROGRAMS, RESULTS};
use crate::remote::site;
use crate::sshd::options::Options;
use crate::sys::mounts::{self, Detached};
use crate::sys::poll;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::verdict::Verdict;
use crate::volume::layout::{
    ARCHIVE, CREATED_IMAGE_ROOT, IMAGE_ROOT, INVENTORY, KIWI_LOG, READY, RECIPE, REMOTE_RECIPE,
};
use crate::volume::open_tree;
use crate::volume::signal_files::SignalFiles;

/// Directory of keys, configuration and certificates, which vanishes with the job's /run.
const OWN: &str = "/run/ims-sshd-job";

/// Comment of the host key.
const KEY_COMMENT: &str = "ims-sshd node";

/// Name under which this program is started inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// Makes the root directory, and becomes the next stage there.
    Root,
    /// Carries the order out.
    Task,
}

/// Runs a stage. Its order is a line on standard input, and it tells its parent on standard output how far it has come.
pub(crate) fn run(stage: Stage) -> Result<u8> {
    if std::process::id() != 1 {
        return Err(Error::bad_input("only 'ims-sshd node' may start this command"));
    }
    match stage {
        Stage::Root => root(),
        Stage::Task => task(),
    }
}

fn root() -> Result<u8> {
    // The parent removes leftovers of this process when the job ends, so this process must not outlive the parent.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .attempt(|| "follow the parent")?;
    let order = read_order()?;
    let stdin = std::io::stdin();
    let mut parent = [PollFd::new(&stdin, PollFlags::IN)];
    let _ = poll::wait(&mut parent, Duration::ZERO);
    if parent[0].revents().contains(PollFlags::HUP) {
        return Err(Error::new("go on with the job").because("its first process has ended"));
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).attempt(|| "make a mount namespace")?;
    mounts::make_all_private().attempt(|| "make all mounts private")?;
    let place = JobDirectory::path(&order.job);
    let shown = [job_directory::IMAGE, job_directory::RESULTS].map(|name| place.join(name));
    let program = match order.task {
        Task::Customize(_) => {
            node_root::enter(&place, (&shown[0], &shown[1]))?;
            Path::new(PROGRAMS).join("ims-sshd")
        }
        Task::Build(_) => {
            let program = std::env::current_exe().attempt(|| "find this program's own file")?;
            node_root::enter_for_build(&place, (&shown[0], &shown[1]))?;
            program
        }
    };
    let mut line = serde_json::to_vec(&Message::Order(Box::new(order))).attempt(|| "pass on the order")?;
    line.push(b'\n');
    let line = packer::inheritable(&line).attempt(|| "pass on the order")?;
    let mut next = Command::new(program);
    Err(next.args(["node", "--inside", "task"]).stdin(line).exec()).attempt(|| "start this program in the job's root")
}

fn read_order() -> Result<Order> {
    let attempted = || "read the order";
    let mut line = String::new();
    BufReader::new(std::io::stdin()).read_line(&mut line).attempt(attempted)?;
    match serde_json::from_str(&line).attempt(attempted)? {
        Message::Order(order) => Ok(*order),
        _ => Err(Error::new(attempted()).because("it is another message")),
    }
}

/// Tells the parent process.
struct Parent(File);

impl Parent {
    /// Takes standard output: nothing that this process starts may write there.
    fn take() -> Result<Self> {
        let attempted = || "take over standard output";
        let own: OwnedFd = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).attempt(attempted)?;
        rustix::stdio::dup2_stdout(std::io::stderr()).attempt(attempted)?;
        let null = File::open("/dev/null").attempt(attempted)?;
        rustix::stdio::dup2_stdin(null).attempt(attempted)?;
        Ok(Self(own.into()))
    }

    fn tell(&mut self, message: &Message) -> Result<()> {
        let line = serde_json::to_string(message).attempt(|| "tell the parent")?;
        self.0.write_all(format!("{line}\n").as_bytes()).attempt(|| "tell the parent")
    }
}

fn task() -> Result<u8> {
    let order = read_order()?;
    let mut parent = Parent::take()?;
    let done = match &order.task {
        Task::Customize(wanted) => customize(wanted, &mut parent),
        Task::Build(wanted) => build(wanted, &mut parent),
    };
    done.map(|()| 0).inspect_err(|e| drop(parent.tell(&Message::Failed { why: e.to_string() })))
}

/// Opens the image as an environment, and packs it if it was marked complete.
fn customize(wanted: &Customize, parent: &mut Parent) -> Result<()> {
    let own = Path::new(OWN);
    std::fs::DirBuilder::new().mode(0o755).create(own).attempt(|| format!("create the directory {OWN}"))?;
    let given = wanted.variables.iter().map(|(name, value)| (name.into(), value.into()));
    let fixed = [("IMS_ACTION".into(), "customize".into())];
    let variables: Vec<(std::ffi::OsString, std::ffi::OsString)> =
        [("IMAGE_PACKER".into(), "ims-sshd".into())].into_iter().chain(given).chain(fixed).collect();
    let publishing = publishing::Settings::read(Some(PARENT.into()), variables.clone())?;
    let work = Work::begin(&publishing.network)?;
    let image_root = Path::new(PARENT).join(IMAGE_ROOT);
    let source = Source::Here(Path::new(PARENT).join(ARCHIVE));
    let overlay = prepare::prepare(&work, &publishing, &source, None, &image_root)?;
    honour_setuid(&image_root)?;
    {
        let tree = open_tree(&image_root)?;
        put_certificates(&tree, own, &wanted.authorities)?;
        resolv_conf::lend(&tree)?;
    }
    if let (true, Some(overlay)) = (wanted.reports_changes, &overlay) {
        Inventory::of(&work, &overlay.lower)?.save(&open_tree(Path::new(PARENT))?, INVENTORY)?;
    }
    let held = own_sshd::free_port(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    let port = held.port;
    let settings = environment(wanted, variables, own, port)?;
    let host_key = own.join(HOST_KEY).with_extension("pub");
    let host_key = std::fs::read_to_string(&host_key).attempt(|| format!("read {}", host_key.display()))?;
    let mut files = SignalFiles::open(Path::new(PARENT))?
        .ok_or_else(|| Error::new(format!("open {PARENT}")).because("it does not exist"))?;
    files.claim()?;
    files.touch(READY)?;
    let mut told = Ok(());
    let listening = || told = parent.tell(&Message::Listening { port, host_key });
    let outcome = supervisor::run(settings, Some(files), listening)?;
    told?;
    let verdict = outcome.verdict.unwrap_or(Verdict::Failed);
    parent.tell(&Message::Closed { verdict: verdict.into(), exit_code: outcome.exit_code })?;
    if verdict == Verdict::Failed || outcome.exit_code != 0 {
        return Ok(());
    }
    let results = Path::new(RESULTS);
    let parts = pack(&work, &publishing, (&image_root, results), &wanted.exclude, wanted.reports_changes)?;
    mounts::unmount(&image_root).attempt(|| format!("unmount {}", image_root.display()))?;
    overlay.map_or(Ok(()), crate::image::unpack::Overlay::unmount)?;
    parent.tell(&Message::Packed { parts })
}

/// Mounts the image root on itself: the overlay is `nosuid`, and sudo and su must work.
fn honour_setuid(image_root: &Path) -> Result<()> {
    let attempted = || format!("mount {}", image_root.display());
    let target = Tree::open(image_root).attempt(attempted)?;
    Detached::copy_of(image_root, false, MountAttrFlags::empty())
        .and_then(Detached::honouring_setuid)
        .and_then(|mount| mount.attach(target))
        .attempt(attempted)
        .map(drop)
}

fn put_certificates(image_root: &Tree, own: &Path, authorities: &[(String, String)]) -> Result<()> {
    if authorities.is_empty() {
        return Ok(());
    }
    let directory = own.join("ca");
    let attempted = || format!("write {}", directory.display());
    std::fs::create_dir(&directory).attempt(attempted)?;
    let tree = Tree::open(&directory).attempt(attempted)?;
    for (name, text) in authorities {
        if !is_file_name(name) {
            return Err(Error::new(attempted()).because(format!("'{name}' is no name of a certificate")));
        }
        tree.replace(name, text.as_bytes()).attempt(attempted)?;
    }
    put_authorities(image_root, &directory)
}

/// Returns whether `name`, which the other side has chosen, is one of a file.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains('/')
}

/// Settings of the environment, whose sshd is to listen on `port`.
fn environment(
    wanted: &Customize,
    variables: Vec<(std::ffi::OsString, std::ffi::OsString)>,
    own: &Path,
    port: u16,
) -> Result<Settings> {
    let keys = own.join("authorized_keys");
    std::fs::write(&keys, &wanted.keys).attempt(|| format!("write {}", keys.display()))?;
    let sessions =
        wanted.sshd.as_ref().map_or_else(|| Ok(own_sshd::SESSIONS.to_owned()), |lines| site::lines(lines))?;
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let config = own_sshd::configure(own, address, &keys, KEY_COMMENT, &sessions)?;
    let not_ours = ["SSHD_OPTIONS", "SSHD_CONFIG_FILE", "CUSTOMIZATION_SCRIPT", "IMS_JAIL_BINDS"];
    let variables = variables.into_iter().filter(|(name, _)| !not_ours.iter().any(|other| name == other));
    let mut settings = Settings::read(Some(PARENT.into()), variables)?;
    let words = ["-E", &own.join("sshd.log").to_string_lossy(), "-f", &config.to_string_lossy()].map(str::to_owned);
    settings.sshd = Options::parse(&shell_words::join(words))?;
    settings.sshd_config = config;
    settings.script = wanted.script.as_ref().map(|script| put_script(own, script)).transpose()?;
    settings.session_variables.extend(wanted.session_variables.iter().cloned());
    settings.image.clone_from(&wanted.image);
    Ok(settings)
}

fn put_script(own: &Path, script: &Script) -> Result<PathBuf> {
    let path = own.join("customization-script");
    let attempted = || format!("write {}", path.display());
    std::fs::write(&path, &script.text).attempt(attempted)?;
    let mode = if script.is_executable { 0o700 } else { 0o600 };
    std::fs::set_permissions(&path, Permissions::from_mode(mode)).attempt(attempted)?;
    Ok(path)
}

/// Builds the recipe's image root by the node's kiwi-ng, and packs it.
fn build(wanted: &Build, parent: &mut Parent) -> Result<()> {
    let (own, results) = (Path::new(BUILD_OWN), Path::new(BUILD_RESULTS));
    let attempted = || format!("write the build's files in {}", own.display());
    std::fs::DirBuilder::new().mode(0o700).create(own).attempt(attempted)?;
    let directory = Tree::open(own).attempt(attempted)?;
    let put = |name: &str, content: &[u8]| {
        directory.replace(name, content).attempt(attempted)?;
        Ok(own.join(name))
    };
    let authority = wanted.authority.as_ref().map(|text| put("authority.crt", text.as_bytes())).transpose()?;
    let ca_rpm = wanted.ca_rpm.as_ref().map(|Blob(content)| put(ca_rpm::FILE, content)).transpose()?;
    let keys = wanted.signing_keys.iter().enumerate();
    let signing_keys = keys.map(|(number, (name, Blob(content)))| {
        is_file_name(name)
            .then_some(())
            .ok_or_else(|| Error::new(attempted()).because(format!("'{name}' is no name")))?;
        put(&format!("{number}-{name}"), content)
    });
    let signing_keys = signing_keys.collect::<Result<Vec<_>>>()?;
    let ca = authority.iter().map(|file| ("CA_CERT".into(), file.into()));
    let given = wanted.variables.iter().map(|(name, value)| (name.into(), value.into()));
    let variables: Vec<(std::ffi::OsString, std::ffi::OsString)> =
        given.chain(ca).chain([("IMS_ACTION".into(), "create".into())]).collect();
    let settings = publishing::Settings::read(Some(PARENT.into()), variables)?;
    let image_root = Path::new(PARENT).join(CREATED_IMAGE_ROOT);
    let recipe = Path::new(PARENT).join(RECIPE);
    let order = kiwi::Wanted {
        recipe: recipe.clone(),
        profiles: wanted.profiles.clone(),
        ca_rpm,
        authority,
        is_authority_optional: true,
        signing_keys,
        are_lines_errors: false,
    };
    let built = fetch::unpack_filled_in(&settings, &Path::new(PARENT).join(REMOTE_RECIPE))
        .and_then(|()| match wanted.wait {
            Some(seconds) => {
                repositories::run(&settings, &recipe, &wanted.profiles, Duration::from_secs(seconds)).map(drop)
            }
            None => Ok(()),
        })
        .and_then(|()| kiwi::run(&settings, &order).map(drop));
    let mut parts = Vec::new();
    if std::fs::copy(Path::new(PARENT).join(KIWI_LOG), results.join(Part::Log.name())).is_ok() {
        parts.push(Part::Log);
    }
    let work = Work::begin(&settings.network)?;
    match &built {
        Ok(()) => {
            put_certificates(&open_tree(&image_root)?, own, &wanted.authorities)?;
            parts.extend(pack(&work, &settings, (&image_root, results), &wanted.exclude, false)?);
        }
        Err(_) if wanted.returns_tree && image_root.is_dir() => {
            let results = open_tree(results)?;
            let archive = Archive { directory: &results, name: Part::Tree.name() };
            packing::pack(&work, &open_tree(&image_root)?, &archive, &settings.packing, &[], None)?;
            parts.push(Part::Tree);
        }
        Err(_) => {}
    }
    parent.tell(&Message::Built { failure: built.err().map(|e| e.reason()) })?;
    parent.tell(&Message::Packed { parts })
}

/// Packs the image into the directory of results, with copies of its boot files.
fn pack(
    work: &Work,
    settings: &publishing::Settings,
    (image_root, to): (&Path, &Path),
    exclude: &[String],
    reports_changes: bool,
) -> Result<Vec<Part>> {
    let (tree, volume, results) = (open_tree(image_root)?, open_tree(Path::new(PARENT))?, open_tree(to)?);
    // An environment that was killed has left its own text behind in the image's resolv.conf.
    ENVIRONMENT.restore(&tree)?;
    SIDECAR.restore(&tree)?;
    let mut parts = vec![Part::Image];
    if reports_changes {
        write_changes(work, &volume, &tree, &to.join(Part::Changes.name()))?;
        parts.push(Part::Changes);
    }
    if let Some(files) = boot::find_if_any(&tree, &settings.boot, settings.job.arch())? {
        let optional = [(Part::Initrd, files.initrd), (Part::Parameters, files.parameters)];
        let found = optional.into_iter().filter_map(|(part, file)| Some((part, file?)));
        for (part, mut file) in [(Part::Kernel, files.kernel)].into_iter().chain(found) {
            let attempted = || format!("copy /{} of the image", file.path);
            let mut copy = results.create_file(part.name()).attempt(attempted)?;
            std::io::copy(&mut file.content, &mut copy).attempt(attempted)?;
            parts.push(part);
        }
    }
    let archive = Archive { directory: &results, name: Part::Image.name() };
    let basis = basis::of(work, settings, &volume, &tree, false)?;
    let exclude = exclude.iter().map(|text| Pattern::parse(text));
    let exclude = exclude.collect::<std::result::Result<Vec<_>, _>>().map_err(Error::bad_input)?;
    packing::pack(work, &tree, &archive, &settings.packing, &exclude, basis.as_ref())?;
    Ok(parts)
}

//! `ims-sshd build`: builds an image root with kiwi-ng. Leaves no mount and no process behind, however it ends.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use crate::error::{Advise, Attempt, Error, Result};
use crate::ims::records::Status;
use crate::jail::binfmt;
use crate::log::redaction;
use crate::printable::{Printable, listed};
use crate::publish::settings::Settings;
use crate::recipe::ca_rpm::{self, ANCHORS};
use crate::recipe::description::{Description, Selection};
use crate::recipe::outcome::{self, Outcome};
use crate::recipe::repositories;
use crate::recipe::sandbox::{self, CACHE, DEBIAN_ANCHORS, Ended, HOME, Order, PROGRAMS, ROOTS_HOME, Running};
use crate::sys::architecture::Architecture;
use crate::sys::file_kind::FileKind;
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::transfer::{Work, installed};
use crate::volume::layout::{BUILD, BUILD_FAILED, CREATED_IMAGE_ROOT, KIWI_LOG};
use crate::volume::open_tree;
use crate::volume::signal_files::SignalFiles;

/// Name of kiwi-ng's program.
const KIWI: &str = "kiwi-ng";

/// Type of image that kiwi-ng builds: an image root, and an archive of it, which is not used.
const TYPE: &str = "tbz";

/// Supported package managers, each with the program that must be installed.
const PACKAGE_MANAGERS: [(&str, &str); 5] =
    [("zypper", "zypper"), ("dnf", "dnf"), ("dnf4", "dnf"), ("dnf5", "dnf5"), ("apt", "apt-get")];

/// Replacement for xz that discards the archive. kiwi-ng always creates an archive of the image root, with
/// `tar … | xz -f …`, but the archive is not used. Other calls of xz (with a file, or to decompress) go to the
/// machine's own xz.
const NO_ARCHIVE: &str = "#!/bin/sh\n[ \"$1\" != -f ] || [ ! -p /dev/stdin ] || exec cat > /dev/null\nexec XZ \"$@\"\n";

/// Shell functions for the scripts that kiwi-ng runs outside the image root. These scripts unpack Debian's base-files
/// with `tar`, which would fail to set mode, owner and time of /proc, since /proc is read-only in a build.
const FUNCTIONS: (&str, &str) = ("functions", "tar() { command tar --exclude=./proc \"$@\"; }\n");

/// Macro with which rpm leaves out the files of packages in /dev, /proc and /sys. While packages are installed, these
/// directories are the build's own, and rpm could neither set modes nor create device nodes there.
const NOT_OF_THE_IMAGE: &str = "%_netsharedpath /dev:/proc:/sys\n";

/// Minimum free space, in bytes, that a build needs to begin.
const LEAST_SPACE: u64 = 256 << 20;

/// First version of kiwi-ng that does not use debootstrap. For older versions the build sets `container=lxc`:
/// debootstrap then mounts devices instead of creating device nodes, which is not possible here.
const FIRST_WITHOUT_DEBOOTSTRAP: (u32, u32) = (10, 0);

/// First version of kiwi-ng that can add a CA certificate to the image.
const TAKES_AUTHORITY: (u32, u32) = (10, 2);

/// Keyrings that this machine has for distributions, used for apt if there are no other keys.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/ubuntu-archive-keyring.gpg"];

/// Directories, in a pod, with keys of repositories: those of the image, and those of the site.
pub const KEY_DIRECTORIES: [&str; 2] = ["/signing-keys", "/etc/cray/signing-keys"];

/// Directories that are hidden from root in the build, in addition to `OAUTH_CONFIG_DIR`: those with a pod's
/// credentials, and that of the socket of an IMS service on this machine.
const HIDDEN: [&str; 5] =
    ["/etc/cray/remote-keys", "/etc/admin-client-auth", "/run/secrets", "/var/run/secrets", "/run/ims"];

/// The only variables of this process that kiwi-ng gets: a site's proxies.
const PROXIES: [&str; 6] = ["http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"];

/// Files into which the tools for CA certificates collect an image's certificates.
const BUNDLES: [&str; 4] = [
    "etc/ssl/certs/ca-certificates.crt",
    "var/lib/ca-certificates/ca-bundle.pem",
    "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "etc/ssl/ca-bundle.pem",
];

/// Files that kiwi-ng's scripts leave behind at the top of an image root.
const LEFT: [&str; 2] = [".kconfig", ".profile"];

/// Beginnings of the stages of kiwi-ng: a part of the line that it prints, and the name of the stage.
const STAGES: [(&str, &str); 7] = [
    ("Setup root directory", "preparing the image root"),
    ("Installing bootstrap packages", "installing the first packages"),
    ("Installing system (chroot)", "installing packages"),
    ("Calling config.sh", "running config.sh"),
    ("Calling images.sh", "running images.sh"),
    ("compressed tar archive", "making the archive of kiwi-ng"),
    ("Export rpm packages metadata", "listing packages"),
];

/// Number of bytes at the end of kiwi-ng's log that are searched for the output of a failed script.
const LONGEST_TAIL: u64 = 64 << 10;

/// Parts of package managers' errors when a package contains a device node, which cannot be created in a user
/// namespace. dnf's error names no reason.
const DEVICE_NODE: [&str; 3] = ["cpio: mknod failed", "error creating device", "Error unpacking rpm package"];

/// Maximum length, in characters, of a script's line that an error quotes.
const LONGEST_LINE: usize = 200;

/// Maximum length, in bytes, of kiwi-ng's error that an error quotes.
const LONGEST_ERROR: usize = 1 << 10;

/// Arguments of the command line.
#[derive(Debug)]
pub struct Wanted {
    /// Directory of the recipe.
    pub recipe: PathBuf,
    /// Profiles to build; if empty, those that the description imports.
    pub profiles: Vec<String>,
    /// Package of the site's certificate authority; `None` for the pod's package.
    pub ca_rpm: Option<PathBuf>,
    /// Certificate of the site's certificate authority; `None` for the pod's certificate.
    pub authority: Option<PathBuf>,
    /// True if a job may go without a certificate authority: a machine without a pod need not have one.
    pub is_authority_optional: bool,
    /// Additional keys of repositories.
    pub signing_keys: Vec<PathBuf>,
    /// True if kiwi-ng's lines go to standard error, since standard output is for a result.
    pub are_lines_errors: bool,
}

/// A build that was checked and can begin.
pub(crate) trait Ready {
    /// Builds the image root in the image root parent.
    fn carry_out(&mut self, work: &Work, volume: &Tree) -> Result<()>;
}

/// Builds the image root of a recipe and reports the job's status to IMS.
pub fn run(settings: &Settings, wanted: &Wanted) -> Result<u8> {
    run_by(settings, |work, parent, volume| Build::check(work, settings, wanted, parent.to_owned(), volume))
}

/// Calls `check`, and carries out the build that it returns.
///
/// If a job's build fails, creates `build_failed` and returns exit code 0: the next containers decide how the job
/// continues. If `check` fails, the build cannot begin, and the job ends with an error.
pub(crate) fn run_by<R: Ready>(
    settings: &Settings,
    check: impl FnOnce(&Work, &Path, &Tree) -> Result<R>,
) -> Result<u8> {
    outcome::build(settings, Some(Status::BuildingImage), |work| {
        let parent = make_parent(settings)?;
        let volume = open_tree(&parent)?;
        let mut build = check(work, &parent, &volume)?;
        let result = work.unless_interrupted(build.carry_out(work, &volume));
        drop(build);
        let _ = volume.remove_whole(BUILD.as_ref());
        let files = SignalFiles::open(&parent)?;
        match result {
            Ok(()) => Ok(Outcome::Built),
            Err(e) if settings.job.id.is_some() => {
                if let Some(files) = files {
                    files.retract(BUILD_FAILED)?;
                    files.touch(BUILD_FAILED)?;
                    // Write the reason into the file, for the sidecar to report.
                    let _ = volume.replace(BUILD_FAILED, format!("{}\n", e.reason()).as_bytes());
                }
                if e.is_interruption() { Err(e) } else { Ok(Outcome::Failed(e)) }
            }
            Err(e) => Err(e),
        }
    })
}

/// Creates the image root parent, and returns its path without symbolic links. Other users cannot enter it, so that
/// they do not reach setuid programs of the image. A job already has a parent: the job's own volume.
fn make_parent(settings: &Settings) -> Result<PathBuf> {
    let parent = &settings.job.parent;
    let attempted = || format!("open the image root parent {}", parent.display());
    if settings.job.id.is_some() {
        return named::resolve(parent).attempt(attempted);
    }
    if let Some(missing) = named::missing_parent(parent) {
        let why = format!("{} does not exist", missing.display());
        return Err(Error::new(attempted()).because(why).advise("create it first"));
    }
    let real = named::resolve_beginning(parent).attempt(attempted)?;
    DirBuilder::new().recursive(true).mode(0o700).create(&real).attempt(attempted)?;
    named::refuse_changeable(&real, false)
        .attempt(attempted)
        .advise("name a directory that only root can change, as well as all directories above it")?;
    Ok(real)
}

/// Refuses a recipe that a user other than root can change, since that user could run scripts as root in the build.
fn refuse_changeable(recipe: &Path) -> Result<()> {
    let attempted = || format!("build the recipe {}", recipe.display());
    let advice = "fetch it by 'ims-sshd fetch-recipe', which makes a copy that only root can change";
    named::refuse_changeable(recipe, false).attempt(attempted).advise(advice)?;
    let tree = open_tree(recipe)?;
    // With this mode no other user can enter the directory, so its content need not be checked.
    if rustix::fs::fstat(&tree).attempt(attempted)?.st_mode & 0o011 == 0 {
        return Ok(());
    }
    tree.walk(|path, _, _, found| {
        let is_link = FileType::from_raw_mode(found.st_mode) == FileType::Symlink;
        let why = if !named::is_trusted(found.st_uid) {
            format!("{} belongs to user {}, who can change it", path.display(), found.st_uid)
        } else if !is_link && found.st_mode & named::WRITABLE != 0 {
            format!("users other than its owner can write to {}", path.display())
        } else {
            return Ok(());
        };
        Err(std::io::Error::other(why))
    })
    .attempt(attempted)
    .advise(advice)
}

/// A recipe whose description asks for nothing that ims-sshd cannot build.
pub(crate) struct Buildable {
    description: Description,
    selection: Selection,
    /// Package manager, and its program.
    manager: String,
    program: &'static str,
}

impl Buildable {
    /// Reads the description of `recipe`.
    pub(crate) fn read(recipe: &Tree, profiles: &[String], architecture: &'static str) -> Result<Self> {
        let description = Description::read(recipe)?;
        let selection = description.select(profiles, architecture)?;
        let (manager, program) = manager(&description, &selection)?;
        repositories::refuse_disk_images(&description, &selection)?;
        Ok(Self { description, selection, manager, program })
    }
}

/// Returns the recipe's package manager and its program. Fails if `ims-sshd` cannot build the recipe.
fn manager(description: &Description, selection: &Selection) -> Result<(String, &'static str)> {
    let attempted = || format!("build '{}'", description.name);
    let of = |parts: &[(crate::recipe::description::Scope, String)]| -> BTreeSet<String> {
        parts.iter().filter(|(scope, _)| scope.holds(selection)).map(|(_, name)| name.clone()).collect()
    };
    let types = of(&description.types);
    if !types.contains(TYPE) {
        let has = if types.is_empty() { "none".into() } else { listed(&types.iter().collect::<Vec<_>>()) };
        let why = format!("ims-sshd builds the type {TYPE} only; the recipe has: {has}");
        return Err(Error::new(attempted())
            .because(why)
            .advise(format!("add <type image=\"{TYPE}\"/> to its preferences")));
    }
    let managers = of(&description.package_managers);
    // This is kiwi-ng's default.
    let manager = managers.first().cloned().unwrap_or_else(|| "dnf4".into());
    let Some((_, program)) = PACKAGE_MANAGERS.iter().find(|(name, _)| *name == manager) else {
        let known: Vec<_> = PACKAGE_MANAGERS.iter().map(|(name, _)| *name).collect();
        let why = format!("its package manager is '{manager}': expected one of {}", known.join(", "));
        return Err(Error::new(attempted()).because(why));
    };
    Ok((manager, program))
}

/// Everything that another machine needs to carry out a build.
pub(crate) struct Offered {
    /// The recipe.
    pub(crate) recipe: Tree,
    /// Programs that the other machine must have.
    pub(crate) programs: [&'static str; 2],
    /// Certificate of the site's certificate authority, in PEM.
    pub(crate) authority: Option<Vec<u8>>,
    /// Package of the site's certificate authority.
    pub(crate) package: Option<Vec<u8>>,
    /// Files with the keys with which packages may be signed.
    pub(crate) keys: Vec<PathBuf>,
}

impl Offered {
    /// Reads everything that the other machine needs. Fails if the recipe cannot be built.
    pub(crate) fn read(settings: &Settings, wanted: &Wanted) -> Result<Self> {
        let recipe = named::resolve(&wanted.recipe).attempt(|| format!("open {}", wanted.recipe.display()))?;
        let recipe = open_tree(&recipe)?;
        let Buildable { program, .. } = Buildable::read(&recipe, &wanted.profiles, settings.job.arch())?;
        let Authority { certificate, package } = Authority::read(settings, wanted)?;
        let keys = keys(wanted, None)?;
        Ok(Self { recipe, programs: [KIWI, program], authority: certificate, package, keys })
    }
}

/// A build on this machine that can begin.
struct Build<'a> {
    settings: &'a Settings,
    parent: PathBuf,
    recipe: PathBuf,
    description: Description,
    selection: Selection,
    profiles: &'a [String],
    manager: String,
    kiwi: PathBuf,
    version: (u32, u32),
    authority: Authority,
    keys: Vec<PathBuf>,
    /// True if QEMU must be registered to run the image's programs.
    is_emulated: bool,
    are_lines_errors: bool,
}

impl<'a> Build<'a> {
    /// Checks everything that can be checked before the build begins.
    fn check(work: &Work, settings: &'a Settings, wanted: &'a Wanted, parent: PathBuf, volume: &Tree) -> Result<Self> {
        let attempted = || format!("build the recipe {}", wanted.recipe.display());
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new(attempted()).because("only root can install packages").advise("run it as root"));
        }
        sandbox::check_namespaces()?;
        let recipe = named::resolve(&wanted.recipe).attempt(|| format!("open {}", wanted.recipe.display()))?;
        // A job's recipe is on the job's own volume, where no other user can change it.
        if settings.job.id.is_none() {
            refuse_changeable(&recipe)?;
        }
        let architecture = settings.job.architecture.unwrap_or(Architecture::OWN);
        let Buildable { description, selection, manager, program } =
            Buildable::read(&open_tree(&recipe)?, &wanted.profiles, architecture.name())?;
        installed(program)?;
        let mut is_emulated = false;
        if architecture != Architecture::OWN {
            let name = architecture.name();
            if manager == "apt" {
                let why = format!("with apt, kiwi-ng builds for {name} only on a machine of that architecture");
                return Err(Error::new(attempted()).because(why).advise("build it on such a node"));
            }
            is_emulated = !architecture.runs();
            if is_emulated && !binfmt::interpreter(architecture).exists() {
                let why = format!("this machine runs no programs for {name}");
                let interpreter = binfmt::interpreter(architecture);
                let advice = format!("install qemu-user-static, which has {}", interpreter.display());
                return Err(Error::new(attempted()).because(why).advise(advice));
            }
        }
        let image_root = parent.join(CREATED_IMAGE_ROOT);
        if settings.job.id.is_some() {
            // Remove leftovers of an earlier start of this container: nothing else writes to the job's volume.
            for name in [CREATED_IMAGE_ROOT, BUILD] {
                let (above, name) = name.rsplit_once('/').unwrap_or((".", name));
                if let Ok(above) = volume.directory_without_links(above) {
                    above.remove_whole(name.as_ref()).attempt(|| format!("remove {name}"))?;
                }
            }
        } else if std::fs::symlink_metadata(&image_root).is_ok() {
            let why = format!("{} exists", image_root.display());
            return Err(Error::new(attempted()).because(why).advise("remove it, or name another image root parent"));
        }
        let disk = rustix::fs::fstatvfs(volume).attempt(attempted)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free < LEAST_SPACE {
            let why = format!("{} has {} MiB of free space", parent.display(), free >> 20);
            return Err(Error::new(attempted()).because(why).advise("give the volume more space"));
        }
        let kiwi = program_in_path(KIWI).ok_or_else(|| {
            Error::new("run kiwi-ng").because("it is not installed").advise("install kiwi-ng; see docs/RECIPES.md")
        })?;
        let kiwi = kiwi.canonicalize().attempt(|| format!("find {}", kiwi.display()))?;
        let find = format!("find the version of {}", kiwi.display());
        let output = work.run(&find, Command::new(&kiwi).arg("--version"), None, |_| {})?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = version_in(&said).ok_or_else(|| {
            let said = format!("{said}{}", String::from_utf8_lossy(&output.stderr));
            let said = said.trim().lines().last().unwrap_or("it says nothing").to_owned();
            Error::new(&find).because(said)
        })?;
        let authority = Authority::read(settings, wanted)?;
        let keys = keys(wanted, Some(&manager))?;
        let profiles = &wanted.profiles;
        Ok(Self {
            settings,
            parent,
            recipe,
            description,
            selection,
            profiles,
            manager,
            kiwi,
            version,
            authority,
            keys,
            is_emulated,
            are_lines_errors: wanted.are_lines_errors,
        })
    }

    /// Runs kiwi-ng, and checks the image root that it has built.
    fn build(&self, work: &Work, volume: &Tree) -> Result<()> {
        let attempted = || format!("build '{}'", self.description.name);
        if let Ok(Some(files)) = SignalFiles::open(&self.parent) {
            files.retract(BUILD_FAILED)?;
        }
        volume.remove_whole(BUILD.as_ref()).attempt(attempted)?;
        let private = volume.make_private(BUILD).attempt(attempted)?;
        for name in [CACHE, HOME, "keys", PROGRAMS] {
            private.make_directories(name).attempt(attempted)?;
        }
        let before = archives(volume)?;
        let order = self.order(work, &private)?;
        tracing::info!(
            "building '{}' by kiwi-ng {}.{} and {}{}; its log is {}",
            self.description.name,
            self.version.0,
            self.version.1,
            self.manager,
            if self.profiles.is_empty() { String::new() } else { format!(", profiles {}", self.profiles.join(", ")) },
            self.parent.join(KIWI_LOG).display()
        );
        let mut running = Running::start(&order)?;
        let output = running.output.try_clone().attempt(attempted)?;
        let error = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                if self.are_lines_errors {
                    tell_output(output, std::io::stderr())
                } else {
                    tell_output(output, std::io::stdout())
                }
            });
            let ended = work.wait_for(running.child());
            if ended.is_err() {
                running.end();
            }
            // The reader ends when no process has the output open for writing any more.
            let error = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            ended.map(|()| error)
        })?;
        let at = || {
            format!("{} and {}", self.parent.join(KIWI_LOG).display(), self.parent.join(CREATED_IMAGE_ROOT).display())
        };
        match running.report() {
            Some(Ended::Code(0)) => {}
            Some(Ended::Code(code)) => {
                let why = error.unwrap_or_else(|| format!("kiwi-ng ended with exit code {code}"));
                let log = end_of(volume, KIWI_LOG, LONGEST_TAIL).unwrap_or_default();
                let why = with_cause(why, &String::from_utf8_lossy(&log));
                let device = DEVICE_NODE.iter().any(|said| why.contains(said));
                let advice = if device { "a package with a device node cannot be installed; " } else { "" };
                return Err(Error::new(attempted()).because(why).advise(format!("{advice}see {}", at())));
            }
            Some(Ended::Signal(signal)) => {
                let why = format!("kiwi-ng was killed by signal {signal}");
                return Err(Error::new(attempted()).because(why).advise(format!("it may lack memory; see {}", at())));
            }
            Some(Ended::Failed(why)) => return Err(Error::new(attempted()).because(why)),
            None => {
                return Err(Error::new(attempted())
                    .because("its first process was killed")
                    .advise("it may lack memory"));
            }
        }
        self.finish(volume, &before).attempt(attempted)?;
        tracing::info!("the image root is {}", self.parent.join(CREATED_IMAGE_ROOT).display());
        Ok(())
    }

    fn order(&self, work: &Work, private: &Tree) -> Result<Order> {
        let attempted = || format!("prepare the build of '{}'", self.description.name);
        let place = self.parent.join(BUILD);
        let at = |name: &str| place.join(name).display().to_string();
        let mut command = vec![self.kiwi.display().to_string()];
        if self.settings.job.debug {
            command.push("--debug".into());
        }
        command.push(format!("--logfile={}", self.parent.join(KIWI_LOG).display()));
        command.extend(["--type".into(), TYPE.into()]);
        command.extend(self.profiles.iter().map(|profile| format!("--profile={profile}")));
        if self.selection.architecture != Architecture::OWN.name() {
            command.push(format!("--target-arch={}", self.selection.architecture));
        }
        command.extend(["system".into(), "build".into()]);
        command.push(format!("--description={}", self.recipe.display()));
        command.push(format!("--target-dir={}", self.parent.display()));
        let mut authority = None;
        if let Some(content) = &self.authority.certificate {
            private.replace("authority.crt", content).attempt(attempted)?;
            authority = Some(place.join("authority.crt"));
        }
        if self.manager == "apt" {
            if authority.is_some() && self.version >= TAKES_AUTHORITY {
                command.push(format!("--ca-cert={}", at("authority.crt")));
                command.push("--ca-target-distribution=debian".into());
            }
        } else if let Some(package) = &self.authority.package {
            private.replace(ca_rpm::FILE, package).attempt(attempted)?;
            command.push(format!("--add-bootstrap-package=file://{}", at(ca_rpm::FILE)));
        }
        let keys = private.directory("keys").attempt(attempted)?;
        for (number, key) in self.keys.iter().enumerate() {
            // Copy the keys. A pod has them in mounts below /etc, and mounts are left out of the build's copy of /etc.
            let name = key.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let name = format!("{number}-{name}");
            keys.replace(&name, &read_signing_key(key)?).attempt(attempted)?;
            command.push(format!("--signing-key={}", at(&format!("keys/{name}"))));
        }
        self.prepare_home(work, &place.join(HOME))?;
        let path = format!("{}:{}", at(PROGRAMS), std::env::var("PATH").unwrap_or_default());
        if let Some(xz) = program_in_path("xz") {
            let name = Path::new(PROGRAMS).join("xz");
            private
                .replace(&name, NO_ARCHIVE.replace("XZ", &shell_words::quote(&xz.to_string_lossy())).as_bytes())
                .attempt(attempted)?;
            rustix::fs::chmodat(private, &name, Mode::from_raw_mode(0o755), AtFlags::empty()).attempt(attempted)?;
        }
        let mut variables = vec![
            ("PATH".to_owned(), path),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ("HOME".to_owned(), ROOTS_HOME.to_owned()),
        ];
        if self.manager == "apt" {
            let (name, text) = FUNCTIONS;
            private.replace(name, text.as_bytes()).attempt(attempted)?;
            variables.push(("BASH_ENV".to_owned(), at(name)));
            if self.version < FIRST_WITHOUT_DEBOOTSTRAP {
                variables.push(("container".to_owned(), "lxc".to_owned()));
            }
        }
        variables.extend(PROXIES.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))));
        let oauth = self.settings.ims.as_ref().and_then(|ims| ims.oauth.clone());
        let named = std::env::var_os("OAUTH_CONFIG_DIR").filter(|path| !path.is_empty()).map(PathBuf::from);
        let hidden = HIDDEN.iter().map(PathBuf::from).chain(oauth).chain(named).collect();
        let mut shown = repositories::of_machine(&self.description, &self.selection, &self.recipe);
        shown.push(self.recipe.clone());
        shown.extend(installation(&self.kiwi));
        let is_left_out = self.manager == "apt" && self.version < TAKES_AUTHORITY;
        let trusts_later = is_left_out.then(|| self.parent.join(CREATED_IMAGE_ROOT));
        let emulated = self.is_emulated.then(|| self.selection.architecture.to_owned());
        Ok(Order {
            command,
            variables,
            private: place,
            parent: self.parent.clone(),
            shown,
            hidden,
            authority,
            emulated,
            trusts_later,
        })
    }

    /// Tells rpm what does not belong to the image, and sets the usual path of its database. Debian's rpm puts the
    /// database below the home directory, so the image's database would get the path of the builder's home.
    fn prepare_home(&self, work: &Work, home: &Path) -> Result<()> {
        let attempted = || format!("write {}", home.join(".rpmmacros").display());
        if self.manager == "apt" {
            // kiwi-ng 9.24 calls gpg, which needs this directory to exist.
            return std::fs::create_dir_all(home.join(".gnupg")).attempt(attempted);
        }
        let mut rpm = Command::new("rpm");
        let output = work.run("find rpm's database", rpm.args(["--eval", "%_dbpath"]), None, |_| {})?;
        let mut macros = NOT_OF_THE_IMAGE.to_owned();
        if output.stdout.trim_ascii().ends_with(b"/.rpmdb") {
            macros += "%_dbpath /var/lib/rpm\n";
        }
        std::fs::write(home.join(".rpmmacros"), macros).attempt(attempted)
    }

    /// Checks that the image root has the certificate of the site's authority, and removes leftovers of the build.
    fn finish(&self, volume: &Tree, before: &BTreeSet<OsString>) -> Result<()> {
        let root =
            volume.directory_without_links(CREATED_IMAGE_ROOT).attempt(|| "open the image root that was built")?;
        self.check_authority(&root)?;
        clean(&root)?;
        for name in archives(volume)?.difference(before) {
            volume.remove(name).attempt(|| format!("remove {}", Path::new(name).display()))?;
        }
        Ok(())
    }

    /// Fails if the image lacks the certificate of the site's authority. kiwi-ng may have succeeded without it, since
    /// zypper skips packages that it cannot find and exits with 0.
    fn check_authority(&self, root: &Tree) -> Result<()> {
        let Some(content) = &self.authority.certificate else { return Ok(()) };
        let is_here = |path: &Path| root.read(path, 4 << 20).is_ok_and(|found| found == *content);
        let found = if self.manager == "apt" {
            let names = root.directory(DEBIAN_ANCHORS).and_then(|anchors| anchors.names()).unwrap_or_default();
            names.iter().any(|name| is_here(&Path::new(DEBIAN_ANCHORS).join(name)))
        } else {
            ANCHORS.iter().any(|anchor| is_here(Path::new(anchor.trim_start_matches('/'))))
        };
        if !found {
            let why = "the image does not have it, though kiwi-ng reports success";
            return Err(Error::new("add the site's authority").because(why).advise(
                "see whether the recipe's packages come from repositories that can be read; the image needs ca-certificates",
            ));
        }
        let body = body(content);
        let is_trusted = BUNDLES.iter().any(|bundle| {
            let text = root.read(bundle, 64 << 20).unwrap_or_default();
            !body.is_empty() && without_space(&text).windows(body.len()).any(|part| part == body)
        });
        if !is_trusted {
            tracing::warn!(
                "the image has the site's authority, but its store of authorities lacks it: add the package \
                 ca-certificates to the recipe's bootstrap packages"
            );
        }
        Ok(())
    }
}

impl Ready for Build<'_> {
    fn carry_out(&mut self, work: &Work, volume: &Tree) -> Result<()> {
        self.build(work, volume)
    }
}

/// Removes kiwi-ng's own files from an image root. Makes the description inaccessible to other users, since it may
/// contain passwords of repositories.
pub(crate) fn clean(root: &Tree) -> Result<()> {
    for name in LEFT {
        let is_file = |found: &rustix::fs::Stat| FileKind::of(found) == FileKind::Regular;
        if root.look(name).is_ok_and(|found| found.as_ref().is_some_and(is_file)) {
            root.remove(name).attempt(|| format!("remove /{name} of the image root"))?;
        }
    }
    if let Ok(image) = root.directory_without_links("image") {
        rustix::fs::chmodat(&image, ".", Mode::RWXU, AtFlags::empty()).attempt(|| "close /image of the image root")?;
    }
    Ok(())
}

/// Returns the base64 text of the first certificate, without white space, to search for it in bundles.
fn body(pem: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(pem).into_owned();
    let certificate = text.split_once("-----BEGIN CERTIFICATE-----").map_or("", |(_, rest)| rest);
    let certificate = certificate.split("-----").next().unwrap_or_default();
    without_space(certificate.as_bytes())
}

fn without_space(text: &[u8]) -> Vec<u8> {
    text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect()
}

/// Returns the names of kiwi-ng's archives in the image root parent.
fn archives(volume: &Tree) -> Result<BTreeSet<OsString>> {
    let names = volume.names().attempt(|| format!("read {}", volume.shown().display()))?;
    Ok(names.into_iter().filter(|name| name.to_string_lossy().ends_with(".tar.xz")).collect())
}

/// Certificate and package of the site's certificate authority.
struct Authority {
    certificate: Option<Vec<u8>>,
    package: Option<Vec<u8>>,
}

impl Authority {
    /// Reads the certificate and the package, as far as they exist. A job in a pod must have both; elsewhere the
    /// package is created from the certificate.
    fn read(settings: &Settings, wanted: &Wanted) -> Result<Self> {
        let place = wanted.authority.clone().unwrap_or_else(|| ca_rpm::DEFAULT_CERTIFICATE.into());
        let file = wanted.ca_rpm.clone().unwrap_or_else(|| Path::new(ca_rpm::DEFAULT_OUTPUT).join(ca_rpm::FILE));
        let is_job = settings.job.id.is_some() && !wanted.is_authority_optional;
        let is_named = is_job || wanted.authority.is_some() || place.exists();
        let certificate = is_named.then(|| ca_rpm::read_certificate(&place)).transpose()?;
        let package = if file.exists() || is_job || wanted.ca_rpm.is_some() {
            let attempted = || format!("read the package of the site's authority, {}", file.display());
            Some(named::read(&file, ca_rpm::LONGEST).attempt(attempted)?)
        } else {
            let made = certificate.as_ref().map(|certificate| ca_rpm::build(certificate, ca_rpm::epoch(settings)));
            made.transpose()?
        };
        Ok(Self { certificate, package })
    }
}

/// Refuses named certificates, packages and keys that cannot be read.
pub(crate) fn check_files(settings: &Settings, wanted: &Wanted) -> Result<()> {
    Authority::read(settings, wanted)?;
    wanted.signing_keys.iter().try_for_each(|key| read_signing_key(key).map(drop))
}

/// Reads a file with keys with which packages may be signed.
pub(crate) fn read_signing_key(file: &Path) -> Result<Vec<u8>> {
    named::read(file, ca_rpm::LONGEST).attempt(|| format!("read the signing key {}", file.display()))
}

/// Returns the files with keys with which packages may be signed: [`KEYRINGS`] if there are no others and `manager` is
/// apt.
fn keys(wanted: &Wanted, manager: Option<&str>) -> Result<Vec<PathBuf>> {
    let mut keys = wanted.signing_keys.clone();
    for directory in KEY_DIRECTORIES {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.attempt(|| format!("read {directory}"))?.path();
            // Skip hidden names: Kubernetes mounts files as links into hidden directories.
            let is_hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
            if !is_hidden && path.is_file() {
                found.push(path);
            }
        }
        found.sort();
        keys.extend(found);
    }
    if keys.is_empty() && manager == Some("apt") {
        keys.extend(KEYRINGS.map(PathBuf::from).into_iter().filter(|file| file.exists()));
    }
    Ok(keys)
}

/// Returns the directories of a kiwi-ng outside of /usr, and of its Python: a whole virtual environment, or the usual
/// directories of another prefix.
fn installation(program: &Path) -> Vec<PathBuf> {
    let prefixes = [program.to_owned(), program.with_file_name("python3")];
    let prefixes = prefixes.iter().filter_map(|file| Some(file.canonicalize().ok()?.parent()?.parent()?.to_owned()));
    let parts = prefixes.flat_map(|prefix| {
        let is_virtual = prefix.join("pyvenv.cfg").exists();
        if is_virtual { vec![prefix] } else { ["bin", "lib", "lib64"].map(|name| prefix.join(name)).into() }
    });
    parts.filter(|part| part.is_dir() && !part.starts_with("/usr") && part.components().count() > 2).collect()
}

/// Returns the path of a program that `PATH` contains.
fn program_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|place| place.join(name)).find(|file| file.is_file())
}

/// Returns the major and minor version from the output of `kiwi-ng --version`.
fn version_in(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.trim().rsplit(' ').next()?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Prints kiwi-ng's output to `out` line by line, logs the stages, and returns kiwi-ng's last error.
fn tell_output(output: impl Read, mut out: impl Write) -> Option<String> {
    let mut reader = BufReader::new(output);
    let mut error = Errors::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(64 << 10).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        // Keep only the last state of a progress bar, which overwrites itself.
        let text = text.trim_end_matches(['\n', '\r']).rsplit('\r').next().unwrap_or_default();
        let text = redaction::without_secrets(text);
        error.hear(&text);
        // Write the line in one call, so that it does not mix with lines of other processes.
        let _ = out.write_all(format!("{}\n", Printable(&text)).as_bytes());
        if let Some((_, stage)) = STAGES.iter().find(|(begins, _)| is_info(&text) && text.contains(begins)) {
            tracing::info!("{stage}");
        }
    }
    let _ = out.flush();
    error.last()
}

fn is_info(line: &str) -> bool {
    line.starts_with("[ INFO")
}

/// Finds the last error in the lines that kiwi-ng prints.
#[derive(Default)]
struct Errors {
    lines: Vec<String>,
    length: usize,
    is_inside: bool,
}

impl Errors {
    fn hear(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("[ ERROR") {
            let message = rest.split_once(" | ").map_or(rest, |(_, message)| message);
            (self.lines, self.length, self.is_inside) = (Vec::new(), 0, true);
            self.add(message);
        } else if line.starts_with("[ ") {
            self.is_inside = false;
        } else if self.is_inside {
            self.add(line);
        }
    }

    fn add(&mut self, line: &str) {
        let line = line.trim().trim_end_matches([':', '.']).trim();
        if !line.is_empty() && self.length + line.len() <= LONGEST_ERROR {
            self.length += line.len();
            self.lines.push(line.to_owned());
        }
    }

    fn last(self) -> Option<String> {
        (!self.lines.is_empty()).then(|| self.lines.join(", "))
    }
}

/// Returns the last `length` bytes of a file.
fn end_of(volume: &Tree, name: &str, length: u64) -> std::io::Result<Vec<u8>> {
    let mut file = volume.open_regular(name, OFlags::RDONLY | OFlags::NOFOLLOW)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(length)))?;
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text)?;
    Ok(text)
}

/// Adds the cause to an error of kiwi-ng, if only kiwi-ng's log contains the cause.
fn with_cause(error: String, log: &str) -> String {
    let cause = match silent_script(&error) {
        Some(script) => Some(what_it_said(script, log)),
        None if error.contains("dpkg returned an error") => what_dpkg_said(log),
        None => None,
    };
    match cause {
        Some(cause) => format!("{error}: {cause}"),
        None => error,
    }
}

/// Returns the first error of dpkg in `log`, the end of kiwi-ng's log, with the next line, which contains the cause.
fn what_dpkg_said(log: &str) -> Option<String> {
    // Skip the name of the phase, which kiwi-ng writes before each line of dpkg.
    let mut lines = log.lines().filter_map(|line| line.split_once(" | ")?.1.split_once(": ")).map(|(_, said)| said);
    let first = lines.find(|said| said.starts_with("dpkg: error"))?;
    let said = format!("{first} {}", lines.next().unwrap_or_default().trim());
    Some(redaction::without_secrets(&said).chars().take(2 * LONGEST_LINE).collect())
}

/// Returns the name of the script if an error of kiwi-ng reports that a script failed, but no cause: kiwi-ng quotes
/// only standard error, to which the script wrote nothing.
fn silent_script(error: &str) -> Option<&str> {
    let rest = error.strip_prefix("KiwiScriptFailed: ")?;
    let script = rest.strip_suffix(" failed with").or_else(|| rest.strip_suffix(" failed"))?;
    (!script.contains(' ')).then_some(script)
}

/// Describes the last line that `script` wrote to standard output. `log` is the end of kiwi-ng's log.
fn what_it_said(script: &str, log: &str) -> String {
    let begun = log.rsplit_once("out start-----").map_or("", |(_, rest)| rest);
    let lines = begun.split("out stop-----").next().unwrap_or_default().lines().filter(|line| !line.contains("-----"));
    let mut said = lines.filter_map(|line| line.split_once(" | ")).map(|(_, said)| said.trim());
    let advice = format!("'set -x' in {script} shows its commands");
    match said.rfind(|said| !said.is_empty()) {
        Some(said) => {
            let said: String = redaction::without_secrets(said).chars().take(LONGEST_LINE).collect();
            format!("it wrote nothing to standard error, and last to standard output '{said}'; {advice}")
        }
        None => format!("it wrote nothing; {advice}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_error_of_kiwi_is_found_with_the_lines_that_belong_to_it() {
        let said = "[ INFO    ]: 09:33:46 | --> package: a\n[ ERROR   ]: 09:33:46 | first\n[ INFO    ]: 1 | x\n\
            [ ERROR   ]: 09:33:47 | KiwiBootStrapPhaseFailed: Bootstrap package installation failed: No provider of 'b' found.\n: \nmore\n";
        let wanted = "KiwiBootStrapPhaseFailed: Bootstrap package installation failed: No provider of 'b' found, more";
        assert_eq!(tell_output(said.as_bytes(), std::io::sink()).as_deref(), Some(wanted));
        assert_eq!(tell_output(&b"[ INFO    ]: 1 | x\n\xff\n"[..], std::io::sink()), None);
    }

    #[test]
    fn script_that_failed_without_an_error_gets_a_cause() {
        let log = "[ INFO    ]: 1 | Calling config.sh script\n[ DEBUG   ]: 1 | --------------out start-------------\n\
            [ DEBUG   ]: 1 | one\n[ DEBUG   ]: 1 | two | three\n[ DEBUG   ]: 1 | --------------out stop--------------\n\
            [ ERROR   ]: 1 | KiwiScriptFailed: config.sh failed with: \n";
        let script = silent_script("KiwiScriptFailed: config.sh failed with").unwrap();
        assert!(what_it_said(script, log).contains("last to standard output 'two | three'"));
        assert!(what_it_said(script, "").starts_with("it wrote nothing; "));
        assert_eq!(silent_script("KiwiScriptFailed: images.sh failed"), Some("images.sh"));
        assert_eq!(silent_script("KiwiScriptFailed: config.sh failed with: no such file"), None);
    }

    #[test]
    fn error_of_apt_gets_the_cause_of_dpkg() {
        let log = "[ DEBUG   ]: 1 | system: Unpacking a (1) ...\n\
            [ DEBUG   ]: 1 | system: dpkg: error processing archive /a.deb (--unpack):\n\
            [ DEBUG   ]: 1 | system:  error creating device './null': Operation not permitted\n\
            [ DEBUG   ]: 1 | system: dpkg: error processing package b (--configure):\n";
        let error = "KiwiInstallPhaseFailed: E: Sub-process /usr/bin/dpkg returned an error code (1)";
        let cause = "dpkg: error processing archive /a.deb (--unpack): error creating device './null': Operation not \
                     permitted";
        assert_eq!(with_cause(error.to_owned(), log), format!("{error}: {cause}"));
        assert_eq!(with_cause(error.to_owned(), ""), error);
        assert_eq!(with_cause("other".to_owned(), log), "other");
    }

    #[test]
    fn version_of_kiwi_is_read() {
        assert_eq!(version_in("KIWI (next generation) version 11.1.6\n"), Some((11, 1)));
        assert_eq!(version_in("KIWI (next generation) version 9.24.61"), Some((9, 24)));
        assert_eq!(version_in("Traceback"), None);
    }

    #[test]
    fn certificate_is_found_in_a_bundle_whatever_its_lines() {
        let pem = b"# site\n-----BEGIN CERTIFICATE-----\nAAEC\nAwQ=\n-----END CERTIFICATE-----\n";
        assert_eq!(body(pem), b"AAECAwQ=");
        assert!(body(b"nothing").is_empty());
    }
}

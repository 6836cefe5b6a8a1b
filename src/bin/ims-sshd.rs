//! The build environment's entrypoint, and the same on one machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, Parser, Subcommand};

use ims_sshd::environment::settings::Settings;
use ims_sshd::environment::stage::Stage;
use ims_sshd::environment::supervisor;
use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::image::boot;
use ims_sshd::image::exclude;
use ims_sshd::jail::binds::Bind;
use ims_sshd::job::DEFAULT_PARENT;
use ims_sshd::local::command_line::CommandLine;
use ims_sshd::local::customize::{self, Customization};
use ims_sshd::local::directory;
use ims_sshd::local::enter::{self, Answer, Entry};
use ims_sshd::local::job::{End, Job, Reports};
use ims_sshd::local::script::Script;
use ims_sshd::local::status::{self, Shown};
use ims_sshd::local::steps;
use ims_sshd::local::{names, work_directory};
use ims_sshd::log::format;
use ims_sshd::manual;
use ims_sshd::panic;
use ims_sshd::pod::sidecar::{self, Places};
use ims_sshd::printable::Printable;
use ims_sshd::publish::prepare;
use ims_sshd::publish::prepare::Open;
use ims_sshd::publish::settings as publishing;
use ims_sshd::publish::source::{self, Source};
use ims_sshd::session::variables;
use ims_sshd::transfer::without_query;
use ims_sshd::verdict::Verdict;

/// Opens an image root over SSH, jailed inside it, and ends in an order that lets it be packed.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Arguments {
    /// Format of the log on standard error [variable: LOG_FORMAT] [default: text]; its level is $LOG_LEVEL (debug, info, warning, error)
    #[arg(long, global = true, value_enum)]
    log_format: Option<format::Format>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Be a pod's build environment, as its variables say (see docs/REFERENCE.md)
    #[command(after_help = ENTRYPOINT_EXAMPLES)]
    Entrypoint {
        /// The folder that holds image-root and the signal files [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        image_root_parent: Option<PathBuf>,
    },
    /// Open an image on this machine over SSH until it is marked complete or failed, or run a command in it unattended
    #[command(after_help = CUSTOMIZE_EXAMPLES, mut_args = only_to_publish)]
    Customize(CustomizeArguments),
    /// Open an image in this terminal, without SSH, and run a shell or a command in it
    #[command(after_help = ENTER_EXAMPLES, mut_args = only_to_publish)]
    Enter(EnterArguments),
    /// Fetch an image and make an image root of it
    #[command(after_help = PREPARE_EXAMPLES)]
    Prepare {
        /// The folder that gets image-root [default: $IMAGE_ROOT_PARENT, else /mnt/image]; left out where one argument is given
        #[arg(value_name = "IMAGE_ROOT_PARENT")]
        first: String,
        /// An image: URL (https, s3), squashfs, archive of tar or cpio (plain, gzip, xz, zstd), saved container image or directory
        #[arg(value_name = "SOURCE")]
        second: Option<String>,
        /// How it becomes a tree
        #[arg(long, value_enum, default_value = "unpack")]
        open: Open,
        /// Remove an image root that is there, with all changes, and begin anew
        #[arg(long)]
        fresh: bool,
        #[command(flatten)]
        checksum: ChecksumOptions,
        #[command(flatten)]
        servers: ServerOptions,
    },
    /// Stand beside a pod's build environment: let it open, wait for its end, publish the image
    #[command(after_help = SIDECAR_EXAMPLES, mut_args = as_pods_have_it)]
    Sidecar(SidecarArguments),
    /// Pack an image root
    #[command(after_help = PACKAGE_EXAMPLES, mut_arg("name", |name| name.conflicts_with("archive")))]
    Package {
        /// The image root, or the folder that holds image-root [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        image_root: Option<PathBuf>,
        /// The squashfs to write [default: NAME.sqsh beside image-root, else here]
        #[arg(long, value_name = "FILE")]
        archive: Option<PathBuf>,
        #[command(flatten)]
        packing: PackingOptions,
        #[command(flatten)]
        image: ImageOptions,
    },
    /// Upload a packed image with its boot files and manifest.json, and register it with IMS where there is one
    #[command(after_help = UPLOAD_EXAMPLES)]
    Upload {
        /// The image root, or the folder that holds image-root [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        image_root: Option<PathBuf>,
        /// The squashfs [default: NAME.sqsh beside image-root, else here]
        #[arg(long, value_name = "FILE")]
        archive: Option<PathBuf>,
        /// The kernel with its symbols
        #[arg(long, value_name = "FILE")]
        debug_kernel: Option<PathBuf>,
        #[command(flatten)]
        image: ImageOptions,
        #[command(flatten)]
        parameters: ParametersOption,
        #[command(flatten)]
        store: StoreOption,
        #[command(flatten)]
        servers: ServerOptions,
    },
    /// Mark the image complete: its environment closes and it may be packed
    #[command(after_help = COMPLETE_EXAMPLES)]
    Complete(Named),
    /// Mark the image failed: its environment closes and it is not packed
    #[command(after_help = FAIL_EXAMPLES)]
    Fail(Named),
    /// Tell where an environment is in its life; without a name, of all that are open on this machine
    #[command(after_help = STATUS_EXAMPLES)]
    Status {
        #[command(flatten)]
        named: Named,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// End with 0 if it is in one of these states, else with 1
        #[arg(long, value_name = "STATE", value_delimiter = ',')]
        is: Vec<Stage>,
    },
    /// Print a shell's completions
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    #[command(after_help = MAN_EXAMPLES)]
    Man {
        /// The directory, which is made if it is not there
        #[arg(value_name = "DIRECTORY", value_hint = clap::ValueHint::DirPath)]
        folder: PathBuf,
    },
}

const EXAMPLES: &str = "Examples:
  ims-sshd enter ./image.sqsh --output ./out
  ims-sshd customize ./image.sqsh --output ./out
  ims-sshd status";

const ENTRYPOINT_EXAMPLES: &str = "Examples:
  IMS_ACTION=customize SSH_JAIL=True ims-sshd entrypoint
  IMS_ACTION=customize SSH_JAIL=True ims-sshd entrypoint /srv/image";

const CUSTOMIZE_EXAMPLES: &str = "Examples:
  ims-sshd customize ./image-root
  ims-sshd customize ./image.sqsh --output ./out
  ims-sshd customize ./image.sqsh --output ./out --script ./install.sh
  ims-sshd customize ./image.sqsh --output s3://boot-images -- zypper --non-interactive update";

const ENTER_EXAMPLES: &str = "Examples:
  ims-sshd enter ./image-root
  ims-sshd enter ./image-root ls -l /boot
  ims-sshd enter ./image-root --discard --script ./try.sh
  ims-sshd enter ./image.sqsh --output ./out
  ims-sshd enter ./image.sqsh --output ./out --yes dnf -y update";

const PREPARE_EXAMPLES: &str = "Examples:
  ims-sshd prepare /mnt/image 'https://s3.example/boot-images/…/rootfs?X-Amz-Signature=…'
  ims-sshd prepare --open overlay /srv/work ./image.sqsh";

const PACKAGE_EXAMPLES: &str = "Examples:
  ims-sshd package
  ims-sshd package --compression zstd --archive compute.sqsh ./image-root";

const UPLOAD_EXAMPLES: &str = "Examples:
  ims-sshd upload --name compute
  ims-sshd upload --store ./store --archive compute.sqsh ./image-root";

const SIDECAR_EXAMPLES: &str = "Examples:
  IMS_ACTION=customize ims-sshd sidecar --name compute --store s3://boot-images
  IMS_ACTION=customize ims-sshd sidecar --kernel auto --store /srv/store /srv/image";

const COMPLETE_EXAMPLES: &str = "Examples:
  ims-sshd complete compute
  ims-sshd complete /mnt/image";

const FAIL_EXAMPLES: &str = "Examples:
  ims-sshd fail compute
  ims-sshd fail /mnt/image";

const STATUS_EXAMPLES: &str = "Examples:
  ims-sshd status
  ims-sshd status --json compute
  ims-sshd status --is serving /mnt/image";

const COMPLETIONS_EXAMPLES: &str = "Examples:
  ims-sshd completions bash > /usr/share/bash-completion/completions/ims-sshd
  ims-sshd completions zsh > /usr/share/zsh/vendor-completions/_ims-sshd
  ims-sshd completions fish > /usr/share/fish/vendor_completions.d/ims-sshd.fish";

const MAN_EXAMPLES: &str = "Examples:
  ims-sshd man /usr/share/man/man1";

/// Options that are a pod's variables by other names.
type Variables = Vec<(&'static str, Option<String>)>;

#[derive(Args)]
struct ChecksumOptions {
    /// Expected SHA-256 of the source [variable: DOWNLOAD_SHA256SUM]
    #[arg(long, value_name = "SUM", value_parser = ims_sshd::transfer::checksum::sha256)]
    sha256: Option<String>,
}

impl ChecksumOptions {
    fn variables(self) -> Variables {
        vec![("DOWNLOAD_SHA256SUM", self.sha256)]
    }
}

#[derive(Args)]
#[command(next_help_heading = "Image")]
struct ImageOptions {
    /// Name of the new image [variable: IMAGE_ROOT_ARCHIVE_NAME] [default: image]
    #[arg(long, value_parser = publishing::image_name)]
    name: Option<String>,
    /// Kernel, by its name in the image's /boot; auto is the newest one, if there is one [variable: KERNEL_FILENAME] [default: auto]
    #[arg(long, value_name = "NAME", value_parser = publishing::boot_file)]
    kernel: Option<String>,
    /// Initrd, by its name in the image's /boot; auto is the one that belongs to the kernel, none is no initrd [variable: INITRD_FILENAME] [default: auto]
    #[arg(long, value_name = "NAME", value_parser = publishing::boot_file)]
    initrd: Option<String>,
}

/// Files published beside the packed image.
#[derive(Args)]
#[command(next_help_heading = "Image")]
struct ParametersOption {
    /// File of the kernel's command line, by its name in the image's /boot; it may be missing [variable: KERNEL_PARAMETERS_FILENAME]
    /// [default: kernel-parameters]
    #[arg(long, value_name = "NAME", value_parser = publishing::boot_file)]
    kernel_parameters: Option<String>,
}

impl ParametersOption {
    fn variables(self) -> Variables {
        vec![("KERNEL_PARAMETERS_FILENAME", self.kernel_parameters)]
    }
}

impl ImageOptions {
    /// Names the image after its source where nobody has named it.
    fn named_by(mut self, source: &str) -> Self {
        let named = self.name.take().or_else(|| std::env::var("IMAGE_ROOT_ARCHIVE_NAME").ok());
        self.name = Some(named.filter(|name| !name.is_empty()).unwrap_or_else(|| names::of_source(source)));
        self
    }

    /// Boot files are found (`auto`) unless they are named: a person at a command line names them only if it matters.
    fn variables_or_auto(mut self) -> Variables {
        for (option, name) in [(&mut self.kernel, "KERNEL_FILENAME"), (&mut self.initrd, "INITRD_FILENAME")] {
            let named = option.take().or_else(|| std::env::var(name).ok()).filter(|name| !name.is_empty());
            *option = Some(named.unwrap_or_else(|| boot::AUTO.into()));
        }
        self.variables()
    }

    fn variables(self) -> Variables {
        vec![("IMAGE_ROOT_ARCHIVE_NAME", self.name), ("KERNEL_FILENAME", self.kernel), ("INITRD_FILENAME", self.initrd)]
    }
}

#[derive(Args)]
#[command(next_help_heading = "Packing")]
struct PackingOptions {
    /// Compression of the squashfs [variable: IMAGE_COMPRESSION] [default: gzip]
    #[arg(long, value_name = "ALGORITHM", value_parser = ims_sshd::image::packing::COMPRESSIONS)]
    compression: Option<String>,
    /// Leave out what matches: a path in the image, in which * and ? stand for characters of one name, and [a-z] for one of them; below a
    /// directory that matches, all; after '... ' at any depth, as in '... *.pyc'. Any number of times
    #[arg(long, value_name = "PATTERN", value_parser = exclude::Pattern::parse)]
    exclude: Vec<exclude::Pattern>,
    /// Write what was added, removed and altered since the image was opened, by 'ims-sshd prepare' or this command, as JSON
    #[arg(long, value_name = "FILE")]
    changes: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Servers")]
struct StoreOption {
    /// Store of images: s3://BUCKET, or a directory [variable: IMAGE_STORE] [default: s3://$S3_BUCKET]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Servers")]
struct ServerOptions {
    /// The S3 server; its keys are $S3_ACCESS_KEY and $S3_SECRET_KEY [variable: S3_ENDPOINT]
    #[arg(long, value_name = "URL", value_parser = ims_sshd::transfer::network::http_url)]
    s3_endpoint: Option<String>,
    /// Where jobs and images are registered [variable: IMS_URL] [default: nowhere, without $OAUTH_CONFIG_DIR]
    #[arg(long, value_name = "URL", value_parser = ims_sshd::transfer::network::http_url)]
    ims_url: Option<String>,
}

impl ServerOptions {
    fn variables(self) -> Variables {
        vec![("S3_ENDPOINT", self.s3_endpoint), ("IMS_URL", self.ims_url)]
    }
}

#[derive(Args)]
struct SidecarArguments {
    /// The folder that holds image-root and the signal files [default: $IMAGE_ROOT_PARENT, else /mnt/image]
    image_root_parent: Option<PathBuf>,
    /// Public keys that may log in
    #[arg(long, value_name = "FILE", default_value = "/etc/cray/authorized_keys")]
    authorized_keys: PathBuf,
    /// sshd's configuration [default: port 22, root by key alone]
    #[arg(long, value_name = "FILE")]
    sshd_config: Option<PathBuf>,
    /// The folder that both are put into, which the build environment's sshd reads
    #[arg(long, value_name = "FOLDER", default_value = "/etc/cray/ims")]
    sshd_folder: PathBuf,
    /// Certificates of authorities that the image gets
    #[arg(long, value_name = "FOLDER", default_value = "/etc/cray/ca")]
    authorities: PathBuf,
    #[command(flatten)]
    packing: PackingOptions,
    #[command(flatten)]
    image: ImageOptions,
    #[command(flatten)]
    parameters: ParametersOption,
    #[command(flatten)]
    store: StoreOption,
    #[command(flatten)]
    servers: ServerOptions,
}

/// The environment's variables, and the options, which count before them.
fn variables(options: impl IntoIterator<Item = (&'static str, Option<String>)>) -> Vec<(OsString, OsString)> {
    let given = options.into_iter().filter_map(|(name, value)| Some((name.into(), value?.into())));
    std::env::vars_os().chain(given).collect()
}

#[derive(Args)]
struct Named {
    /// Name that 'ims-sshd status' prints, source, or directory that holds image-root and the signal files [default: $IMAGE_ROOT_PARENT;
    /// in a pod, what is open there]
    #[arg(value_name = "NAME")]
    name: Option<PathBuf>,
}

fn parent_or_default(given: Option<PathBuf>) -> PathBuf {
    let named = || std::env::var_os("IMAGE_ROOT_PARENT").filter(|p| !p.is_empty()).map(PathBuf::from);
    given.or_else(named).unwrap_or_else(|| DEFAULT_PARENT.into())
}

/// Options of `customize` and `enter` that say how the new image is made, and are of no use where none is.
fn only_to_publish(option: clap::Arg) -> clap::Arg {
    const OPTIONS: [&str; 6] = ["kernel", "initrd", "kernel_parameters", "exclude", "changes", "json"];
    match option.get_id().as_str() {
        "compression" => {
            with_default(option, "gzip", "the source's, if it is a squashfs, else gzip").requires("output")
        }
        "name" => with_default(option, "image", "the source's name").requires("output"),
        name if OPTIONS.contains(&name) => option.requires("output"),
        _ => option,
    }
}

/// The sidecar's boot files are called as IMS calls them.
fn as_pods_have_it(option: clap::Arg) -> clap::Arg {
    match option.get_id().as_str() {
        "kernel" => with_default(option, "auto", "vmlinuz"),
        "initrd" => with_default(option, "auto", "initrd"),
        _ => option,
    }
}

/// The option with another default in its help.
fn with_default(option: clap::Arg, usual: &str, here: &str) -> clap::Arg {
    let help = option.get_help().map(ToString::to_string).unwrap_or_default();
    option.help(help.replace(&format!("[default: {usual}]"), &format!("[default: {here}]")))
}

#[derive(Args)]
struct CustomizeArguments {
    /// The unpacked image, to which the changes are applied once it is complete; with --output also a squashfs, an archive, or a URL (https, s3)
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Port to listen on [default: a free one]
    #[arg(long)]
    port: Option<u16>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    listen: std::net::IpAddr,
    /// Public keys that may log in [default: a key pair made for this run]
    #[arg(long, value_name = "FILE")]
    authorized_key: Option<PathBuf>,
    /// Sessions land on this machine, beside the image root, and not in it
    #[arg(long)]
    plain: bool,
    /// Show a directory or file of this machine in the image, at the same path if no other is named; nothing of it is packed. Any number of
    /// times
    #[arg(long, value_name = "SOURCE[:TARGET[:ro]]", value_parser = Bind::parse, conflicts_with = "plain")]
    bind: Vec<Bind>,
    /// Give a variable to all that runs in the image; without a value, the one it has here. Any number of times
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = variables::variable)]
    env: Vec<(String, String)>,
    /// Run this script of this machine in the image, unattended, and publish the image if the script succeeds
    #[arg(long, value_name = "FILE", conflicts_with_all = OVER_SSH)]
    script: Option<PathBuf>,
    /// Run this script on this machine, not in the image, as root, once sessions can log in. The image root is
    /// $IMAGE_ROOT_PARENT/image-root
    #[arg(long, value_name = "FILE")]
    host_script: Option<PathBuf>,
    /// A command to run in the image, unattended, with its arguments; the image is published if it succeeds [default: wait for people who
    /// log in]
    #[arg(trailing_var_arg = true, conflicts_with_all = OVER_SSH, conflicts_with = "script")]
    command: Vec<OsString>,
    #[command(flatten)]
    job: JobOptions,
}

/// Options of `customize` for people who log in.
const OVER_SSH: [&str; 5] = ["port", "listen", "authorized_key", "plain", "host_script"];

#[derive(Args)]
struct EnterArguments {
    /// An unpacked image, which is changed where it is; or a squashfs, an archive, or a URL (https, s3), whose changes are discarded at
    /// the end without --output
    #[arg(value_name = "SOURCE")]
    source: String,
    /// Publish at the end without asking, unless the command has failed
    #[arg(long, requires = "output", conflicts_with = "discard")]
    yes: bool,
    /// At the end discard what was changed, without asking; a directory is then shown below an overlay, and stays as it is
    #[arg(long, conflicts_with = "in_place")]
    discard: bool,
    /// Show a directory or file of this machine in the image, at the same path if no other is named; nothing of it is packed. Any number of
    /// times
    #[arg(long, value_name = "SOURCE[:TARGET[:ro]]", value_parser = Bind::parse)]
    bind: Vec<Bind>,
    /// Give a variable to all that runs in the image; without a value, the one it has here. Any number of times
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = variables::variable)]
    env: Vec<(String, String)>,
    /// Run this script of this machine in the image
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// The command and its arguments, after all options [default: the login shell]
    #[arg(trailing_var_arg = true, conflicts_with = "script")]
    command: Vec<OsString>,
    #[command(flatten)]
    job: JobOptions,
}

/// Options for what is done with an image on one machine.
#[derive(Args)]
struct JobOptions {
    /// Publish the new image there: a directory, or s3://BUCKET
    #[arg(long, value_name = "STORE")]
    output: Option<String>,
    /// Change a directory where it is, and not above it until the image is complete
    #[arg(long)]
    in_place: bool,
    /// Drop changes that an earlier run has kept, and begin anew
    #[arg(long, conflicts_with = "in_place")]
    fresh: bool,
    /// Directory for the changes until they are published or applied, on a disk with space for two new images [default: /var/lib]
    #[arg(long, value_name = "DIRECTORY")]
    work: Option<PathBuf>,
    #[command(flatten)]
    checksum: ChecksumOptions,
    /// Print the result of the publication as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    packing: PackingOptions,
    #[command(flatten)]
    image: ImageOptions,
    #[command(flatten)]
    parameters: ParametersOption,
}

impl JobOptions {
    /// The job on `source`; a directory without an output has its changes as `end` says, or is changed where it is.
    fn read(self, source: String, end: Option<End>, command_line: CommandLine) -> Result<Job> {
        let Self { output, in_place, fresh, work, checksum, json, packing, image, parameters } = self;
        let is_directory = Path::new(&source).is_dir();
        if is_directory && checksum.sha256.is_some() {
            return Err(Error::bad_input(format!(
                "--sha256 is given, and SOURCE is '{source}': expected a file or a URL"
            )));
        }
        if in_place && !is_directory {
            return Err(Error::bad_input(format!(
                "--in-place is given, and SOURCE is '{}': expected a directory",
                without_query(&source)
            )));
        }
        let work = work.map_or_else(|| work_directory::DEFAULT.into(), |directory| directory.join("ims-sshd"));
        let work = std::path::absolute(&work).attempt(|| format!("find {}", work.display()))?;
        let in_place = is_directory && (in_place || output.is_none() && end.is_none());
        let end = if output.is_some() { End::Published } else { end.unwrap_or(End::Discarded) };
        if fresh && (in_place || end == End::Discarded) {
            return Err(Error::bad_input("--fresh is given, and this run neither uses nor keeps changes")
                .advise("'ims-sshd fail SOURCE' drops those that are kept"));
        }
        // The variables are for what is mounted or published.
        let settings = if output.is_none() && in_place {
            None
        } else {
            let options = image.named_by(&source).variables_or_auto().into_iter().chain(checksum.variables());
            let options = options.chain(parameters.variables());
            let variables = variables(options.chain([("IMAGE_COMPRESSION", packing.compression)]));
            let mut settings = publishing::Settings::read(Some(work.clone()), variables)?;
            settings.store.url = output;
            Some(settings)
        };
        let (exclude, reports) = (packing.exclude, Reports { changes: packing.changes, result: json });
        Ok(Job { source, command_line, in_place, fresh, discards: false, end, settings, work, exclude, reports })
    }
}

/// Tells of a panic in the log, or before that has started.
fn tell_panic(sentence: &str) {
    if tracing::dispatcher::has_been_set() {
        tracing::error!("{sentence}");
    } else {
        eprintln!("ims-sshd: {}", Printable(sentence));
    }
}

fn main() -> ExitCode {
    panic::tell_by(tell_panic);
    // A pod's manifest may still call the name of the script that this program replaces.
    let called_as = std::env::args_os().next().unwrap_or_default();
    let arguments = if Path::new(&called_as).file_name() == Some("entrypoint.sh".as_ref()) {
        Arguments::parse_from(["ims-sshd".into(), "entrypoint".into()].into_iter().chain(std::env::args_os().skip(1)))
    } else {
        Arguments::try_parse().unwrap_or_else(|refusal| with_owners(refusal).exit())
    };
    let awaited = match &arguments.command {
        Command::Entrypoint { image_root_parent } => Some(parent_or_default(image_root_parent.clone())),
        _ => None,
    };
    match format::start(arguments.log_format).and_then(|()| run(arguments.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error}");
            // Before the log has started, which is refused input too.
            if !tracing::dispatcher::has_been_set() {
                eprintln!("ims-sshd: {error}");
            }
            if let Some(parent) = awaited {
                supervisor::tell_refusal(&parent);
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// The refusal of an unknown option, with the commands that have it in the place of a similar option.
fn with_owners(mut refusal: clap::Error) -> clap::Error {
    let Some(ContextValue::String(unknown)) = refusal.get(ContextKind::InvalidArg) else { return refusal };
    if refusal.kind() != ErrorKind::UnknownArgument {
        return refusal;
    }
    let name = unknown.split_once('=').map_or(unknown.as_str(), |(name, _)| name).to_owned();
    let has = |option: &clap::Arg| option.get_long().is_some_and(|long| name.strip_prefix("--") == Some(long));
    let program = Arguments::command();
    let commands = program.get_subcommands().filter(|command| command.get_arguments().any(has));
    let owners: Vec<_> = commands.map(|command| format!("'ims-sshd {}'", command.get_name())).collect();
    if !owners.is_empty() {
        refusal.remove(ContextKind::SuggestedArg);
        let tip = format!("{name} is an option of {}", owners.join(", "));
        refusal.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    refusal
}

/// Refuses options of this program in the command of `customize` or `enter`, which would be given them. After `--` they are its own.
fn refuse_late_options(name: &str, command: &[OsString], given: &[OsString]) -> Result<()> {
    let (before, _) = given.split_at(given.len().saturating_sub(command.len()));
    if before.iter().any(|word| word == "--") {
        return Ok(());
    }
    let mut program = Arguments::command();
    program.build();
    let options = program.find_subcommand(name).into_iter().flat_map(clap::Command::get_arguments);
    // Programs are asked these more often than this one.
    let longs: Vec<_> = options.filter_map(clap::Arg::get_long).filter(|long| *long != "help").collect();
    let is_ours = |word: &&OsString| {
        let word = word.to_string_lossy();
        let Some(word) = word.strip_prefix("--") else { return false };
        longs.contains(&word.split_once('=').map_or(word, |(name, _)| name))
    };
    command.iter().find(is_ours).map_or(Ok(()), |word| {
        Err(Error::bad_input(format!("'{}' stands in the command, which would be given it", word.display()))
            .advise("options come before the command; write -- before the command if it is its own"))
    })
}

fn run(command: Command) -> Result<u8> {
    let given: Vec<_> = std::env::args_os().collect();
    match &command {
        Command::Customize(arguments) => refuse_late_options("customize", &arguments.command, &given)?,
        Command::Enter(arguments) => refuse_late_options("enter", &arguments.command, &given)?,
        _ => {}
    }
    match command {
        Command::Entrypoint { image_root_parent } => entrypoint(image_root_parent),
        Command::Customize(mut arguments) => {
            arguments.source = source::rootfs_of(arguments.source);
            let line = CommandLine::new("customize", &given, arguments.command.len());
            run_customize(arguments, line)
        }
        Command::Enter(mut arguments) => {
            arguments.source = source::rootfs_of(arguments.source);
            let answer = match (arguments.yes, arguments.discard) {
                (true, _) => Some(Answer::Yes),
                (_, true) => Some(Answer::Discard),
                _ => None,
            };
            let line = CommandLine::new("enter", &given, arguments.command.len());
            let entry = Entry {
                command: arguments.command,
                script: arguments.script.as_deref().map(Script::read).transpose()?,
                variables: arguments.env,
                binds: arguments.bind,
                answer,
                heeds_dkms: false,
            };
            // `--discard` only looks; without it, the directory itself is changed, as by chroot.
            let end = arguments.discard.then_some(End::Discarded);
            let job = arguments.job.read(arguments.source, end, line)?;
            enter::run(Job { discards: arguments.discard, ..job }, &entry)
        }
        Command::Complete(Named { name }) => status::mark(name.as_deref(), Verdict::Complete),
        Command::Fail(Named { name }) => status::mark(name.as_deref(), Verdict::Failed),
        Command::Status { named, json, is } => status::print(named.name.as_deref(), Shown { as_json: json, is: &is }),
        Command::Prepare { first, second, open, fresh, checksum, servers } => {
            let (parent, source) = second.map_or((None, first.clone()), |source| (Some(first.into()), source));
            let options = checksum.variables().into_iter().chain(servers.variables());
            let settings = publishing::Settings::read(parent, variables(options))?;
            let source = source::rootfs_of(source);
            directory::refuse_open_source(&source)?;
            prepare::run(&settings, &source, open, fresh)
        }
        Command::Sidecar(arguments) => run_sidecar(arguments),
        Command::Package { image_root, archive, packing, image } => {
            let compression = [("IMAGE_COMPRESSION", packing.compression)];
            let options = image.variables_or_auto().into_iter().chain(compression);
            let settings = publishing::Settings::read(None, variables(options))?;
            let (named, archive, changes) = (image_root.as_deref(), archive.as_deref(), packing.changes.as_deref());
            steps::package(&settings, named, archive, &packing.exclude, changes)
        }
        Command::Upload { image_root, archive, debug_kernel, image, parameters, store, servers } => {
            let options =
                image.variables_or_auto().into_iter().chain(parameters.variables()).chain(servers.variables());
            let options = options.chain([("IMAGE_STORE", store.store)]);
            let settings = publishing::Settings::read(None, variables(options))?;
            steps::upload(&settings, image_root.as_deref(), archive.as_deref(), debug_kernel.as_deref())
        }
        Command::Completions { shell } => {
            let mut to = std::io::stdout();
            let written = manual::write_completions(&mut Arguments::command(), shell, &mut to);
            written.attempt(|| "print the completions").map(|()| 0)
        }
        Command::Man { folder } => {
            let written = manual::write_pages(Arguments::command(), &folder);
            written.attempt(|| format!("write the man pages into {}", folder.display())).map(|()| 0)
        }
    }
}

fn run_customize(arguments: CustomizeArguments, line: CommandLine) -> Result<u8> {
    if arguments.job.output.is_none() && !Path::new(&arguments.source).is_dir() {
        return Err(without_output(&arguments.source));
    }
    if arguments.script.is_some() || !arguments.command.is_empty() {
        let entry = Entry {
            command: arguments.command,
            script: arguments.script.as_deref().map(Script::read).transpose()?,
            variables: arguments.env,
            binds: arguments.bind,
            answer: Some(Answer::Yes),
            heeds_dkms: true,
        };
        return enter::run(arguments.job.read(arguments.source, Some(End::Applied), line)?, &entry);
    }
    let wanted = Customization {
        port: arguments.port,
        listen: arguments.listen,
        authorized_key: arguments.authorized_key,
        jailed: !arguments.plain,
        binds: arguments.bind,
        variables: arguments.env,
        host_script: arguments.host_script,
    };
    customize::run(arguments.job.read(arguments.source, Some(End::Applied), line)?, &wanted)
}

/// Refuses a source that cannot be changed where it is.
fn without_output(source: &str) -> Error {
    if let Ok(Source::Here(path)) = Source::parse(source)
        && let Err(e) = std::fs::metadata(&path)
    {
        return Error::bad_input(format!("SOURCE is '{source}': {e}"));
    }
    let shown = without_query(source);
    let command = shell_words::join(["ims-sshd", "customize", &shown, "--output", "./out"]);
    Error::bad_input("--output is missing: it says where the new image is put, since SOURCE itself stays as it is")
        .advise(format!("for example: {command}"))
}

fn run_sidecar(arguments: SidecarArguments) -> Result<u8> {
    let compression = [("IMAGE_COMPRESSION", arguments.packing.compression)];
    let options = arguments.image.variables().into_iter().chain(arguments.parameters.variables());
    let options = options.chain(arguments.servers.variables()).chain(compression);
    let options = options.chain([("IMAGE_STORE", arguments.store.store)]);
    let variables = variables(options);
    let parent = arguments.image_root_parent;
    let settings = publishing::Settings::read(parent.clone(), variables.clone());
    let places = Places {
        authorized_keys: arguments.authorized_keys,
        sshd_config: arguments.sshd_config,
        sshd_folder: arguments.sshd_folder,
        authorities: arguments.authorities,
        exclude: arguments.packing.exclude,
        changes: arguments.packing.changes,
    };
    sidecar::run(settings, (parent, variables), &places)
}

fn entrypoint(image_root_parent: Option<PathBuf>) -> Result<u8> {
    let parent = parent_or_default(image_root_parent.clone());
    let settings = Settings::read(image_root_parent, std::env::vars_os()).map_err(|refusal| {
        // Who starts the image with nothing is told everything at once.
        let missing = || format!("{} does not exist: it has to be the job's volume", parent.display());
        if parent.exists() { refusal } else { refusal.advise(missing()) }
    })?;
    supervisor::run(settings, None, || {}).map(|outcome| outcome.exit_code)
}

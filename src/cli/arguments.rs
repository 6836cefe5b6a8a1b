//! The command line: commands, options, and the variables that options stand for.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::cli::options::{ChecksumOptions, ServerOptions, Variables};
use crate::cli::recipe;
use crate::environment::stage::Stage;
use crate::error::{Error, Result};
use crate::image::boot;
use crate::image::exclude;
use crate::image::packing;
use crate::jail::binds::Bind;
use crate::local::names;
use crate::log::format;
use crate::publish::prepare::Open;
use crate::publish::settings;
use crate::remote::inside::Stage as RemoteStage;
use crate::session::variables;

/// Opens an image root over SSH, jailed inside it, and ends in an order that lets it be packed.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Arguments {
    /// Format of the log on standard error; $LOG_LEVEL is its level (debug, info, warning, error)
    /// [variable: LOG_FORMAT] [default: text]
    #[arg(long, global = true, value_enum)]
    pub(super) log_format: Option<format::Format>,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Be a pod's build environment, as its variables say (see docs/REFERENCE.md)
    #[command(after_help = ENTRYPOINT_EXAMPLES)]
    Entrypoint {
        /// Directory of image-root and the signal files [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        image_root_parent: Option<PathBuf>,
    },
    /// Open an image on this machine over SSH until it is marked complete or failed, or run a command in it
    #[command(after_help = CUSTOMIZE_EXAMPLES, mut_args = only_to_publish)]
    #[command(mut_arg("bind", |bind| bind.conflicts_with("plain")))]
    Customize(CustomizeArguments),
    /// Open an image in this terminal, without SSH, and run a shell or a command in it
    #[command(after_help = ENTER_EXAMPLES, mut_args = only_to_publish)]
    Enter(EnterArguments),
    /// Fetch an image and make an image root from it
    #[command(after_help = PREPARE_EXAMPLES)]
    Prepare {
        /// Directory in which to create image-root; omitted if only SOURCE is given. A SOURCE that is a file or URL may
        /// also come first
        /// [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        #[arg(value_name = "IMAGE_ROOT_PARENT")]
        first: String,
        /// An image: URL (https, s3), squashfs, tar or cpio archive (plain, gzip, bzip2, xz, zstd), saved container
        /// image or directory
        #[arg(value_name = "SOURCE")]
        second: Option<String>,
        /// How the image becomes a tree
        #[arg(long, value_enum, default_value = "unpack")]
        open: Open,
        /// Remove an existing image root with all its changes, and start over
        #[arg(long)]
        fresh: bool,
        #[command(flatten)]
        checksum: ChecksumOptions,
        #[command(flatten)]
        servers: ServerOptions,
    },
    /// Run beside a pod's build environment: let it open, wait until it ends, publish the image
    #[command(after_help = SIDECAR_EXAMPLES, mut_args = as_pods_have_it)]
    Sidecar(SidecarArguments),
    /// Pack an image root
    #[command(after_help = PACKAGE_EXAMPLES, mut_arg("name", |name| name.conflicts_with("archive")))]
    Package {
        /// The image root, or the directory that holds image-root [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        image_root: Option<PathBuf>,
        /// The squashfs to write [default: NAME.sqsh beside image-root, else in the current directory]
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
        /// The image root, or the directory that holds image-root [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        image_root: Option<PathBuf>,
        /// The squashfs [default: NAME.sqsh beside image-root, else in the current directory]
        #[arg(long, value_name = "FILE")]
        archive: Option<PathBuf>,
        /// A kernel with debugging symbols, to upload as well
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
    /// Build an image from a recipe on this machine and publish it
    #[command(after_help = recipe::CREATE_EXAMPLES)]
    #[command(mut_arg("name", |name| with_default(name, "image", "the recipe's name")))]
    Create(CreateArguments),
    /// Fetch a recipe and fill in its templates
    #[command(after_help = recipe::FETCH_EXAMPLES)]
    FetchRecipe(recipe::FetchArguments),
    /// Wait until the repositories that a recipe is built from can be read
    #[command(after_help = recipe::WAIT_EXAMPLES)]
    WaitForRepos(recipe::WaitArguments),
    /// Make the rpm package of the site's certificate authority
    #[command(after_help = recipe::CA_EXAMPLES)]
    CaRpm(recipe::CaArguments),
    /// Build an image root from a recipe, by kiwi-ng
    #[command(after_help = recipe::BUILD_EXAMPLES)]
    Build(recipe::BuildArguments),
    /// Mark the image complete: its environment closes and it may be packed
    #[command(after_help = COMPLETE_EXAMPLES)]
    Complete(Named),
    /// Mark the image failed: its environment closes and it is not packed
    #[command(after_help = FAIL_EXAMPLES)]
    Fail(Named),
    /// Show the state of an environment, or of all on this machine if no name is given
    #[command(after_help = STATUS_EXAMPLES)]
    Status {
        #[command(flatten)]
        named: Named,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Exit with 0 if the environment is in one of these states, otherwise with 1
        #[arg(long, value_name = "STATE", value_delimiter = ',')]
        is: Vec<Stage>,
    },
    /// Be the far side of a remote job, on a build node; started over SSH
    #[command(hide = true)]
    Node {
        /// Part that runs inside the job's namespaces
        #[arg(long, value_enum)]
        inside: Option<RemoteStage>,
        /// Answer only what IMS and a job ask over SSH; for a key that is tied to this command
        #[arg(long, conflicts_with = "inside")]
        shell: bool,
    },
    /// Print completions for a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory
    #[command(after_help = MAN_EXAMPLES)]
    Man {
        /// The directory, created if it does not exist
        #[arg(value_hint = clap::ValueHint::DirPath)]
        directory: PathBuf,
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
  ims-sshd customize ./image.sqsh --output s3://boot-images -- zypper --non-interactive update
  ims-sshd customize --node root@builder ./image.sqsh --output ./out";

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

#[derive(Args)]
#[command(next_help_heading = "Image")]
pub(super) struct ImageOptions {
    /// Name of the new image [variable: IMAGE_ROOT_ARCHIVE_NAME] [default: image]
    #[arg(long, value_parser = settings::image_name)]
    pub(super) name: Option<String>,
    /// Name of the kernel in the image's /boot; 'auto' takes the newest one, and publishes none if the image has none
    /// [variable: KERNEL_FILENAME] [default: auto]
    #[arg(long, value_name = "NAME", value_parser = settings::boot_file)]
    pub(super) kernel: Option<String>,
    /// Name of the initrd in the image's /boot; 'auto' takes that of the kernel, 'none' publishes no initrd
    /// [variable: INITRD_FILENAME] [default: auto]
    #[arg(long, value_name = "NAME", value_parser = settings::boot_file)]
    pub(super) initrd: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Image")]
pub(super) struct ParametersOption {
    /// Name of the file in the image's /boot that holds the kernel's command line; it may be missing
    /// [variable: KERNEL_PARAMETERS_FILENAME] [default: kernel-parameters]
    #[arg(long, value_name = "NAME", value_parser = settings::boot_file)]
    pub(super) kernel_parameters: Option<String>,
}

impl ParametersOption {
    pub(super) fn variables(self) -> Variables {
        vec![("KERNEL_PARAMETERS_FILENAME", self.kernel_parameters)]
    }
}

impl ImageOptions {
    /// Names the image after its source unless an option or a variable names it.
    pub(super) fn named_by(mut self, source: &str) -> Self {
        self.name = Some(self.given_name().unwrap_or_else(|| names::of_source(source)));
        self
    }

    /// Name of the image, if an option or a variable gives one.
    pub(super) fn given_name(&self) -> Option<String> {
        let named = self.name.clone().or_else(|| std::env::var("IMAGE_ROOT_ARCHIVE_NAME").ok());
        named.filter(|name| !name.is_empty())
    }

    /// The variables, with `auto` for boot files that nothing names: a person at a command line names them only if
    /// it matters.
    pub(super) fn variables_or_auto(mut self) -> Variables {
        for (option, name) in [(&mut self.kernel, "KERNEL_FILENAME"), (&mut self.initrd, "INITRD_FILENAME")] {
            let named = option.take().or_else(|| std::env::var(name).ok()).filter(|name| !name.is_empty());
            *option = Some(named.unwrap_or_else(|| boot::AUTO.into()));
        }
        self.variables()
    }

    pub(super) fn variables(self) -> Variables {
        vec![("IMAGE_ROOT_ARCHIVE_NAME", self.name), ("KERNEL_FILENAME", self.kernel), ("INITRD_FILENAME", self.initrd)]
    }
}

#[derive(Args)]
#[command(next_help_heading = "Packing")]
pub(super) struct PackingOptions {
    /// Compression of the squashfs [variable: IMAGE_COMPRESSION] [default: gzip]
    #[arg(long, value_name = "ALGORITHM", value_parser = packing::COMPRESSIONS)]
    pub(super) compression: Option<String>,
    /// Compress every file, and take nothing over from the source image [variable: IMAGE_FROM_SCRATCH]
    #[arg(long)]
    pub(super) from_scratch: bool,
    /// Omit matching paths, and everything below a matching directory. In a path of the image, * and ? match
    /// characters of one name, [a-z] one of a set; '... ' before a name matches at any depth, as in '... *.pyc'.
    /// May be repeated
    #[arg(long, value_name = "PATTERN", value_parser = exclude::Pattern::parse)]
    pub(super) exclude: Vec<exclude::Pattern>,
    /// Write as JSON what was added, removed and changed since this command or 'ims-sshd prepare' opened the image
    #[arg(long, value_name = "FILE")]
    pub(super) changes: Option<PathBuf>,
}

impl PackingOptions {
    pub(super) fn variables(&self) -> Variables {
        let is_from_scratch = self.from_scratch.then(|| "true".to_owned());
        vec![("IMAGE_COMPRESSION", self.compression.clone()), ("IMAGE_FROM_SCRATCH", is_from_scratch)]
    }
}

#[derive(Args)]
#[command(next_help_heading = "Servers")]
pub(super) struct StoreOption {
    /// Store of images: s3://BUCKET, or a directory [variable: IMAGE_STORE] [default: s3://$S3_BUCKET]
    #[arg(long, value_name = "URL")]
    pub(super) store: Option<String>,
}

#[derive(Args)]
pub(super) struct SidecarArguments {
    /// Directory of image-root and the signal files [default: $IMAGE_ROOT_PARENT, else /mnt/image]
    pub(super) image_root_parent: Option<PathBuf>,
    /// Public keys that may log in
    #[arg(long, value_name = "FILE", default_value = "/etc/cray/authorized_keys")]
    pub(super) authorized_keys: PathBuf,
    /// sshd's configuration [default: port 22, root by key alone]
    #[arg(long, value_name = "FILE")]
    pub(super) sshd_config: Option<PathBuf>,
    /// Directory into which the keys and the configuration are copied, for the build environment's sshd
    #[arg(long, alias = "sshd-folder", value_name = "DIRECTORY", default_value = "/etc/cray/ims")]
    pub(super) sshd_directory: PathBuf,
    /// Certificates of authorities to add to the image
    #[arg(long, value_name = "DIRECTORY", default_value = "/etc/cray/ca")]
    pub(super) authorities: PathBuf,
    #[command(flatten)]
    pub(super) packing: PackingOptions,
    #[command(flatten)]
    pub(super) image: ImageOptions,
    #[command(flatten)]
    pub(super) parameters: ParametersOption,
    #[command(flatten)]
    pub(super) store: StoreOption,
    #[command(flatten)]
    pub(super) servers: ServerOptions,
}

#[derive(Args)]
pub(super) struct Named {
    /// Name that 'ims-sshd status' prints, source, or directory of image-root and the signal files
    /// [default: $IMAGE_ROOT_PARENT; in a pod, the environment that is open there]
    #[arg(value_name = "NAME")]
    pub(super) name: Option<PathBuf>,
}

/// Makes options of `customize` and `enter` that describe the new image require an output. Its name is the run's, too.
fn only_to_publish(option: clap::Arg) -> clap::Arg {
    const OPTIONS: [&str; 7] = ["from_scratch", "kernel", "initrd", "kernel_parameters", "exclude", "changes", "json"];
    match option.get_id().as_str() {
        "compression" => {
            with_default(option, "gzip", "the source's, if it is a squashfs, else gzip").requires("output")
        }
        "name" => with_default(option, "image", "the source's name"),
        name if OPTIONS.contains(&name) => option.requires("output"),
        _ => option,
    }
}

/// Gives the sidecar's boot files the default names of IMS.
fn as_pods_have_it(option: clap::Arg) -> clap::Arg {
    match option.get_id().as_str() {
        "kernel" => with_default(option, "auto", "vmlinuz"),
        "initrd" => with_default(option, "auto", "initrd"),
        _ => option,
    }
}

/// `option` with another default in its help.
fn with_default(option: clap::Arg, usual: &str, here: &str) -> clap::Arg {
    reworded(option, &format!("[default: {usual}]"), &format!("[default: {here}]"))
}

/// `option` with other words in its help.
fn reworded(option: clap::Arg, usual: &str, here: &str) -> clap::Arg {
    let help = option.get_help().map(ToString::to_string).unwrap_or_default();
    option.help(help.replace(usual, here))
}

#[derive(Args)]
pub(super) struct CustomizeArguments {
    /// An unpacked image, to which the changes are applied once it is complete; with --output also a squashfs, an
    /// archive, or a URL (https, s3)
    pub(super) source: String,
    /// Change the image on this host, to which ssh logs in as root; it is packed there and published from here
    #[arg(long, value_name = "[USER@]HOST", requires = "output", conflicts_with_all = ["bind", "host_script", "in_place"])]
    pub(super) node: Option<String>,
    /// Port to listen on [default: a free one]
    #[arg(long)]
    pub(super) port: Option<u16>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(super) listen: std::net::IpAddr,
    /// Public keys that may log in [default: a key pair made for this run]
    #[arg(long, value_name = "FILE")]
    pub(super) authorized_key: Option<PathBuf>,
    /// Start sessions on this machine beside the image root, not in it
    #[arg(long)]
    pub(super) plain: bool,
    #[command(flatten)]
    pub(super) jail: JailOptions,
    /// Run this script of this machine in the image, unattended, and publish the image if the script succeeds
    #[arg(long, value_name = "FILE", conflicts_with_all = OVER_SSH)]
    pub(super) script: Option<PathBuf>,
    /// Run this script as root on this machine, not in the image, once sessions can log in; the image root is
    /// $IMAGE_ROOT_PARENT/image-root
    #[arg(long, value_name = "FILE")]
    pub(super) host_script: Option<PathBuf>,
    /// A command to run in the image, unattended, with its arguments; the image is published if it succeeds
    /// [default: wait for people who log in]
    #[arg(trailing_var_arg = true, conflicts_with_all = OVER_SSH, conflicts_with = "script")]
    pub(super) command: Vec<OsString>,
    #[command(flatten)]
    pub(super) job: JobOptions,
}

/// Options of `customize` for people who log in.
const OVER_SSH: [&str; 5] = ["port", "listen", "authorized_key", "plain", "host_script"];

#[derive(Args)]
pub(super) struct CreateArguments {
    /// A recipe: URL (https, s3), tar archive (plain, gzip, bzip2, xz, zstd) or directory
    pub(super) recipe: String,
    /// Publish the new image to this store: a directory, or s3://BUCKET
    #[arg(long, value_name = "STORE")]
    pub(super) output: String,
    #[command(flatten)]
    pub(super) values: recipe::ValueOptions,
    #[command(flatten)]
    pub(super) profiles: recipe::ProfileOptions,
    /// Architecture of the image: x86_64 or aarch64 [variable: BUILD_ARCH] [default: this machine's]
    #[arg(long, value_name = "NAME")]
    pub(super) arch: Option<String>,
    /// Certificate of the site's authority, in PEM [default: /etc/cray/ca/certificate_authority.crt, if it exists]
    #[arg(long, value_name = "FILE")]
    pub(super) authority: Option<PathBuf>,
    #[command(flatten)]
    pub(super) keys: recipe::KeyOptions,
    /// Seconds to wait for repositories [variable: TIMEOUT] [default: 500]
    #[arg(long, value_name = "SECONDS")]
    pub(super) timeout: Option<String>,
    /// Open the image root over SSH if its build fails, as 'ims-sshd customize' does; if it is marked complete, it is
    /// published
    #[arg(long)]
    pub(super) debug_shell: bool,
    /// Build on this host over SSH, by its kiwi-ng; see docs/REMOTE_NODES.md
    #[arg(long, value_name = "[USER@]HOST")]
    pub(super) node: Option<String>,
    /// Directory to build in, below 'ims-sshd.create', until the image is published [default: /var/lib]
    #[arg(long, value_name = "DIRECTORY")]
    pub(super) work: Option<PathBuf>,
    #[command(flatten)]
    pub(super) checksum: ChecksumOptions,
    #[command(flatten)]
    pub(super) packing: CreatedPacking,
    #[command(flatten)]
    pub(super) image: ImageOptions,
    #[command(flatten)]
    pub(super) parameters: ParametersOption,
}

/// Options for packing an image that has no source.
#[derive(Args)]
#[command(next_help_heading = "Packing")]
pub(super) struct CreatedPacking {
    /// Compression of the squashfs [variable: IMAGE_COMPRESSION] [default: gzip]
    #[arg(long, value_name = "ALGORITHM", value_parser = packing::COMPRESSIONS)]
    pub(super) compression: Option<String>,
    /// Omit matching paths, and everything below a matching directory; see 'ims-sshd package'. May be repeated
    #[arg(long, value_name = "PATTERN", value_parser = exclude::Pattern::parse)]
    pub(super) exclude: Vec<exclude::Pattern>,
}

#[derive(Args)]
pub(super) struct EnterArguments {
    /// An unpacked image, which is changed in place; or a squashfs, an archive, or a URL (https, s3), whose changes are
    /// discarded at the end without --output
    pub(super) source: String,
    /// Publish at the end without asking, unless the command failed
    #[arg(long, requires = "output", conflicts_with = "discard")]
    pub(super) yes: bool,
    /// Discard the changes at the end without asking; a directory is opened below an overlay and stays as it is
    #[arg(long, conflicts_with = "in_place")]
    pub(super) discard: bool,
    #[command(flatten)]
    pub(super) jail: JailOptions,
    /// Run this script of this machine in the image
    #[arg(long, value_name = "FILE")]
    pub(super) script: Option<PathBuf>,
    /// The command and its arguments, after all options [default: the login shell]
    #[arg(trailing_var_arg = true, conflicts_with = "script")]
    pub(super) command: Vec<OsString>,
    #[command(flatten)]
    pub(super) job: JobOptions,
}

#[derive(Args)]
pub(super) struct JailOptions {
    /// Show a directory or file of this machine in the image, at the same path unless TARGET is given; it is not
    /// packed. A colon in a path is written '\:'. May be repeated
    #[arg(long, value_name = "SOURCE[:TARGET[:ro]]", value_parser = Bind::parse)]
    pub(super) bind: Vec<Bind>,
    /// Set a variable for everything that runs in the image; without a value, to the one it has here. May be repeated
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = variables::variable)]
    pub(super) env: Vec<(String, String)>,
}

/// Options that decide what becomes of an image on one machine.
#[derive(Args)]
pub(super) struct JobOptions {
    /// Publish the new image to this store: a directory, or s3://BUCKET
    #[arg(long, value_name = "STORE")]
    pub(super) output: Option<String>,
    /// Change the directory itself, without an overlay that keeps the changes apart until the image is complete
    #[arg(long)]
    pub(super) in_place: bool,
    /// Drop the changes that an earlier run kept, and start over
    #[arg(long, conflicts_with = "in_place")]
    pub(super) fresh: bool,
    /// Directory that holds changes, below 'ims-sshd', until they are published or applied; needs enough free space for
    /// two new images [default: /var/lib]
    #[arg(long, value_name = "DIRECTORY")]
    pub(super) work: Option<PathBuf>,
    #[command(flatten)]
    pub(super) checksum: ChecksumOptions,
    /// Print the result of the publication as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) packing: PackingOptions,
    #[command(flatten)]
    pub(super) image: ImageOptions,
    #[command(flatten)]
    pub(super) parameters: ParametersOption,
}

/// Parses the command line of this process; ends it after a refusal, and for help and version.
pub fn parse() -> Arguments {
    let mut words: Vec<_> = std::env::args_os().collect();
    // A pod's manifest may still start this program under the name of the script that it replaces.
    let scripts = recipe::SCRIPTS.into_iter().chain([("entrypoint.sh", "entrypoint")]);
    let name = words.first().and_then(|name| Path::new(name).file_name()?.to_str().map(str::to_owned));
    if let Some((_, command)) = scripts.into_iter().find(|(script, _)| name.as_deref() == Some(script)) {
        words.splice(..1, ["ims-sshd".into(), command.into()]);
    }
    Arguments::try_parse_from(words).unwrap_or_else(|refusal| with_owners(refusal).exit())
}

/// The refusal of an unknown option. If other commands have that option, the tip names them; otherwise clap's tip, the
/// name of a similar option, stays.
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

/// Refuses options of this program in the command of `customize` or `enter`, which would receive them. Options after
/// `--` are the command's own.
pub(super) fn refuse_late_options(name: &str, command: &[OsString], given: &[OsString]) -> Result<()> {
    let (before, _) = given.split_at(given.len().saturating_sub(command.len()));
    if before.iter().any(|word| word == "--") {
        return Ok(());
    }
    let mut program = Arguments::command();
    program.build();
    let options = program.find_subcommand(name).into_iter().flat_map(clap::Command::get_arguments);
    // A user who types `--help` after a command more often means that command than this program.
    let longs: Vec<_> = options.filter_map(clap::Arg::get_long).filter(|long| *long != "help").collect();
    let is_ours = |word: &&OsString| {
        let word = word.to_string_lossy();
        let Some(word) = word.strip_prefix("--") else { return false };
        longs.contains(&word.split_once('=').map_or(word, |(name, _)| name))
    };
    command.iter().find(is_ours).map_or(Ok(()), |word| {
        Err(Error::bad_input(format!("'{}' is part of the command, which would receive it", word.display()))
            .advise("options come before the command; write -- before the command if it is its own"))
    })
}

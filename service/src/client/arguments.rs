//! Command line of the client: the groups, verbs and options of `cray ims`, which `cray` derives from the API's
//! description.

use std::path::PathBuf;

use clap::{Args, FromArgMatches, Subcommand, ValueEnum};
use ims_sshd::error::{Error, Result};
use ims_sshd::image::boot::AUTO;
use ims_sshd::publish::settings::image_name;

use super::shown::Format;
use crate::settings::{STORE, Settings};

/// A group of commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// SSH public keys that may log in to jobs
    PublicKeys(Group<PublicKeys>),
    /// Recipes that images are built from
    Recipes(Box<Group<Recipes>>),
    /// Images
    Images(Box<Group<Images>>),
    /// Jobs that build or change images
    Jobs(Box<Group<Jobs>>),
    /// Records that were deleted and can be undeleted
    Deleted(Group<Deleted>),
    /// Hosts that run jobs for other architectures
    RemoteBuildNodes(Group<Nodes>),
}

/// The verbs of a group, and how to reach the service.
#[derive(Debug, Args)]
pub struct Group<V: Subcommand> {
    #[command(flatten)]
    pub(super) place: Place,
    #[command(subcommand)]
    pub(super) verb: V,
}

/// How to reach the service, and how to print what it answers.
#[derive(Debug, Args)]
#[command(next_help_heading = "Service")]
pub struct Place {
    /// URL of the service; unix:PATH for a socket [default: the socket of the service that this user has started]
    #[arg(long, global = true, env = "IMS_URL", value_name = "URL")]
    pub(super) url: Option<String>,
    /// File of the token: the token alone, or JSON with `access_token`
    #[arg(long, global = true, env = "CRAY_CREDENTIALS", value_name = "FILE")]
    pub(super) token: Option<PathBuf>,
    /// PEM file of authorities to trust besides those of the system
    #[arg(long, global = true, env = "CA_CERT", value_name = "FILE")]
    pub(super) ca: Option<PathBuf>,
    /// Format of the output
    #[arg(long, global = true, env = "CRAY_FORMAT", value_enum, default_value = "toml")]
    pub(super) format: Format,
}

/// Verbs of every group.
#[derive(Debug, Subcommand)]
pub enum Common {
    /// Show all records
    List,
    /// Show a record
    Describe(One),
    /// Delete a record
    Delete(One),
    /// Delete all records
    Deleteall(Sure),
}

/// Answer, given in advance, to the question before all records are deleted.
#[derive(Debug, Args)]
pub struct Sure {
    /// Delete without asking on a terminal
    #[arg(short, long)]
    pub(super) yes: bool,
}

/// A record.
#[derive(Debug, Args)]
pub struct One {
    /// ID of the record, or its name if no other record has it
    #[arg(value_name = "ID")]
    pub(super) id: String,
}

#[derive(Debug, Subcommand)]
pub enum PublicKeys {
    /// Register a public key
    Create {
        /// Name of the key
        #[arg(long)]
        name: String,
        /// File of the key; `-` is standard input
        #[arg(long, value_name = "FILE")]
        public_key: PathBuf,
    },
    #[command(flatten)]
    Common(Common),
}

#[derive(Debug, Subcommand)]
pub enum Recipes {
    /// Register a recipe
    Create {
        /// Name of the recipe
        #[arg(long)]
        name: String,
        /// Program that builds the recipe
        #[arg(long, value_enum)]
        recipe_type: RecipeType,
        /// Distribution of the recipe
        #[arg(long, value_enum)]
        linux_distribution: Distribution,
        #[command(flatten)]
        fields: RecipeFields,
    },
    /// Change a recipe
    Update {
        #[command(flatten)]
        one: One,
        #[command(flatten)]
        fields: RecipeFields,
    },
    /// Upload a recipe and register it
    #[command(after_help = IMPORT_RECIPE_EXAMPLES)]
    Import(ImportRecipe),
    #[command(flatten)]
    Common(Common),
}

const IMPORT_RECIPE_EXAMPLES: &str = "Examples:
  ims recipes import ./recipe.tgz
  ims recipes import ./recipe --name compute --linux-distribution sles15";

/// Fields of a recipe that can change.
#[derive(Debug, Args)]
pub struct RecipeFields {
    #[command(flatten)]
    pub(super) link: Link,
    #[command(flatten)]
    pub(super) build: BuildFields,
}

/// How a recipe is built.
#[derive(Debug, Args)]
pub struct BuildFields {
    /// Architecture of the image
    #[arg(long, value_enum)]
    pub(super) arch: Option<Arch>,
    /// Allow the build to load kernel modules
    #[arg(long, value_name = "BOOL", value_parser = boolean)]
    pub(super) require_dkms: Option<bool>,
    /// Names of values for the recipe's templates
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub(super) template_dictionary_key: Vec<String>,
    /// Values of these names, in the same order
    #[arg(long, value_name = "VALUE,…", value_delimiter = ',')]
    pub(super) template_dictionary_value: Vec<String>,
}

/// A recipe to import.
#[derive(Debug, Args)]
pub struct ImportRecipe {
    /// A tar archive (plain, gzip, bzip2, xz, zstd), or a directory
    pub(super) source: PathBuf,
    /// Name of the recipe [default: the source's]
    #[arg(long)]
    pub(super) name: Option<String>,
    /// Distribution of the recipe
    #[arg(long, value_enum, default_value = "sles15")]
    pub(super) linux_distribution: Distribution,
    #[command(flatten)]
    pub(super) build: BuildFields,
    #[command(flatten)]
    pub(super) store: Store,
}

#[derive(Debug, Subcommand)]
pub enum Images {
    /// Register an image
    Create {
        /// Name of the image
        #[arg(long)]
        name: String,
        #[command(flatten)]
        fields: ImageFields,
    },
    /// Change an image
    Update {
        #[command(flatten)]
        one: One,
        /// Change of the metadata
        #[arg(long, value_enum)]
        metadata_operation: Option<Operation>,
        #[command(flatten)]
        fields: ImageFields,
    },
    /// Pack an image, upload it and register it
    #[command(after_help = IMPORT_IMAGE_EXAMPLES)]
    Import(ImportImage),
    #[command(flatten)]
    Common(Common),
}

const IMPORT_IMAGE_EXAMPLES: &str = "Examples:
  ims images import ./image.sqsh
  ims images import ./image-root --name compute
  ims images import https://server/image.tar.gz --name compute";

/// Fields of an image that can change.
#[derive(Debug, Args)]
pub struct ImageFields {
    #[command(flatten)]
    pub(super) link: Link,
    /// Architecture of the image
    #[arg(long, value_enum)]
    pub(super) arch: Option<Arch>,
    /// Key of the metadata
    #[arg(long, value_name = "KEY")]
    pub(super) metadata_key: Option<String>,
    /// Value of the metadata
    #[arg(long, value_name = "VALUE")]
    pub(super) metadata_value: Option<String>,
}

/// An image to import.
#[derive(Debug, Args)]
pub struct ImportImage {
    /// A squashfs, a tar or cpio archive, a directory, or a URL (https, s3) of such a file
    pub(super) source: String,
    /// Name of the image [default: the source's]
    #[arg(long, value_parser = image_name)]
    pub(super) name: Option<String>,
    /// Architecture of the image [default: this machine's]
    #[arg(long, value_enum)]
    pub(super) arch: Option<Arch>,
    /// Name of the kernel in the image's /boot [default: the newest one]
    #[arg(long, value_name = "NAME")]
    pub(super) kernel: Option<String>,
    /// Name of the initrd in the image's /boot [default: the kernel's]
    #[arg(long, value_name = "NAME")]
    pub(super) initrd: Option<String>,
    /// Directory that holds the unpacked image until it is uploaded; needs enough free space for the image
    #[arg(long, value_name = "DIRECTORY", default_value = "/var/lib/ims")]
    pub(super) work: PathBuf,
    #[command(flatten)]
    pub(super) store: Store,
}

/// Store of the service: the settings that `ims serve` has.
#[derive(Debug, Args)]
#[command(next_help_heading = "Store")]
pub struct Store {
    /// The service's S3 server, with the keys $S3_ACCESS_KEY and $S3_SECRET_KEY; `file:///DIRECTORY` for a directory
    #[arg(long, env = "S3_ENDPOINT", value_name = "URL", default_value = STORE)]
    pub(super) s3_endpoint: String,
}

impl Store {
    /// Settings of a service that has this store; the others have their variables.
    pub(super) fn settings(&self) -> Result<Settings> {
        let words = ["ims", "--s3-endpoint", &self.s3_endpoint];
        let read = Settings::augment_args(clap::Command::new("ims")).try_get_matches_from(words);
        let settings = read.and_then(|read| Settings::from_arg_matches(&read));
        settings.map_err(|e| Error::bad_input(e.to_string()))
    }
}

#[derive(Debug, Subcommand)]
pub enum Jobs {
    /// Start a job
    #[command(after_help = CREATE_JOB_EXAMPLES)]
    Create(Box<NewJob>),
    /// Show all jobs
    List,
    /// Show a job
    Describe(One),
    /// Delete a job and what is left of it
    Delete(One),
    /// Delete all jobs, or those that fit all filters
    Deleteall {
        #[command(flatten)]
        filters: Filters,
        #[command(flatten)]
        sure: Sure,
    },
    /// Print the log of a job's programs
    Logs {
        /// Print new lines until the job ends
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        one: One,
    },
    /// Log in to a job, once it waits for users
    #[command(after_help = SSH_EXAMPLES)]
    Ssh {
        /// File of the private key [default: those of ssh]
        #[arg(short, long, value_name = "FILE")]
        identity: Option<PathBuf>,
        #[command(flatten)]
        one: One,
        /// A command to run there, with its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

const CREATE_JOB_EXAMPLES: &str = "Examples:
  ims jobs create --job-type customize --artifact-id compute --public-key-id me --image-root-archive-name compute-2";

const SSH_EXAMPLES: &str = "Examples:
  ims jobs ssh compute-2
  ims jobs ssh compute-2 touch /tmp/complete";

/// A new job.
#[derive(Debug, Args)]
pub struct NewJob {
    /// Type of the job: `create` builds an image from a recipe, `customize` changes an image
    #[arg(long, value_enum)]
    pub(super) job_type: JobType,
    /// ID or name of the recipe or image
    #[arg(long, value_name = "ID")]
    pub(super) artifact_id: String,
    /// ID or name of the public key that may log in
    #[arg(long, value_name = "ID")]
    pub(super) public_key_id: String,
    /// Name of the new image
    #[arg(long, value_name = "NAME")]
    pub(super) image_root_archive_name: String,
    /// Name of the kernel in the new image's /boot; 'auto' takes the newest one, and publishes none if the image has
    /// none. Upstream's programs do not know 'auto'
    #[arg(long, value_name = "NAME", default_value = AUTO)]
    pub(super) kernel_file_name: String,
    /// Name of the initrd in the new image's /boot; 'auto' takes that of the kernel. Upstream's programs do not know
    /// 'auto'
    #[arg(long, value_name = "NAME", default_value = AUTO)]
    pub(super) initrd_file_name: String,
    /// Name of the file of kernel parameters in the new image's /boot
    #[arg(long, value_name = "NAME")]
    pub(super) kernel_parameters_file_name: Option<String>,
    /// Name of the container that users log in to
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub(super) ssh_containers_name: Vec<String>,
    /// Begin sessions inside the image
    #[arg(long, value_name = "BOOL,…", value_delimiter = ',', value_parser = boolean)]
    pub(super) ssh_containers_jail: Vec<bool>,
    /// Open a shell in a build that fails
    #[arg(long, value_name = "BOOL", value_parser = boolean)]
    pub(super) enable_debug: Option<bool>,
    /// Size of the build environment, in GiB
    #[arg(long, value_name = "GIBIBYTES")]
    pub(super) build_env_size: Option<u32>,
    /// Allow the job to load kernel modules
    #[arg(long, value_name = "BOOL", value_parser = boolean)]
    pub(super) require_dkms: Option<bool>,
}

/// Which jobs to delete.
#[derive(Debug, Args)]
pub struct Filters {
    /// Jobs with one of these statuses
    #[arg(long, value_name = "STATUS,…", value_delimiter = ',')]
    pub(super) status: Vec<String>,
    /// Jobs of this type
    #[arg(long, value_enum)]
    pub(super) job_type: Option<JobType>,
    /// Jobs that are at least this old: a number and w, d, h or m, as in 3d
    #[arg(long)]
    pub(super) age: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Deleted {
    /// Deleted public keys
    PublicKeys {
        #[command(subcommand)]
        verb: DeletedVerb,
    },
    /// Deleted recipes
    Recipes {
        #[command(subcommand)]
        verb: DeletedVerb,
    },
    /// Deleted images
    Images {
        #[command(subcommand)]
        verb: DeletedVerb,
    },
}

#[derive(Debug, Subcommand)]
pub enum DeletedVerb {
    /// Undelete a record
    Update {
        #[command(flatten)]
        one: One,
        /// Change of the record
        #[arg(long, value_parser = ["undelete"], default_value = "undelete")]
        operation: String,
    },
    #[command(flatten)]
    Common(Common),
}

#[derive(Debug, Subcommand)]
pub enum Nodes {
    /// Register a node
    Create {
        /// Name of the node
        #[arg(long)]
        xname: String,
    },
    /// Show which nodes can run jobs
    Status {
        #[command(subcommand)]
        verb: NodeStatus,
    },
    #[command(flatten)]
    Common(Common),
}

#[derive(Debug, Subcommand)]
pub enum NodeStatus {
    /// Show the status of all nodes
    List,
    /// Show the status of a node
    Describe(One),
}

/// Location of an object.
#[derive(Debug, Args)]
pub struct Link {
    /// URL of the object
    #[arg(long = "link-path", value_name = "URL")]
    pub(super) path: Option<String>,
    /// ETag of the object
    #[arg(long = "link-etag", value_name = "ETAG")]
    pub(super) etag: Option<String>,
    /// Type of the link
    #[arg(long = "link-type", value_name = "TYPE")]
    pub(super) kind: Option<String>,
}

/// Defines an enum of words of the API. Options accept the words, and `word` returns the word of a variant.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $word:literal),+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
        pub enum $name {
            $(#[value(name = $word)] #[allow(missing_docs)] $variant),+
        }

        impl $name {
            /// Its name in the API.
            pub(super) fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }
    };
}

words!(
    /// Architecture of an image.
    Arch { X86 = "x86_64", Arm = "aarch64" }
);
words!(
    /// Program that builds a recipe.
    RecipeType { Kiwi = "kiwi-ng", Packer = "packer" }
);
words!(
    /// Distribution of a recipe.
    Distribution { Sles12 = "sles12", Sles15 = "sles15", Centos7 = "centos7" }
);
words!(
    /// Type of a job.
    JobType { Create = "create", Customize = "customize" }
);
words!(
    /// Operation on an image's metadata.
    Operation { Set = "set", Remove = "remove" }
);

/// Parses a boolean as `cray` does.
fn boolean(text: &str) -> std::result::Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "1" | "yes" | "y" | "on" => Ok(true),
        "false" | "f" | "0" | "no" | "n" | "off" => Ok(false),
        _ => Err("expected true or false".into()),
    }
}

//! The command line of the steps of a create job: from a recipe to an image root.

use std::path::PathBuf;

use clap::Args;

use crate::cli::options::{ChecksumOptions, ServerOptions, variables};
use crate::error::Result;
use crate::publish::settings::Settings;
use crate::recipe::fetch::{self, Wanted};
use crate::recipe::{self, ca_rpm, kiwi, outcome, repositories};
use crate::remote::build::{self as offloaded, Node};

/// Scripts of a create job's containers, and the commands that they became. Manifests still start them.
pub(super) const SCRIPTS: [(&str, &str); 3] =
    [("fetch-recipe.sh", "fetch-recipe"), ("wait_for_kiwi_repos.py", "wait-for-repos"), ("build_ca_rpm.py", "ca-rpm")];

pub(super) const FETCH_EXAMPLES: &str = "Examples:
  ims-sshd fetch-recipe /mnt/image/recipe 'https://s3.example/ims/recipes/…/recipe.tar.gz?X-Amz-Signature=…'
  ims-sshd fetch-recipe ./work ./recipe.tgz --set MIRROR=https://deb.debian.org/debian --set SUITE=bookworm";

pub(super) const WAIT_EXAMPLES: &str = "Examples:
  ims-sshd wait-for-repos
  ims-sshd wait-for-repos --profile kernel --timeout 60 ./work";

pub(super) const CA_EXAMPLES: &str = "Examples:
  ims-sshd ca-rpm
  ims-sshd ca-rpm ./authority.crt --output .";

pub(super) const BUILD_EXAMPLES: &str = "Examples:
  ims-sshd build
  ims-sshd build --profile kernel ./work ./out";

pub(super) const CREATE_EXAMPLES: &str = "Examples:
  ims-sshd create ./recipe --set MIRROR=https://deb.debian.org/debian --set SUITE=bookworm --output ./out
  ims-sshd create ./recipe.tgz --values ./values.json --profile kernel --output s3://boot-images";

#[derive(Args)]
pub(super) struct FetchArguments {
    /// Directory in which to create the recipe; omitted if only SOURCE is given
    /// [default: $RECIPE_ROOT_PARENT, else /mnt/image/recipe]
    #[arg(value_name = "DIRECTORY")]
    first: String,
    /// A recipe: URL (https, s3), tar archive (plain, gzip, bzip2, xz, zstd) or directory
    #[arg(value_name = "SOURCE")]
    second: Option<String>,
    #[command(flatten)]
    values: ValueOptions,
    #[command(flatten)]
    checksum: ChecksumOptions,
    #[command(flatten)]
    servers: ServerOptions,
}

#[derive(Args)]
pub(super) struct ValueOptions {
    /// Values for the recipe's templates, a JSON object of strings
    /// [default: /etc/cray/template_dictionary, if there is one]
    #[arg(long, value_name = "FILE")]
    pub(super) values: Option<PathBuf>,
    /// A value for the recipe's templates; overrides the one in the file. May be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub(super) set: Vec<(String, String)>,
}

fn pair(text: &str) -> std::result::Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    if name.is_empty() {
        return Err("expected a name before '='".into());
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// The recipe's directory if none is named.
fn recipe_directory() -> PathBuf {
    let named = std::env::var_os("RECIPE_ROOT_PARENT").filter(|path| !path.is_empty());
    named.map_or_else(|| recipe::DEFAULT_RECIPE.into(), PathBuf::from)
}

pub(super) fn fetch(arguments: FetchArguments, log: Result<()>) -> Result<u8> {
    let FetchArguments { first, second, values, checksum, servers } = arguments;
    let variables = variables(checksum.variables().into_iter().chain(servers.variables()));
    let settings = log.and_then(|()| Settings::read(None, variables.clone()));
    let settings = settings.inspect_err(|_| outcome::report_refusal(variables))?;
    let (directory, source) = match second {
        Some(source) => (first.into(), source),
        None => (recipe_directory(), first),
    };
    fetch::run(&settings, &Wanted { directory, source, values: values.values, set: values.set })
}

#[derive(Args)]
pub(super) struct WaitArguments {
    /// The recipe's directory [default: $RECIPE_ROOT_PARENT, else /mnt/image/recipe]
    recipe: Option<PathBuf>,
    #[command(flatten)]
    profiles: ProfileOptions,
    /// Seconds to wait [variable: TIMEOUT] [default: 500]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<String>,
}

#[derive(Args)]
pub(super) struct ProfileOptions {
    /// A profile of the recipe to build [default: those that the recipe imports]. May be repeated
    #[arg(long, value_name = "NAME")]
    pub(super) profile: Vec<String>,
}

pub(super) fn wait(arguments: WaitArguments, log: Result<()>) -> Result<u8> {
    let WaitArguments { recipe, profiles, timeout } = arguments;
    let variables = variables([("TIMEOUT", timeout)]);
    let read = log.and_then(|()| {
        let limit = repositories::limit(variables.clone())?;
        Ok((Settings::read(None, variables.clone())?, limit))
    });
    let (settings, limit) = read.inspect_err(|_| outcome::report_refusal(variables))?;
    repositories::run(&settings, &recipe.unwrap_or_else(recipe_directory), &profiles.profile, limit)
}

#[derive(Args)]
pub(super) struct CaArguments {
    /// Certificate of the authority, in PEM [default: /etc/cray/ca/certificate_authority.crt, else $CA_CERT]
    certificate: Option<PathBuf>,
    /// Directory for the package, cray_ca_cert-1.0.1-1.noarch.rpm
    #[arg(long, value_name = "DIRECTORY", default_value = ca_rpm::DEFAULT_OUTPUT)]
    output: PathBuf,
    /// The site's RPM specification of this package; a warning lists what it has and this package lacks
    #[arg(long, value_name = "FILE", default_value = ca_rpm::DEFAULT_SPECIFICATION)]
    specification: PathBuf,
}

pub(super) fn ca_rpm(arguments: &CaArguments, log: Result<()>) -> Result<u8> {
    let variables = variables([]);
    let settings = log.and_then(|()| Settings::read(None, variables.clone()));
    let settings = settings.inspect_err(|_| outcome::report_refusal(variables))?;
    ca_rpm::run(&settings, arguments.certificate.as_deref(), &arguments.specification, &arguments.output)
}

#[derive(Args)]
pub(super) struct BuildArguments {
    /// The recipe's directory [default: $RECIPE_ROOT_PARENT, else /mnt/image/recipe]
    recipe: Option<PathBuf>,
    /// Directory in which to create build/image-root [default: $IMAGE_ROOT_PARENT, else /mnt/image]
    image_root_parent: Option<PathBuf>,
    #[command(flatten)]
    profiles: ProfileOptions,
    /// Package of the site's authority [default: the pod's, else one that is made of the certificate]
    #[arg(long, value_name = "FILE")]
    ca_rpm: Option<PathBuf>,
    /// Certificate of the site's authority, in PEM [default: /etc/cray/ca/certificate_authority.crt, if it exists]
    #[arg(long, value_name = "FILE")]
    authority: Option<PathBuf>,
    /// Build a job's image without an authority if there is none
    #[arg(long)]
    authority_if_any: bool,
    #[command(flatten)]
    keys: KeyOptions,
}

#[derive(Args)]
pub(super) struct KeyOptions {
    /// A key that packages or repositories are signed with, besides those in /signing-keys and /etc/cray/signing-keys.
    /// May be repeated
    #[arg(long, value_name = "FILE")]
    pub(super) signing_key: Vec<PathBuf>,
}

pub(super) fn build(arguments: BuildArguments, log: Result<()>) -> Result<u8> {
    let BuildArguments { recipe, image_root_parent, profiles, ca_rpm, authority, authority_if_any, keys } = arguments;
    let variables = variables([]);
    let settings = log.and_then(|()| Settings::read(image_root_parent, variables.clone()));
    let settings = settings.inspect_err(|_| outcome::report_refusal(variables.clone()))?;
    let recipe = recipe.unwrap_or_else(recipe_directory);
    let profiles = profiles.profile;
    let (is_authority_optional, signing_keys) = (authority_if_any, keys.signing_key);
    let are_lines_errors = false;
    let wanted =
        kiwi::Wanted { recipe, profiles, ca_rpm, authority, is_authority_optional, signing_keys, are_lines_errors };
    match Node::of_job(&settings, variables.clone()).inspect_err(|_| outcome::report_refusal(variables))? {
        Some(node) => offloaded::run(&settings, &wanted, &node),
        None => kiwi::run(&settings, &wanted),
    }
}

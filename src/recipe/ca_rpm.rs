//! `ims-sshd ca-rpm`: builds an rpm package that installs the certificate of a site's authority, for recipes.
//!
//! IMS has always given recipes a package with the same name and version, and the certificate at the same path. This
//! package also has the certificate at the path of the other family of distributions. Its scripts run the image's tool
//! that updates CA certificates; while the image has no such tool, they do nothing.

use std::path::{Path, PathBuf};

use reqwest::Certificate;
use rpm::{BuildConfig, CompressionType, Dependency, FileOptions, PackageBuilder, Scriptlet};

use crate::error::{Attempt, Error, Result};
use crate::publish::settings::Settings;
use crate::recipe::outcome;
use crate::sys::named;
use crate::sys::tree::Tree;

/// Name of the package.
pub(crate) const NAME: &str = "cray_ca_cert";
const VERSION: &str = "1.0.1";
const RELEASE: &str = "1";

/// File name of the package.
pub const FILE: &str = "cray_ca_cert-1.0.1-1.noarch.rpm";

/// Directory, in a pod, that the package is written to.
pub const DEFAULT_OUTPUT: &str = "/mnt/ca-rpm";

/// File, in a pod, with the certificate of the site's authority.
pub const DEFAULT_CERTIFICATE: &str = "/etc/cray/ca/certificate_authority.crt";

/// Specification file, in a pod, of the package that IMS would have built.
pub const DEFAULT_SPECIFICATION: &str = "/mnt/specfile/cray_ca_cert.spec";

/// Files from which distributions take additional CA certificates: on SUSE, and on RHEL and the like.
pub(crate) const ANCHORS: [&str; 2] = [
    "/usr/share/pki/trust/anchors/cray_certificate_authority.crt",
    "/etc/pki/ca-trust/source/anchors/cray_certificate_authority.crt",
];

/// Runs the tool that updates the image's CA certificates. Succeeds if there is no tool: a failure would only be a
/// warning, and the package's trigger runs the script again once there is a tool. Redirects nothing, because an image
/// root has no /dev/null at first.
const SCRIPT: &str = "\
for tool in update-ca-certificates update-ca-trust; do
    for place in /usr/sbin /usr/bin; do
        if [ -x \"$place/$tool\" ]; then
            \"$place/$tool\" || echo \"cray_ca_cert: $tool failed\"
            exit 0
        fi
    done
done
exit 0
";

/// Package that contains the tool, in both families of distributions.
const TOOLS: &str = "ca-certificates";

/// Time of everything in the package if `SOURCE_DATE_EPOCH` is not set: 2020-01-01.
const EPOCH: u32 = 1_577_836_800;

/// Maximum length, in bytes, of a certificate, a signing key, a specification file and the package.
pub(crate) const LONGEST: u64 = 4 << 20;

/// Words of the line that begins a private key of any kind in PEM.
const PRIVATE_KEY: &[u8] = b"PRIVATE KEY-----";

/// Writes the package into the directory `output`.
pub fn run(settings: &Settings, certificate: Option<&Path>, specification: &Path, output: &Path) -> Result<u8> {
    // This step sets no status when it begins, but reports a failure to IMS.
    outcome::step(settings, None, |_| {
        let certificate = certificate.map_or_else(|| default_certificate(settings), Path::to_owned);
        let content = read_certificate(&certificate)?;
        tell_other_specification(specification);
        let package = build(&content, epoch(settings))?;
        let attempted = || format!("write {}", output.join(FILE).display());
        std::fs::create_dir_all(output).attempt(attempted)?;
        let directory = Tree::open(&named::resolve(output).attempt(attempted)?).attempt(attempted)?;
        directory.replace(FILE, &package).attempt(attempted)?;
        tracing::info!("wrote {}, with the authority in {}", output.join(FILE).display(), certificate.display());
        Ok(())
    })
}

/// Time of everything in the package, in seconds since 1970.
pub(crate) fn epoch(settings: &Settings) -> u32 {
    settings.packing.epoch.and_then(|epoch| u32::try_from(epoch).ok()).unwrap_or(EPOCH)
}

/// Returns the file of the pod's certificate; if it is missing, the file of the certificates that this program trusts.
fn default_certificate(settings: &Settings) -> PathBuf {
    let named = settings.network.ca.clone().filter(|file| file.exists() && !Path::new(DEFAULT_CERTIFICATE).exists());
    named.unwrap_or_else(|| DEFAULT_CERTIFICATE.into())
}

/// Reads a certificate. Refuses a file that contains none: the image would then lack the authority. Refuses a file that
/// contains a private key as well: everybody could read the key in the image.
pub(crate) fn read_certificate(file: &Path) -> Result<Vec<u8>> {
    let attempted = || format!("read the certificate {}", file.display());
    let advice = "name the site's certificate authority, in PEM";
    let content = named::read(file, LONGEST).map_err(|e| Error::new(attempted()).because(e).advise(advice))?;
    if content.windows(PRIVATE_KEY.len()).any(|words| words == PRIVATE_KEY) {
        let why = "it holds a private key, which everybody could read in the image";
        return Err(Error::new(attempted()).because(why).advise("name a file that holds only certificates"));
    }
    match Certificate::from_pem_bundle(&content) {
        Ok(found) if !found.is_empty() => Ok(content),
        Ok(_) => Err(Error::new(attempted()).because("it holds no certificate").advise(advice)),
        Err(e) => Err(Error::new(attempted()).because(e).advise(advice)),
    }
}

/// Builds the package and returns its bytes; equal input gives equal bytes.
pub(crate) fn build(certificate: &[u8], epoch: u32) -> Result<Vec<u8>> {
    let attempted = || format!("make {FILE}");
    let config = BuildConfig::v4().source_date(epoch).compression(CompressionType::None);
    let mut builder = PackageBuilder::new(NAME, VERSION, "MIT", "noarch", "Certificate authority of the site");
    builder.using_config(config).release(RELEASE).build_host("localhost").cookie("ims-sshd");
    builder.description("The certificate authority of the site, which the image trusts.");
    for anchor in ANCHORS {
        builder.with_file_contents(certificate, FileOptions::new(anchor).permissions(0o644)).attempt(attempted)?;
    }
    let script = || Scriptlet::new(SCRIPT);
    builder.post_install_script(script()).post_trans_script(script()).trigger_in(TOOLS, None, script());
    // The scripts' shell must be installed before this package; so must the tool, if it is in the same transaction.
    builder.requires(Dependency::script_post("/bin/sh")).order_with_requires(Dependency::any(TOOLS));
    let mut bytes = Vec::new();
    builder.build().and_then(|package| package.write(&mut bytes)).attempt(attempted)?;
    Ok(bytes)
}

/// Warns if a site's own spec file has lines to which nothing in the package that is built here corresponds.
fn tell_other_specification(file: &Path) {
    let Ok(text) = named::read(file, LONGEST) else { return };
    let other = other_lines(&String::from_utf8_lossy(&text));
    if !other.is_empty() {
        tracing::warn!(
            "{} differs from the package that is made here and is not used: {}; put what these lines do into a \
             package or a script of the recipe",
            file.display(),
            crate::printable::listed(&other)
        );
    }
}

/// Returns the lines of a specification file to which nothing in this package corresponds.
fn other_lines(text: &str) -> Vec<String> {
    let own = [("name:", NAME), ("version:", VERSION), ("release:", RELEASE)];
    let other = |line: &&str| {
        let lower = line.to_ascii_lowercase();
        let tag = own.iter().find_map(|(tag, value)| Some((lower.strip_prefix(tag)?.trim(), *value)));
        match tag {
            Some((given, value)) => !given.starts_with(value),
            None => {
                let tags = ["requires", "provides:", "conflicts:", "obsoletes:", "epoch:"];
                let sections = ["%pre", "%postun", "%trigger", "%filetrigger", "%transfiletrigger", "%verifyscript"];
                let is_prep = lower.starts_with("%prep");
                tags.iter().any(|tag| lower.starts_with(tag))
                    || sections.iter().any(|section| lower.starts_with(section)) && !is_prep
            }
        }
    };
    text.lines().map(str::trim).filter(other).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_of_the_same_certificate_has_the_same_bytes() {
        let [one, two] = [1, 2].map(|_| build(b"certificate", EPOCH).unwrap());
        assert!(one == two && !one.is_empty());
        assert!(one != build(b"other", EPOCH).unwrap());
    }

    #[test]
    fn own_specification_is_noticed() {
        let usual = "Name: cray_ca_cert\nVersion: 1.0.1\nRelease: 1\nLicense: MIT\n%description\nx\n%prep\n%install\n\
            cp a b\n%post\nupdate-ca-certificates\n%files\n/a\n";
        assert_eq!(other_lines(usual), [""; 0]);
        let own = usual.replace("1.0.1", "2.0").replace("License", "Requires: openssl\nLicense") + "%postun\nrm x\n";
        assert_eq!(other_lines(&own), ["Version: 2.0", "Requires: openssl", "%postun"]);
    }
}

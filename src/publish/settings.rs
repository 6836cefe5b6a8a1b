//! Variables of `prepare`, `sidecar`, `package` and `upload`, read once into one value. Options of the command line are
//! passed as later variables, and override those of the environment.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::Result;
use crate::image::boot::{AUTO, Names};
use crate::image::packing::{COMPRESSIONS, PACKERS, Packer, Packing};
use crate::ims;
use crate::ims::client::Ims;
use crate::ims::id::Id;
use crate::job::Job;
use crate::job::variables::{Case, Checked, Reader, TRUTH};
use crate::store;
use crate::transfer::Work;
use crate::transfer::checksum::{Expected, checksum};
use crate::transfer::network::Network;

/// Settings for fetching and publishing an image.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The job. Its action may be missing or unknown: only the sidecar needs the action, and the sidecar reports a
    /// wrong action to IMS.
    pub(crate) job: Job,
    /// `IMAGE_ROOT_ARCHIVE_NAME`: the new image's name.
    pub(crate) name: String,
    /// `KERNEL_FILENAME`, `INITRD_FILENAME`, `KERNEL_PARAMETERS_FILENAME`.
    pub(crate) boot: Names,
    /// `DOWNLOAD_MD5SUM`, `DOWNLOAD_SHA256SUM`: checksums that the source must have.
    pub(crate) expected: Expected,
    /// Options for packing the image.
    pub(crate) packing: Packing,
    /// `IMAGE_KEEP_SOURCE`: whether a fetched squashfs is kept beside an unpacked image root; `None` means only if
    /// there is room for it.
    pub(crate) keep_source: Option<bool>,
    /// Store of images.
    pub store: store::place::Place,
    /// IMS, where jobs and images are registered; `None` on one machine.
    pub ims: Option<ims::place::Place>,
    /// TLS settings and timeouts.
    pub network: Network,
    /// `IMS_START_LIMIT`: maximum time for the build environment to start.
    pub start_limit: Duration,
}

impl Settings {
    /// Reads `variables`. If a name occurs twice, the later value counts. One error lists all wrong values.
    pub fn read(argument: Option<PathBuf>, variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self> {
        let mut reader = Reader::of(variables);
        let job = Job::read(&mut reader, argument);
        let kernel = file_name(&mut reader, "KERNEL_FILENAME").unwrap_or_else(|| "vmlinuz".into());
        let initrd = file_name(&mut reader, "INITRD_FILENAME");
        let boot = Names {
            // If the kernel is to be searched for, so is its initrd.
            initrd: initrd.unwrap_or_else(|| if kernel == AUTO { AUTO } else { "initrd" }.into()),
            kernel,
            parameters: file_name(&mut reader, "KERNEL_PARAMETERS_FILENAME")
                .unwrap_or_else(|| "kernel-parameters".into()),
        };
        let name = reader.text("IMAGE_ROOT_ARCHIVE_NAME");
        let name = name.and_then(|name| reader.check("IMAGE_ROOT_ARCHIVE_NAME", &name, image_name));
        let expected = Expected {
            md5: checksum(&mut reader, "DOWNLOAD_MD5SUM", 32),
            sha256: checksum(&mut reader, "DOWNLOAD_SHA256SUM", 64),
        };
        let compressions = COMPRESSIONS.map(|c| (c, c));
        let packing = Packing {
            compression: reader.choice("IMAGE_COMPRESSION", &compressions, Case::Exact),
            epoch: reader.seconds("SOURCE_DATE_EPOCH").map(|d| d.as_secs()),
            packer: reader.choice("IMAGE_PACKER", &PACKERS, Case::Exact).unwrap_or(Packer::Own),
            is_from_scratch: reader.choice("IMAGE_FROM_SCRATCH", &TRUTH, Case::Any).unwrap_or(false),
        };
        let keep_source = reader.choice("IMAGE_KEEP_SOURCE", &TRUTH, Case::Any);
        let store = store::place::read(&mut reader);
        let ims = ims::place::read(&mut reader);
        let network = Network {
            ca: reader.text("CA_CERT").map(Into::into),
            stall_limit: reader.limit("IMS_STALL_LIMIT").unwrap_or(Duration::from_secs(30)),
            retry_limit: reader.seconds("IMS_RETRY_LIMIT").unwrap_or(Duration::from_secs(200)),
            is_shortened: false,
        };
        let start_limit = reader.seconds("IMS_START_LIMIT").unwrap_or(Duration::from_mins(2));
        // Without an IMS the ID is only reported; with one it becomes part of URLs.
        if let Some(wrong) = job.id.as_ref().filter(|id| id.contains('/') || ims.is_some() && Id::parse(id).is_none()) {
            let expected = if ims.is_some() { "the ID of an IMS job, a UUID" } else { "an ID without '/'" };
            reader.complain(format!("IMS_JOB_ID is '{wrong}': expected {expected}"));
        }
        let name = name.unwrap_or_else(|| "image".into());
        reader.finish(Some(Self { job, name, boot, expected, packing, keep_source, store, ims, network, start_limit }))
    }

    /// Settings with which the refusal of `variables` is reported to IMS. Fails if the variables that name IMS and the
    /// job are wrong as well, such as an invalid job ID, since nothing can be reported then.
    pub(crate) fn to_report(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self> {
        let known = ["IMS_URL", "IMS_TOKEN_FILE", "OAUTH_CONFIG_DIR", "IMS_JOB_ID", "CA_CERT"];
        Self::read(None, variables.into_iter().filter(|(name, _)| known.iter().any(|known| name == *known)))
    }

    /// Client of IMS for the job; built once in a run.
    pub(crate) fn ims_client<'a>(&self, work: &'a Work) -> Ims<'a> {
        Ims::of(work, self.ims.as_ref(), self.job.id.as_deref())
    }

    /// File name of the packed image.
    pub(crate) fn archive(&self) -> String {
        format!("{}.sqsh", self.name)
    }
}

/// Checks a file name in the image's /boot.
pub fn boot_file(name: &str) -> Checked {
    if name.contains('/') || name == "." || name == ".." || name.contains(|c: char| c.is_control()) {
        return Err("expected the name of a file in the image's /boot".into());
    }
    Ok(name.to_owned())
}

/// Checks the name of a new image: it becomes the name of its archive and, in a store that is a directory, of its
/// directory.
pub fn image_name(name: &str) -> Checked {
    if name.is_empty() || name.starts_with('.') || name.contains(|c: char| c == '/' || c.is_control()) {
        return Err("expected a name of one line without '/' that does not begin with '.'".into());
    }
    Ok(name.to_owned())
}

fn file_name(reader: &mut Reader, variable: &str) -> Option<String> {
    let name = reader.line(variable).filter(|n| !n.is_empty())?;
    reader.check(variable, &name, boot_file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::network::Validate;

    fn read(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::read(None, variables.iter().map(|(n, v)| ((*n).into(), (*v).into())))
    }

    #[test]
    fn variables_of_a_pods_sidecar_are_read() {
        let settings = read(&[
            ("OAUTH_CONFIG_DIR", "/nowhere"),
            ("ENABLE_DEBUG", "False"),
            ("IMS_ACTION", "customize"),
            ("IMAGE_ROOT_PARENT", "/mnt/image"),
            ("IMAGE_ROOT_ARCHIVE_NAME", "compute ä"),
            ("KERNEL_FILENAME", "vmlinuz"),
            ("INITRD_FILENAME", ""),
            ("KERNEL_PARAMETERS_FILENAME", "kernel-parameters"),
            ("IMS_JOB_ID", "7"),
            ("SSH_JAIL", "True"),
            ("BUILD_ARCH", "x86_64"),
            ("REMOTE_BUILD_NODE", ""),
            ("S3_BUCKET", "boot-images"),
            ("S3_ACCESS_KEY", "a"),
            ("S3_SECRET_KEY", "s"),
            ("S3_ENDPOINT", "http://rgw"),
            ("S3_SSL_VALIDATE", "False"),
            ("CA_CERT", "/etc/cray/ca/certificate_authority.crt"),
        ])
        .unwrap();
        assert_eq!(settings.store.url.as_deref(), Some("s3://boot-images"));
        assert_eq!(settings.store.validate, Validate::No);
        assert_eq!((settings.boot.initrd.as_str(), settings.name.as_str()), ("initrd", "compute ä"));
        assert!(settings.ims.is_none() && settings.job.jailed);
        assert_eq!(settings.network.retry_limit, Duration::from_secs(200));
    }

    #[test]
    fn without_variables_there_is_no_ims_and_no_store() {
        let settings = read(&[]).unwrap();
        assert!(settings.ims.is_none() && settings.store.url.is_none() && settings.job.id.is_none());
        assert_eq!(settings.job.image_root(), "image-root");
        assert_eq!(read(&[("IMS_ACTION", "create")]).unwrap().job.image_root(), "build/image-root");
    }

    #[test]
    fn aws_variables_are_used_if_s3_variables_are_not_set() {
        let aws = [
            ("AWS_ACCESS_KEY_ID", "A"),
            ("AWS_SECRET_ACCESS_KEY", "S"),
            ("AWS_SESSION_TOKEN", "T"),
            ("AWS_REGION", "eu-north-1"),
            ("AWS_ENDPOINT_URL", "https://s3"),
            ("AWS_CA_BUNDLE", "/ca.pem"),
        ];
        let store = read(&aws).unwrap().store;
        assert_eq!(store.keys, Some(("A".into(), "S".into())));
        assert_eq!((store.token.as_deref(), store.region.as_deref()), (Some("T"), Some("eu-north-1")));
        assert_eq!((store.endpoint.as_deref(), store.validate), (Some("https://s3"), Validate::By("/ca.pem".into())));
        assert_eq!(store.url, None, "an AWS endpoint names no bucket");
        let ours = [("S3_ACCESS_KEY", "a"), ("S3_SECRET_KEY", "s"), ("S3_ENDPOINT", "http://rgw")];
        let store = read(&[&aws[..], &ours, &[("S3_SSL_VALIDATE", "False")]].concat()).unwrap().store;
        assert_eq!(store.keys, Some(("a".into(), "s".into())));
        assert_eq!(
            (store.token, store.endpoint.as_deref()),
            (None, Some("http://rgw")),
            "the token belongs to other keys"
        );
        assert_eq!((store.url.as_deref(), store.validate), (Some("s3://boot-images"), Validate::No));
        let store = read(&[&ours[..2], &aws[2..3]].concat()).unwrap().store;
        assert_eq!((store.token.as_deref(), store.region.as_deref()), (Some("T"), None));
        assert!(read(&aws[..1]).unwrap_err().to_string().contains("AWS_SECRET_ACCESS_KEY"));
    }

    #[test]
    fn keys_and_tokens_are_trimmed_of_a_newline_and_refused_if_invalid_in_a_header() {
        let keys = |end: &str| {
            let [access, secret, token] =
                ["A", "the secret", "T"].map(|text| format!("{}{end}", text.replace(' ', "-")));
            let names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
            let variables: Vec<_> = names.into_iter().zip([access, secret, token]).collect();
            Settings::read(None, variables.into_iter().map(|(n, v)| (n.into(), v.into())))
                .map(|settings| settings.store)
        };
        for end in ["", "\n", "\r\n"] {
            let store = keys(end).unwrap();
            assert_eq!(store.keys, Some(("A".into(), "the-secret".into())), "{end:?}");
            assert_eq!(store.token.as_deref(), Some("T"), "{end:?}");
        }
        for wrong in ["\n\n", "\r", " ", "\r\nx: y", "ö", "\u{7f}"] {
            let refused = keys(wrong).unwrap_err().to_string();
            for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"] {
                assert!(refused.contains(&format!("{name} holds")), "{wrong:?}: {refused}");
            }
            assert!(!refused.contains("the-secret"), "{refused}");
        }
    }

    #[test]
    fn all_wrong_values_are_named_in_one_error() {
        let wrong = [
            ("IMS_ACTION", "destroy"),
            ("KERNEL_FILENAME", "../../etc/shadow"),
            ("DOWNLOAD_MD5SUM", "no"),
            ("DOWNLOAD_SHA256SUM", "d41d8cd98f00b204e9800998ecf8427e"),
            ("S3_SSL_VALIDATE", "perhaps"),
            ("S3_ACCESS_KEY", "alone"),
            ("IMS_JOB_ID", "../images"),
            ("IMAGE_COMPRESSION", "rar"),
            ("IMS_RETRY_LIMIT", "long"),
            ("IMAGE_ROOT_ARCHIVE_NAME", "a/b"),
            ("AWS_REGION", "eu north"),
            ("IMS_STALL_LIMIT", "0"),
        ];
        let refused = |variables: &[(&str, &str)]| read(variables).unwrap_err().to_string();
        assert!(refused(&[("IMS_URL", "ims")]).contains("IMS_URL"));
        for url in ["127.0.0.1:5777", "localhost:5777", "ftp://s3", "http://", "s3"] {
            assert!(refused(&[("S3_ENDPOINT", url)]).contains("S3_ENDPOINT"), "{url}");
            assert!(refused(&[("AWS_ENDPOINT_URL", url)]).contains("AWS_ENDPOINT_URL"), "{url}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("endpoint"), "keycloak/token\n").unwrap();
        assert!(
            refused(&[("OAUTH_CONFIG_DIR", dir.path().to_str().unwrap())]).contains("endpoint is 'keycloak/token'")
        );
        assert!(refused(&[("IMS_URL", "http://ims"), ("IMS_JOB_ID", "7")]).contains("a UUID"));
        let message = refused(&wrong);
        for (name, _) in wrong {
            assert!(message.contains(name), "{name}: {message}");
        }
    }
}

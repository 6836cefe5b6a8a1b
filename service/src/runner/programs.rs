//! The program that carries out the steps of a job, and the variables that name the store to it.

use std::path::PathBuf;

use crate::settings::Settings;

/// Path of `ims-sshd`: next to this program if both were installed together, otherwise just the name, to be found in
/// `PATH`.
pub fn ims_sshd() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|program| program.with_file_name("ims-sshd"));
    beside.filter(|program| program.exists()).unwrap_or_else(|| "ims-sshd".into())
}

/// Returns the variables by which `ims-sshd` finds the store of a service with these settings.
pub fn store_variables(settings: &Settings) -> Vec<(String, String)> {
    let mut variables =
        vec![("S3_BUCKET", settings.boot_images_bucket.clone()), ("S3_ENDPOINT", settings.s3_endpoint.clone())];
    if settings.directory().is_none() {
        variables.extend([
            ("S3_ACCESS_KEY", settings.s3_access_key.clone()),
            ("S3_SECRET_KEY", settings.s3_secret_key.clone()),
            ("S3_SSL_VALIDATE", settings.s3_ssl_validate.clone()),
        ]);
    }
    variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

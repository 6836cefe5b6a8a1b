//! The container's resolv.conf, shown in the jail where programs of an image look for it. `build` puts it there.

use std::path::{Path, PathBuf};

use crate::sys::tree::Tree;

/// Path of the file, in the container and in the image.
pub(crate) const RESOLV_CONF: &str = "etc/resolv.conf";

/// Maximum size of resolv.conf, in bytes; a larger file is ignored.
pub(crate) const LIMIT: u64 = 1 << 20;

/// Common targets below /run of a link at /etc/resolv.conf: those of systemd-resolved, SUSE's netconfig, resolvconf and
/// NetworkManager. A session can install one of these programs, and names must still resolve afterwards.
const BELOW_RUN: [&str; 5] = [
    "systemd/resolve/stub-resolv.conf",
    "systemd/resolve/resolv.conf",
    "netconfig/resolv.conf",
    "resolvconf/resolv.conf",
    "NetworkManager/resolv.conf",
];

/// Text of the container's file; `None` if there is none.
pub(crate) fn of_container() -> Option<Vec<u8>> {
    std::fs::read(Path::new("/").join(RESOLV_CONF)).ok().filter(|text| text.len() as u64 <= LIMIT)
}

/// Files below /run that a jail gets.
pub(crate) fn files_below_run(image_root: &Tree) -> Vec<PathBuf> {
    BELOW_RUN.into_iter().map(PathBuf::from).chain(link_into_run(image_root)).collect()
}

/// Target of a link at /etc/resolv.conf, if it is below /run.
pub(crate) fn link_into_run(image_root: &Tree) -> Option<PathBuf> {
    let target = image_root.leads_to(RESOLV_CONF).ok()?;
    target.strip_prefix("run").ok().filter(|below| !below.as_os_str().is_empty()).map(Path::to_owned)
}

//! The container's resolv.conf in the jail: where programs of an image look for it.

use std::path::{Path, PathBuf};

use crate::sys::tree::Tree;

/// The container's file, and the image's.
pub(crate) const RESOLV_CONF: &str = "etc/resolv.conf";

/// A larger file is not taken for one.
pub(crate) const LIMIT: u64 = 1 << 20;

/// Targets below /run of links at /etc/resolv.conf: systemd-resolved's, SUSE's netconfig's, resolvconf's,
/// NetworkManager's. A session can install such a program, and its next command still has to resolve names.
const BELOW_RUN: [&str; 5] = [
    "systemd/resolve/stub-resolv.conf",
    "systemd/resolve/resolv.conf",
    "netconfig/resolv.conf",
    "resolvconf/resolv.conf",
    "NetworkManager/resolv.conf",
];

/// The container's text; `None` where it has none.
pub(crate) fn of_container() -> Option<Vec<u8>> {
    std::fs::read(Path::new("/").join(RESOLV_CONF)).ok().filter(|text| text.len() as u64 <= LIMIT)
}

/// The files below /run that a jail gets.
pub(crate) fn files_below_run(image_root: &Tree) -> Vec<PathBuf> {
    BELOW_RUN.into_iter().map(PathBuf::from).chain(link_into_run(image_root)).collect()
}

/// Target of a link at /etc/resolv.conf, if it is below /run.
pub(crate) fn link_into_run(image_root: &Tree) -> Option<PathBuf> {
    let target = image_root.leads_to(RESOLV_CONF).ok()?;
    target.strip_prefix("run").ok().filter(|below| !below.as_os_str().is_empty()).map(Path::to_owned)
}

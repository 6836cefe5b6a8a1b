//! Every name in the image root's parent, the directory that the containers of a pod share.

use crate::job::{Action, Job};

/// The image root of a job that changes an image.
pub(crate) const IMAGE_ROOT: &str = "image-root";
/// The image root of a job that builds one from a recipe.
pub(crate) const CREATED_IMAGE_ROOT: &str = "build/image-root";

impl Job {
    /// The image root, relative to the parent.
    pub(crate) fn image_root(&self) -> &'static str {
        match self.action {
            Some(Action::Create) => CREATED_IMAGE_ROOT,
            _ => IMAGE_ROOT,
        }
    }
}

/// Signal file: the sidecar has unpacked the image and written sshd's configuration.
pub(crate) const READY: &str = "ready";
/// Signal file: sshd accepts connections.
pub(crate) const SSHD_LISTENING: &str = "sshd_listening";
/// Signal file: nobody writes to the image root any more.
pub(crate) const EXITING: &str = "exiting";
/// Signal file: a build from a recipe failed.
pub(crate) const BUILD_FAILED: &str = "build_failed";
/// Signal file: a container of the pod has failed.
pub(crate) const POD_ERROR: &str = "pod_error";

/// The packed image of a remote job.
pub(crate) const TRANSFER: &str = "transfer.sqsh";
/// The source image, if it is mounted or was fetched.
pub(crate) const ARCHIVE: &str = "image.sqsh";
/// The source image while it is fetched.
pub(crate) const FETCHING: &str = "image.sqsh.part";
/// Directory for what an overlay keeps.
pub(crate) const OVERLAY: &str = "overlay";
/// The image root while it is unpacked.
pub(crate) const UNPACKING: &str = ".ims-sshd.unpacking";

/// Identity of the source of the image root.
pub(crate) const SOURCE: &str = ".ims-sshd.source";
/// Record of the packed image and of the image root that it was made of.
pub(crate) const PACKED: &str = ".ims-sshd.packed";
/// Inventory of the image as it was before the job.
pub(crate) const INVENTORY: &str = ".ims-sshd.inventory";
/// Stage that the job has reached.
pub(crate) const STAGE: &str = ".ims-sshd.stage";
/// Record of what a sidecar has done.
pub(crate) const PUBLICATION: &str = ".ims-sshd.publication";
/// Record of the parts that a sidecar has uploaded.
pub(crate) const UPLOAD: &str = ".ims-sshd.upload";
/// Key of a work directory that only its owner can read; also in a store that is a directory.
pub(crate) const KEY: &str = ".ims-sshd.key";
/// Record of what was made in the image for the jail.
pub(crate) const MOUNT_POINTS: &str = ".ims-sshd.additions";
/// Directory for the image's resolv.conf while a build environment lends it another.
pub(crate) const RESOLV_CONF: &str = ".ims-sshd.resolv.conf";
/// The same while a sidecar does.
pub(crate) const SIDECAR_RESOLV_CONF: &str = ".ims-sshd.sidecar.resolv.conf";
/// File that is locked as long as a build environment is open.
pub(crate) const CLAIM: &str = ".ims-sshd.claim";
/// File that is locked as long as a sidecar runs.
pub(crate) const SIDECAR_CLAIM: &str = ".ims-sshd.sidecar";
/// Empty files that can become signal files by a rename where the disk is full: the verdict in the parent and in the image, and `exiting`.
pub(crate) const RESERVED: [&str; 3] = [".ims-sshd.reserve-1", ".ims-sshd.reserve-2", ".ims-sshd.reserve-3"];

//! Every name in the image root parent, the directory that the containers of a pod share.

use crate::job::Job;
use crate::job::action::Action;

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
/// File of upstream's prepare: the port of the container that it has started on a remote build node.
pub(crate) const REMOTE_PORT: &str = "remote_port";

/// Directory of a recipe.
pub(crate) const RECIPE: &str = "recipe";
/// Log of kiwi-ng.
pub(crate) const KIWI_LOG: &str = "kiwi.log";
/// Directory of a build's own files, removed when the build ends.
pub(crate) const BUILD: &str = ".ims-sshd.build";

/// The packed image of a remote job.
pub(crate) const TRANSFER: &str = "transfer.sqsh";
/// Names of the boot files of a remote job. `prepare` records them for the container that starts the packing, which
/// does not get the variables that set these names.
pub(crate) const BOOT_NAMES: &str = ".ims-sshd.boot";
/// Public host key of the sshd of a remote job, which has been made on the node.
pub const REMOTE_HOST_KEY: &str = ".ims-sshd.host-key";
/// Report of the changes of a remote job.
pub(crate) const REMOTE_CHANGES: &str = ".ims-sshd.changes";
/// Squashfs of the image root that a failed remote build left behind, until it is unpacked.
pub(crate) const REMOTE_TREE: &str = ".ims-sshd.tree.sqsh";
/// Recipe of a remote job, an archive.
pub(crate) const REMOTE_RECIPE: &str = ".ims-sshd.recipe.tar";
/// Results that are being received from a remote build node: the packed image, its boot files, the report of changes,
/// and the log of kiwi-ng.
pub(crate) const REMOTE_PARTS: [&str; 6] = [
    ".ims-sshd.remote.image",
    ".ims-sshd.remote.kernel",
    ".ims-sshd.remote.initrd",
    ".ims-sshd.remote.parameters",
    ".ims-sshd.remote.changes",
    ".ims-sshd.remote.log",
];
/// The source image, if it is mounted or was fetched.
pub(crate) const ARCHIVE: &str = "image.sqsh";
/// The source image while it is being fetched.
pub(crate) const FETCHING: &str = "image.sqsh.part";
/// Directory of an overlay's upper and work directories.
pub(crate) const OVERLAY: &str = "overlay";
/// The image root while it is being unpacked.
pub(crate) const UNPACKING: &str = ".ims-sshd.unpacking";
/// Directory for a new image root, until it is complete and replaces the old one.
pub(crate) const FRESH: &str = ".ims-sshd.fresh";
/// Directory for a replaced image root, until it is removed.
pub(crate) const DROPPED: &str = ".ims-sshd.dropped";

/// Identity of the source that the image root was created from.
pub(crate) const SOURCE: &str = ".ims-sshd.source";
/// Record of the packed image and of the image root that it was packed from.
pub(crate) const PACKED: &str = ".ims-sshd.packed";
/// Inventory of the image as it was before the job.
pub(crate) const INVENTORY: &str = ".ims-sshd.inventory";
/// Inventory of an unpacked image root as it was right after unpacking, for the packer.
pub(crate) const UNPACKED: &str = ".ims-sshd.unpacked";
/// The squashfs that an image root was unpacked from, if it was fetched and is kept for the packer.
pub(crate) const KEPT_SOURCE: &str = ".ims-sshd.source.sqsh";
/// Stage that the job has reached.
pub(crate) const STAGE: &str = ".ims-sshd.stage";
/// Journal of the steps that a sidecar has completed.
pub(crate) const PUBLICATION: &str = ".ims-sshd.publication";
/// Record of the parts that a sidecar has uploaded.
pub(crate) const UPLOAD: &str = ".ims-sshd.upload";
/// Key that authenticates records, readable by its owner alone; a store that is a directory has one too.
pub(crate) const KEY: &str = ".ims-sshd.key";
/// Record of the mount points that were created in the image for the jail.
pub(crate) const MOUNT_POINTS: &str = ".ims-sshd.additions";
/// Directory that keeps the image's own resolv.conf while a build environment has replaced it.
pub(crate) const RESOLV_CONF: &str = ".ims-sshd.resolv.conf";
/// Directory that keeps the image's own resolv.conf while a sidecar has replaced it.
pub(crate) const SIDECAR_RESOLV_CONF: &str = ".ims-sshd.sidecar.resolv.conf";
/// File that a build environment locks as long as the environment is open.
pub(crate) const CLAIM: &str = ".ims-sshd.claim";
/// File that a sidecar, a `prepare`, a `package` or an `upload` locks as long as it runs, so that one runs at a time.
/// The file holds the name of that command and its process id.
pub(crate) const STEP_CLAIM: &str = ".ims-sshd.sidecar";
/// Empty files that a rename turns into signal files when the disk is full: the verdict in the parent, the verdict in
/// the image, and `exiting`.
pub(crate) const RESERVED: [&str; 3] = [".ims-sshd.reserve-1", ".ims-sshd.reserve-2", ".ims-sshd.reserve-3"];

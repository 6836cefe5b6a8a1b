//! The jail: the namespaces around the image root. Made once a job, entered by every session.

pub mod architecture;
pub mod binfmt;
pub mod build;
pub mod capabilities;
pub mod enter;
pub mod init;
pub mod link;
pub mod mount_points;
pub mod mount_table;
pub mod record;

use nix::sched::CloneFlags;

/// The namespaces that a jail has of its own. The network is the container's: sessions work with the pod's addresses.
pub const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

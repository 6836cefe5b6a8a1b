//! Images written by `src/squashfs`, judged by the kernel: each is mounted, and every entry compared with the tree.
//!
//! `SQUASHFS_TREES` is the number of random trees (20 by default), `SQUASHFS_MUTATIONS` that of damaged images (2000),
//! and `SQUASHFS_SEED` the first seed of both. Long runs take a third of the time or less with
//! `--config profile.dev.package.ims-sshd.opt-level=2` and a tmpfs that is mounted on `tests` in the cache. With
//! `SQUASHFS_IMAGES=all`, each of the cache's image roots is packed from each kind of source.

mod failures;
mod figures;
mod format;
mod hostile;
mod images;
mod random;
mod snapshot;
mod sources;
mod taken;
mod trees;

//! Images written by `src/squashfs`, judged by the kernel: each is mounted, and every entry compared with the tree.
//!
//! `SQUASHFS_TREES` is the number of random trees (20 by default).

mod figures;
mod format;
mod hostile;
mod random;
mod snapshot;
mod sources;
mod taken;
mod trees;

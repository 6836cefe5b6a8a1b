//! SquashFS 4.0: a reader, and a writer that copies the compressed blocks of unchanged files from a source image.
//!
//! A new image is created in three steps:
//!
//! 1. [`Plan`] collects the entries of the image: [`Plan::new`] with the root directory, [`Plan::add`] for each entry,
//!    [`Plan::link`] for hard links. [`gather`] creates the plan of an existing directory tree. The content of a
//!    regular file is either read ([`Content::Read`]) or taken over from an inode of a source image
//!    ([`Content::Taken`]).
//! 2. [`Inventory::new`] checks the content of a source image. Skip this step if there is no source.
//! 3. [`write()`] writes the image, and returns a [`Summary`].
//!
//! The same plan, source and [`Options`] give the same bytes, whatever the number of processors and the order of
//! [`Plan::add`] calls. The image contains nothing but what the plan describes.
//!
//! A source is input from outside: it may be damaged or malicious. [`Fault`] says what is wrong with it.

mod blocks;
pub mod compression;
mod content;
mod error;
mod format;
pub mod gather;
mod inventory;
mod metadata;
mod options;
mod plan;
mod progress;
mod reader;
mod tables;
mod takeover;
mod walk;
mod writer;

pub use compression::{Compression, Method};
pub use content::Open;
pub use error::{Failure, Fault, Limit};
pub use inventory::Inventory;
pub use options::{DEFAULT_BLOCK_SIZE, Fragments, Options};
pub use plan::{Attributes, Content, NodeId, Object, Plan, can_hold};
pub use progress::{Progress, Report};
pub use reader::Reader;
pub use walk::Entry;
pub use writer::{Summary, write};

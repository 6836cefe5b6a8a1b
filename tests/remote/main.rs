//! Remote build nodes: real ones with an sshd, a root and a network of their own, from prepare to a published image.

mod builds;
mod clients;
mod faults;
mod hostile;
mod jobs;
mod offloaded;
mod remote;
mod site;
mod upstream;

//! POSIX ACLs, which a squashfs cannot hold.

use std::path::Path;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

/// Extended attribute that holds an ACL. linux/posix_acl_xattr.h defines the format: a version, then each entry's tag,
/// rights and ID, all little-endian.
pub(crate) const ACCESS_LIST: &str = "system.posix_acl_access";
/// Tag of the entry for the file's group.
const ACL_GROUP_OBJ: u16 = 0x04;

/// Permissions to pack for a file whose ACL gives its group fewer rights than the mode shows; `None` for any other
/// file. If a file has an ACL, the group bits of its mode are the ACL's mask (acl(5)). A squashfs cannot hold the ACL,
/// so with an unchanged mode the group would get all rights of the mask. `at` is a path by which the ACL can be read.
pub(crate) fn narrowed(at: &Path, found: &Stat) -> Option<u32> {
    let is_link = FileType::from_raw_mode(found.st_mode) == FileType::Symlink;
    if is_link || found.st_mode & 0o070 == 0 {
        return None;
    }
    let mut list = [0; 4096];
    let length = match rustix::fs::lgetxattr(at, ACCESS_LIST, &mut list[..]) {
        Ok(length) => length,
        // The ACL does not fit into the buffer, so it is longer than any that a person writes. Give the group nothing.
        Err(Errno::RANGE) => 0,
        Err(_) => return None,
    };
    let group = group_rights(&list[..length]).unwrap_or(0) & (found.st_mode >> 3);
    let mode = found.st_mode & 0o7707 | group << 3;
    (mode != found.st_mode & 0o7777).then_some(mode)
}

/// Rights of the entry for the file's group in an ACL.
fn group_rights(list: &[u8]) -> Option<u32> {
    let entries = list.get(4..)?.chunks_exact(8);
    let number = |at: &[u8]| u16::from_le_bytes([at[0], at[1]]);
    let group = entries.map(|entry| (number(entry), number(&entry[2..]))).find(|(tag, _)| *tag == ACL_GROUP_OBJ);
    group.map(|(_, rights)| u32::from(rights & 7))
}

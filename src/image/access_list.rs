//! POSIX ACLs, which a squashfs cannot hold.

use std::path::Path;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

/// Extended attribute that holds an ACL. Its format is that of linux/posix_acl_xattr.h: a version, then tag, rights and
/// ID of each entry, all little-endian.
pub(crate) const ACCESS_LIST: &str = "system.posix_acl_access";
const ACL_GROUP_OBJ: u16 = 0x04;

/// Permissions of a file whose ACL gives its group less than its mode does: with an ACL, the mode has the mask there
/// (acl(5)), which a squashfs without the ACL would give to the group. `at` is a path by which the ACL can be read.
pub(crate) fn narrowed(at: &Path, found: &Stat) -> Option<u32> {
    let is_link = FileType::from_raw_mode(found.st_mode) == FileType::Symlink;
    if is_link || found.st_mode & 0o070 == 0 {
        return None;
    }
    let mut list = [0; 4096];
    let length = match rustix::fs::lgetxattr(at, ACCESS_LIST, &mut list[..]) {
        Ok(length) => length,
        // Longer than any that a person writes: the group gets nothing.
        Err(Errno::RANGE) => 0,
        Err(_) => return None,
    };
    let group = group_rights(&list[..length]).unwrap_or(0) & (found.st_mode >> 3);
    let mode = found.st_mode & 0o7707 | group << 3;
    (mode != found.st_mode & 0o7777).then_some(mode)
}

/// Rights of the group's entry in an ACL.
fn group_rights(list: &[u8]) -> Option<u32> {
    let entries = list.get(4..)?.chunks_exact(8);
    let number = |at: &[u8]| u16::from_le_bytes([at[0], at[1]]);
    let group = entries.map(|entry| (number(entry), number(&entry[2..]))).find(|(tag, _)| *tag == ACL_GROUP_OBJ);
    group.map(|(_, rights)| u32::from(rights & 7))
}

//! Trees with everything that a squashfs can hold, drawn from a seed.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// Numbers from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }

    pub fn one_in(&mut self, chance: u64) -> bool {
        self.below(chance) == 0
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(length);
        bytes
    }
}

/// A tree on disk that is drawn, and edited at random.
pub struct Drawn {
    pub root: PathBuf,
    pub random: Random,
    pub block_size: u64,
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
    others: Vec<PathBuf>,
    contents: Vec<Vec<u8>>,
    names: u64,
    /// Inode numbers of files whose content has changed or which are gone.
    pub changed: Vec<u64>,
}

impl Drawn {
    pub fn new(root: &Path, seed: u64, block_size: u64) -> Self {
        let mut random = Random(seed);
        let entries = 10 + random.below(90);
        let mut drawn = Self::of(root, random, block_size, entries);
        if drawn.random.one_in(8) {
            drawn.add_large_directory();
        }
        drawn
    }

    /// A tree of so many entries.
    pub fn with_entries(root: &Path, seed: u64, block_size: u64, entries: u64) -> Self {
        Self::of(root, Random(seed), block_size, entries)
    }

    fn of(root: &Path, random: Random, block_size: u64, entries: u64) -> Self {
        fs::create_dir_all(root).unwrap();
        let mut drawn = Self {
            root: root.to_owned(),
            random,
            block_size,
            directories: vec![PathBuf::new()],
            files: Vec::new(),
            others: Vec::new(),
            contents: Vec::new(),
            names: 0,
            changed: Vec::new(),
        };
        for _ in 0..entries {
            drawn.add();
        }
        drawn
    }

    fn place(&mut self) -> PathBuf {
        let at = self.random.index(self.directories.len());
        self.names += 1;
        let mut name = match self.random.below(6) {
            0 => self.random.bytes(1).repeat(200),
            1 => self.random.bytes(6),
            2 => b"Z".to_vec(),
            _ => b"file.".to_vec(),
        };
        name.retain(|byte| !matches!(byte, b'/' | 0));
        name.extend(self.names.to_string().bytes());
        self.directories[at].join(OsString::from_vec(name))
    }

    fn content(&mut self) -> Vec<u8> {
        if !self.contents.is_empty() && self.random.one_in(5) {
            let at = self.random.index(self.contents.len());
            return self.contents[at].clone();
        }
        let block = self.block_size;
        let length = match self.random.below(10) {
            0 => 0,
            1 => block,
            2 => block - 1,
            3 => block + 1,
            4 => block * self.random.below(4),
            5 => block * 2 + self.random.below(block),
            _ => self.random.below(block.min(5000)),
        };
        let length = usize::try_from(length).unwrap();
        let content = match self.random.below(5) {
            0 => vec![0; length],
            1 => self.random.bytes(length),
            2 => {
                let mut mixed = vec![0; length];
                let noise = self.random.bytes(length / 3);
                mixed[..noise.len()].copy_from_slice(&noise);
                mixed
            }
            _ => {
                let word = self.random.bytes(7);
                word.iter()
                    .cycle()
                    .enumerate()
                    .take(length)
                    .map(|(n, byte)| byte ^ (n / 999).to_le_bytes()[0])
                    .collect()
            }
        };
        if content.len() < 1 << 20 {
            self.contents.push(content.clone());
        }
        content
    }

    /// Adds an entry of any type.
    pub fn add(&mut self) {
        let path = self.place();
        let real = self.root.join(&path);
        match self.random.below(20) {
            0..3 => {
                fs::create_dir(&real).unwrap();
                self.directories.push(path.clone());
            }
            3 => {
                let length = 1 + self.random.index(300);
                symlink(OsStr::from_bytes(&vec![b't'; length]), &real).unwrap();
                self.others.push(path.clone());
            }
            4 => {
                let kinds = [FileType::Fifo, FileType::Socket, FileType::CharacterDevice, FileType::BlockDevice];
                let kind = kinds[self.random.index(4)];
                let (major, minor) = (self.random.below(4096), self.random.below(1 << 20));
                let device = rustix::fs::makedev(u32::try_from(major).unwrap(), u32::try_from(minor).unwrap());
                rustix::fs::mknodat(rustix::fs::CWD, &real, kind, Mode::RUSR, device).unwrap();
                self.others.push(path.clone());
            }
            5 if !self.files.is_empty() => {
                let at = self.random.index(self.files.len());
                fs::hard_link(self.root.join(&self.files[at]), &real).unwrap();
                self.files.push(path.clone());
                return;
            }
            6 => {
                let (size, at) = (self.random.below(self.block_size * 20), self.random.below(self.block_size * 20));
                let file = File::create(&real).unwrap();
                file.set_len(size).unwrap();
                file.write_all_at(b"between holes", at).unwrap();
                self.files.push(path.clone());
            }
            _ => {
                fs::write(&real, self.content()).unwrap();
                self.files.push(path.clone());
            }
        }
        self.set_attributes(&path);
    }

    fn add_large_directory(&mut self) {
        let directory = self.place();
        fs::create_dir(self.root.join(&directory)).unwrap();
        for number in 0..1500 + self.random.below(1500) {
            let path = directory.join(format!("an entry of a large directory with the number {number}"));
            File::create(self.root.join(&path)).unwrap();
            self.files.push(path);
        }
        self.directories.push(directory);
    }

    /// Mode, owner, time and extended attributes.
    fn set_attributes(&mut self, path: &Path) {
        let real = self.root.join(path);
        let is_link = real.is_symlink();
        let ids = [0, 1, 1000, 65_534, 100_000, 4_000_000_000].map(rustix::fs::Uid::from_raw);
        let (user, group) = (ids[self.random.index(6)], ids[self.random.index(6)].as_raw());
        let group = rustix::fs::Gid::from_raw(group);
        rustix::fs::chownat(rustix::fs::CWD, &real, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW).unwrap();
        if !is_link {
            let mode = u32::try_from(self.random.below(0o10000)).unwrap();
            fs::set_permissions(&real, fs::Permissions::from_mode(mode)).unwrap();
        }
        for _ in 0..self.random.below(8).saturating_sub(5) {
            let name = match self.random.below(4) {
                0 if !is_link && real.is_file() => format!("user.n{}", self.random.below(5)),
                1 => "security.selinux".into(),
                _ => format!("trusted.n{}", self.random.below(5)),
            };
            let length = [0, 1, 8, 9, 30, 1000][self.random.index(6)];
            let seed = self.random.below(4);
            let value = Random(seed).bytes(length);
            rustix::fs::lsetxattr(&real, name.as_str(), &value, XattrFlags::empty()).unwrap();
        }
        let time = i64::try_from(self.random.below(u32::MAX.into())).unwrap();
        set_time(&real, time);
    }

    fn dirty(&mut self, path: &Path) {
        if let Ok(found) = fs::symlink_metadata(self.root.join(path)) {
            self.changed.push(found.ino());
        }
    }

    /// Changes something: content with or without a new time, names, attributes, what is there at all.
    pub fn edit(&mut self) {
        if self.files.is_empty() || self.random.one_in(4) {
            let (path, before) = (self.place(), self.names);
            drop(path);
            self.names = before;
            self.add();
            return;
        }
        let at = self.random.index(self.files.len());
        let path = self.files[at].clone();
        let real = self.root.join(&path);
        let found = fs::symlink_metadata(&real).unwrap();
        match self.random.below(7) {
            0 => {
                // The last name of an inode: its number may be given to a new file.
                self.dirty(&path);
                fs::remove_file(&real).unwrap();
                self.files.remove(at);
            }
            1 => {
                self.dirty(&path);
                let content = self.content();
                fs::write(&real, content).unwrap();
            }
            2 => {
                // Size and time as before.
                self.dirty(&path);
                let length = usize::try_from(found.len().min(50)).unwrap();
                let bytes = self.random.bytes(length);
                File::options().write(true).open(&real).unwrap().write_all_at(&bytes, 0).unwrap();
                set_time(&real, found.mtime());
            }
            3 => {
                let new = self.place();
                fs::rename(&real, self.root.join(&new)).unwrap();
                self.files[at] = new;
            }
            4 => self.set_attributes(&path),
            5 => {
                self.dirty(&path);
                let new = self.root.join("new");
                let content = self.content();
                File::create(&new).unwrap().write_all(&content).unwrap();
                fs::rename(&new, &real).unwrap();
            }
            _ => {
                let new = self.place();
                fs::hard_link(&real, self.root.join(&new)).unwrap();
                self.files.push(new);
            }
        }
    }
}

fn set_time(path: &Path, time: i64) {
    let time = Timespec { tv_sec: time, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

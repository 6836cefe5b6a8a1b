//! Takes over parts of a source image into a new one. Compressed data blocks are copied, and so are fragment blocks in
//! which all content is live (used by the new image). The live tails in other fragment blocks are moved into new
//! fragment blocks.
//!
//! Blocks are copied in the order of the source. Only live blocks are copied, so no content of other files gets into
//! the new image. Files that share blocks in the source also share them in the new image.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::squashfs::blocks::{FileBlocks, Halt, Queue};
use crate::squashfs::content::Reading;
use crate::squashfs::error::{Failure, Fault};
use crate::squashfs::format::{Fragment, STORED_BLOCK};
use crate::squashfs::inventory::{Inventory, SourceFile, in_parts};
use crate::squashfs::options::{Fragments, Options};
use crate::squashfs::plan::NodeId;
use crate::squashfs::progress::Meter;
use crate::squashfs::reader::BlockReader;

/// Number of bytes that are copied between two progress reports.
const STEP: u64 = 16 << 20;

/// Sorted ranges of numbers. Overlapping ranges are merged; adjacent ranges stay separate.
#[derive(Debug, Default, Clone)]
struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    fn of(mut ranges: Vec<(u64, u64)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges {
            match merged.last_mut() {
                Some(last) if start < last.1 || (start, end) == *last => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        Self(merged)
    }

    /// Returns the index of the range that contains `at`.
    fn find(&self, at: u64) -> Option<usize> {
        let behind = self.0.partition_point(|(start, _)| *start <= at);
        let index = behind.checked_sub(1)?;
        (at < self.0[index].1).then_some(index)
    }

    /// Returns whether the ranges together are exactly `0..length`.
    fn cover(&self, length: u64) -> bool {
        let mut covered = 0;
        self.0.iter().all(|(start, end)| (*start == covered).then(|| covered = *end).is_some()) && covered == length
    }
}

/// The parts of a source image that are copied to the new image as they are.
#[derive(Debug, Default)]
pub(crate) struct Takeover<'a> {
    source: Option<&'a Inventory>,
    /// Ranges of the source that are copied, in the order of the source.
    copied: Ranges,
    /// Position of each copied range in the new image.
    places: Vec<u64>,
    total: u64,
    /// Fragment blocks that are copied: index in the source, and the block in the new image.
    kept: Vec<(u32, Fragment)>,
    /// Live ranges of the other fragment blocks, by the index of the block in the source.
    moved: BTreeMap<u32, Ranges>,
}

/// For each moved tail: fragment block and offset in the source, mapped to fragment block and offset in the new image.
pub(crate) type Moved = HashMap<(u32, u64), (u32, u32)>;

impl<'a> Takeover<'a> {
    /// Decides which parts of `source` are copied to an image whose data begins at `start`, so that the content of
    /// `files` is taken over. `has_more` is true if the image has other files too.
    pub(crate) fn new(
        source: &'a Inventory,
        files: &[(NodeId, SourceFile)],
        start: u64,
        options: &Options,
        has_more: bool,
    ) -> Result<Self, Fault> {
        let mut ranges = Vec::new();
        let mut live: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        for (_, file) in files {
            let length: u64 = source.blocks(file).iter().map(|size| u64::from(size & !STORED_BLOCK)).sum();
            if length > 0 {
                ranges.push((file.start, file.start + length));
            }
            if let Some((index, offset, end)) = source.tail(file) {
                live.entry(index).or_default().push((offset.into(), end.into()));
            }
        }
        let live: BTreeMap<u32, Ranges> = live.into_iter().map(|(index, tails)| (index, Ranges::of(tails))).collect();
        let whole = whole_fragments(source, &live, options.processors)?;
        // If a new fragment block is filled anyway, also move the tails of blocks that are less than half full into it.
        // Otherwise each generation of an image would add such a block.
        let has_new = (has_more && options.fragments != Fragments::Never) || whole.len() < live.len();
        let half = u64::from(options.block_size) / 2;
        let (mut kept, mut moved) = (Vec::new(), BTreeMap::new());
        for (index, tails) in live {
            let fragment = source.fragments[index as usize];
            let is_full = tails.0.last().is_some_and(|(_, end)| *end >= half);
            if whole.binary_search(&index).is_ok() && (is_full || !has_new) {
                ranges.push((fragment.start, fragment.start + u64::from(fragment.size & !STORED_BLOCK)));
                kept.push((index, fragment));
            } else {
                moved.insert(index, tails);
            }
        }
        let copied = Ranges::of(ranges);
        let mut end = start;
        let place = |(from, to): &(u64, u64)| {
            let at = end;
            end += to - from;
            at
        };
        let places = copied.0.iter().map(place).collect();
        let mut made = Self { source: Some(source), copied, places, total: end - start, kept, moved };
        for position in 0..made.kept.len() {
            made.kept[position].1.start = made.place(made.kept[position].1.start)?;
        }
        Ok(made)
    }

    /// Returns the position in the new image of the byte that is at `at` in the source.
    fn place(&self, at: u64) -> Result<u64, Fault> {
        let index = self.copied.find(at).ok_or_else(|| Fault::damaged("a block is not among those copied"))?;
        Ok(self.places[index] + (at - self.copied.0[index].0))
    }

    /// Number of bytes that are copied without change.
    pub(crate) fn to_take(&self) -> u64 {
        self.total
    }

    /// Number of bytes of tails that are compressed again.
    pub(crate) fn to_read(&self) -> u64 {
        self.moved.values().flat_map(|ranges| &ranges.0).map(|(start, end)| end - start).sum()
    }

    /// Fragment blocks that are copied, in the order of the new fragment table.
    pub(crate) fn kept_fragments(&self) -> impl Iterator<Item = Fragment> {
        self.kept.iter().map(|(_, fragment)| *fragment)
    }

    /// Number of fragment blocks that are copied.
    pub(crate) fn fragments(&self) -> u32 {
        u32::try_from(self.kept.len()).unwrap_or(u32::MAX)
    }

    /// Copies the blocks to `output`.
    pub(crate) fn copy(&self, output: &File, meter: &Meter) -> Result<(), Failure> {
        let Some(source) = self.source else { return Ok(()) };
        let mut pieces: Vec<(u64, u64, u64)> = Vec::new();
        for ((from, end), to) in self.copied.0.iter().zip(&self.places) {
            match pieces.last_mut() {
                // Copy adjacent ranges as one piece: they are also adjacent in the new image.
                Some((last_from, length, _)) if *last_from + *length == *from => *length += end - from,
                _ => pieces.push((*from, end - from, *to)),
            }
        }
        for (mut from, mut left, mut to) in pieces {
            while left > 0 {
                let done = copy_some(source.source(), from, output, to, left.min(STEP))?;
                meter.taken(done);
                (from, left, to) = (from + done, left - done, to + done);
            }
        }
        Ok(())
    }

    /// Moves the live tails of fragment blocks that are not copied into new fragment blocks, and returns their new
    /// positions.
    pub(crate) fn move_tails(&self, queue: &Queue, reading: &mut Reading) -> Result<Moved, Halt<Failure>> {
        let mut places = Moved::new();
        let Some(source) = self.source else { return Ok(places) };
        let mut blocks = BlockReader::new(source.source(), &source.method);
        for (index, tails) in &self.moved {
            let fragment = source.fragments[*index as usize];
            let content = blocks.read(fragment.start, fragment.size, source.block_size as usize);
            let content = content.map_err(|fault| Halt::Failed(fault.into()))?;
            for (start, end) in &tails.0 {
                let range = usize::try_from(*start).unwrap_or(usize::MAX)..usize::try_from(*end).unwrap_or(usize::MAX);
                let tail = content.get(range).ok_or_else(|| {
                    Halt::Failed(Failure::Source(Fault::damaged("a file's tail lies outside of its fragment")))
                })?;
                places.insert((*index, *start), reading.packer.add(tail, queue)?);
            }
        }
        Ok(places)
    }

    /// Returns the position of a file's content in the new image: its blocks, and its tail in a fragment block.
    pub(crate) fn located(&self, file: &SourceFile, moved: &Moved) -> Result<(FileBlocks, Option<(u32, u32)>), Fault> {
        let Some(source) = self.source else { return Ok((FileBlocks::default(), None)) };
        let sizes = source.blocks(file).to_vec();
        let has_data = sizes.iter().any(|size| size & !STORED_BLOCK > 0);
        let start = if has_data { self.place(file.start)? } else { 0 };
        let lost = || Fault::damaged("a file's tail is not among those kept");
        let fragment = match source.tail(file) {
            None => None,
            Some((index, offset, _)) => Some(match self.kept.binary_search_by_key(&index, |(index, _)| *index) {
                Ok(position) => (u32::try_from(position).map_err(|_| lost())?, offset),
                Err(_) => {
                    let tails = self.moved.get(&index).ok_or_else(lost)?;
                    let start = tails.0[tails.find(offset.into()).ok_or_else(lost)?].0;
                    let (index, new) = *moved.get(&(index, start)).ok_or_else(lost)?;
                    (index, new + u32::try_from(u64::from(offset) - start).map_err(|_| lost())?)
                }
            }),
        };
        Ok((FileBlocks { start, sizes }, fragment))
    }
}

/// Returns the sorted indices of the fragment blocks in which all content is live.
fn whole_fragments(source: &Inventory, live: &BTreeMap<u32, Ranges>, processors: usize) -> Result<Vec<u32>, Fault> {
    let mut ends: HashMap<u32, u64> = HashMap::new();
    for (index, _, end) in source.files().filter_map(|file| source.tail(file)) {
        let known = ends.entry(index).or_default();
        *known = (*known).max(end.into());
    }
    let candidates: Vec<_> =
        live.iter().filter(|(index, tails)| ends.get(index).is_some_and(|end| tails.cover(*end))).collect();
    // A fragment block may be longer than all tails in it, so compare with its real length. A gzip block must be
    // decompressed to find that length.
    in_parts(&candidates, processors, |part| {
        let mut blocks = BlockReader::new(source.source(), &source.method);
        let mut whole = Vec::new();
        for (index, tails) in part {
            let fragment = source.fragments[**index as usize];
            let length = match source.length(**index) {
                Some(length) => length,
                None => blocks.length(fragment.start, fragment.size, source.block_size as usize)?,
            };
            if tails.cover(length) {
                whole.push(**index);
            }
        }
        Ok(whole)
    })
}

/// Copies up to `length` bytes, and returns the number of copied bytes.
fn copy_some(source: &File, from: u64, output: &File, to: u64, length: u64) -> Result<u64, Failure> {
    let (mut from_offset, mut to_offset) = (from, to);
    let most = usize::try_from(length).unwrap_or(usize::MAX);
    match rustix::fs::copy_file_range(source, Some(&mut from_offset), output, Some(&mut to_offset), most) {
        Ok(0) => Err(Failure::Source(Fault::damaged("it was cut off meanwhile"))),
        Ok(done) => Ok(done as u64),
        Err(Errno::INTR) => Ok(0),
        // The kernel cannot copy between these two file systems, or a sandbox refuses the call.
        Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
            let mut buffer = vec![0; most.min(1 << 20)];
            source.read_exact_at(&mut buffer, from).map_err(|error| Failure::Source(error.into()))?;
            output.write_all_at(&buffer, to)?;
            Ok(buffer.len() as u64)
        }
        Err(error) => Err(Failure::Output(io::Error::from(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_are_one_and_neighbours_are_not() {
        let ranges = Ranges::of(vec![(10, 20), (0, 10), (30, 40), (35, 50), (10, 20), (12, 15)]);
        assert_eq!(ranges.0, [(0, 10), (10, 20), (30, 50)]);
        assert_eq!(
            [0, 9, 10, 19, 20, 29, 49, 50].map(|at| ranges.find(at)),
            [Some(0), Some(0), Some(1), Some(1), None, None, Some(2), None]
        );
        assert!(Ranges::of(vec![(5, 9), (0, 5)]).cover(9));
        for (ranges, length) in [(vec![(0, 5), (6, 9)], 9), (vec![(0, 5)], 9), (vec![(1, 9)], 9), (vec![(0, 9)], 8)] {
            assert!(!Ranges::of(ranges).cover(length));
        }
    }
}

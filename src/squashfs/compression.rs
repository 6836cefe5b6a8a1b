//! Compresses single blocks with gzip, xz, zstd, or not at all, with the options that the superblock of an image names.
//!
//! Follows mksquashfs: the defaults are its levels and dictionaries, and a block that would not get smaller is stored
//! uncompressed. libdeflate writes gzip, at levels at which the result is no larger than zlib's.

use libdeflater::{CompressionError, CompressionLvl};
use liblzma::stream::{Action, Check, Filters, LzmaOptions, Status, Stream};
use zstd::zstd_safe::{CCtx, DCtx};

use crate::squashfs::error::Fault;
use crate::squashfs::format::{Append, Fields, LARGEST_BLOCK, METADATA_BLOCK};

/// Algorithm of an image's compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// All blocks are stored uncompressed.
    None,
    /// zlib's format.
    Gzip,
    /// xz's format.
    Xz,
    /// zstd's format.
    Zstd,
}

impl Compression {
    /// All algorithms.
    pub const ALL: [Self; 4] = [Self::None, Self::Gzip, Self::Xz, Self::Zstd];

    /// Name of the algorithm, as mksquashfs and `IMAGE_COMPRESSION` use it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    /// Returns the algorithm with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }
}

/// Number of each algorithm in a superblock. Algorithms that only other tools write are listed for the error message.
const NUMBERS: [(u16, &str); 6] = [(1, "gzip"), (2, "lzma"), (3, "lzo"), (4, "xz"), (5, "lz4"), (6, "zstd")];

/// An algorithm with its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    algorithm: Compression,
    options: Options,
}

/// Options of the compressor. They follow the superblock if [`flag::OPTIONS`](crate::squashfs::format::flag::OPTIONS)
/// is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Options {
    None,
    /// Level from 1 to 9. zlib's window and strategies are kept for the superblock, but not used.
    Gzip {
        level: u32,
        window: u16,
        strategies: u16,
    },
    /// Size of the dictionary in bytes, and a bit for each machine-code filter to try.
    Xz {
        dictionary: u32,
        filters: u32,
    },
    Zstd {
        level: u32,
    },
}

const GZIP_LEVEL: u32 = 9;
const GZIP_WINDOW: u16 = 15;
const ZSTD_LEVEL: u32 = 15;
const XZ_PRESET: u32 = 6;

/// libdeflate's level for each of zlib's levels, from 1: the fastest level whose result is no larger than zlib's. On
/// image roots of Debian, rpm and musl, libdeflate's level 6 is 0.7 to 1.3 % smaller than zlib's level 9. libdeflate's
/// level 9 would save another 0.2 to 0.8 %, but take three to four times as long.
const LIBDEFLATE_LEVELS: [i32; 9] = [1, 2, 2, 3, 5, 5, 5, 6, 6];

/// Maximum gzip level for metadata blocks. Higher levels are slow and save little: all metadata is about a hundredth of
/// an image, in blocks of 8 KiB. It is also compressed by a single thread, since directory listings contain the
/// positions of compressed inodes.
const METADATA_GZIP_LEVEL: u32 = 6;
/// Maximum zstd level for metadata blocks: the image's own level would take longer than copying all of the data.
const METADATA_ZSTD_LEVEL: u32 = 5;
/// xz preset for metadata blocks, low since a higher one would take too long.
const METADATA_XZ_PRESET: u32 = 1;

/// Minimum dictionary size for xz that mksquashfs accepts, in bytes.
const SMALLEST_DICTIONARY: u32 = 8 << 10;
/// Bits of the xz filters that liblzma supports.
const XZ_FILTERS: u32 = 0xff;

impl Method {
    /// The algorithm with mksquashfs's default options, for blocks of `block_size` bytes.
    pub fn new(algorithm: Compression, block_size: u32) -> Self {
        let options = match algorithm {
            Compression::None => Options::None,
            Compression::Gzip => Options::Gzip { level: GZIP_LEVEL, window: GZIP_WINDOW, strategies: 0 },
            Compression::Xz => Options::Xz { dictionary: block_size, filters: 0 },
            Compression::Zstd => Options::Zstd { level: ZSTD_LEVEL },
        };
        Self { algorithm, options }
    }

    /// The algorithm.
    pub fn algorithm(&self) -> Compression {
        self.algorithm
    }

    /// Decodes the algorithm's number in a superblock, and the options that follow the superblock.
    pub(crate) fn decode(number: u16, options: Option<&[u8]>, block_size: u32) -> Result<Self, Fault> {
        let name = NUMBERS.iter().find(|(known, _)| *known == number).map(|(_, name)| *name);
        let name = name.ok_or_else(|| Fault::damaged(format!("compression {number} is unknown")))?;
        let algorithm =
            Compression::named(name).ok_or_else(|| Fault::Unsupported(format!("the compression {name}")))?;
        let mut method = Self::new(algorithm, block_size);
        if let Some(options) = options {
            let decoded = Self::decode_options(algorithm, Fields(options));
            method.options = decoded.ok_or_else(|| Fault::damaged(format!("its options of {name} are unknown")))?;
        }
        Ok(method)
    }

    fn decode_options(algorithm: Compression, mut from: Fields) -> Option<Options> {
        match algorithm {
            Compression::None => None,
            Compression::Gzip => {
                let (level, window, strategies) = (from.u32()?, from.u16()?, from.u16()?);
                let valid = (1..=9).contains(&level) && (8..=15).contains(&window);
                valid.then_some(Options::Gzip { level, window, strategies })
            }
            Compression::Xz => {
                let (dictionary, filters) = (from.u32()?, from.u32()?);
                let valid = (SMALLEST_DICTIONARY..=LARGEST_BLOCK).contains(&dictionary) && filters & !XZ_FILTERS == 0;
                valid.then_some(Options::Xz { dictionary, filters })
            }
            Compression::Zstd => {
                let level = from.u32()?;
                (1..=22).contains(&level).then_some(Options::Zstd { level })
            }
        }
    }

    /// Returns the algorithm's number for the superblock.
    pub(crate) fn number(&self) -> u16 {
        // Like mksquashfs, name gzip for an image without compression: all its blocks are marked as uncompressed.
        let name = if self.algorithm == Compression::None { "gzip" } else { self.algorithm.name() };
        NUMBERS.iter().find(|(_, known)| *known == name).map_or(0, |(number, _)| *number)
    }

    /// Length in bytes of the options that follow the superblock. Default options are not written.
    pub(crate) fn options_length(algorithm: Compression) -> usize {
        match algorithm {
            Compression::None => 0,
            Compression::Gzip | Compression::Xz => 8,
            Compression::Zstd => 4,
        }
    }

    /// Encodes the options that follow the superblock; `None` if they are the defaults.
    pub(crate) fn encode_options(&self, block_size: u32) -> Option<Vec<u8>> {
        if *self == Self::new(self.algorithm, block_size) {
            return None;
        }
        let mut out = Vec::new();
        match self.options {
            Options::None => return None,
            Options::Gzip { level, window, strategies } => {
                out.u32(level);
                out.u16(window);
                out.u16(strategies);
            }
            Options::Xz { dictionary, filters } => {
                out.u32(dictionary);
                out.u32(filters);
            }
            Options::Zstd { level } => out.u32(level),
        }
        Some(out)
    }

    /// Maximum memory in bytes of one [`Compressor`] for blocks of `block_size` bytes.
    pub(crate) fn memory(&self, block_size: u32) -> u64 {
        let block = u64::from(block_size);
        match self.options {
            Options::None => 0,
            Options::Gzip { .. } => 1 << 20,
            // For preset 6, lzma_easy_encoder_memusage grows by 10.5 times the dictionary; the rest is for hash tables.
            Options::Xz { dictionary, .. } => (2 << 20) + 11 * u64::from(dictionary),
            Options::Zstd { .. } => (4 << 20) + 12 * block,
        }
    }
}

/// Compresses blocks, one after another.
pub(crate) struct Compressor {
    state: CompressorState,
}

enum CompressorState {
    None,
    Gzip(libdeflater::Compressor),
    Xz { preset: u32, dictionary: u32, filters: u32 },
    Zstd(CCtx<'static>, i32),
}

impl Compressor {
    pub(crate) fn new(method: &Method) -> Self {
        Self::with(method.options, XZ_PRESET)
    }

    /// A compressor for metadata blocks.
    pub(crate) fn for_metadata(method: &Method) -> Self {
        let options = match method.options {
            Options::Gzip { level, window, strategies } => {
                Options::Gzip { level: level.min(METADATA_GZIP_LEVEL), window, strategies }
            }
            Options::Zstd { level } => Options::Zstd { level: level.min(METADATA_ZSTD_LEVEL) },
            // Filters are for machine code, which metadata does not contain.
            Options::Xz { dictionary, .. } => Options::Xz { dictionary, filters: 0 },
            Options::None => Options::None,
        };
        Self::with(options, METADATA_XZ_PRESET)
    }

    fn with(options: Options, preset: u32) -> Self {
        let state = match options {
            Options::None => CompressorState::None,
            Options::Gzip { level, .. } => {
                let ours = LIBDEFLATE_LEVELS.get(level.saturating_sub(1) as usize).copied().unwrap_or(6);
                // libdeflate has all levels of `LIBDEFLATE_LEVELS`, so the default is never used.
                let level = CompressionLvl::new(ours).unwrap_or_default();
                CompressorState::Gzip(libdeflater::Compressor::new(level))
            }
            Options::Xz { dictionary, filters } => CompressorState::Xz { preset, dictionary, filters },
            Options::Zstd { level } => CompressorState::Zstd(CCtx::create(), level.cast_signed()),
        };
        Self { state }
    }

    /// Writes the compressed `block` into `out`, replacing its content. Returns false if the result would not be
    /// smaller; `out` must not be used then.
    pub(crate) fn compress(&mut self, block: &[u8], out: &mut Vec<u8>) -> bool {
        out.clear();
        // Limit the result to one byte less than the block: if it does not fit, the block is stored uncompressed.
        let most = block.len().saturating_sub(1);
        match &mut self.state {
            CompressorState::None => false,
            CompressorState::Gzip(compressor) => {
                out.resize(most, 0);
                match compressor.zlib_compress(block, out) {
                    Ok(length) => {
                        out.truncate(length);
                        true
                    }
                    Err(CompressionError::InsufficientSpace) => false,
                }
            }
            CompressorState::Xz { preset, dictionary, filters } => {
                compress_xz(block, (*preset, *dictionary, *filters), most, out)
            }
            CompressorState::Zstd(context, level) => {
                out.resize(most, 0);
                match context.compress(out.as_mut_slice(), block, *level) {
                    Ok(length) => {
                        out.truncate(length);
                        true
                    }
                    // Compression fails only if the result does not fit: ZSTD_error_dstSize_tooSmall.
                    Err(_) => false,
                }
            }
        }
    }
}

/// Compresses once without a filter and once with each filter, as mksquashfs does, and keeps the smallest result.
fn compress_xz(block: &[u8], (preset, dictionary, filters): (u32, u32, u32), most: usize, out: &mut Vec<u8>) -> bool {
    // Limit the dictionary to the block's size. Otherwise a metadata block would need the large tables of a data
    // block's dictionary.
    let needed = u32::try_from(block.len().next_power_of_two().max(METADATA_BLOCK)).unwrap_or(dictionary);
    let dictionary = dictionary.min(needed);
    let mut is_smaller = compress_xz_once(block, (preset, dictionary, 0), most, out);
    for filter in (0..32).map(|bit| 1 << bit).filter(|bit| filters & bit != 0) {
        let mut filtered = Vec::new();
        let most = if is_smaller { out.len().saturating_sub(1) } else { most };
        if compress_xz_once(block, (preset, dictionary, filter), most, &mut filtered) {
            *out = filtered;
            is_smaller = true;
        }
    }
    is_smaller
}

fn compress_xz_once(
    block: &[u8],
    (preset, dictionary, filter): (u32, u32, u32),
    most: usize,
    out: &mut Vec<u8>,
) -> bool {
    let Ok(mut options) = LzmaOptions::new_preset(preset) else { return false };
    options.dict_size(dictionary);
    let mut filters = Filters::new();
    match filter {
        0x01 => drop(filters.x86()),
        0x02 => drop(filters.powerpc()),
        0x04 => drop(filters.ia64()),
        0x08 => drop(filters.arm()),
        0x10 => drop(filters.arm_thumb()),
        0x20 => drop(filters.sparc()),
        0x40 => drop(filters.arm64()),
        0x80 => drop(filters.riscv()),
        _ => {}
    }
    filters.lzma2(&options);
    let Ok(mut stream) = Stream::new_stream_encoder(&filters, Check::Crc32) else { return false };
    out.clear();
    out.resize(most, 0);
    // One call is enough: all input is available, and a result that does not fit is discarded.
    let ended = matches!(stream.process(block, out, Action::Finish), Ok(Status::StreamEnd));
    out.truncate(usize::try_from(stream.total_out()).unwrap_or(usize::MAX));
    ended
}

/// Decompresses blocks, one after another.
pub(crate) struct Decompressor {
    state: DecompressorState,
}

enum DecompressorState {
    None,
    Gzip(libdeflater::Decompressor),
    Xz,
    Zstd(DCtx<'static>),
}

/// Memory limit of liblzma for a block, in bytes. The kernel limits the dictionary to the block size.
const XZ_MEMORY: u64 = 8 << 20;

impl Decompressor {
    pub(crate) fn new(algorithm: Compression) -> Self {
        let state = match algorithm {
            Compression::None => DecompressorState::None,
            Compression::Gzip => DecompressorState::Gzip(libdeflater::Decompressor::new()),
            Compression::Xz => DecompressorState::Xz,
            Compression::Zstd => DecompressorState::Zstd(DCtx::create()),
        };
        Self { state }
    }

    /// Writes the content of `block` into `out`, replacing what was there. Content of more than `most` bytes is a
    /// fault.
    pub(crate) fn decompress(&mut self, block: &[u8], most: usize, out: &mut Vec<u8>) -> Result<(), Fault> {
        out.resize(most, 0);
        let length = match &mut self.state {
            DecompressorState::None => None,
            DecompressorState::Gzip(decompressor) => decompressor.zlib_decompress(block, out).ok(),
            DecompressorState::Xz => decompress_xz(block, out),
            DecompressorState::Zstd(context) => context.decompress(out.as_mut_slice(), block).ok(),
        };
        out.truncate(length.unwrap_or(0));
        length.map(|_| ()).ok_or_else(|| Fault::damaged("a block cannot be decompressed"))
    }
}

/// Returns the length of a block's content if the block states it. zlib's format does not.
pub(crate) fn content_length(algorithm: Compression, block: &[u8]) -> Option<u64> {
    match algorithm {
        Compression::Zstd => zstd::zstd_safe::get_frame_content_size(block).ok()?,
        Compression::Xz => xz_content_length(block),
        Compression::None | Compression::Gzip => None,
    }
}

/// Reads the content's length from the index at the end of a stream of one block (xz file format, sections 2.1.2 and
/// 4).
fn xz_content_length(stream: &[u8]) -> Option<u64> {
    let (rest, footer) = stream.split_last_chunk::<12>()?;
    let mut fields = Fields(&footer[4..]);
    let index_length = (usize::try_from(fields.u32()?).ok()? + 1).checked_mul(4)?;
    let index = rest.get(rest.len().checked_sub(index_length)?..)?;
    let mut at = index.iter().copied();
    let mut number = || {
        let mut value = 0_u64;
        for shift in (0..63).step_by(7) {
            let byte = at.next()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    };
    // The index contains its indicator, the number of blocks, and for each block the length in the file and of the
    // content.
    let is_one = number()? == 0 && number()? == 1;
    number()?;
    number().filter(|_| is_one)
}

fn decompress_xz(block: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut stream = Stream::new_stream_decoder(XZ_MEMORY, 0).ok()?;
    let status = stream.process(block, out, Action::Finish).ok()?;
    (status == Status::StreamEnd).then(|| usize::try_from(stream.total_out()).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks() -> Vec<Vec<u8>> {
        let mut number = 1_u32;
        let mut noise = |length: usize| -> Vec<u8> {
            let next = || {
                number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                number.to_be_bytes()[0]
            };
            std::iter::repeat_with(next).take(length).collect()
        };
        let text: Vec<u8> = (0..20_000_u32).flat_map(|n| format!("line {} of {}\n", n, n % 7).into_bytes()).collect();
        vec![b"a".to_vec(), vec![0; 131_072], text[..131_072].to_vec(), text[..4096].to_vec(), noise(131_072), noise(5)]
    }

    #[test]
    fn a_block_comes_back_as_it_was() {
        for algorithm in Compression::ALL {
            let method = Method::new(algorithm, 131_072);
            let (mut compressor, mut decompressor) = (Compressor::new(&method), Decompressor::new(algorithm));
            for block in blocks() {
                let (mut compressed, mut content) = (vec![1; 77], vec![2; 55]);
                if compressor.compress(&block, &mut compressed) {
                    assert!(compressed.len() < block.len());
                    decompressor.decompress(&compressed, block.len(), &mut content).unwrap();
                    assert!(content == block, "{algorithm:?}");
                    let says = content_length(algorithm, &compressed);
                    assert_eq!(says, (algorithm != Compression::Gzip).then_some(block.len() as u64));
                    let short = decompressor.decompress(&compressed, block.len() - 1, &mut content);
                    assert!(short.is_err(), "{algorithm:?} wrote beyond the limit");
                }
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_told() {
        for algorithm in Compression::ALL {
            let mut compressor = Compressor::new(&Method::new(algorithm, 131_072));
            let shrinks = blocks().iter().map(|block| compressor.compress(block, &mut Vec::new())).collect::<Vec<_>>();
            let is_any = algorithm != Compression::None;
            assert_eq!(shrinks, [false, is_any, is_any, is_any, false, false], "{algorithm:?}");
        }
    }

    #[test]
    fn options_are_those_of_the_superblock() {
        for (number, options, expected) in [
            (1, None, "Gzip { level: 9, window: 15, strategies: 0 }"),
            (1, Some([1, 0, 0, 0, 15, 0, 1, 0].as_slice()), "Gzip { level: 1, window: 15, strategies: 1 }"),
            (4, None, "Xz { dictionary: 131072, filters: 0 }"),
            (4, Some(&[0, 0, 1, 0, 1, 0, 0, 0]), "Xz { dictionary: 65536, filters: 1 }"),
            (6, Some(&[3, 0, 0, 0]), "Zstd { level: 3 }"),
        ] {
            let method = Method::decode(number, options, 131_072).unwrap();
            assert_eq!(format!("{:?}", method.options), expected);
            assert_eq!(method.encode_options(131_072).as_deref(), options);
            assert_eq!(method.number(), number);
        }
        let unsupported = Method::decode(5, None, 131_072).unwrap_err();
        assert_eq!(unsupported.to_string(), "a squashfs of the compression lz4");
        for (number, options) in
            [(9, None), (0, None), (1, Some([0; 8].as_slice())), (6, Some(&[1])), (4, Some(&[0; 8]))]
        {
            assert!(matches!(Method::decode(number, options, 131_072), Err(Fault::Damaged(_))), "{number} {options:?}");
        }
    }

    #[test]
    fn filters_of_xz_make_code_smaller_and_are_kept_where_they_do() {
        // Calls to a single address: their relative operands differ, and only the filter makes them equal.
        let code: Vec<u8> = (0..12_000_u32)
            .flat_map(|n| {
                let relative = (1_000_000 - n * 9).to_le_bytes();
                [0xe8, relative[0], relative[1], relative[2], relative[3], 0x90, 0x48, 0x89, 0xc7]
            })
            .collect();
        let [plain, filtered] = [0, 1].map(|filters| {
            let method = Method { algorithm: Compression::Xz, options: Options::Xz { dictionary: 131_072, filters } };
            let mut out = Vec::new();
            assert!(Compressor::new(&method).compress(&code, &mut out));
            let mut content = Vec::new();
            Decompressor::new(Compression::Xz).decompress(&out, code.len(), &mut content).unwrap();
            assert!(content == code);
            out.len()
        });
        assert!(filtered < plain, "{filtered} {plain}");
    }
}

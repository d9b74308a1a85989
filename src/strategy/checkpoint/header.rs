//! The header of a checkpoint file: a safetensors header whose metadata carries checksums.
//!
//! ```text
//! u64 LE  length of the header text, a multiple of 8
//! text    {"__metadata__":{"annulus.header_crc32":"xxxxxxxx",
//!                          "annulus.tensor_crc32":"xxxxxxxx…",      8 hex digits per tensor, in the order of the data
//!                          "annulus.format":"1", …},                 the JSON part: one entry per value
//!          "model.w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}, …}   padded with spaces
//! data    the tensors, wide elements first, without gaps
//! ```
//!
//! The header's checksum covers the length and the text, its own eight digits read as zeros; the tensors' checksums
//! stand in the text and cover the data. So every bit of the file is covered once, and the file is still one that any
//! safetensors reader opens.
//!
//! The reader trusts nothing. It does not use `SafeTensors::read_metadata`: that buffers every entry twice (a flattened
//! map) and allows a header of 100 MB, so that a hostile file costs many times its size. Here an entry costs 40 bytes and
//! its dimensions, names stay in the file, and all of it together is smaller than the header. The tests hold the two
//! readers against each other.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::dtype::DType;
use crate::error::{Error, Result};

/// Longest header that is read or written.
pub const MAX_HEADER_BYTES: usize = 16 << 20;
/// Most tensors in one file.
pub const MAX_TENSORS: usize = 100_000;
/// Most entries of the JSON part.
pub const MAX_VALUES: usize = 1024;
/// Most dimensions of a tensor.
pub const MAX_DIMS: usize = 8;

const LENGTH_BYTES: usize = 8;
const CRC_DIGITS: usize = 8;
/// What the text of every checkpoint begins with; the digits of the header's checksum follow.
const PREFIX: &str = "{\"__metadata__\":{\"annulus.header_crc32\":\"";
const TENSOR_CRC_KEY: &str = "annulus.tensor_crc32";
const FORMAT_KEY: &str = "annulus.format";
const FORMAT: &str = "1";
/// Metadata entries that are not values: two checksums, two formats.
const RESERVED_VALUES: usize = 4;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// Its name: no quote, backslash or control character, at most 4,096 bytes.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// The dimensions, slowest first, at most [`MAX_DIMS`].
    pub shape: Vec<usize>,
    /// The elements, row-major, little-endian.
    pub bytes: &'a [u8],
}

/// One tensor of a parsed file.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Where the name stands in the file.
    name: (u32, u32),
    /// Where the dimensions begin in `Header::dims`.
    dims_at: u32,
    dims_len: u8,
    dtype: DType,
    crc32: u32,
    start: u64,
    end: u64,
}

const _: () = assert!(size_of::<Entry>() == 40);

/// Fewest bytes that a tensor takes in the text: bounds what is allocated for a text of given length.
const SMALLEST_ENTRY_BYTES: usize = r#","a":{"dtype":"U8","shape":[],"data_offsets":[0,0]}"#.len();

/// A parsed header: which tensor lies where, and the JSON part. Names are looked up in the file it was parsed from.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of the data.
    entries: Vec<Entry>,
    dims: Vec<u64>,
    /// Indices into `entries`, by name.
    by_name: Vec<u32>,
    values: BTreeMap<String, String>,
    data_start: usize,
    crc32: u32,
}

/// One tensor of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorInfo<'f> {
    pub name: &'f str,
    pub dtype: DType,
    dims: &'f [u64],
    entry: Entry,
    data_start: usize,
}

impl TensorInfo<'_> {
    pub fn shape(&self) -> Vec<usize> {
        // `u64` dimensions whose product was checked against the file's length fit `usize`.
        self.dims.iter().map(|dim| *dim as usize).collect()
    }

    /// The tensor's bytes in the file.
    pub fn range(&self) -> Range<usize> {
        self.data_start + self.entry.start as usize..self.data_start + self.entry.end as usize
    }

    pub fn crc32(&self) -> u32 {
        self.entry.crc32
    }
}

fn refuse(path: &Path, item: impl Into<String>, reason: impl fmt::Display) -> Error {
    Error::Checkpoint { path: path.to_owned(), item: item.into(), reason: reason.to_string() }
}

/// Whether `name` may name a tensor or a value: no character that JSON would escape, so that names can be compared in place.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.len() <= 4096 && !name.chars().any(|c| c == '"' || c == '\\' || c.is_control())
}

fn dtype_name(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F64 => Dtype::F64,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::U8 => Dtype::U8,
    }
}

/// A header ready to be written, checksums still zero.
pub(crate) struct Encoded {
    /// Length field and text.
    pub bytes: Vec<u8>,
    /// The records in the order in which their data must follow.
    pub order: Vec<usize>,
    tensor_crc_at: usize,
}

/// Lays out `records` and the JSON part `values`.
pub(crate) fn encode(path: &Path, records: &[TensorView<'_>], values: &BTreeMap<String, String>) -> Result<Encoded> {
    if records.len() > MAX_TENSORS {
        return Err(refuse(
            path,
            "header",
            format_args!("{} tensors, at most {MAX_TENSORS} fit one file", records.len()),
        ));
    }
    if values.len() > MAX_VALUES - RESERVED_VALUES {
        return Err(refuse(
            path,
            "header",
            format_args!("{} values, at most {} fit one file", values.len(), MAX_VALUES - RESERVED_VALUES),
        ));
    }
    let mut names = HashSet::with_capacity(records.len());
    if let Some(twin) = records.iter().find(|record| !names.insert(record.name.as_str())) {
        return Err(refuse(path, &twin.name, "two tensors have this name"));
    }
    let mut order: Vec<usize> = (0..records.len()).collect();
    // Wide elements first, so that each tensor is aligned for its type.
    order.sort_by(|&a, &b| {
        let (a, b) = (&records[a], &records[b]);
        b.dtype.size_bytes().cmp(&a.dtype.size_bytes()).then_with(|| a.name.cmp(&b.name))
    });
    let mut text = String::from(PREFIX);
    text.push_str("00000000\",\"");
    text.push_str(TENSOR_CRC_KEY);
    text.push_str("\":\"");
    let tensor_crc_at = LENGTH_BYTES + text.len();
    text.extend(std::iter::repeat_n('0', CRC_DIGITS * records.len()));
    text.push_str("\",\"annulus.format\":\"1\",\"format\":\"pt\"");
    for (key, value) in values {
        if !is_plain(key) {
            return Err(refuse(path, key, "the key is empty or has a character that is not allowed"));
        }
        text.push_str(",\"value.");
        text.push_str(key);
        text.push_str("\":");
        text.push_str(&serde_json::Value::from(value.as_str()).to_string());
    }
    text.push('}');
    let mut offset_bytes = 0_usize;
    for &index in &order {
        let record = &records[index];
        if !is_plain(&record.name) || record.name == "__metadata__" {
            return Err(refuse(
                path,
                &record.name,
                "the name is empty, reserved or has a character that is not allowed",
            ));
        }
        let expected_bytes = shape_bytes(record.shape.iter().map(|dim| *dim as u64), record.dtype);
        if record.shape.len() > MAX_DIMS || expected_bytes != Some(record.bytes.len() as u64) {
            return Err(refuse(
                path,
                &record.name,
                format_args!(
                    "shape {:?} of {} does not describe {} bytes",
                    record.shape,
                    record.dtype,
                    record.bytes.len()
                ),
            ));
        }
        let end_bytes = offset_bytes.checked_add(record.bytes.len()).ok_or_else(|| Error::SizeOverflow {
            what: "checkpoint size",
            detail: format!("{offset_bytes} + {} bytes", record.bytes.len()),
        })?;
        text.push_str(",\"");
        text.push_str(&record.name);
        text.push_str("\":{\"dtype\":\"");
        text.push_str(&dtype_name(record.dtype).to_string());
        text.push_str(&format!("\",\"shape\":{:?},\"data_offsets\":[{offset_bytes},{end_bytes}]}}", record.shape));
        offset_bytes = end_bytes;
    }
    text.push('}');
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    if text.len() > MAX_HEADER_BYTES {
        return Err(refuse(
            path,
            "header",
            format_args!("{} bytes, at most {MAX_HEADER_BYTES} are allowed", text.len()),
        ));
    }
    let mut bytes = Vec::with_capacity(LENGTH_BYTES + text.len());
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
    Ok(Encoded { bytes, order, tensor_crc_at })
}

impl Encoded {
    /// Writes the checksums of the tensors, in the order of the data, and then the header's own.
    pub fn seal(&mut self, tensor_crc32: &[u32]) {
        for (index, crc) in tensor_crc32.iter().enumerate() {
            let at = self.tensor_crc_at + index * CRC_DIGITS;
            self.bytes[at..at + CRC_DIGITS].copy_from_slice(format!("{crc:08x}").as_bytes());
        }
        let at = LENGTH_BYTES + PREFIX.len();
        let crc = header_crc32(&self.bytes);
        self.bytes[at..at + CRC_DIGITS].copy_from_slice(format!("{crc:08x}").as_bytes());
    }
}

/// CRC of length field and text with the eight digits of the header's own checksum read as zeros.
fn header_crc32(bytes: &[u8]) -> u32 {
    let at = LENGTH_BYTES + PREFIX.len();
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..at]);
    hasher.update(&[b'0'; CRC_DIGITS]);
    hasher.update(&bytes[at + CRC_DIGITS..]);
    hasher.finalize()
}

/// Bytes of a tensor of this shape, unless the product wraps.
fn shape_bytes(dims: impl IntoIterator<Item = u64>, dtype: DType) -> Option<u64> {
    dims.into_iter().try_fold(dtype.size_bytes() as u64, u64::checked_mul)
}

impl Header {
    /// Parses and validates the header of `file`, the whole file. The data's checksums are read, not compared.
    pub fn parse(path: &Path, file: &[u8]) -> Result<Header> {
        let Some(length) = file.first_chunk::<LENGTH_BYTES>() else {
            return Err(refuse(path, "header", format_args!("the file has {} bytes and no header", file.len())));
        };
        let text_bytes = u64::from_le_bytes(*length);
        if text_bytes > MAX_HEADER_BYTES as u64 {
            return Err(refuse(
                path,
                "header",
                format_args!("{text_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed"),
            ));
        }
        let data_start = LENGTH_BYTES + text_bytes as usize;
        let Some(head) = file.get(..data_start) else {
            return Err(refuse(
                path,
                "header",
                format_args!("it claims {text_bytes} bytes but the file ends after {}", file.len() - LENGTH_BYTES),
            ));
        };
        let text = &head[LENGTH_BYTES..];
        let digits_at = PREFIX.len()..PREFIX.len() + CRC_DIGITS;
        let Some(digits) = text.get(digits_at).filter(|_| text.starts_with(PREFIX.as_bytes())) else {
            return Err(refuse(path, "header", "it does not begin as a checkpoint of annulus does"));
        };
        let crc32 = header_crc32(head);
        let crc = format!("{crc32:08x}");
        if digits != crc.as_bytes() {
            return Err(refuse(
                path,
                "header",
                format_args!("checksum {} in the file, {crc} computed: the file is damaged", digits.escape_ascii()),
            ));
        }
        let text = std::str::from_utf8(text).map_err(|error| refuse(path, "header", error))?;
        let most_entries = (text.len() / SMALLEST_ENTRY_BYTES).min(MAX_TENSORS);
        let mut parsed = Parsed {
            text,
            entries: Vec::with_capacity(most_entries),
            dims: Vec::with_capacity(most_entries),
            metadata: BTreeMap::new(),
        };
        let mut json = serde_json::Deserializer::from_str(text);
        HeaderSeed(&mut parsed)
            .deserialize(&mut json)
            .and_then(|()| json.end())
            .map_err(|error| refuse(path, "header", error))?;
        let Parsed { mut entries, dims, mut metadata, .. } = parsed;

        if metadata.get(FORMAT_KEY).map(String::as_str) != Some(FORMAT) {
            let found = metadata.get(FORMAT_KEY).map_or("none", String::as_str);
            return Err(refuse(path, FORMAT_KEY, format_args!("format {found:?}, this version reads {FORMAT:?}")));
        }
        entries.sort_unstable_by_key(|entry| (entry.start, entry.end));
        let checksums = metadata.remove(TENSOR_CRC_KEY).unwrap_or_default();
        if checksums.len() != entries.len() * CRC_DIGITS {
            return Err(refuse(
                path,
                TENSOR_CRC_KEY,
                format_args!("{} digits for {} tensors", checksums.len(), entries.len()),
            ));
        }
        let data_bytes = (file.len() - data_start) as u64;
        let mut cursor = 0_u64;
        for (entry, digits) in entries.iter_mut().zip(checksums.as_bytes().chunks_exact(CRC_DIGITS)) {
            let name = name_of(file, entry);
            entry.crc32 = std::str::from_utf8(digits)
                .ok()
                .filter(|digits| !digits.starts_with('+'))
                .and_then(|digits| u32::from_str_radix(digits, 16).ok())
                .ok_or_else(|| refuse(path, TENSOR_CRC_KEY, "not a hexadecimal number"))?;
            let size_bytes = shape_bytes(dims_of(&dims, entry).iter().copied(), entry.dtype)
                .ok_or_else(|| refuse(path, name, "the product of its dimensions overflows"))?;
            if entry.start != cursor || entry.end.checked_sub(entry.start) != Some(size_bytes) {
                return Err(refuse(
                    path,
                    name,
                    format_args!(
                        "data offsets [{}, {}] where a tensor of {size_bytes} bytes begins at {cursor}",
                        entry.start, entry.end
                    ),
                ));
            }
            if entry.end > data_bytes {
                return Err(refuse(
                    path,
                    name,
                    format_args!("its data ends at byte {} of {data_bytes}: the file is truncated", entry.end),
                ));
            }
            cursor = entry.end;
        }
        if cursor != data_bytes {
            return Err(refuse(
                path,
                "data",
                format_args!("{} bytes follow the last tensor", data_bytes.saturating_sub(cursor)),
            ));
        }
        let mut by_name: Vec<u32> = (0..entries.len() as u32).collect();
        by_name.sort_unstable_by_key(|index| name_of(file, &entries[*index as usize]));
        for pair in by_name.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|index| name_of(file, &entries[index as usize]));
            if a == b {
                return Err(refuse(path, a, "two tensors have this name"));
            }
        }
        let values = metadata
            .into_iter()
            .filter_map(|(key, value)| key.strip_prefix("value.").map(|key| (key.to_owned(), value)))
            .collect();
        Ok(Header { entries, dims, by_name, values, data_start, crc32 })
    }

    /// Every tensor, in the order of the data. `file` is what the header was parsed from, here and below.
    pub fn tensors<'f>(&'f self, file: &'f [u8]) -> impl Iterator<Item = TensorInfo<'f>> {
        self.entries.iter().map(move |entry| self.info(file, entry))
    }

    /// The tensors whose names begin with `prefix`, by name.
    pub fn tensors_under<'f>(&'f self, file: &'f [u8], prefix: &'f str) -> impl Iterator<Item = TensorInfo<'f>> {
        let name = move |index: &u32| name_of(file, &self.entries[*index as usize]);
        let first = self.by_name.partition_point(|index| name(index) < prefix);
        self.by_name[first..]
            .iter()
            .take_while(move |index| name(index).starts_with(prefix))
            .map(move |index| self.info(file, &self.entries[*index as usize]))
    }

    /// The tensor with this name.
    pub fn tensor<'f>(&'f self, file: &'f [u8], name: &str) -> Option<TensorInfo<'f>> {
        let entry = |index: &u32| &self.entries[*index as usize];
        let at = self.by_name.binary_search_by_key(&name, |index| name_of(file, entry(index))).ok()?;
        Some(self.info(file, entry(&self.by_name[at])))
    }

    /// The header's own checksum.
    pub fn crc32(&self) -> u32 {
        self.crc32
    }

    /// The JSON part: each value's own text.
    pub fn values(&self) -> &BTreeMap<String, String> {
        &self.values
    }

    fn info<'f>(&'f self, file: &'f [u8], entry: &Entry) -> TensorInfo<'f> {
        TensorInfo {
            name: name_of(file, entry),
            dtype: entry.dtype,
            dims: dims_of(&self.dims, entry),
            entry: *entry,
            data_start: self.data_start,
        }
    }
}

fn name_of<'f>(file: &'f [u8], entry: &Entry) -> &'f str {
    // The bytes were a string when the header was parsed; a file changed since then gets a name that is not found.
    file.get(entry.name.0 as usize..entry.name.1 as usize).and_then(|name| std::str::from_utf8(name).ok()).unwrap_or("")
}

fn dims_of<'d>(dims: &'d [u64], entry: &Entry) -> &'d [u64] {
    &dims[entry.dims_at as usize..][..usize::from(entry.dims_len)]
}

/// What the visitor below collects.
struct Parsed<'t> {
    text: &'t str,
    entries: Vec<Entry>,
    dims: Vec<u64>,
    metadata: BTreeMap<String, String>,
}

struct HeaderSeed<'p, 't>(&'p mut Parsed<'t>);

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_, 'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a safetensors header")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        // A borrowed key is one without escapes: its bytes stand in the text.
        while let Some(name) = map.next_key::<&'de str>()? {
            if name == "__metadata__" {
                map.next_value_seed(MetadataSeed(&mut self.0.metadata))?;
                continue;
            }
            if self.0.entries.len() == MAX_TENSORS {
                return Err(de::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
            }
            if !is_plain(name) {
                return Err(de::Error::custom("a tensor's name is empty or has a control character"));
            }
            let info: RawInfo = map.next_value()?;
            let dtype = DType::ALL.into_iter().find(|dtype| dtype_name(*dtype) == info.dtype).ok_or_else(|| {
                de::Error::custom(format_args!("tensor {name:?} has dtype {}, which annulus does not hold", info.dtype))
            })?;
            // Both strings lie in one file, the text at most MAX_HEADER_BYTES long and behind the length field.
            let at = name.as_ptr() as usize - self.0.text.as_ptr() as usize + LENGTH_BYTES;
            let dims_at = self.0.dims.len() as u32; // at most MAX_TENSORS * MAX_DIMS
            self.0.dims.extend(&info.shape.dims[..usize::from(info.shape.len)]);
            self.0.entries.push(Entry {
                name: (at as u32, (at + name.len()) as u32),
                dims_at,
                dims_len: info.shape.len,
                dtype,
                crc32: 0,
                start: info.data_offsets.0,
                end: info.data_offsets.1,
            });
        }
        Ok(())
    }
}

struct MetadataSeed<'p>(&'p mut BTreeMap<String, String>);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(key) = map.next_key::<&'de str>()? {
            if self.0.len() == MAX_VALUES {
                return Err(de::Error::custom(format_args!("more than {MAX_VALUES} metadata entries")));
            }
            if self.0.insert(key.to_owned(), map.next_value()?).is_some() {
                return Err(de::Error::custom(format_args!("two metadata entries are called {key:?}")));
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawInfo {
    dtype: Dtype,
    shape: Dims,
    data_offsets: (u64, u64),
}

/// A shape without an allocation.
struct Dims {
    dims: [u64; MAX_DIMS],
    len: u8,
}

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct DimsVisitor;
        impl<'de> Visitor<'de> for DimsVisitor {
            type Value = Dims;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_DIMS} dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Dims, A::Error> {
                let mut shape = Dims { dims: [0; MAX_DIMS], len: 0 };
                while usize::from(shape.len) < MAX_DIMS {
                    let Some(dim) = seq.next_element()? else { return Ok(shape) };
                    shape.dims[usize::from(shape.len)] = dim;
                    shape.len += 1;
                }
                match seq.next_element::<IgnoredAny>()? {
                    None => Ok(shape),
                    Some(_) => Err(de::Error::custom(format_args!("a shape has more than {MAX_DIMS} dimensions"))),
                }
            }
        }
        deserializer.deserialize_seq(DimsVisitor)
    }
}

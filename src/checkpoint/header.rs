//! The header of one safetensors file: eight bytes of length, JSON, then the tensors' bytes.
//!
//! Pure over bytes, and it trusts none of them: no input may panic, allocate beyond a small multiple of its own size,
//! or describe bytes outside the file.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result};

/// Longest header that is read, as in the safetensors library.
pub const LONGEST: u64 = 100_000_000;
/// Most dimensions of a tensor.
const MOST_DIMENSIONS: usize = 8;
/// Every type of the format, with its size in bits.
const TYPES: &[(&str, u64)] = &[
    ("BF16", 16),
    ("F16", 16),
    ("F32", 32),
    ("BOOL", 8),
    ("C64", 64),
    ("F4", 4),
    ("F64", 64),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F8_E4M3", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2", 8),
    ("F8_E5M2FNUZ", 8),
    ("F8_E8M0", 8),
    ("I8", 8),
    ("I16", 16),
    ("I32", 32),
    ("I64", 64),
    ("U8", 8),
    ("U16", 16),
    ("U32", 32),
    ("U64", 64),
];

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// The element type as the format names it: `BF16`, `F32`, …
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file; within the file.
    pub bytes: Range<usize>,
}

/// The bytes of the header itself, length field included. `file` names it in errors.
pub fn bytes<'a>(file: &Path, contents: &'a [u8]) -> Result<&'a [u8]> {
    let refuse = |what: String| Err(Error::checkpoint(file, what));
    let length = contents.len();
    if contents.starts_with(b"version https://git-lfs") {
        return refuse("is a git-lfs pointer, not the weights: run git lfs pull".into());
    }
    let Some(field) = contents.first_chunk::<8>() else {
        return refuse(format!("has {length} bytes, too few for a safetensors file: it is truncated, copy it again"));
    };
    let header = u64::from_le_bytes(*field);
    if header > LONGEST {
        return refuse(format!("its header claims {header} bytes, more than {LONGEST}: it is no safetensors file"));
    }
    // Below LONGEST, so it fits usize.
    match contents.get(..8 + header as usize) {
        Some(bytes) => Ok(bytes),
        None => refuse(format!(
            "its header claims {header} bytes, but the file has only {length}: it is truncated, copy it again"
        )),
    }
}

/// Reads and checks the header of a safetensors file whose whole contents are `contents` (a memory map: only the
/// header's pages are touched). The tensors come sorted by name. Errors name `file` and the tensor at fault.
pub fn parse(file: &Path, contents: &[u8]) -> Result<Vec<Tensor>> {
    let header = bytes(file, contents)?;
    let json = &header[8..];
    if json.first() != Some(&b'{') {
        return Err(Error::checkpoint(file, "its header is no JSON object: it is no safetensors file"));
    }
    let raw = serde_json::from_slice::<Entries>(json)
        .map_err(|e| Error::checkpoint(file, format!("its header is damaged: {e}")))?;
    let data = (contents.len() - header.len()) as u64;
    let mut placed = Vec::with_capacity(raw.0.len());
    for (name, entry) in raw.0 {
        let bytes =
            check(&entry, data).map_err(|what| Error::checkpoint(file, format!("tensor {}: {what}", shown(&name))))?;
        placed.push((name, entry, bytes));
    }
    contiguous(file, &mut placed, data)?;
    let mut tensors = Vec::with_capacity(placed.len());
    for (name, entry, bytes) in placed {
        // Offsets do not exceed the file's length, which is a usize.
        let bytes = header.len() + bytes.start as usize..header.len() + bytes.end as usize;
        let shape = entry.shape.iter().map(|&d| d as usize).collect();
        tensors.push(Tensor { name, dtype: entry.dtype, shape, bytes });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => Err(Error::checkpoint(file, format!("tensor {} stands there twice", shown(&pair[0].name)))),
        None => Ok(tensors),
    }
}

/// The bytes of an entry within `data` bytes, if type, shape, offsets and length agree.
fn check(entry: &Entry, data: u64) -> std::result::Result<Range<u64>, String> {
    let (start, end) = entry.offsets;
    if start > end {
        return Err(format!("its bytes begin at {start} and end before that, at {end}"));
    }
    if end > data {
        return Err(format!(
            "its bytes end at {end}, but the file has only {data} after its header: it is truncated, copy it again"
        ));
    }
    let bits = TYPES.iter().find(|(name, _)| *name == entry.dtype).map_or(0, |(_, bits)| *bits);
    // Dimensions are bounded too, so that a zero among them cannot hide one that no usize holds.
    let fits = entry.shape.iter().all(|&d| usize::try_from(d).is_ok_and(|d| d <= isize::MAX as usize));
    let total = entry.shape.iter().try_fold(bits, |product, &d| product.checked_mul(d)).filter(|_| fits);
    let Some(total) = total else {
        return Err(format!("its shape {:?} multiplies to more elements than can be addressed", entry.shape));
    };
    if total % 8 != 0 || total / 8 != end - start {
        return Err(format!(
            "its shape {:?} of {} needs {} bytes, but it has {}",
            entry.shape,
            entry.dtype,
            total.div_ceil(8),
            end - start
        ));
    }
    Ok(start..end)
}

/// Whether the tensors cover the data without overlap, hole or remainder, as the format demands.
fn contiguous(file: &Path, placed: &mut [(String, Entry, Range<u64>)], data: u64) -> Result<()> {
    placed.sort_by_key(|(_, _, bytes)| (bytes.start, bytes.end));
    let (mut end, mut before) = (0, None);
    for (name, _, bytes) in placed.iter() {
        if bytes.start != end {
            let after = before.map_or("the header".into(), |name: &String| format!("tensor {}", shown(name)));
            let what = if bytes.start < end { "overlap" } else { "leave a hole after" };
            let what = format!("tensor {}: its bytes {bytes:?} {what} {after}, which ends at {end}", shown(name));
            return Err(Error::checkpoint(file, what));
        }
        (end, before) = (bytes.end, Some(name));
    }
    match end == data {
        true => Ok(()),
        false => Err(Error::checkpoint(
            file,
            format!(
                "its tensors end at byte {end} of the data, but there are {data} bytes: the last is {}",
                before.map_or("none".into(), |name| format!("tensor {}", shown(name)))
            ),
        )),
    }
}

/// A tensor's name for a message: quoted, and not longer than a line.
pub(super) fn shown(name: &str) -> String {
    match name.char_indices().nth(160) {
        None => format!("{name:?}"),
        Some((end, _)) => format!("{:?}…", &name[..end]),
    }
}

/// The header's tensors in the order written, names not yet compared.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
                let (mut entries, mut metadata) = (Vec::new(), false);
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut metadata, true) {
                            return Err(A::Error::custom("__metadata__ stands there twice"));
                        }
                        map.next_value::<Metadata>()?;
                        continue;
                    }
                    let entry = map
                        .next_value::<Entry>()
                        .map_err(|e| A::Error::custom(format!("tensor {}: {e}", shown(&name))))?;
                    entries.push((name, entry));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// `__metadata__`: strings by name, which nothing here uses.
struct Metadata;

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("__metadata__ to be an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Metadata, A::Error> {
                while map.next_entry::<IgnoredAny, String>()?.is_some() {}
                Ok(Metadata)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// One tensor as written.
struct Entry {
    dtype: &'static str,
    shape: Vec<u64>,
    offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entry;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of dtype, shape and data_offsets")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entry, A::Error> {
                let (mut dtype, mut shape, mut offsets) = (None, None, None);
                while let Some(key) = map.next_key::<String>()? {
                    let twice = match key.as_str() {
                        "dtype" => dtype.replace(known(&map.next_value::<String>()?)?).is_some(),
                        "shape" => shape.replace(map.next_value_seed(Numbers { most: MOST_DIMENSIONS })?).is_some(),
                        "data_offsets" => offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                        other => return Err(A::Error::custom(format!("the field {} is unknown", shown(other)))),
                    };
                    if twice {
                        return Err(A::Error::custom(format!("{key} stands there twice")));
                    }
                }
                let missing = |field: &str| A::Error::custom(format!("{field} is missing"));
                Ok(Entry {
                    dtype: dtype.ok_or_else(|| missing("dtype"))?,
                    shape: shape.ok_or_else(|| missing("shape"))?,
                    offsets: offsets.ok_or_else(|| missing("data_offsets"))?,
                })
            }
        }
        deserializer.deserialize_map(Object)
    }
}

fn known<E: serde::de::Error>(dtype: &str) -> std::result::Result<&'static str, E> {
    let found = TYPES.iter().find(|(name, _)| *name == dtype);
    found.map(|(name, _)| *name).ok_or_else(|| E::custom(format!("the dtype {} is unknown", shown(dtype))))
}

/// A list of at most `most` numbers: a header cannot make a long one.
struct Numbers {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Numbers {
    type Value = Vec<u64>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Vec<u64>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Numbers {
    type Value = Vec<u64>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} whole numbers", self.most)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Vec<u64>, A::Error> {
        let mut list = Vec::new();
        while let Some(number) = seq.next_element()? {
            if list.len() == self.most {
                return Err(A::Error::custom(format!("a shape of more than {} dimensions", self.most)));
            }
            list.push(number);
        }
        Ok(list)
    }
}

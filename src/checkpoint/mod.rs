//! A Hugging Face directory of safetensors, memory-mapped: headers are checked, and a rank reads its rows and columns.

pub mod header;
mod index;
mod slice;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use header::shown;
use slice::{Noise, Source};

pub use slice::{MadeUp, Slice};

/// Element types that weights come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// float32.
    F32,
}

impl Dtype {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

/// A checkpoint whose headers have all been checked. Nothing of the weights has been read yet.
pub struct Checkpoint {
    directory: PathBuf,
    files: Vec<File>,
    /// By name. Empty for a dummy checkpoint.
    tensors: BTreeMap<String, Tensor>,
    dummy: bool,
    /// Made-up routers send every token to this many experts, the first ones; 0: wherever the token says.
    favoured: usize,
    fingerprint: u64,
}

struct File {
    path: PathBuf,
    map: Mmap,
}

struct Tensor {
    file: usize,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Range<usize>,
    /// Whether a `slice` or `vector` call has asked for it.
    claimed: AtomicBool,
}

impl Checkpoint {
    /// Maps every safetensors file of `directory` and checks its header, or says which file and tensor is at fault.
    ///
    /// The files must not be changed while the checkpoint is open: the operating system ends a process that reads a
    /// mapped file beyond its new end.
    pub fn open(directory: &Path) -> Result<Checkpoint> {
        let found = index::find(directory)?;
        let mut hash = Sha256::new();
        let config = directory.join("config.json");
        match std::fs::read(&config) {
            Ok(text) => hash.update(&text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(config, e)),
        }
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::<String, Tensor>::new());
        for path in found.paths {
            let map = map(&path)?;
            hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update(header::bytes(&path, &map)?);
            for header::Tensor { name, dtype, shape, bytes } in header::parse(&path, &map)? {
                let tensor = Tensor { file: files.len(), dtype, shape, bytes, claimed: AtomicBool::new(false) };
                if let Some(first) = tensors.get(&name) {
                    let other: &File = &files[first.file];
                    let what =
                        format!("tensor {} is also in {}; remove one of them", shown(&name), other.path.display());
                    return Err(Error::checkpoint(path, what));
                }
                tensors.insert(name, tensor);
            }
            files.push(File { path, map });
        }
        if let Some((index, places)) = found.index {
            for (name, place) in places {
                if tensors.get(&name).is_none_or(|tensor| tensor.file != place) {
                    let file = files[place].path.display();
                    let what = format!("tensor {} should be in {file}, but is not", shown(&name));
                    return Err(Error::checkpoint(index, what));
                }
            }
        }
        let digest: [u8; 32] = hash.finalize().into();
        let fingerprint = digest.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Ok(Checkpoint { directory: directory.into(), files, tensors, dummy: false, favoured: 0, fingerprint })
    }

    /// A checkpoint of made-up weights: every tensor asked for exists, with small deterministic values in bf16.
    ///
    /// Weights have mean 0 and standard deviation 0.02, norms are 1. With `favoured` above 0 the routers' correction
    /// biases send every token to that many experts, always the same.
    pub fn dummy(favoured: usize) -> Checkpoint {
        let (files, tensors) = (vec![], BTreeMap::new());
        Checkpoint { directory: "dummy".into(), files, tensors, dummy: true, favoured, fingerprint: 0 }
    }

    /// Whether the checkpoint has a tensor of this name. A dummy checkpoint answers `dummy`.
    pub fn has(&self, name: &str, dummy: bool) -> bool {
        if self.dummy { dummy } else { self.tensors.contains_key(name) }
    }

    /// Names of all tensors, sorted. Empty for a dummy checkpoint.
    pub fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    /// A tensor as it is stored: its type as the format names it, its shape and its bytes. `None` when there is none.
    pub fn raw(&self, name: &str) -> Option<(&'static str, &[usize], &[u8])> {
        let tensor = self.tensors.get(name)?;
        Some((tensor.dtype, &tensor.shape, &self.files[tensor.file].map[tensor.bytes.clone()]))
    }

    /// The directory it was opened from.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Rows and columns of a tensor whose whole shape must be `shape` (`[out, in]`, or `[n]` for a vector: then `rows`
    /// selects elements and `cols` must be `0..1`; of more dimensions all but the last count as rows). Only the pages
    /// of those rows are read, and not before they are asked for. An error names file and tensor.
    pub fn slice(&self, name: &str, shape: &[usize], rows: Range<usize>, cols: Range<usize>) -> Result<Slice<'_>> {
        let (all_rows, stride) = match shape {
            [] => (1, 1),
            [length] => (*length, 1),
            [outer @ .., last] => (outer.iter().product(), *last),
        };
        let within = |part: &Range<usize>, whole: usize| part.start <= part.end && part.end <= whole;
        if !within(&rows, all_rows) || !within(&cols, stride) {
            let what = format!("rows {rows:?} and columns {cols:?} of tensor {}, shape {shape:?}", shown(name));
            return Err(Error::Internal(what));
        }
        Ok(Slice { source: self.source(name, shape)?, stride, rows, cols })
    }

    /// A whole small tensor as f32 (norms, biases).
    pub fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; length];
        if self.dummy && name.ends_with("e_score_correction_bias") {
            // Scores are below 1: a bias of 4 decides.
            out.iter_mut().take(self.favoured).for_each(|bias| *bias = 4.0);
            return Ok(out);
        }
        let source = self.source(name, &[length])?;
        // One row of `length` columns is the same elements.
        let slice = Slice { source, stride: length, rows: 0..1, cols: 0..length };
        slice.read_f32(0, &mut out);
        Ok(out)
    }

    /// Names of tensors that no `slice` or `vector` call has asked for yet.
    pub fn unclaimed(&self) -> Vec<&str> {
        let open = |tensor: &Tensor| !tensor.claimed.load(Ordering::Relaxed);
        self.tensors.iter().filter(|(_, tensor)| open(tensor)).map(|(name, _)| name.as_str()).collect()
    }

    /// A short hash of configuration and headers, equal on ranks that see the same checkpoint.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The elements of a tensor of this shape.
    fn source(&self, name: &str, shape: &[usize]) -> Result<Source<'_>> {
        if self.dummy {
            let norm = shape.len() == 1 && name.ends_with("norm.weight");
            return Ok(if norm { Source::Constant(1.0) } else { Source::Noise(Noise::of(name)) });
        }
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::checkpoint(&self.directory, format!("tensor {} is missing", shown(name))));
        };
        let file = &self.files[tensor.file];
        let refuse = |what: String| Err(Error::checkpoint(&file.path, format!("tensor {}: {what}", shown(name))));
        if tensor.shape != shape {
            return refuse(format!("its shape is {:?}, but config.json makes it {shape:?}", tensor.shape));
        }
        let dtype = match tensor.dtype {
            "BF16" => Dtype::Bf16,
            "F16" => Dtype::F16,
            "F32" => Dtype::F32,
            other => {
                return refuse(format!(
                    "its type is {other}, which is not read: save the checkpoint in bfloat16, float16 or float32"
                ));
            }
        };
        tensor.claimed.store(true, Ordering::Relaxed);
        Ok(Source::Mapped { bytes: &file.map[tensor.bytes.clone()], dtype })
    }
}

/// Maps a regular file.
fn map(path: &Path) -> Result<Mmap> {
    // A pipe or a device would block or never end, so look before opening.
    let regular = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_file();
    if !regular {
        return Err(Error::checkpoint(path, "is not a regular file"));
    }
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: the map is private to reading; that nobody shortens the file meanwhile is a documented demand of `open`.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}

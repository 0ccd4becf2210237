//! The converted checkpoint: finished layers one file each, then shards of bounded size with an index, all in a working
//! directory beside the output that is renamed at the end.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::linalg::Rows;
use crate::checkpoint::{Checkpoint, header};
use crate::error::{Error, Result};

/// Locked by the conversion under way, whose process it names.
const LOCK: &str = "lock.part";

/// A tensor that a conversion made.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its whole name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub data: Vec<f32>,
    /// Stored as f32 whatever the others are (frequencies).
    pub exact: bool,
}

impl Made {
    /// A matrix.
    pub fn matrix(name: String, rows: Rows) -> Made {
        Made { name, shape: vec![rows.rows(), rows.cols], data: rows.data, exact: false }
    }

    /// A vector.
    pub fn vector(name: String, data: Vec<f32>, exact: bool) -> Made {
        Made { name, shape: vec![data.len()], data, exact }
    }
}

/// The directory that becomes the output. It is removed when a conversion does not finish, unless it is to be resumed.
pub struct Working {
    /// The directory.
    pub directory: PathBuf,
    keep: bool,
    done: bool,
    /// Held while this process makes the output.
    _lock: File,
}

/// Where `out` is made: `<out>.converting`.
pub fn beside(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".converting");
    out.with_file_name(name)
}

/// Removes what this process has begun to make of `out`, from whichever thread; false where something is left.
pub fn discard(out: &Path) -> bool {
    let directory = beside(out);
    let ours = std::fs::read_to_string(directory.join(LOCK)).is_ok_and(|pid| pid == std::process::id().to_string());
    // The conversion may just be making another file: again, then.
    ours && (0..5).any(|_| std::fs::remove_dir_all(&directory).is_ok()) || !directory.exists()
}

impl Working {
    /// The directory beside `out`, made anew, or as an interrupted run left it.
    pub fn open(out: &Path, resume: bool) -> Result<Working> {
        if out.exists() {
            let what = "--out already exists: name a directory that does not, or remove it";
            return Err(Error::Usage(format!("{}: {what}", out.display())));
        }
        if out.file_name().is_none() {
            return Err(Error::Usage(format!("--out {}: name a directory to be made", out.display())));
        }
        let directory = beside(out);
        std::fs::create_dir_all(&directory).map_err(|e| io(&directory, e))?;
        let path = directory.join(LOCK);
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| io(&path, e))?;
        // A file system without locks is no reason to refuse.
        if let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
            let what = "another conversion is making it: wait for that one, or give another --out";
            return Err(Error::Usage(format!("{}: {what}", out.display())));
        }
        let pid = std::process::id().to_string();
        lock.set_len(0).and_then(|()| lock.write_all(pid.as_bytes())).map_err(|e| io(&path, e))?;
        let working = Working { directory, keep: resume, done: false, _lock: lock };
        if !resume {
            working.empty(&path)?;
        }
        Ok(working)
    }

    /// Removes what an earlier run left, but the lock.
    fn empty(&self, lock: &Path) -> Result<()> {
        for entry in std::fs::read_dir(&self.directory).map_err(|e| io(&self.directory, e))? {
            let path = entry.map_err(|e| io(&self.directory, e))?.path();
            if path != lock {
                let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                removed.map_err(|e| io(&path, e))?;
            }
        }
        Ok(())
    }

    /// The file of layer `i`.
    pub fn layer(&self, i: usize) -> PathBuf {
        self.directory.join(format!("layer-{i:05}.part"))
    }

    /// Gives the directory its final name.
    pub fn finish(mut self, out: &Path) -> Result<()> {
        std::fs::rename(&self.directory, out).map_err(|e| io(out, e))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        if !self.done && !self.keep {
            // What cannot be removed is named by the command, which looks.
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

/// An error of the operating system's about a file of ours, with the remedy where the disk is full.
pub fn io(path: &Path, e: std::io::Error) -> Error {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    match e.kind() {
        StorageFull | QuotaExceeded | FileTooLarge => {
            let what = format!("{e}: free some space there, or give an --out on another disk");
            Error::Io { file: path.into(), what }
        }
        _ => Error::io(path, e),
    }
}

/// One tensor of a file to be written: name, type, shape, bytes in all.
type Entry = (String, String, Vec<usize>, usize);

/// Writes a safetensors file of `entries`, whose bytes `bytes(i)` gives one by one.
fn write_file<'a>(path: &Path, entries: &[Entry], bytes: impl Fn(usize) -> Result<Cow<'a, [u8]>>) -> Result<()> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for (name, dtype, shape, size) in entries {
        map.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}));
        at += size;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let file = File::create(path).map_err(|e| io(path, e))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(text.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&text)).map_err(|e| io(path, e))?;
    for (i, entry) in entries.iter().enumerate() {
        let bytes = bytes(i)?;
        if bytes.len() != entry.3 {
            return Err(Error::Internal(format!("{}: {} bytes, not {}", entry.0, bytes.len(), entry.3)));
        }
        out.write_all(&bytes).map_err(|e| io(path, e))?;
    }
    let file = out.into_inner().map_err(|e| io(path, e.into_error()))?;
    file.sync_all().map_err(|e| io(path, e))
}

/// Writes the tensors made for one layer. `dtype` is BF16, F16 or F32.
pub fn save_layer(path: &Path, made: &[Made], dtype: &str) -> Result<()> {
    let kind = |m: &Made| if m.exact { "F32" } else { dtype };
    let encode = |m: &Made| -> Vec<u8> {
        match kind(m) {
            "BF16" => m.data.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            "F16" => m.data.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            _ => m.data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    };
    if let Some(bad) = made.iter().find(|m| m.data.iter().any(|x| !x.is_finite())) {
        return Err(Error::Internal(format!("{} came out with elements that are no numbers", bad.name)));
    }
    let entries: Vec<Entry> = made
        .iter()
        .map(|m| {
            let size = if kind(m) == "F32" { 4 } else { 2 };
            (m.name.clone(), kind(m).to_string(), m.shape.clone(), m.data.len() * size)
        })
        .collect();
    let beside = path.with_extension("writing");
    write_file(&beside, &entries, |i| Ok(encode(&made[i]).into()))?;
    std::fs::rename(&beside, path).map_err(|e| io(path, e))
}

/// Writes all shards: `source`'s tensors but those that `dropped` names, and the layers' in their place.
pub fn assemble(
    source: &Checkpoint,
    directory: &Path,
    layers: &[PathBuf],
    dropped: impl Fn(&str) -> bool,
    shard_bytes: usize,
) -> Result<()> {
    let mut made = BTreeMap::new();
    for path in layers {
        // One layer's file in memory at a time.
        let bytes = std::fs::read(path).map_err(|e| io(path, e))?;
        for tensor in header::parse(path, &bytes)? {
            made.insert(tensor.name.clone(), (path, tensor));
        }
    }
    let mut entries: Vec<Entry> = Vec::new();
    for name in source.names().into_iter().filter(|n| !dropped(n) && !made.contains_key(*n)) {
        if let Some((dtype, shape, bytes)) = source.raw(name) {
            entries.push((name.into(), dtype.into(), shape.into(), bytes.len()));
        }
    }
    entries.extend(made.values().map(|(_, t)| (t.name.clone(), t.dtype.into(), t.shape.clone(), t.bytes.len())));
    // Layer by layer, the vocabulary first.
    let key = |name: &str| -> (usize, String) {
        let number = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        (number.map_or(0, |n| n + 1), name.to_string())
    };
    entries.sort_by_cached_key(|e| key(&e.0));
    let mut shards: Vec<Vec<Entry>> = vec![vec![]];
    let mut size = 0;
    for entry in entries {
        if size > 0 && size + entry.3 > shard_bytes {
            shards.push(vec![]);
            size = 0;
        }
        size += entry.3;
        if let Some(last) = shards.last_mut() {
            last.push(entry);
        }
    }
    let (count, mut total, mut places) = (shards.len(), 0, Map::new());
    for (i, entries) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        let path = directory.join(&file);
        write_file(&path, entries, |i| {
            let name = &entries[i].0;
            match (made.get(name), source.raw(name)) {
                (Some((path, tensor)), _) => Ok(part(path, &tensor.bytes)?.into()),
                (None, Some((_, _, bytes))) => Ok(bytes.into()),
                (None, None) => Err(Error::Internal(format!("{name} vanished"))),
            }
        })?;
        for (name, _, _, size) in entries {
            places.insert(name.clone(), json!(file));
            total += size;
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": places});
    text(&directory.join("model.safetensors.index.json"), &format!("{index:#}\n"))
}

/// Some bytes of a file.
fn part(path: &Path, bytes: &Range<usize>) -> Result<Vec<u8>> {
    let mut out = vec![0; bytes.len()];
    let mut file = File::open(path).map_err(|e| io(path, e))?;
    let read = file.seek(SeekFrom::Start(bytes.start as u64)).and_then(|_| file.read_exact(&mut out));
    read.map_err(|e| io(path, e))?;
    Ok(out)
}

/// Writes a small file.
pub fn text(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|e| io(path, e))
}

/// Copies what belongs to the tokenizer and to generation.
pub fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    const NAMES: &[&str] = &[
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "LICENSE",
        "LICENSE.txt",
    ];
    for name in NAMES {
        let source = from.join(name);
        if source.is_file() {
            let target = to.join(name);
            std::fs::copy(&source, &target).map_err(|e| io(&target, e))?;
        }
    }
    Ok(())
}

//! The calibration's hidden states: in memory up to a bound, above it in a file that has no name, so that
//! nothing is left of it however the process ends.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::write::io;
use crate::error::Result;

/// One row of `width` f32 a token, sample by sample.
pub struct Hidden {
    /// Elements of a sample.
    sample: usize,
    store: Mutex<Store>,
}

enum Store {
    Memory(Vec<f32>),
    /// The path is what errors name.
    Disk {
        file: File,
        path: PathBuf,
    },
}

impl Hidden {
    /// Room for `samples` samples of `elements` each; a file in `directory` when that is more than `bound` bytes.
    pub fn new(samples: usize, elements: usize, bound: u64, directory: &Path) -> Result<Hidden> {
        let bytes = samples as u64 * elements as u64 * 4;
        let store = if bytes <= bound {
            Store::Memory(vec![0.0; samples * elements])
        } else {
            std::fs::create_dir_all(directory).map_err(|e| io(directory, e))?;
            let (file, path) = nameless(directory)?;
            file.set_len(bytes).map_err(|e| io(&path, e))?;
            Store::Disk { file, path }
        };
        Ok(Hidden { sample: elements, store: Mutex::new(store) })
    }

    /// Sample `i`.
    pub fn read(&self, i: usize) -> Result<Vec<f32>> {
        match &mut *self.store.lock().unwrap_or_else(PoisonError::into_inner) {
            Store::Memory(data) => Ok(data[i * self.sample..(i + 1) * self.sample].to_vec()),
            Store::Disk { file, path } => {
                let mut bytes = vec![0; self.sample * 4];
                let at = SeekFrom::Start((i * self.sample * 4) as u64);
                file.seek(at).and_then(|_| file.read_exact(&mut bytes)).map_err(|e| io(path, e))?;
                let (words, _) = bytes.as_chunks::<4>();
                Ok(words.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
        }
    }

    /// Replaces sample `i`.
    pub fn write(&self, i: usize, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.sample);
        match &mut *self.store.lock().unwrap_or_else(PoisonError::into_inner) {
            Store::Memory(data) => data[i * self.sample..(i + 1) * self.sample].copy_from_slice(values),
            Store::Disk { file, path } => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                let at = SeekFrom::Start((i * self.sample * 4) as u64);
                file.seek(at).and_then(|_| file.write_all(&bytes)).map_err(|e| io(path, e))?;
            }
        }
        Ok(())
    }
}

/// A new file in `directory`, whose name is removed at once.
fn nameless(directory: &Path) -> Result<(File, PathBuf)> {
    let mut number = 0;
    loop {
        let path = directory.join(format!(".hidden-{}-{number}.f32", std::process::id()));
        match File::options().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path).map_err(|e| io(&path, e))?;
                return Ok((file, path));
            }
            // Another thread, or a process of another host, has just made its own.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
            Err(e) => return Err(io(&path, e)),
        }
    }
}

//! Any bytes as a safetensors file: refused, or tensors that cover the file's data exactly.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|contents: &[u8]| {
    let Ok(mut tensors) = gqla::checkpoint::header::parse(Path::new("fuzz.safetensors"), contents) else { return };
    tensors.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    assert!(tensors.windows(2).all(|pair| pair[0].bytes.end == pair[1].bytes.start));
    assert!(tensors.last().is_none_or(|last| last.bytes.end == contents.len()));
});

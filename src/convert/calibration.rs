//! Tokens to calibrate and to evaluate on: `.u16`, `.txt` or `.jsonl`.

use std::collections::HashMap;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// The part of a text's tokens that its own tokenizer makes again (all, but for cuts); of another's it makes 0.82 to 0.92.
const SAME: f64 = 0.95;

/// Equal windows of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Tokens a window.
    pub length: usize,
    /// The windows, in order.
    pub windows: Vec<Vec<u32>>,
    /// SHA-256 of the file.
    pub hash: String,
}

/// The first `count` windows of `length` tokens of `file`. `.txt` is one text and `.jsonl` one text a line (its `text`
/// field; the texts are shuffled by `seed`), tokenised with the model's tokenizer; `.u16` is tokens, little-endian.
pub fn read(
    file: &Path,
    model: &Path,
    config: &ModelConfig,
    count: Option<usize>,
    length: usize,
    seed: u64,
) -> Result<Windows> {
    let bytes = std::fs::read(file).map_err(|e| Error::io(file, e))?;
    let hash = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let tokens = match file.extension().and_then(|e| e.to_str()) {
        Some("u16") => {
            let tokens = sixteen_bit(file, &bytes)?;
            same_tokenizer(file, model, &tokens)?;
            tokens
        }
        Some("txt") => tokenise(file, model, config, &[text(file, bytes)?])?,
        Some("jsonl") => tokenise(file, model, config, &lines(file, &text(file, bytes)?, seed)?)?,
        _ => {
            let what =
                "give tokens as .u16 (little-endian 16-bit), or text as .txt or .jsonl (a \"text\" field a line)";
            return Err(Error::Usage(format!("{}: {what}", file.display())));
        }
    };
    if let Some((at, token)) = tokens.iter().enumerate().find(|(_, t)| **t as usize >= config.vocab) {
        return Err(Error::Usage(format!(
            "{}: token {token} at place {at} is beyond the model's vocabulary of {}: the file was made with another \
             tokenizer; make it with the model's, or give .txt",
            file.display(),
            config.vocab
        )));
    }
    let there = tokens.len() / length.max(1);
    let wanted = count.unwrap_or(there);
    if there == 0 || wanted > there || wanted == 0 {
        return Err(Error::Usage(format!(
            "{}: {} tokens make {there} windows of {length}, and {} are wanted: give a longer file, or smaller --samples \
             or --length",
            file.display(),
            tokens.len(),
            wanted.max(1)
        )));
    }
    let windows = tokens.chunks_exact(length).take(wanted).map(<[u32]>::to_vec).collect();
    Ok(Windows { length, windows, hash })
}

fn sixteen_bit(file: &Path, bytes: &[u8]) -> Result<Vec<u32>> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        let what = "an odd number of bytes is not 16-bit tokens";
        return Err(Error::Usage(format!("{}: {what}; copy the file again", file.display())));
    }
    Ok(pairs.iter().map(|b| u32::from(u16::from_le_bytes(*b))).collect())
}

fn text(file: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        Error::Usage(format!("{}: not UTF-8 after {} bytes; convert it", file.display(), e.utf8_error().valid_up_to()))
    })
}

fn lines(file: &Path, text: &str, seed: u64) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: String| Error::Usage(format!("{}: line {}: {what}", file.display(), number + 1));
        let value: serde_json::Value = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
        let text = value.get("text").and_then(|t| t.as_str()).or(value.as_str());
        texts.push(text.ok_or_else(|| wrong("has no \"text\" that is a string".into()))?.to_owned());
    }
    // Fisher and Yates' shuffle with splitmix64: the same on every machine.
    let mut state = seed;
    for i in (1..texts.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        texts.swap(i, ((x ^ x >> 31) % (i as u64 + 1)) as usize);
    }
    Ok(texts)
}

/// Refuses tokens that the model's tokenizer would not have made: it makes others of the text that they stand for.
/// Without a tokenizer nothing can be said.
fn same_tokenizer(file: &Path, model: &Path, tokens: &[u32]) -> Result<()> {
    let Ok(tokenizer) = tokenizers::Tokenizer::from_file(model.join("tokenizer.json")) else { return Ok(()) };
    let some = &tokens[..tokens.len().min(2048)];
    let Ok(text) = tokenizer.decode(some, false) else { return Ok(()) };
    let Ok(again) = tokenizer.encode_fast(text, false) else { return Ok(()) };
    let mut counts = HashMap::<u32, usize>::new();
    again.get_ids().iter().for_each(|id| *counts.entry(*id).or_default() += 1);
    let kept = some.iter().filter(|t| counts.get_mut(t).filter(|n| **n > 0).map(|n| *n -= 1).is_some()).count();
    if (kept as f64) < SAME * some.len() as f64 {
        return Err(Error::Usage(format!(
            "{}: the model's tokenizer makes only {kept} of its first {} tokens again of their own text: the file was \
             made with another tokenizer; make it with the model's, or give .txt",
            file.display(),
            some.len()
        )));
    }
    Ok(())
}

/// The texts' tokens, an end-of-sequence token between texts.
fn tokenise(file: &Path, model: &Path, config: &ModelConfig, texts: &[String]) -> Result<Vec<u32>> {
    let path = model.join("tokenizer.json");
    let wrong = |what: String| Error::checkpoint(&path, format!("{what}; give the calibration as .u16 tokens instead"));
    if !path.is_file() {
        return Err(wrong("there is no such file".into()));
    }
    let tokenizer = tokenizers::Tokenizer::from_file(&path).map_err(|e| wrong(e.to_string()))?;
    let unknown = ["<unk>", "[UNK]", "<|unk|>"].iter().find_map(|name| tokenizer.token_to_id(name));
    let (mut tokens, mut strange) = (Vec::new(), 0);
    for text in texts {
        let encoded = tokenizer.encode_fast(text.as_str(), false).map_err(|e| wrong(e.to_string()))?;
        strange += encoded.get_ids().iter().filter(|id| Some(**id) == unknown).count();
        tokens.extend(encoded.get_ids());
        if texts.len() > 1 {
            tokens.extend(config.eos.first());
        }
    }
    if strange * 20 > tokens.len() {
        return Err(Error::Usage(format!(
            "{}: the model's tokenizer does not know {strange} of {} tokens: give text of the kind the model was made for",
            file.display(),
            tokens.len()
        )));
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    if tokens.len() * 10 > bytes * 9 {
        return Err(Error::Usage(format!(
            "{}: the model's tokenizer makes {} tokens of {bytes} bytes: it was not made for such text; give text of the \
             kind the model was made for, or .u16 tokens",
            file.display(),
            tokens.len()
        )));
    }
    Ok(tokens)
}

//! Text to tokens and back. Detokenising is incremental and never yields half a character.

mod fewest;

use std::ops::Deref;
use std::path::Path;

use fewest::Fewest;

use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Put before every prompt that does not begin with it.
    bos: Option<u32>,
    /// How single tokens are written in the vocabulary.
    spelling: Spelling,
    fewest: Option<Fewest>,
}

/// How a vocabulary spells the bytes of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's alphabet: a printable character a byte.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte.
    Pieces,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of the checkpoint in `directory`. Prompts begin with the model's bos token unless
    /// `tokenizer_config.json` says `"add_bos_token": false`.
    pub fn load(directory: &Path, model: &ModelConfig) -> Result<Tokenizer> {
        let file = directory.join("tokenizer.json");
        if !file.is_file() {
            return Err(Error::checkpoint(file, "is missing: text needs the checkpoint's tokenizer; token ids do not"));
        }
        let inner = tokenizers::Tokenizer::from_file(&file)
            .map_err(|e| Error::checkpoint(&file, format!("is not a tokenizer: {e}")))?;
        let largest = inner.get_vocab_size(true);
        if largest > model.vocab {
            let what = format!("has {largest} tokens and the model only {}", model.vocab);
            return Err(Error::checkpoint(file, what));
        }
        let config = directory.join("tokenizer_config.json");
        let config: serde_json::Value = match std::fs::read_to_string(&config) {
            Ok(text) => serde_json::from_str(&text)
                .map_err(|e| Error::checkpoint(&config, format!("is not valid JSON: {e}")))?,
            Err(_) => serde_json::Value::Null,
        };
        let bos = if config["add_bos_token"] == false { None } else { model.bos };
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default().to_string();
        let spelling = if decoder.contains("ByteLevel") { Spelling::ByteLevel } else { Spelling::Pieces };
        let mut tokenizer = Tokenizer { inner, bos, spelling, fewest: None };
        if spelling == Spelling::ByteLevel {
            let description = serde_json::to_value(&tokenizer.inner).unwrap_or_default();
            let ids = tokenizer.inner.get_vocab(true).into_values();
            let tokens: Vec<Vec<u8>> = ids.map(|id| tokenizer.token_bytes(id)).collect();
            tokenizer.fewest = Fewest::new(&description, &tokens);
        }
        Ok(tokenizer)
    }

    /// Tokens that a text has at least, without tokenising it, or `enough` of them; 0 where that cannot be told.
    pub fn at_least(&self, text: &str, enough: usize) -> usize {
        self.fewest.as_ref().map_or(0, |fewest| fewest.count(text, enough))
    }

    /// The prompt's token ids; special tokens written in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoded =
            self.inner.encode_fast(text, true).map_err(|e| Error::Request(format!("the text has no tokens: {e}")))?;
        let mut ids = encoded.get_ids().to_vec();
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The ids of `text` itself, without anything put before it.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let encoded =
            self.inner.encode_fast(text, false).map_err(|e| Error::Request(format!("the text has no tokens: {e}")))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::Internal(format!("tokens {ids:?} do not decode: {e}")))
    }

    /// The bytes that a token alone stands for; special tokens as they are written, an unknown id as nothing.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return vec![] };
        if self.inner.get_added_tokens_decoder().contains_key(&id) {
            return token.into_bytes();
        }
        match self.spelling {
            Spelling::ByteLevel => token.chars().flat_map(byte_level).collect(),
            Spelling::Pieces => {
                let byte = token.strip_prefix("<0x").and_then(|t| u8::from_str_radix(t.strip_suffix('>')?, 16).ok());
                byte.map_or_else(|| token.replace('▁', " ").into_bytes(), |b| vec![b])
            }
        }
    }

    /// A token as it is written in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as it is written in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A detokenizer of one generation.
    pub fn detokenizer(&self) -> Detokenizer<&Tokenizer> {
        Detokenizer::new(self)
    }
}

/// The byte that a character of GPT-2's alphabet stands for. Printable Latin-1 stands for itself; the other bytes, in
/// order, are the characters from U+0100 on.
fn byte_level(c: char) -> Vec<u8> {
    let itself = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => vec![code as u8],
        code => match (0..=255u8).filter(|b| !itself(*b)).nth((code - 0x100) as usize) {
            Some(byte) => vec![byte],
            None => c.to_string().into_bytes(),
        },
    }
}

/// Turns tokens into text as they come.
///
/// A token's text depends on its neighbours (spaces, characters of several tokens), so a short window is decoded twice,
/// without and with the new token, and the difference is the new text, held back while it ends in half a character.
pub struct Detokenizer<T: Deref<Target = Tokenizer>> {
    tokenizer: T,
    ids: Vec<u32>,
    /// First token of the window.
    before: usize,
    /// Tokens whose text has been given.
    done: usize,
}

impl<T: Deref<Target = Tokenizer>> Detokenizer<T> {
    /// A detokenizer that borrows or shares its tokenizer.
    pub fn new(tokenizer: T) -> Detokenizer<T> {
        Detokenizer { tokenizer, ids: vec![], before: 0, done: 0 }
    }

    /// The text that `id` completes; empty while a character is unfinished.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let old = self.tokenizer.decode(&self.ids[self.before..self.done])?;
        let new = self.tokenizer.decode(&self.ids[self.before..])?;
        // A replacement character at the end is half a character, unless it stays for longer than a character can be.
        if new.len() <= old.len() || (new.ends_with('\u{FFFD}') && self.ids.len() - self.done < 8) {
            return Ok(String::new());
        }
        let Some(text) = new.get(old.len()..) else { return Ok(String::new()) };
        (self.before, self.done) = (self.done, self.ids.len());
        Ok(text.to_string())
    }

    /// What is left at the end: an unfinished character shows as a replacement character.
    pub fn finish(&mut self) -> Result<String> {
        let old = self.tokenizer.decode(&self.ids[self.before..self.done])?;
        let new = self.tokenizer.decode(&self.ids[self.before..])?;
        (self.before, self.done) = (self.done, self.ids.len());
        Ok(new.get(old.len()..).unwrap_or_default().to_string())
    }
}

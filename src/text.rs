//! Text to tokens and back. Detokenising is incremental and never yields half a character.

use std::path::Path;

use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Put before every prompt that does not begin with it.
    bos: Option<u32>,
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
        Ok(Tokenizer { inner, bos })
    }

    /// The prompt's token ids; special tokens written in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoded =
            self.inner.encode(text, true).map_err(|e| Error::Request(format!("the text has no tokens: {e}")))?;
        let mut ids = encoded.get_ids().to_vec();
        if let Some(bos) = self.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The ids of `text` itself, without anything put before it.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let encoded =
            self.inner.encode(text, false).map_err(|e| Error::Request(format!("the text has no tokens: {e}")))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::Internal(format!("tokens {ids:?} do not decode: {e}")))
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
    pub fn detokenizer(&self) -> Detokenizer<'_> {
        Detokenizer { tokenizer: self, ids: vec![], before: 0, done: 0 }
    }
}

/// Turns tokens into text as they come.
///
/// A token's text depends on its neighbours (spaces, characters of several tokens), so a short window is decoded twice,
/// without and with the new token, and the difference is the new text, held back while it ends in half a character.
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// First token of the window.
    before: usize,
    /// Tokens whose text has been given.
    done: usize,
}

impl Detokenizer<'_> {
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

//! The least number of tokens that a text can have, in a small part of the time that tokenising takes: what is too long
//! is refused without.
//!
//! The bytes of a text's tokens, joined, are the text. So wherever two bytes follow each other in no token of the
//! vocabulary, one token ends and another begins; between such places the fewest tokens that give the bytes are looked
//! for. A tokenizer takes those or more.

use serde_json::Value;

/// A vocabulary's pairs of bytes, and its tokens.
pub(super) struct Fewest {
    /// A bit a pair: whether it is in some token. `[65536]`
    pairs: Vec<u64>,
    /// A table of the hashes of every beginning of a token, with the lowest bit for a whole one; 0 is free. Two that share
    /// a hash only make the count smaller.
    beginnings: Vec<u64>,
    longest: usize,
    /// Whether other text than ASCII may be changed before it is tokenised.
    ascii: bool,
}

impl Fewest {
    /// Of a byte-level tokenizer, described as `tokenizer.json` does, with these tokens. `None` where tokens may stand for
    /// other bytes than the text's.
    pub fn new(description: &Value, tokens: &[Vec<u8>]) -> Option<Fewest> {
        let ascii = match description["normalizer"]["type"].as_str() {
            None if description["normalizer"].is_null() => false,
            Some("NFC") => true,
            _ => return None,
        };
        let strips = |t: &Value| t["lstrip"] == true || t["rstrip"] == true;
        let swallows = description["added_tokens"].as_array().is_some_and(|all| all.iter().any(strips));
        let single: std::collections::HashSet<u8> = tokens.iter().filter(|t| t.len() == 1).map(|t| t[0]).collect();
        let kept = keeps_all(&description["pre_tokenizer"]) && description["truncation"].is_null();
        if swallows || !kept || single.len() < 256 {
            return None;
        }
        let mut pairs = vec![0; 1024];
        let mut hashes = vec![];
        for token in tokens {
            token.windows(2).map(pair).for_each(|bit| pairs[bit / 64] |= 1 << (bit % 64));
            let mut hash = 0;
            for (i, byte) in token.iter().enumerate() {
                hash = follow(hash, *byte);
                hashes.push(hash | u64::from(i + 1 == token.len()));
            }
        }
        hashes.sort_unstable();
        hashes.dedup();
        let longest = tokens.iter().map(Vec::len).max()?;
        let beginnings = vec![0; (2 * hashes.len()).next_power_of_two()];
        let mut fewest = Fewest { pairs, beginnings, longest, ascii };
        for hash in hashes {
            let at = fewest.place(hash & !1);
            fewest.beginnings[at] |= hash;
        }
        Some(fewest)
    }

    /// Tokens that `text` has at least, or `enough` of them.
    pub fn count(&self, text: &str, enough: usize) -> usize {
        let bytes = text.as_bytes();
        if self.ascii && !text.is_ascii() {
            return 0;
        }
        let (mut count, mut first, mut best) = (0, 0, vec![]);
        while first < bytes.len() && count < enough {
            let cut = |i: &usize| {
                let bit = pair(&bytes[*i - 1..=*i]);
                self.pairs[bit / 64] & (1 << (bit % 64)) == 0
            };
            let end = (first + 1..bytes.len()).find(cut).unwrap_or(bytes.len());
            count += self.cover(&bytes[first..end], enough - count, &mut best);
            first = end;
        }
        count.min(enough)
    }

    /// The fewest tokens that give `bytes`, or `enough` of them. `best`: room for the fewest up to each byte.
    fn cover(&self, bytes: &[u8], enough: usize, best: &mut Vec<usize>) -> usize {
        best.clear();
        best.resize(bytes.len() + 1, usize::MAX);
        best[0] = 0;
        for first in 0..bytes.len() {
            // Every way to the end has a token that ends here or a little before.
            if first % 256 == 255 {
                let near = &best[(first + 1).saturating_sub(self.longest)..=first];
                let least = near.iter().copied().min().unwrap_or(0);
                if least >= enough {
                    return enough;
                }
            }
            let next = best[first].saturating_add(1);
            let mut hash = 0;
            for (i, byte) in bytes[first..].iter().take(self.longest).enumerate() {
                hash = follow(hash, *byte);
                let found = self.beginnings[self.place(hash)];
                if found == 0 {
                    break;
                }
                if found & 1 != 0 {
                    let end = &mut best[first + i + 1];
                    *end = next.min(*end);
                }
            }
        }
        best[bytes.len()]
    }

    /// Where a hash is in the table, or would be.
    fn place(&self, hash: u64) -> usize {
        let mask = self.beginnings.len() - 1;
        let mut at = (hash >> 20) as usize & mask;
        while self.beginnings[at] != 0 && self.beginnings[at] & !1 != hash {
            at = (at + 1) & mask;
        }
        at
    }
}

/// The hash of a beginning and one more byte: never 0, the lowest bit clear.
fn follow(hash: u64, byte: u8) -> u64 {
    let mixed = (hash.rotate_left(5) ^ (u64::from(byte) + 1)).wrapping_mul(0x517C_C1B7_2722_0A95);
    (mixed & !1).max(2)
}

fn pair(b: &[u8]) -> usize {
    usize::from(b[0]) << 8 | usize::from(b[1])
}

/// Whether a pre-tokenizer leaves every byte where it is, but for a space it may put before all.
fn keeps_all(pre: &Value) -> bool {
    match pre["type"].as_str() {
        Some("Sequence") => pre["pretokenizers"].as_array().is_some_and(|all| all.iter().all(keeps_all)),
        Some("Split") => pre["behavior"] != "Removed",
        Some(kind) => ["ByteLevel", "Digits"].contains(&kind),
        None => pre.is_null(),
    }
}

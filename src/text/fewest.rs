//! The least number of tokens that a text can have, in a nanosecond or so a byte: what is far too long is refused
//! without being tokenised.
//!
//! The bytes of a text's tokens, joined, are the text. So wherever two bytes, or four, follow each other in no token of
//! the vocabulary, one token ends and another begins. The text is cut as seldom as that and the longest token allow;
//! since every part of a piece that is allowed is allowed too, cutting late is cutting seldom.

use serde_json::Value;

/// The vocabulary's pairs and fours of bytes.
pub(super) struct Fewest {
    /// A bit a pair.
    pairs: Vec<u64>,
    /// A bit a hash of four bytes: sharing one only makes the count smaller.
    fours: Vec<u64>,
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
        let every_byte = (0..=255u8).all(|b| tokens.iter().any(|t| t[..] == [b]));
        let kept = keeps_all(&description["pre_tokenizer"]) && description["truncation"].is_null();
        if swallows || !kept || !every_byte {
            return None;
        }
        let count: usize = tokens.iter().map(Vec::len).sum();
        let fours = (count * 16 / 64).next_power_of_two();
        let longest = tokens.iter().map(Vec::len).max()?;
        let mut fewest = Fewest { pairs: vec![0; 1024], fours: vec![0; fours], longest, ascii };
        for token in tokens {
            token.windows(2).map(pair).for_each(|bit| fewest.pairs[bit / 64] |= 1 << (bit % 64));
            for window in token.windows(4) {
                let bit = fewest.four(window);
                fewest.fours[bit / 64] |= 1 << (bit % 64);
            }
        }
        Some(fewest)
    }

    /// Tokens that `text` has at least; it is enough to find `enough`.
    pub fn count(&self, text: &str, enough: usize) -> usize {
        let bytes = text.as_bytes();
        if bytes.is_empty() || (self.ascii && !text.is_ascii()) {
            return 0;
        }
        let has = |set: &[u64], bit: usize| set[bit / 64] & (1 << (bit % 64)) != 0;
        let (mut count, mut first) = (1, 0);
        for i in 1..bytes.len() {
            let goes_on = i - first < self.longest
                && has(&self.pairs, pair(&bytes[i - 1..=i]))
                && (i - first < 3 || has(&self.fours, self.four(&bytes[i - 3..=i])));
            if !goes_on {
                if count >= enough {
                    break;
                }
                (count, first) = (count + 1, i);
            }
        }
        count
    }

    fn four(&self, b: &[u8]) -> usize {
        let hash = u32::from_le_bytes([b[0], b[1], b[2], b[3]]).wrapping_mul(0x9E37_79B1);
        hash as usize >> 3 & (self.fours.len() * 64 - 1)
    }
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

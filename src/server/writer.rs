//! From tokens to text that may be sent: whole characters, and no part of a stop string.

use std::sync::Arc;

use crate::engine::{Logprob, Token};
use crate::error::Result;
use crate::text::{Detokenizer, Tokenizer};

/// Text that may be sent, and the tokens it ends.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// The log-probabilities of the tokens whose text has been sent with this piece, and where each begins in the whole
    /// text, in characters.
    pub tokens: Vec<(Logprob, usize)>,
}

impl Piece {
    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }

    /// Appends what follows.
    pub fn append(&mut self, mut next: Piece) {
        self.text.push_str(&next.text);
        self.tokens.append(&mut next.tokens);
    }
}

/// A token whose text has not all been sent.
struct Pending {
    logprob: Logprob,
    first_char: usize,
    end: usize,
}

/// The text of one choice.
pub struct Writer {
    detokenizer: Detokenizer<Arc<Tokenizer>>,
    hold: Hold,
    pending: Vec<Pending>,
    /// Characters of the text so far, held back or not.
    chars: usize,
}

impl Writer {
    /// A writer that ends at any of `stops`. `offset` characters stand before its text (an echoed prompt).
    pub fn new(tokenizer: Arc<Tokenizer>, stops: Vec<String>, offset: usize) -> Writer {
        Writer { detokenizer: Detokenizer::new(tokenizer), hold: Hold::new(stops), pending: vec![], chars: offset }
    }

    /// What may be sent now that `token` has come; true when it completes a stop string.
    pub fn push(&mut self, token: Token) -> Result<(Piece, bool)> {
        let text = self.detokenizer.push(token.id)?;
        if let Some(logprob) = token.logprob {
            let end = self.hold.taken + text.len();
            self.pending.push(Pending { logprob, first_char: self.chars, end });
        }
        self.chars += text.chars().count();
        let (text, stopped) = self.hold.push(&text);
        Ok((self.piece(text, !stopped && self.hold.held.is_empty()), stopped))
    }

    /// What is left when the generation has ended of itself; true when it ends in a stop string after all.
    pub fn finish(&mut self) -> Result<(Piece, bool)> {
        let rest = self.detokenizer.finish()?;
        let (mut text, stopped) = self.hold.push(&rest);
        if !stopped {
            text.push_str(&std::mem::take(&mut self.hold.held));
        }
        Ok((self.piece(text, !stopped), stopped))
    }

    /// `text` with the tokens that end in what has been sent; with `all`, also those that wait for half a character.
    fn piece(&mut self, text: String, all: bool) -> Piece {
        let sent = self.hold.taken - self.hold.held.len();
        let ready = self.pending.iter().take_while(|p| all || p.end <= sent).count();
        let tokens = self.pending.drain(..ready).map(|p| (p.logprob, p.first_char)).collect();
        Piece { text, tokens }
    }
}

/// Holds back what may become a stop string.
struct Hold {
    stops: Vec<String>,
    held: String,
    /// Bytes taken in, held back or not.
    taken: usize,
}

impl Hold {
    fn new(stops: Vec<String>) -> Hold {
        Hold { stops, held: String::new(), taken: 0 }
    }

    /// What may be sent, and whether a stop string is complete. What follows it is gone.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        self.taken += text.len();
        if let Some(cut) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            let mut sent = std::mem::take(&mut self.held);
            self.taken -= sent.len() - cut;
            sent.truncate(cut);
            return (sent, true);
        }
        let begins = |i: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*i..]));
        let keep = self.held.char_indices().map(|(i, _)| i).find(begins).unwrap_or(self.held.len());
        let held = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, held), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_stop_string_leaks_no_part_of_itself() {
        let mut h = Hold::new(vec!["END".into(), "\n\n".into()]);
        assert_eq!(h.push("a E"), ("a ".into(), false));
        assert_eq!(h.push("N"), ("".into(), false));
        assert_eq!(h.push("x\n"), ("ENx".into(), false));
        assert_eq!(h.push("y"), ("\ny".into(), false));
        assert_eq!(h.push("zEND and more"), ("z".into(), true));
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_text_before_the_first_stop(
            parts in prop::collection::vec("[abé]{0,3}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let whole: String = parts.concat();
            let mut h = Hold::new(stops.clone());
            let mut sent = String::new();
            let mut stopped = false;
            for part in &parts {
                let (text, end) = h.push(part);
                sent.push_str(&text);
                // Nothing that has been sent contains a stop, or ends in what a held-back text would complete to one.
                prop_assert!(whole.starts_with(&sent) && !stops.iter().any(|s| sent.contains(s.as_str())));
                if end {
                    stopped = true;
                    break;
                }
            }
            prop_assert_eq!(stopped, stops.iter().any(|s| whole.contains(s.as_str())));
            if stopped {
                prop_assert!(stops.iter().any(|s| whole[sent.len()..].starts_with(s.as_str())));
            } else {
                prop_assert_eq!(sent + &h.held, whole);
            }
        }
    }
}

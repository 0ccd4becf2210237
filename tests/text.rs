//! Text to tokens and back: pieces that join to the whole, and never half a character.

#[path = "common/model.rs"]
mod model;

use gqla::config::ModelConfig;
use gqla::text::Tokenizer;

fn tokenizer() -> Tokenizer {
    let directory = model::checkpoint("tiny-glm-gqla").0;
    Tokenizer::load(&directory, &ModelConfig::load(&directory).unwrap()).unwrap()
}

/// The pieces of a stream of tokens.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.detokenizer();
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces
}

#[test]
fn streams_join_to_the_text_without_half_characters() {
    let tokenizer = tokenizer();
    let held_out = std::fs::read(model::at("tests/data/held-out.u16")).unwrap();
    let ids: Vec<u32> = held_out.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
    for window in ids.chunks(700).take(40) {
        assert_eq!(pieces(&tokenizer, window).concat(), tokenizer.decode(window).unwrap());
    }
    for text in
        ["naïve café — ≤ 2 µs", "日本語のテキスト、漢字", "🦀🚀👩‍👩‍👧 emoji", "\u{10FFFF}x\u{0301}", "  leading\n\n\ttabs "]
    {
        let ids = tokenizer.encode_plain(text).unwrap();
        let pieces = pieces(&tokenizer, &ids);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')), "{pieces:?}");
        assert!(pieces.len() > text.chars().count() / 2, "a byte-level vocabulary streams these in many pieces");
    }
}

#[test]
fn an_unfinished_character_shows_only_at_the_end() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode_plain("ok 🦀").unwrap();
    let pieces = pieces(&tokenizer, &ids[..ids.len() - 1]);
    let (end, before) = pieces.split_last().unwrap();
    assert!(before.iter().all(|p| !p.contains('\u{FFFD}')) && end.contains('\u{FFFD}'), "{pieces:?}");
}

#[test]
fn prompts_begin_with_the_models_bos_once() {
    let tokenizer = tokenizer();
    let golden = model::golden("tiny-glm-gqla");
    let texts: Vec<String> = serde_json::from_value(golden["texts"].clone()).unwrap();
    for (text, ids) in texts.iter().zip(model::lists(&golden["prompts"])) {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.encode(&format!("<|begin|>{text}")).unwrap(), ids, "{text:?}");
    }
}

#[test]
fn a_text_never_has_fewer_tokens_than_are_told_without_tokenising_it() {
    let tokenizer = tokenizer();
    let held_out = std::fs::read(model::at("tests/data/held-out.u16")).unwrap();
    let ids: Vec<u32> = held_out.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
    let check = |text: &str| {
        let (least, tokens) = (tokenizer.at_least(text, usize::MAX), tokenizer.encode_plain(text).unwrap().len());
        assert!(least <= tokens && (least > 0 || text.is_empty()), "{least} of {tokens}: {text:?}");
        assert_eq!(tokenizer.at_least(text, least), least);
        assert!(least < 2 || tokenizer.at_least(text, least - 1) == least - 1);
        (least, tokens)
    };
    let (mut told, mut real) = (0, 0);
    for window in ids.chunks(100).take(400) {
        let (least, tokens) = check(&tokenizer.decode(window).unwrap());
        (told, real) = (told + least, real + tokens);
    }
    // Text as it comes: nearly all of its tokens are told.
    eprintln!("{told} of {real} tokens are told");
    assert!(told * 10 > real * 9, "{told} of {real}");
    // Every token of the vocabulary alone is one; and neighbours, and what no text has.
    let vocabulary: Vec<String> = (0..4096).filter_map(|id| tokenizer.decode(&[id]).ok()).collect();
    for pair in vocabulary.chunks(2) {
        check(&pair.concat());
    }
    let spaces = " ".repeat(300);
    for text in
        ["", "a", "<|user|>  <|begin|>x", "🚨🚨🚨🚨🚨", "\u{0}\u{10FFFF}é\u{301}", "x x x x", "@@@@@@@@@@", &spaces]
    {
        check(text);
    }
    let mut state = 1u64;
    for length in 1..400 {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from_u32((state >> 33) as u32 % if length % 2 == 0 { 128 } else { 0x3000 }).unwrap()
        };
        check(&(0..length).map(|_| next()).collect::<String>());
    }
}

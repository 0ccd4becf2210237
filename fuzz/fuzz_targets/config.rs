//! Any texts as config.json and generation_config.json (split at the first zero byte): refused or read.
#![no_main]

use std::path::Path;

use gqla::config::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let (config, generation) = match text.split_once('\0') {
        Some((config, generation)) => (config, Some(generation)),
        None => (text, None),
    };
    let Ok(model) = ModelConfig::from_json(config, generation, Path::new("config.json")) else { return };
    assert_eq!(model.heads() % model.groups(), 0);
    assert_eq!(model.mlp.len(), model.layers);
    assert_eq!(model.rope_dim() % 2, 0);
});

//! Reading `config.json`.
use super::ModelConfig;
use crate::error::{Error, Result};
use std::path::Path;

pub(super) fn load(directory: &Path) -> Result<ModelConfig> {
    from_json("", None, directory)
}
pub(super) fn from_json(_config: &str, _generation: Option<&str>, file: &Path) -> Result<ModelConfig> {
    Err(Error::checkpoint(file, "unread"))
}

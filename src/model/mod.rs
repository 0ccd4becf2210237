//! The model.
pub mod shard;

//! A multi-GPU tensor-parallel runtime for Group-Query Latent Attention.
//!
//! Floors, each importing its own or a lower one: [`config`], [`error`] → [`checkpoint`], [`backend`], [`comm`] →
//! [`cache`], [`model`] → [`plan`], [`engine`] → `server`, `convert` → `cli`.

pub mod backend;
pub mod cache;
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod config;
pub mod convert;
pub mod engine;
pub mod error;
pub mod ffi;
pub mod model;
pub mod plan;
pub mod server;
pub mod text;

pub use error::{Error, Result};

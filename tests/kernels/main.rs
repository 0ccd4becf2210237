//! Every CUDA kernel: compiled for every GPU and head shape, and, where there is a GPU, held against the CPU backend.

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod compile;
mod engine;
mod memory;
mod model;
mod ops;
mod processes;
mod ranks;
mod support;

//! Every CUDA kernel: compiled for every GPU and head shape, and, where there is a GPU, held against the CPU backend.

mod attention;
mod compile;
mod engine;
mod model;
mod ops;
mod ranks;
mod support;

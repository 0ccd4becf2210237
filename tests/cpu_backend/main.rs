//! The CPU backend, operation by operation: against plain f64, and bit for bit against itself.

mod attention;
mod experts;
mod products;
mod ranks;
mod small;
mod support;

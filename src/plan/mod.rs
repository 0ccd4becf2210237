//! What a decode step costs on given hardware, and which path to take: arithmetic only, no device is touched.
//!
//! [`hardware`] has the cards, [`shapes`] some models by name, [`cost`] the bytes, FLOPs and times of one step on one
//! rank, [`choose`](choose()) the path and its reason.

mod choose;
pub mod cost;
pub mod hardware;
pub mod shapes;

pub use choose::{Choice, choose};
pub use cost::{Bound, Load, PathCost};
pub use hardware::Hardware;

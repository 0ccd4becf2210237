//! What a half-layer adds to the residual stream: its sum over the ranks in one shot, and the norm that follows.

use super::experts::Results;
use super::kernels::{Launch, arguments, source};
use super::{CudaBackend, Tensor, Vector};
use crate::comm::nccl::Element;
use crate::comm::one_shot::MAX_WORLD;
use crate::error::{Error, Result};

/// The kernels' parameter blocks, field by field as in `kernels/`.
#[repr(C)]
struct Partial([u64; 4]);
#[repr(C)]
struct AddNorm {
    partial: Partial,
    tensors: [u64; 4],
    eps: f32,
}
#[repr(C)]
struct OneShotAddNorm {
    partial: Partial,
    tensors: [u64; 6],
    slots: [u64; MAX_WORLD],
    rank: i32,
    world: i32,
    max_rows: i32,
    eps: f32,
}

/// What is added.
#[derive(Clone, Copy)]
pub(super) enum Added<'a> {
    /// A tensor.
    Tensor(&'a Tensor),
    /// The weighted sums of experts' results.
    Experts(&'a Results),
    /// A tensor, to nothing: the residual's beginning, in one shot.
    Beginning(&'a Tensor),
}

impl CudaBackend {
    /// Whether what is added to `x` is summed over the ranks by the launch that norms it.
    pub(super) fn is_one_shot(&self, x: &Tensor) -> bool {
        self.rows() <= self.one_shot_rows(x.cols) && x.element == Element::F32
    }

    /// `x += added (+ bias)`, summed over the ranks if `one_shot`; `out` is its norm.
    pub(super) fn add_norm(
        &mut self,
        one_shot: bool,
        added: Added,
        bias: Option<&Vector>,
        x: &Tensor,
        weight: &Vector,
        eps: f32,
        out: &Tensor,
    ) -> Result<()> {
        let mut constants = vec![("WIDTH", x.cols as i64)];
        let (partial, serial) = match added {
            Added::Tensor(tensor) => (Partial([tensor.at(), 0, 0, 0]), false),
            Added::Beginning(tensor) => {
                constants.push(("BEGINS", 1));
                (Partial([tensor.at(), 0, 0, 0]), false)
            }
            Added::Experts(r) => {
                constants.extend([("RESULTS", r.results as i64), ("TOP_K", r.top_k as i64)]);
                (Partial([0, r.y, r.weights, r.ids]), r.serial)
            }
        };
        if x.element == Element::Bf16 {
            constants.push(("X_BF16", 1));
        }
        let tensors = [bias.map_or(0, |b| b.memory.at()), x.at(), weight.memory.at(), out.at()];
        let rows = self.rows();
        let launch = |threads: usize| Launch { serial, ..Launch::new(rows, threads) };
        if !one_shot {
            let f = self.kernels.get(&source::NORM, "add_norm", &constants)?;
            let a = AddNorm { partial, tensors, eps };
            return self.kernels.launch(f, launch(f.exports()[0]), arguments![a]);
        }
        let beyond = self.guarded();
        self.comm.guard(beyond);
        let one_shot = self.one_shot.as_ref().ok_or_else(|| Error::Internal("a sum without slots".into()))?;
        let f = self.kernels.get(&source::ONE_SHOT, "one_shot_add_norm", &constants)?;
        let (rank, world) = one_shot.place();
        let [bias, x_at, weight, out] = tensors;
        let a = OneShotAddNorm {
            partial,
            tensors: [bias, x_at, weight, out, one_shot.calls(), one_shot.stop_words()],
            slots: one_shot.slots(),
            rank: rank as i32,
            world: world as i32,
            max_rows: one_shot.rows(x.cols) as i32,
            eps,
        };
        self.kernels.launch(f, launch(f.exports()[0]), arguments![a])
    }
}

//! The choice of a step's tokens on the GPUs: among a rank's own, then among the ranks'.

use super::context::Memory;
use super::kernels::{Launch, arguments, source};
use super::reduce::Reduce;
use super::{CudaBackend, expect};
use crate::backend::Backend;
use crate::comm::one_shot::{MAX_WORLD, OneShot, TOKEN_ROWS};
use crate::error::Result;

/// The kernels' parameter block, field by field as in `kernels/choose.cu`.
#[repr(C)]
struct Choose {
    logits: u64,
    keys: u64,
    temperatures: u64,
    parts: u64,
    best: u64,
    gathered: u64,
    tokens: u64,
    host: u64,
    side: u64,
    calls: u64,
    stop: u64,
    slots: [u64; MAX_WORLD],
    vocab: i32,
    first: i32,
    rank: i32,
    world: i32,
    slot_rows: i32,
    host_rows: i32,
}

impl CudaBackend {
    /// Chooses a token for each output row of `logits` `[outputs, vocab]`, whose first column is token `first`.
    pub(super) fn choose(&self, logits: u64, vocab: usize, first: usize) -> Result<()> {
        let outputs = self.inputs.outputs;
        expect(outputs <= self.tokens.rows(), || format!("{outputs} tokens of a step"))?;
        let parts = self.kernels.get(&source::CHOOSE, "choose_parts", &[])?;
        let [each, ..] = parts.exports();
        let pushed = self.one_shot.as_ref().filter(|_| self.overlaps() && outputs <= TOKEN_ROWS);
        let (slots, calls) = pushed.map_or(([0; MAX_WORLD], 0), OneShot::tokens);
        let alone = self.comm.world() == 1;
        let mut workspace = self.tokens.parts.borrow_mut();
        let tokens = &self.tokens;
        let mut a = Choose {
            logits,
            keys: self.inputs.keys(),
            temperatures: self.inputs.temperatures(),
            parts: self.ensure(&mut workspace, outputs * each * 8)?,
            best: tokens.best.at(),
            gathered: tokens.gathered.as_ref().map_or(0, Memory::at),
            tokens: if alone || pushed.is_some() { tokens.device.at() } else { 0 },
            host: tokens.host(),
            side: self.inputs.side(),
            calls,
            stop: pushed.map_or(0, OneShot::stop_words),
            slots,
            vocab: vocab as i32,
            first: first as i32,
            rank: self.comm.rank() as i32,
            world: self.comm.world() as i32,
            slot_rows: TOKEN_ROWS as i32,
            host_rows: tokens.rows() as i32,
        };
        let launch = Launch { grid: (each, outputs, 1), block: 256, ..Launch::default() };
        self.kernels.launch(parts, launch, arguments![a])?;
        let join = self.kernels.get(&source::CHOOSE, "choose_join", &[])?;
        self.kernels.launch(join, Launch::new(outputs, 32), arguments![a])?;
        let (Reduce::Nccl(nccl), None) = (&self.reduce, pushed) else { return Ok(()) };
        nccl.all_gather(a.best, a.gathered, outputs * 8, self.gpu.stream().cast())?;
        a.tokens = tokens.device.at();
        let ranks = self.kernels.get(&source::CHOOSE, "choose_ranks", &[])?;
        self.kernels.launch(ranks, Launch::new(outputs, 32), arguments![a])
    }
}

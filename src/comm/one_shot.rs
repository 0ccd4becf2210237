//! Buffers of every rank of a host in every other rank's address space, for sums that push straight into them.
//!
//! Between processes the memory is shared through CUDA's IPC handles, between threads of one process through peer access.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use cudarc::driver::sys;

use super::Communicator;
use crate::backend::cuda::Memory;
use crate::backend::cuda::context::{Gpu, Pinned, check, null};
use crate::error::Result;

/// Ranks that `kernels/one_shot_all_reduce.cu` has room for.
pub const MAX_WORLD: usize = 8;
/// Bytes of partial sums that one call takes at most; beyond that NCCL's bandwidth counts for more than its latency.
pub const MOST_BYTES: usize = 512 << 10;

/// Rows of the exchange of tokens.
pub const TOKEN_ROWS: usize = 4096;
/// Bytes of a score, a token and their flags.
const TOKEN: usize = 16;

/// This rank's end.
pub struct OneShot {
    gpu: Arc<Gpu>,
    /// This rank's slots: of sums, then of tokens.
    _memory: Memory,
    calls: Memory,
    /// Two words that the kernels look at while they wait: leave; 1 + the rank that was waited for.
    stop: Pinned,
    token_calls: Memory,
    /// Addresses of every rank's slots, this rank's own among them.
    slots: [u64; MAX_WORLD],
    /// Those that came through an IPC handle.
    opened: Vec<u64>,
    rank: usize,
    world: usize,
    /// Width of a row, once there was one: the slots are laid out for it.
    cols: Cell<usize>,
}

/// What a rank tells the others of its slots.
#[repr(C)]
#[derive(Clone, Copy)]
struct Card {
    process: u64,
    ordinal: u64,
    address: u64,
    handle: [u8; 64],
}
const CARD: usize = size_of::<Card>();

impl OneShot {
    /// Slots among all ranks, or `None` (on every rank) where they are not all on one host with links between their
    /// GPUs.
    pub fn new(gpu: &Arc<Gpu>, comm: &mut dyn Communicator) -> Result<Option<OneShot>> {
        let (rank, world) = (comm.rank(), comm.world());
        if !(2..=MAX_WORLD).contains(&world) || comm.local().1 != world {
            return Ok(None);
        }
        // A word and its flag take twice the room of the data; two halves; one slot a rank.
        let slots = sum_bytes(world) + 2 * world * TOKEN_ROWS * TOKEN;
        let memory = Memory::new(gpu, slots.next_multiple_of(2 << 20))?;
        let calls = Memory::new(gpu, 4 * MOST_BYTES / 16)?;
        let stop = Pinned::new(gpu, 8)?;
        let token_calls = Memory::new(gpu, 4 * TOKEN_ROWS)?;
        gpu.synchronize()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: an out-parameter, and the base of an allocation.
        let mine = check(unsafe { sys::cuIpcGetMemHandle(&mut handle, memory.at()) }, "sharing memory");
        let card = Card {
            process: u64::from(std::process::id()),
            ordinal: gpu.info.ordinal as u64,
            address: memory.at(),
            handle: handle.reserved.map(|c| c as u8),
        };
        let mut all = vec![0u8; CARD * world];
        comm.all_gather(&card.bytes(), &mut all)?;
        let mut this = OneShot {
            gpu: gpu.clone(),
            _memory: memory,
            calls,
            stop,
            token_calls,
            slots: [0; MAX_WORLD],
            opened: vec![],
            rank,
            world,
            cols: Cell::new(0),
        };
        let mut opened = mine;
        for (other, bytes) in all.chunks_exact(CARD).enumerate() {
            opened = opened.and_then(|()| this.open(other, &Card::of(bytes)));
        }
        if let Err(e) = &opened {
            tracing::info!("no one-shot sums: {e}");
        }
        let mut everyone = vec![0; world];
        comm.all_gather(&[u8::from(opened.is_ok())], &mut everyone)?;
        Ok(everyone.iter().all(|&ok| ok == 1).then_some(this))
    }

    fn open(&mut self, other: usize, card: &Card) -> Result<()> {
        self.slots[other] = card.address;
        if other == self.rank {
            return Ok(());
        }
        self.gpu.attach()?;
        if card.process == u64::from(std::process::id()) {
            if card.ordinal == self.gpu.info.ordinal as u64 {
                return Ok(());
            }
            let (mut device, mut context) = (0, null());
            // SAFETY: out-parameters; the context is the other thread's primary one, retained for good.
            unsafe {
                check(sys::cuDeviceGet(&mut device, card.ordinal as i32), "finding a peer")?;
                check(sys::cuDevicePrimaryCtxRetain(&mut context, device), "finding a peer")?;
                return match sys::cuCtxEnablePeerAccess(context, 0) {
                    sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
                    other => check(other, "reaching a peer's memory"),
                };
            }
        }
        let handle = sys::CUipcMemHandle { reserved: card.handle.map(|b| b as std::ffi::c_char) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut at = 0;
        // SAFETY: an out-parameter, and a handle from the other process.
        check(unsafe { sys::cuIpcOpenMemHandle_v2(&mut at, handle, flags) }, "opening a peer's memory")?;
        self.slots[other] = at;
        self.opened.push(at);
        Ok(())
    }

    /// Rows of `cols` bf16 values that a call takes. The first width that is asked for is the only one.
    pub fn rows(&self, cols: usize) -> usize {
        if self.cols.get() == 0 {
            self.cols.set(cols);
        }
        if !cols.is_multiple_of(8) || self.cols.get() != cols {
            return 0;
        }
        // What is pushed grows with the ranks.
        MOST_BYTES / (self.world - 1).max(1) / (2 * cols)
    }

    /// Every rank's slots.
    pub fn slots(&self) -> [u64; MAX_WORLD] {
        self.slots
    }

    /// The calls counted by row.
    pub fn calls(&self) -> u64 {
        self.calls.at()
    }

    /// The stop words' address, the same on the GPU.
    pub fn stop_words(&self) -> u64 {
        self.stop.words().as_ptr() as u64
    }

    /// Ends kernels that wait for another rank, within milliseconds. Nothing is summed right from then on.
    pub fn stop(&self) {
        self.stop.words()[0].store(1, Relaxed);
    }

    /// The rank that a kernel waited for when it was stopped.
    pub fn late(&self) -> Option<usize> {
        (self.stop.words()[1].load(Relaxed) as usize).checked_sub(1)
    }

    /// Every rank's slots of tokens, `[2, world, TOKEN_ROWS]`, and the calls counted by row.
    pub fn tokens(&self) -> ([u64; MAX_WORLD], u64) {
        let slots = self.slots.map(|at| if at == 0 { 0 } else { at + sum_bytes(self.world) as u64 });
        (slots, self.token_calls.at())
    }

    /// This rank and the world size.
    pub fn place(&self) -> (usize, usize) {
        (self.rank, self.world)
    }
}

/// Bytes of a rank's slots of sums.
fn sum_bytes(world: usize) -> usize {
    2 * MOST_BYTES * 2 * world
}

impl Drop for OneShot {
    fn drop(&mut self) {
        let _ = self.gpu.attach();
        for at in &self.opened {
            // SAFETY: opened by us, used no more.
            unsafe {
                let _ = sys::cuIpcCloseMemHandle(*at);
            }
        }
    }
}

impl Card {
    fn bytes(&self) -> [u8; CARD] {
        let mut bytes = [0; CARD];
        bytes[..8].copy_from_slice(&self.process.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.address.to_le_bytes());
        bytes[24..].copy_from_slice(&self.handle);
        bytes
    }

    fn of(bytes: &[u8]) -> Card {
        let word = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[i * 8..][..8]);
            u64::from_le_bytes(word)
        };
        let mut handle = [0; 64];
        handle.copy_from_slice(&bytes[24..CARD]);
        Card { process: word(0), ordinal: word(1), address: word(2), handle }
    }
}

//! Sums over the ranks: NCCL on the stream, or through host memory where ranks share a GPU.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::{Gpu, Memory, Pinned, bytes_of, bytes_of_mut};
use crate::comm::Communicator;
use crate::comm::nccl::{self, Element, Nccl};
use crate::error::Result;

/// How this world sums.
pub(crate) enum Reduce {
    /// A world of one.
    Alone,
    /// NCCL.
    Nccl(Nccl),
    /// Through the communicator on host memory: slow, for several ranks on one GPU.
    Host,
}

impl Reduce {
    /// `bytes` zeroed bytes for a buffer that will be summed. Every rank calls it alike.
    pub fn memory(&self, gpu: &Arc<Gpu>, bytes: usize) -> Result<Memory> {
        let Reduce::Nccl(nccl) = self else { return Memory::new(gpu, bytes) };
        gpu.attach()?;
        match nccl.summed(bytes)? {
            Some(window) => Memory::of_window(gpu, window, bytes),
            None => Memory::new(gpu, bytes),
        }
    }

    /// In words.
    pub fn describe(&self, one_shot: bool) -> String {
        match self {
            Reduce::Alone => "nothing to sum".into(),
            Reduce::Host if one_shot => "one-shot for few rows, else host memory".into(),
            Reduce::Host => "host memory".into(),
            Reduce::Nccl(nccl) => {
                let windows = if nccl.has_windows() { " with registered windows" } else { "" };
                let few = if one_shot { "one-shot for few rows, else " } else { "" };
                format!("{few}NCCL {}{windows}", nccl::version_text())
            }
        }
    }

    /// Whether these sums make the GPU itself wait for other ranks.
    pub fn waits(&self) -> bool {
        matches!(self, Reduce::Nccl(_))
    }

    /// Whether sums can be part of a graph.
    pub fn on_stream(&self) -> bool {
        !matches!(self, Reduce::Host)
    }

    /// Sums `count` elements at `at` over the ranks, in place. Returns the time spent waiting on the host.
    pub fn all_reduce(
        &self,
        gpu: &Arc<Gpu>,
        comm: &mut dyn Communicator,
        at: u64,
        count: usize,
        element: Element,
    ) -> Result<Duration> {
        match self {
            Reduce::Alone => Ok(Duration::ZERO),
            Reduce::Nccl(nccl) => {
                nccl.all_reduce(at, count, element, gpu.stream().cast())?;
                Ok(Duration::ZERO)
            }
            Reduce::Host => {
                let start = Instant::now();
                let mut values = read(gpu, at, count, element)?;
                comm.all_reduce(&mut values)?;
                match element {
                    Element::F32 => gpu.upload(at, bytes_of(&values))?,
                    Element::Bf16 => {
                        let bits: Vec<u16> = values.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
                        gpu.upload(at, bytes_of(&bits))?;
                    }
                }
                gpu.synchronize()?;
                Ok(start.elapsed())
            }
        }
    }

    /// Polls until `done`, for at most `bound`; then false. A link or rank that NCCL knows to have failed is an error.
    pub fn poll(&self, bound: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
        let start = Instant::now();
        let mut polls = 0u32;
        while !done()? {
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(1024) {
                self.failed()?;
                if start.elapsed() > bound {
                    return Ok(false);
                }
            }
            std::hint::spin_loop();
        }
        Ok(true)
    }

    /// An error where NCCL knows a link or rank to have failed.
    pub fn failed(&self) -> Result<()> {
        if let Reduce::Nccl(nccl) = self { nccl.poll() } else { Ok(()) }
    }

    /// Ends sums that wait for another rank; there are none from then on.
    pub fn abort(&mut self) {
        if let Reduce::Nccl(nccl) = self {
            nccl.abort();
        }
    }
}

/// Elements on the GPU as f32.
pub(crate) fn read(gpu: &Arc<Gpu>, at: u64, count: usize, element: Element) -> Result<Vec<f32>> {
    gpu.attach()?;
    match element {
        Element::F32 => {
            let mut values = vec![0f32; count];
            gpu.download(at, bytes_of_mut(&mut values))?;
            gpu.synchronize()?;
            Ok(values)
        }
        Element::Bf16 => {
            let mut bits = Pinned::new(gpu, count * 2)?;
            let bits = &mut bits.slice_mut::<u16>()[..count];
            gpu.download(at, bytes_of_mut(bits))?;
            gpu.synchronize()?;
            Ok(bits.iter().map(|&b| f32::from_bits(u32::from(b) << 16)).collect())
        }
    }
}

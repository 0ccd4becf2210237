//! Sums over the ranks: NCCL on the stream, or through host memory where ranks share a GPU.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::{Gpu, Pinned, bytes_of, bytes_of_mut};
use crate::comm::Communicator;
use crate::comm::nccl::{Element, Nccl};
use crate::error::{Error, Result};

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

    /// Waits until the GPU is done, for at most `bound`: a rank that never comes must not hang the others.
    pub fn wait(&self, gpu: &Gpu, bound: Duration, rank: usize) -> Result<()> {
        let Reduce::Nccl(nccl) = self else { return gpu.synchronize() };
        let start = Instant::now();
        let mut polls = 0u32;
        while !gpu.idle()? {
            polls += 1;
            if polls.is_multiple_of(1024) {
                nccl.poll()?;
                if start.elapsed() > bound {
                    let what = format!("its GPU has waited {} s for the other ranks' part of a step", bound.as_secs());
                    return Err(Error::Rank { rank, what });
                }
            }
            std::hint::spin_loop();
        }
        Ok(())
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

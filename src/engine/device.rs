//! Which device computes, and doing something on whichever it is.

use std::time::Duration;

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, fair_threads};
use crate::backend::cuda::{self, AllReduce, CudaBackend, CudaOptions, GpuInfo};
use crate::comm::Communicator;
use crate::error::Result;

/// The device to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, or an error.
    Cuda,
}

/// What a device is made ready for.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// Which device.
    pub device: Device,
    /// Tokens a step.
    pub max_rows: usize,
    /// Sequences a step.
    pub max_sequences: usize,
    /// Longest context.
    pub max_context: usize,
    /// Width of the residual stream, which the all-reduces have.
    pub hidden: usize,
    /// Threads of a CPU rank; `None` shares the host's cores among its ranks.
    pub threads: Option<usize>,
    /// How ranks on GPUs sum.
    pub all_reduce: AllReduce,
    /// Several ranks may have one GPU.
    pub share_gpus: bool,
    /// Bound of a step's wait for other ranks.
    pub watchdog: Duration,
}

impl Default for DeviceOptions {
    fn default() -> DeviceOptions {
        DeviceOptions {
            device: Device::Auto,
            max_rows: 512,
            max_sequences: 64,
            max_context: 8192,
            hidden: 0,
            threads: None,
            all_reduce: AllReduce::Auto,
            share_gpus: false,
            watchdog: crate::comm::WATCHDOG,
        }
    }
}

/// The device that a rank computes on. Every rank chooses alike.
#[derive(Debug, Clone)]
pub enum Chosen {
    /// The CPU, and why no GPU, where one would have been taken.
    Cpu(Option<String>),
    /// GPUs of this rank's host.
    Cuda(Vec<GpuInfo>),
}

/// Chooses the device: GPUs where every rank has one, unless told otherwise.
pub fn choose(options: &DeviceOptions, comm: &mut dyn Communicator) -> Result<Chosen> {
    if options.device == Device::Cpu {
        return Ok(Chosen::Cpu(None));
    }
    let found = cuda::usable(comm.world() > 1 && !options.share_gpus);
    if options.device == Device::Cuda {
        return found.map(Chosen::Cuda);
    }
    let (local, _) = comm.local();
    let mine = found.as_ref().is_ok_and(|gpus| options.share_gpus || local < gpus.len());
    if least(comm, usize::from(mine))? == 1 {
        return found.map(Chosen::Cuda);
    }
    let why = found.err().map_or_else(|| "some rank has no GPU of its own".into(), |e| e.to_string());
    Ok(Chosen::Cpu(Some(why)))
}

/// Something to do with whatever device there is.
pub trait Task {
    /// What it gives.
    type Out;
    /// Does it.
    fn run<B: Backend + 'static>(self, backend: B) -> Result<Self::Out>;
}

/// Does `task` on the device that was chosen.
pub fn with_device<T: Task>(
    options: &DeviceOptions,
    device: &Chosen,
    comm: Box<dyn Communicator>,
    task: T,
) -> Result<T::Out> {
    match device {
        Chosen::Cpu(_) => {
            let threads = options.threads.unwrap_or_else(|| fair_threads(comm.local().1));
            task.run(CpuBackend::new(comm, threads)?)
        }
        Chosen::Cuda(_) => {
            let options = CudaOptions {
                max_rows: options.max_rows,
                max_sequences: options.max_sequences,
                max_context: options.max_context,
                share_gpus: options.share_gpus,
                all_reduce: options.all_reduce,
                watchdog: options.watchdog,
                ..CudaOptions::default()
            };
            task.run(CudaBackend::new(comm, options)?)
        }
    }
}

/// The smallest of the ranks' values, on every rank.
pub fn least(comm: &mut dyn Communicator, mine: usize) -> Result<usize> {
    let mut all = vec![0; 8 * comm.world()];
    comm.all_gather(&(mine as u64).to_le_bytes(), &mut all)?;
    let values = all.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
    Ok(values.min().map_or(mine, |least| least as usize))
}

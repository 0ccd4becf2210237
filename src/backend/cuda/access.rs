//! What tests write and read, and the trait has no need of.

use super::context::{Memory, bytes_of, bytes_of_mut};
use super::{Cache, CudaBackend, Experts, Matrix, Routing, Tensor, expect, reduce};
use crate::comm::nccl::Element;
use crate::config::Moe;
use crate::error::Result;

impl CudaBackend {
    /// Writes `rows·cols` values into a tensor, rounded to its type.
    pub fn write(&self, x: &mut Tensor, values: &[f32]) -> Result<()> {
        expect(values.len() <= x.rows * x.cols, || format!("{} values into {}", values.len(), x.rows * x.cols))?;
        match x.element {
            Element::F32 => self.gpu.upload(x.at(), bytes_of(values))?,
            Element::Bf16 => {
                let bits: Vec<u16> = values.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
                self.gpu.upload(x.at(), bytes_of(&bits))?;
            }
        }
        self.gpu.synchronize()
    }

    /// A matrix `[rows, cols]` from host memory, rounded to bf16.
    pub fn matrix_of(&self, values: &[f32], cols: usize) -> Result<Matrix> {
        let bits: Vec<u16> = values.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
        let memory = Memory::uninit(&self.gpu, bits.len() * 2)?;
        self.gpu.upload(memory.at(), bytes_of(&bits))?;
        self.gpu.synchronize()?;
        Ok(Matrix { memory, rows: values.len() / cols.max(1), cols })
    }

    /// A matrix's values.
    pub fn read_matrix(&self, matrix: &Matrix) -> Result<Vec<f32>> {
        reduce::read(&self.gpu, matrix.memory.at(), matrix.rows * matrix.cols, Element::Bf16)
    }

    /// Experts from host memory, bf16 bits as [`ExpertSlices`] has them.
    pub fn experts_of(&self, gate_up: &[Vec<u16>], down: &[Vec<u16>], hidden: usize, moe: &Moe) -> Result<Experts> {
        Experts::from_host(&self.gpu, &self.kernels, gate_up, down, hidden, moe)
    }

    /// Fills a cache with bytes: NaN from 0xff.
    pub fn poison(&self, cache: &mut Cache, byte: u8) -> Result<()> {
        self.gpu.fill(cache.memory.at(), byte, cache.memory.bytes())
    }

    /// A cache as it lies in memory, bf16.
    pub fn cache_bits(&self, cache: &Cache) -> Result<Vec<u16>> {
        let mut bits = vec![0u16; cache.memory.bytes() / 2];
        self.gpu.download(cache.memory.at(), bytes_of_mut(&mut bits))?;
        self.gpu.synchronize()?;
        Ok(bits)
    }

    /// Fills a tensor with bytes.
    pub fn poison_tensor(&self, x: &mut Tensor, byte: u8) -> Result<()> {
        self.gpu.fill(x.at(), byte, x.memory.bytes())
    }

    /// What a routing chose: ids and weights, `[rows, top_k]`.
    pub fn read_routing(&self, routing: &Routing, rows: usize) -> Result<(Vec<u32>, Vec<f32>)> {
        let mut ids = vec![0u32; rows * routing.top_k];
        let mut weights = vec![0f32; rows * routing.top_k];
        self.gpu.download(routing.ids(), bytes_of_mut(&mut ids))?;
        self.gpu.download(routing.weights(), bytes_of_mut(&mut weights))?;
        self.gpu.synchronize()?;
        Ok((ids, weights))
    }
}

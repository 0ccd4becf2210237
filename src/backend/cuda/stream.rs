//! Products of 9 to 64 rows on Hopper: how `kernels/stream_product.cu` is cut to a shape, and the tensor maps by which
//! the copy engine finds its matrices.

use cudarc::driver::sys;

use super::context::check;
use crate::error::Result;

/// Rows that the kernel takes.
pub(crate) const ROWS: usize = 64;

/// How a product is shared out over the multiprocessors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Output columns of a pass, a multiple of 8.
    pub columns: usize,
    /// Passes of a CTA.
    pub passes: usize,
    /// CTAs.
    pub grid: usize,
}

impl Cut {
    /// `n` output columns over `multiprocessors` CTAs, in equal shares to 8 columns.
    pub fn of(n: usize, gated: bool, multiprocessors: usize) -> Cut {
        let share = n.div_ceil(8).div_ceil(multiprocessors);
        // wgmma has 256 columns; somewhat fewer leave room for more stages.
        let passes = share.div_ceil(if gated { 15 } else { 28 });
        let columns = 8 * share.div_ceil(passes);
        Cut { columns, passes, grid: n.div_ceil(columns * passes) }
    }
}

/// A matrix for the tensor copy engine, as kernels take it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap([u64; 16]);

impl TensorMap {
    /// bf16 `[rows, cols]` at `at`, rows `stride` elements apart, read in boxes of `height` rows and 64 columns, which lie
    /// in shared memory in wgmma's 128-byte swizzle; zeros outside the matrix.
    pub fn of(at: u64, [rows, cols]: [usize; 2], stride: usize, height: usize) -> Result<TensorMap> {
        let mut map = TensorMap([0; 16]);
        let (dims, strides) = ([cols as u64, rows as u64], [2 * stride as u64]);
        let (bounds, steps) = ([64, height as u32], [1, 1]);
        // SAFETY: an out-parameter of the size and alignment that the driver asks for; arrays of two and one entries.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                at as *mut _,
                dims.as_ptr(),
                strides.as_ptr(),
                bounds.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(made, "describing a matrix to the copy engine").map(|()| map)
    }
}

#[cfg(test)]
mod tests {
    use super::Cut;

    #[test]
    fn every_column_has_one_cta_and_a_pass_fits_wgmma() {
        for n in [8, 64, 1003, 1344, 4096, 6144, 14336, 128256, 154880] {
            for gated in [false, true] {
                for sms in [1, 80, 132] {
                    let c = Cut::of(n, gated, sms);
                    assert!(c.columns.is_multiple_of(8) && c.columns <= if gated { 128 } else { 256 }, "{n}: {c:?}");
                    assert!(c.grid <= sms && c.grid * c.columns * c.passes >= n, "{n} on {sms}: {c:?}");
                    assert!((c.grid - 1) * c.columns * c.passes < n, "{n}: a CTA of {c:?} has nothing to do");
                }
            }
        }
    }
}

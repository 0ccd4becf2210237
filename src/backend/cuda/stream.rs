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
    /// Output columns of a pass, a multiple of 8 times `split`.
    pub columns: usize,
    /// Passes of a cluster; 1 where `split` is more than 1.
    pub passes: usize,
    /// CTAs of a cluster, each with a part of the reduction.
    pub split: usize,
    /// CTAs, a multiple of `split`.
    pub grid: usize,
}

impl Cut {
    /// `rows` rows by `n` output columns over a reduction of `k`, shared out so that the estimate of its time is least.
    pub fn of(n: usize, k: usize, rows: usize, gated: bool, multiprocessors: usize) -> Cut {
        let cuts = [1, 2, 4].map(|split| Cut::split(n, gated, multiprocessors, split));
        let fit = cuts.into_iter().filter(|c| c.fits(k, gated, multiprocessors));
        fit.min_by(|a, b| a.seconds(n, k, rows, gated).total_cmp(&b.seconds(n, k, rows, gated))).unwrap_or(cuts[0])
    }

    /// Equal shares to 8 columns for clusters of `split` CTAs.
    fn split(n: usize, gated: bool, multiprocessors: usize, split: usize) -> Cut {
        let share = n.div_ceil(8).div_ceil(clusters(multiprocessors, split).max(1)).next_multiple_of(split);
        // wgmma has 256 columns; somewhat fewer leave room for more stages.
        let passes = if split > 1 { 1 } else { share.div_ceil(if gated { 15 } else { 28 }) };
        let columns = 8 * share.div_ceil(passes);
        Cut { columns, passes, split, grid: split * n.div_ceil(columns * passes) }
    }

    /// Whether wgmma has the columns, the card the CTAs, and every part of the reduction a stage, of at most 256 elements.
    fn fits(self, k: usize, gated: bool, multiprocessors: usize) -> bool {
        let columns = if gated { 128 } else { 256 };
        self.split == 1 || (self.columns <= columns && self.grid <= multiprocessors && k >= 256 * self.split)
    }

    /// What it takes, about, on an H200: a multiprocessor takes in some 76 GB/s of weights and x, memory gives some 4.2 TB/s,
    /// and a cluster of two adds up its parts in a microsecond, one of four in half a microsecond more.
    fn seconds(self, n: usize, k: usize, rows: usize, gated: bool) -> f64 {
        let gates = 1 + usize::from(gated);
        let taken = 2.0 * ((self.columns * gates + rows) * self.passes * k / self.split) as f64;
        let read = 2.0 * (n * gates * k) as f64;
        (taken / TAKEN).max(read / READ) + [0.0, 1e-6, 1.5e-6][self.split / 2]
    }
}

/// What a multiprocessor takes in, and what memory gives, in bytes a second.
const TAKEN: f64 = 76e9;
const READ: f64 = 4.2e12;

/// How two products in one launch are shared out: each has CTAs of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// Output columns of a CTA, a multiple of 8.
    pub columns: usize,
    /// Each product's CTAs.
    pub grids: [usize; 2],
}

impl Pair {
    /// `rows` rows by `n` output columns over a reduction of `k`, twice; `None` where two launches take less.
    pub fn of(shapes: [(usize, usize); 2], rows: usize, multiprocessors: usize) -> Option<Pair> {
        let grids = |columns: usize| shapes.map(|(n, _)| n.div_ceil(columns));
        let columns = (8..=256).step_by(8).find(|&c| grids(c).iter().sum::<usize>() <= multiprocessors)?;
        let taken = shapes.map(|(_, k)| 2.0 * ((columns + rows) * k) as f64 / TAKEN);
        let read = shapes.map(|(n, k)| 2.0 * (n * k) as f64).iter().sum::<f64>() / READ;
        let apart = shapes.map(|(n, k)| Cut::of(n, k, rows, false, multiprocessors).seconds(n, k, rows, false));
        let joint = taken[0].max(taken[1]).max(read);
        // A launch of its own costs some two microseconds.
        (joint < apart[0] + apart[1] + 2e-6).then_some(Pair { columns, grids: grids(columns) })
    }
}

/// Clusters of `size` CTAs that the card has room for at once, a multiprocessor for each CTA. A group of multiprocessors has
/// 16 or 18: clusters of 4 leave some of them out.
pub(crate) fn clusters(multiprocessors: usize, size: usize) -> usize {
    if size == 4 { multiprocessors * 10 / 11 / 4 } else { multiprocessors / size }
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
    use super::{Cut, Pair};

    #[test]
    fn every_column_has_one_cluster_and_a_pass_fits_wgmma() {
        for n in [8, 64, 1003, 1344, 2048, 4096, 6144, 14336, 128256, 154880] {
            for (gated, sms, k, rows) in [false, true].into_iter().flat_map(|gated| {
                [1, 80, 132].into_iter().flat_map(move |sms| {
                    [64, 512, 4096, 14336].into_iter().flat_map(move |k| [16, 64].map(|rows| (gated, sms, k, rows)))
                })
            }) {
                let c = Cut::of(n, k, rows, gated, sms);
                assert!(
                    c.columns.is_multiple_of(8 * c.split) && c.columns <= if gated { 128 } else { 256 },
                    "{n}: {c:?}"
                );
                assert!(c.grid <= sms && c.grid / c.split * c.columns * c.passes >= n, "{n} on {sms}: {c:?}");
                assert!((c.grid / c.split - 1) * c.columns * c.passes < n, "{n}: a cluster of {c:?} has nothing to do");
                assert!(c.split == 1 || (c.passes == 1 && k / 256 >= c.split), "{n}, {k}: {c:?}");
            }
        }
    }

    #[test]
    fn two_products_have_a_cta_for_every_column_and_no_more_than_the_card() {
        let glm = Pair::of([(2560, 768), (896, 512)], 64, 132);
        assert_eq!(glm, Some(Pair { columns: 32, grids: [80, 28] }));
        for shapes in [[(2560, 768), (896, 512)], [(1000, 1536), (64, 64)], [(24576, 1536), (2048, 512)]] {
            for (rows, sms) in [(16, 132), (64, 132), (64, 40), (64, 1)] {
                let Some(Pair { columns, grids }) = Pair::of(shapes, rows, sms) else { continue };
                assert!(columns.is_multiple_of(8) && columns <= 256 && grids.iter().sum::<usize>() <= sms);
                assert!(shapes.iter().zip(grids).all(|((n, _), g)| g * columns >= *n && (g - 1) * columns < *n));
            }
        }
        assert_eq!(Pair::of([(131_072, 512), (64, 64)], 64, 132), None, "wgmma has 256 columns");
    }

    #[test]
    fn where_x_is_most_of_what_comes_in_the_reduction_is_split() {
        let split = |n, k, rows| Cut::of(n, k, rows, false, 132).split;
        assert_eq!([split(4096, 7168, 64), split(1344, 2048, 64)].map(|s| s > 1), [true, true]);
        assert_eq!([split(4096, 7168, 16), split(128_256, 4096, 64), split(2560, 768, 64)], [1, 1, 1]);
    }
}

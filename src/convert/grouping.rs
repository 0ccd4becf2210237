//! Which heads share a group.

use faer::Mat;

use super::linalg::nuclear_norm;
use crate::error::Result;

/// How heads are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Grouping {
    /// In index order
    Neighbor,
    /// Heads whose keys and values go together
    Similarity,
}

/// Heads in index order, `heads/groups` a group.
pub fn neighbours(heads: usize, groups: usize) -> Vec<Vec<usize>> {
    let size = heads / groups;
    (0..groups).map(|g| (g * size..(g + 1) * size).collect()).collect()
}

/// `‖W_a C W_bᵀ‖_* / √(tr W_a C W_aᵀ · tr W_b C W_bᵀ)` for every pair of heads' maps `[d, in]`.
pub fn similarity(maps: &[Mat<f64>], covariance: &Mat<f64>) -> Result<Vec<Vec<f64>>> {
    let through: Vec<Mat<f64>> = maps.iter().map(|w| w * covariance).collect();
    let trace = |a: usize| -> f64 {
        let own = &through[a] * maps[a].transpose();
        (0..own.nrows()).map(|i| own[(i, i)]).sum::<f64>().max(f64::MIN_POSITIVE)
    };
    let traces: Vec<f64> = (0..maps.len()).map(trace).collect();
    let mut s = vec![vec![0.0; maps.len()]; maps.len()];
    for a in 0..maps.len() {
        for b in a + 1..maps.len() {
            let norm = nuclear_norm(&(&through[a] * maps[b].transpose()))?;
            s[a][b] = norm / (traces[a] * traces[b]).sqrt();
            s[b][a] = s[a][b];
        }
    }
    Ok(s)
}

/// Greedy groups: the best unassigned pair seeds one, then the head with the largest summed similarity joins until it
/// is full; ties go to the lower index.
pub fn greedy(similarity: &[Vec<f64>], groups: usize) -> Vec<Vec<usize>> {
    let heads = similarity.len();
    let size = heads / groups;
    let mut free: Vec<usize> = (0..heads).collect();
    let mut made = Vec::with_capacity(groups);
    for _ in 0..groups {
        let mut group: Vec<usize> = Vec::with_capacity(size);
        if size > 1 {
            let mut best = (free[0], free[1]);
            for (i, &a) in free.iter().enumerate() {
                for &b in &free[i + 1..] {
                    if similarity[a][b] > similarity[best.0][best.1] {
                        best = (a, b);
                    }
                }
            }
            group.extend([best.0, best.1]);
        } else {
            group.push(free[0]);
        }
        free.retain(|h| !group.contains(h));
        while group.len() < size {
            let sum = |h: usize| group.iter().map(|&g| similarity[h][g]).sum::<f64>();
            let mut best = free[0];
            for &h in &free[1..] {
                if sum(h) > sum(best) {
                    best = h;
                }
            }
            group.push(best);
            free.retain(|&h| h != best);
        }
        made.push(group);
    }
    made
}

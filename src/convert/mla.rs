//! MLA → GQLA (SPEC.md 4a and 4c): heads of a group share one key and one value projection.

use faer::Mat;

use super::attention::{HostAttention, LatentLayer};
use super::grouping::{self, Grouping};
use super::linalg::{Rows, beside, eigen, ridge, shared_projection, square_root, stack};
use super::measure::{Part, Samples};
use super::refit::{Moments, Values};
use super::{Method, layer_output};
use crate::error::Result;

/// Widest second moment of pooled latents that is held at once; above it groups are refitted apart.
const WIDEST: usize = 12_288;

/// How a layer is converted.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Groups, G.
    pub groups: usize,
    /// How heads are grouped.
    pub grouping: Grouping,
    /// The method.
    pub method: Method,
    /// Rounds of the values' refit.
    pub refit: usize,
}

/// What heads are changed by: query maps, shared projections, output columns.
struct Shared {
    groups: Vec<Vec<usize>>,
    /// `[nope, latent]` a group.
    keys: Vec<Mat<f64>>,
    /// `[value, latent]` a group.
    values: Vec<Mat<f64>>,
    /// `A_j` `[nope, nope]` a head, in the old order: the new query is `A_jᵀ q`.
    queries: Vec<Mat<f64>>,
    /// `[hidden, value]` a head, in the old order.
    outputs: Vec<Mat<f64>>,
}

/// The converted layer: heads reordered group by group. `teacher` is the attention whose output is to be kept (the
/// layer itself, or the Llama layer that it came from).
pub fn convert(layer: &LatentLayer, teacher: &HostAttention, samples: &Samples, plan: &Plan) -> Result<LatentLayer> {
    match plan.method {
        Method::Pca => Ok(rebuild(layer, &published(layer, samples, plan)?)),
        Method::AttentionAware => aware(layer, teacher, samples, plan),
    }
}

fn keys(layer: &LatentLayer) -> Vec<Mat<f64>> {
    (0..layer.shape.heads).map(|j| layer.kv_up.mat(layer.key_rows(j).start, layer.shape.nope)).collect()
}

fn values(layer: &LatentLayer) -> Vec<Mat<f64>> {
    (0..layer.shape.heads).map(|j| layer.kv_up.mat(layer.value_rows(j).start, layer.shape.value)).collect()
}

fn outputs(layer: &LatentLayer) -> Vec<Mat<f64>> {
    let value = layer.shape.value;
    let whole = layer.output.whole();
    (0..layer.shape.heads).map(|j| whole.as_ref().subcols(j * value, value).to_owned()).collect()
}

fn query(layer: &LatentLayer, j: usize) -> Mat<f64> {
    layer.q_up.mat(j * (layer.shape.nope + layer.shape.rope), layer.shape.nope)
}

/// The covariance of the latent, `/ (N−1)`, and its second moment. Weighted tokens are rows times √w, centred as they
/// are, as the published tool has it.
fn latent_moments(layer: &LatentLayer, samples: &Samples) -> Result<(Mat<f64>, Mat<f64>)> {
    (samples.told)("moments");
    let width = layer.shape.kv_rank;
    let gram = samples.gram(width, 0, |i, h| {
        let (mut rows, _) = layer.latent(h);
        samples.weigh(i, &mut rows, width);
        Ok(Part { rows, cross: vec![] })
    })?;
    Ok((gram.covariance(samples.tokens), gram.second))
}

fn group(maps: &[(Vec<Mat<f64>>, &Mat<f64>)], heads: usize, plan: &Plan) -> Result<Vec<Vec<usize>>> {
    if plan.grouping == Grouping::Neighbor || plan.groups == heads {
        return Ok(grouping::neighbours(heads, plan.groups));
    }
    let mut total = vec![vec![0.0; heads]; heads];
    for (maps, covariance) in maps {
        let s = grouping::similarity(maps, covariance)?;
        for (total, s) in total.iter_mut().zip(s) {
            total.iter_mut().zip(s).for_each(|(t, s)| *t += s);
        }
    }
    Ok(grouping::greedy(&total, plan.groups))
}

/// The published route (4a): PCA of each group's stacked keys and of its stacked values.
fn published(layer: &LatentLayer, samples: &Samples, plan: &Plan) -> Result<Shared> {
    let (covariance, _) = latent_moments(layer, samples)?;
    (samples.told)("projections");
    let (all_keys, all_values) = (keys(layer), values(layer));
    let groups = group(&[(all_keys.clone(), &covariance), (all_values.clone(), &covariance)], layer.shape.heads, plan)?;
    let old = outputs(layer);
    let mut new =
        Shared { groups: groups.clone(), keys: vec![], values: vec![], queries: vec![], outputs: old.clone() };
    new.queries = vec![Mat::zeros(0, 0); layer.shape.heads];
    for heads in &groups {
        let (shared, slots) = principal(&all_keys, heads, &covariance)?;
        new.keys.push(shared);
        for (&j, slot) in heads.iter().zip(slots) {
            new.queries[j] = slot;
        }
        let (shared, slots) = principal(&all_values, heads, &covariance)?;
        new.values.push(shared);
        for (&j, slot) in heads.iter().zip(slots) {
            new.outputs[j] = &old[j] * slot;
        }
    }
    Ok(new)
}

/// The shared projection `Σ U_iᵀ W_i` of some heads and their slots `U_i`.
fn principal(maps: &[Mat<f64>], heads: &[usize], covariance: &Mat<f64>) -> Result<(Mat<f64>, Vec<Mat<f64>>)> {
    let width = maps[heads[0]].nrows();
    let stacked = stack(&heads.iter().map(|&j| maps[j].clone()).collect::<Vec<_>>());
    let mut c = &stacked * covariance * stacked.transpose();
    ridge(&mut c, 0.01);
    let (_, vectors) = eigen(&c)?;
    let leading = vectors.as_ref().subcols(0, width);
    let slots = (0..heads.len()).map(|i| leading.subrows(i * width, width).to_owned()).collect();
    Ok((leading.transpose() * &stacked, slots))
}

/// Keys in the queries' metric, values in the output's, and the values' path refitted to the teacher's output.
fn aware(layer: &LatentLayer, teacher: &HostAttention, samples: &Samples, plan: &Plan) -> Result<LatentLayer> {
    let heads = layer.shape.heads;
    let (covariance, second) = latent_moments(layer, samples)?;
    let q_width = layer.q_up.cols;
    let asked = samples.gram(q_width, 0, |i, h| {
        let mut rows = layer.query_input(h);
        samples.weigh(i, &mut rows, q_width);
        Ok(Part { rows, cross: vec![] })
    })?;
    (samples.told)("projections");
    let (all_keys, all_values, old) = (keys(layer), values(layer), outputs(layer));
    let key_metric: Vec<Mat<f64>> = (0..heads)
        .map(|j| {
            let q = query(layer, j);
            &q * &asked.second * q.transpose()
        })
        .collect();
    let value_metric: Vec<Mat<f64>> = old.iter().map(|o| o.transpose() * o).collect();
    let groups = if plan.grouping == Grouping::Similarity {
        let scaled = |metrics: &[Mat<f64>], maps: &[Mat<f64>]| -> Result<Vec<Mat<f64>>> {
            metrics.iter().zip(maps).map(|(m, w)| Ok(square_root(m)?.0 * w)).collect()
        };
        let (k, v) = (scaled(&key_metric, &all_keys)?, scaled(&value_metric, &all_values)?);
        group(&[(k, &covariance), (v, &second)], heads, plan)?
    } else {
        group(&[], heads, plan)?
    };
    let mut new =
        Shared { groups: groups.clone(), keys: vec![], values: vec![], queries: vec![], outputs: old.clone() };
    new.queries = vec![Mat::zeros(0, 0); heads];
    for members in &groups {
        let pick = |all: &[Mat<f64>]| -> Vec<Mat<f64>> { members.iter().map(|&j| all[j].clone()).collect() };
        let (shared, maps) = shared_projection(&pick(&all_keys), &pick(&key_metric), &covariance, layer.shape.nope)?;
        new.keys.push(shared);
        for (&j, map) in members.iter().zip(maps) {
            new.queries[j] = map;
        }
        let (shared, maps) = shared_projection(&pick(&all_values), &pick(&value_metric), &second, layer.shape.value)?;
        new.values.push(shared);
        for (&j, map) in members.iter().zip(maps) {
            new.outputs[j] = &old[j] * map;
        }
    }
    let order: Vec<usize> = groups.iter().flatten().copied().collect();
    let mut student = rebuild(layer, &new);
    refit(&mut student, teacher, &order, samples, plan.refit)?;
    Ok(student)
}

/// Refits the values' path of `student`, in `rounds` rounds, to the output of `teacher`, whose head `order[j]` is the student's head j.
pub fn refit(
    student: &mut LatentLayer,
    teacher: &HostAttention,
    order: &[usize],
    samples: &Samples,
    rounds: usize,
) -> Result<()> {
    if rounds == 0 {
        return Ok(());
    }
    let a = student.shape.clone();
    let (p, size, hidden) = (a.kv_rank, a.heads / a.groups, student.output.rows());
    let at_once = (WIDEST / (p * size)).clamp(1, a.groups);
    for first in (0..a.groups).step_by(at_once) {
        let groups = first..(first + at_once).min(a.groups);
        let heads = groups.start * size..groups.end * size;
        let width = heads.len() * p;
        (samples.told)("moments of attention's output");
        let gram = samples.gram(width, hidden, |i, h| {
            let projected = student.project(h);
            let mut rows = vec![0.0; projected.length * width];
            for (at, j) in heads.clone().enumerate() {
                let pooled = projected.pooled(j, &projected.pool, p);
                for (to, from) in rows.chunks_exact_mut(width).zip(pooled.chunks_exact(p)) {
                    to[at * p..(at + 1) * p].copy_from_slice(from);
                }
            }
            let mut cross = layer_output(teacher, h, &order[heads.clone()]);
            samples.weigh(i, &mut rows, width);
            samples.weigh(i, &mut cross, hidden);
            Ok(Part { rows, cross })
        })?;
        (samples.told)("refit");
        let moments = Moments { pooled: gram.second, cross: gram.cross, power: gram.power };
        let output = outputs(student);
        let mut values = Values {
            group_of: heads.clone().map(|j| j / size - groups.start).collect(),
            shared: groups.clone().map(|g| student.kv_up.mat(student.value_rows(g).start, a.value)).collect(),
            output: heads.clone().map(|j| output[j].clone()).collect(),
        };
        values.refit(&moments, rounds)?;
        for (g, shared) in groups.clone().zip(&values.shared) {
            put(&mut student.kv_up, student.shape.nope + g * (a.nope + a.value), shared);
        }
        for (j, output) in heads.zip(&values.output) {
            for r in 0..hidden {
                for c in 0..a.value {
                    student.output.data[r * a.heads * a.value + j * a.value + c] = output[(r, c)] as f32;
                }
            }
        }
    }
    Ok(())
}

/// Writes `m` into the rows from `first` on.
pub fn put(rows: &mut Rows, first: usize, m: &Mat<f64>) {
    for r in 0..m.nrows() {
        for c in 0..m.ncols() {
            rows.data[(first + r) * rows.cols + c] = m[(r, c)] as f32;
        }
    }
}

/// The layer with shared projections, its heads reordered group by group.
fn rebuild(layer: &LatentLayer, new: &Shared) -> LatentLayer {
    let a = &layer.shape;
    let order: Vec<usize> = new.groups.iter().flatten().copied().collect();
    let width = a.nope + a.rope;
    let mut out = layer.clone();
    out.shape.groups = new.groups.len();
    for (to, &from) in order.iter().enumerate() {
        let map = &new.queries[from];
        put(&mut out.q_up, to * width, &(map.transpose() * query(layer, from)));
        put(&mut out.q_up, to * width + a.nope, &layer.q_up.mat(from * width + a.nope, a.rope));
        if let (Some(bias), Some(old)) = (&mut out.q_bias, &layer.q_bias) {
            for i in 0..a.nope {
                let turned = (0..a.nope).map(|c| map[(c, i)] * f64::from(old[from * width + c])).sum::<f64>();
                bias[to * width + i] = turned as f32;
            }
            bias[to * width + a.nope..(to + 1) * width]
                .copy_from_slice(&old[from * width + a.nope..(from + 1) * width]);
        }
    }
    out.kv_up = Rows::zeros(new.groups.len() * (a.nope + a.value), a.kv_rank);
    for g in 0..new.groups.len() {
        put(&mut out.kv_up, g * (a.nope + a.value), &new.keys[g]);
        put(&mut out.kv_up, g * (a.nope + a.value) + a.nope, &new.values[g]);
    }
    let columns: Vec<Mat<f64>> = order.iter().map(|&j| new.outputs[j].clone()).collect();
    out.output = Rows::from_mat(beside(&columns).as_ref());
    out
}

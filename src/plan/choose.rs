//! The choice of path, with its reason.

use super::cost::{Bound, Load, PathCost, path_cost};
use super::hardware::Hardware;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::shard::Path;

/// Steps whose times differ by less than this part are equal: the bytes are the same but for rounding.
const TIE: f64 = 1e-6;

/// The path to take, why, and what each path that can run costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The path.
    pub path: Path,
    /// One sentence.
    pub reason: String,
    /// The paths that can run at this world size, GQA first.
    pub costs: Vec<PathCost>,
    /// The paths that cannot, each with its refusal.
    pub refused: Vec<(Path, String)>,
}

/// Chooses the faster path for a decode step of `load`, among those that can run with `world` ranks and hold the load.
///
/// # Errors
/// [`Error::Sharding`] when no path can run at this world size, naming the sizes that would work; [`Error::Usage`] for
/// a load or hardware figure that is not positive.
pub fn choose(model: &ModelConfig, hardware: &Hardware, world: usize, load: &Load) -> Result<Choice> {
    let (mut costs, mut refused) = (vec![], vec![]);
    for path in [Path::Gqa, Path::Absorb] {
        match path_cost(model, hardware, world, path, load) {
            Ok(cost) => costs.push(cost),
            Err(Error::Sharding(why)) => refused.push((path, why)),
            Err(other) => return Err(other),
        }
    }
    let (path, reason) = match costs.as_slice() {
        [] => return Err(nothing_runs(model, world, &refused)),
        [only] => (only.path, format!("only the {} path can run here: {}", only.path, refused[0].1)),
        [gqa, absorb] => compare(gqa, absorb, hardware, world, load),
        _ => return Err(Error::Internal("more paths than two".to_string())),
    };
    Ok(Choice { path, reason, costs, refused })
}

/// No path runs: both refusals, or the GQA path's alone where the model has no latent at all.
fn nothing_runs(model: &ModelConfig, world: usize, refused: &[(Path, String)]) -> Error {
    let told: Vec<&str> = refused
        .iter()
        .filter(|(path, _)| !crate::model::shard::world_sizes(model, *path).is_empty())
        .map(|(_, why)| why.as_str())
        .collect();
    if told.is_empty() {
        return Error::Sharding(format!("{} cannot run with {world} ranks", model.architecture));
    }
    Error::Sharding(told.join("; "))
}

fn compare(gqa: &PathCost, absorb: &PathCost, hardware: &Hardware, world: usize, load: &Load) -> (Path, String) {
    if gqa.fits(load) != absorb.fits(load) {
        let (fits, other) = if gqa.fits(load) { (gqa, absorb) } else { (absorb, gqa) };
        return (
            fits.path,
            format!(
                "only the {} path holds {} sequences of {} tokens beside the weights: the {} path has room for {}",
                fits.path, load.batch, load.context, other.path, other.batch_fits
            ),
        );
    }
    let (path, mut reason) = if (gqa.step_s - absorb.step_s).abs() <= TIE * gqa.step_s {
        let same = format!("both paths take {} a step at W={world}", duration(gqa.step_s));
        (Path::Gqa, format!("{same}, and the gqa path needs less arithmetic for it"))
    } else if gqa.step_s < absorb.step_s {
        (Path::Gqa, faster(gqa, absorb, hardware))
    } else {
        (Path::Absorb, faster(absorb, gqa, hardware))
    };
    if !gqa.fits(load) {
        reason.push_str(", though neither fits this model and load in memory");
    }
    (path, reason)
}

/// Why `best` beats `other`: times first, then what makes attention slower on the other path.
fn faster(best: &PathCost, other: &PathCost, hardware: &Hardware) -> String {
    let times =
        format!("the {} path takes {} a step against {}", best.path, duration(best.step_s), duration(other.step_s));
    let (a, b) = (best.cache_bytes_per_token_per_layer, other.cache_bytes_per_token_per_layer);
    let because = if best.attention.seconds() >= other.attention.seconds() {
        "its products with the weights are the cheaper ones".to_string()
    } else if other.bound == Bound::Compute {
        format!(
            "the {} path is compute-bound here, {:.1} FLOP/byte against a ridge of {:.1}",
            other.path,
            other.intensity,
            hardware.ridge()
        )
    } else if a < b {
        format!("it reads {a} bytes a cached token and layer where the {} path reads {b}", other.path)
    } else {
        format!("the same {a} bytes a cached token and layer meet less arithmetic")
    };
    format!("{times}: {because}")
}

/// Seconds in a unit that suits them.
fn duration(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.1} µs", seconds * 1e6) } else { format!("{:.2} ms", seconds * 1e3) }
}

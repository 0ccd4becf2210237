//! What a conversion is to make, and the small files of its output.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::calibration::Windows;
use super::evaluate::Figures;
use super::gqa::{Choice, RopeMode};
use super::write::{self, Working};
use super::{Method, Options, StoredType, named, shown};
use crate::checkpoint::Checkpoint;
use crate::config::{Attention, Grouped, ModelConfig};
use crate::error::{Error, Result};

/// Share of a Llama's cache that is kept when nothing else is said: 576 of LLaMA-3-8B's 2048 elements.
pub const RATIO: f64 = 0.28125;

/// The settings of a run file within the working directory.
const SETTINGS: &str = "settings.part";

/// The shape of what is made.
#[derive(Debug, Clone)]
pub struct Plan {
    /// G.
    pub groups: usize,
    /// d_r.
    pub rope_dim: usize,
    /// d_c.
    pub latent_rank: usize,
    /// How RoPE is concentrated (Llama).
    pub rope: RopeMode,
    /// Rounds of the values' refit.
    pub refit: usize,
    /// Each layer stores its frequencies.
    pub stored_inv_freq: bool,
    /// Splits of the cache to choose among by predicted loss, `(d_r, d_c)`; empty where the split is given.
    pub splits: Vec<(usize, usize)>,
    /// Elements a token and layer: before, and on the GQA and the absorb path after.
    pub elements: [usize; 3],
}

fn usage<T>(what: String) -> Result<T> {
    Err(Error::Usage(what))
}

/// The plan that the options make for this model, or why there is none.
pub fn plan(options: &Options, config: &ModelConfig) -> Result<Plan> {
    let heads = config.heads();
    let groups = match (&config.attention, options.groups) {
        (_, Some(groups)) => groups,
        (Attention::Grouped(a), None) => a.groups,
        (Attention::Latent(_), None) => return usage("--groups is missing: how many groups are to share keys".into()),
    };
    if groups == 0 || !heads.is_multiple_of(groups) {
        let fits: Vec<String> = (1..=heads).filter(|g| heads.is_multiple_of(*g)).map(|g| g.to_string()).collect();
        let fits = fits.join(", ");
        return usage(format!("--groups {groups} does not divide the model's {heads} query heads: use one of {fits}"));
    }
    if groups > config.groups() {
        return usage(format!(
            "--groups {groups}: the model has only {} KV heads, and a conversion makes no more groups than there are",
            config.groups()
        ));
    }
    if options.length < 2 || options.length > config.max_position {
        let most = config.max_position;
        return usage(format!("--length {} should be from 2 to the model's longest context, {most}", options.length));
    }
    match &config.attention {
        Attention::Latent(a) => {
            for (flag, given, own) in
                [("--latent-rank", options.latent_rank, a.kv_rank), ("--rope-dim", options.rope_dim, a.rope)]
            {
                if given.is_some_and(|given| given != own) {
                    return usage(format!("{flag}: this model has a latent already and keeps it; leave the flag out"));
                }
            }
            if options.cache_elements.is_some() {
                return usage("--cache-elements and --cache-ratio: this model's latent stays as it is".into());
            }
            let before = a.kv_rank + a.rope;
            Ok(Plan {
                groups,
                rope_dim: a.rope,
                latent_rank: a.kv_rank,
                rope: options.rope,
                refit: options.refit,
                stored_inv_freq: a.stored_inv_freq,
                splits: vec![],
                elements: [before, groups * (a.nope + a.value) + a.rope, before],
            })
        }
        Attention::Grouped(a) => llama(options, a, groups, config.hidden),
    }
}

fn llama(options: &Options, a: &Grouped, groups: usize, hidden: usize) -> Result<Plan> {
    let (whole, d) = (2 * a.groups * a.head_dim, a.head_dim);
    let elements = options.cache_elements.unwrap_or((whole as f64 * RATIO).round() as usize);
    let largest_rope = a.groups * d;
    let split = match (options.rope_dim, options.latent_rank, options.rope) {
        (Some(rope), Some(latent), _) => Some((rope, latent)),
        (Some(rope), None, _) => Some((rope, elements.saturating_sub(rope))),
        (None, Some(latent), _) if options.cache_elements.is_some() => Some((elements.saturating_sub(latent), latent)),
        (None, Some(latent), _) => Some((d / 2, latent)),
        (None, None, RopeMode::Published { .. }) => Some((d / 2, elements.saturating_sub(d / 2))),
        (None, None, RopeMode::Adaptive) => None,
    };
    if let (Some((rope, latent)), Some(asked)) = (split, options.cache_elements)
        && rope + latent != asked
    {
        return usage(format!("--rope-dim {rope} and --latent-rank {latent} make {}, not {asked}", rope + latent));
    }
    let splits: Vec<(usize, usize)> = if split.is_some() {
        vec![]
    } else {
        let step = (elements / 18).next_multiple_of(2).max(2);
        let ropes = (step..elements).step_by(step).filter(|r| *r <= largest_rope && elements - r <= whole);
        ropes.map(|rope| (rope, elements - rope)).collect()
    };
    let Some((rope, latent)) = split.or(splits.first().copied()) else {
        return usage(format!("a cache of {elements} elements is too small for a rope key and a latent: give more"));
    };
    if rope == 0 || !rope.is_multiple_of(2) || rope > largest_rope {
        return usage(format!(
            "--rope-dim {rope} should be even, from 2 to {largest_rope} (the KV heads' whole width)"
        ));
    }
    if latent == 0 || latent > hidden.max(whole) {
        return usage(format!("--latent-rank {latent} should be from 1 to {}", hidden.max(whole)));
    }
    if let RopeMode::Published { fold } = options.rope {
        let half = d / 2;
        if fold == 0 || !half.is_multiple_of(fold) {
            return usage(format!("--fold {fold} does not divide the head's {half} frequencies"));
        }
        if !half.is_multiple_of(rope / 2) && !(rope / 2).is_multiple_of(half) {
            return usage(format!("--rope-dim {rope}: as published it divides the head, {d}, or is a multiple of it"));
        }
    }
    let mut plan = Plan {
        groups,
        rope_dim: rope,
        latent_rank: latent,
        rope: options.rope,
        refit: options.refit,
        // As published the frequencies are those of plain RoPE, unless there are more pairs than a head has.
        stored_inv_freq: options.rope == RopeMode::Adaptive || rope > d,
        splits,
        elements: [whole, 0, 0],
    };
    plan.count(d);
    Ok(plan)
}

impl Plan {
    /// Counts the cache's elements for a Llama of head dimension `d`.
    fn count(&mut self, d: usize) {
        self.elements[1] = self.groups * 2 * d + self.rope_dim;
        self.elements[2] = self.latent_rank + self.rope_dim;
    }

    /// Takes the best of the surveyed splits; all of them, best first.
    pub fn choose(&mut self, predicted: &[f64], d: usize) -> Vec<Choice> {
        let mut choices: Vec<Choice> = self
            .splits
            .iter()
            .zip(predicted)
            .map(|(&(rope, latent), &predicted)| {
                let on = |w: usize| {
                    if self.groups.is_multiple_of(w) { self.groups / w * 2 * d + rope } else { 0 }
                };
                Choice { rope, latent, predicted, absorb: rope + latent, grouped: [on(1), on(2), on(4), on(8)] }
            })
            .collect();
        choices.sort_by(|a, b| a.predicted.total_cmp(&b.predicted));
        if let Some(best) = choices.first() {
            (self.rope_dim, self.latent_rank) = (best.rope, best.latent);
            self.count(d);
        }
        choices
    }
}

/// Refuses a calibration with too few tokens for what is estimated from it.
pub fn enough(options: &Options, config: &ModelConfig, plan: &Plan) -> Result<()> {
    let tokens = options.samples * options.length;
    let widest = match &config.attention {
        Attention::Latent(a) if options.method == Method::Pca => a.kv_rank,
        Attention::Latent(a) => a.kv_rank.max(a.heads * a.value),
        Attention::Grouped(a) => config.hidden.max(a.heads * a.head_dim),
    };
    if plan.groups == config.groups() && matches!(config.attention, Attention::Latent(_)) || tokens >= 2 * widest {
        return Ok(());
    }
    usage(format!(
        "{tokens} calibration tokens are too few to estimate {widest} directions of every layer: give at least {}, with \
         more --samples or a larger --length",
        2 * widest
    ))
}

/// The type new weights are stored in, as safetensors names it.
pub fn dtype(options: &Options, source: &Checkpoint) -> Result<String> {
    Ok(match options.stored {
        StoredType::Bf16 => "BF16".into(),
        StoredType::F32 => "F32".into(),
        StoredType::Source => {
            let raw = source.raw("model.layers.0.self_attn.o_proj.weight");
            raw.map_or("BF16", |(dtype, _, _)| dtype).into()
        }
    })
}

/// Settings and calibration, as `gqla_meta.json` records them; equal for a run that can be resumed.
pub fn settings(options: &Options, config: &ModelConfig, plan: &Plan, calibration: &Windows) -> Value {
    let rope = match options.rope {
        RopeMode::Adaptive => json!({"mode": "adaptive"}),
        RopeMode::Published { fold } => json!({"mode": "published", "fold": fold}),
    };
    let llama = matches!(config.attention, Attention::Grouped(_));
    json!({
        "converter": format!("gqla {}", env!("CARGO_PKG_VERSION")),
        "source": shown(&options.model),
        "source_architecture": config.architecture,
        "groups": plan.groups,
        "group_size": config.heads() / plan.groups,
        "method": named(options.method),
        "grouping": named(options.grouping),
        "weights": named(options.weights),
        "refit": options.refit,
        "rope": if llama { rope } else { Value::Null },
        "asked": {
            "rope_dim": options.rope_dim,
            "latent_rank": options.latent_rank,
            "cache_elements": options.cache_elements,
        },
        "stored": named(options.stored),
        "calibration": {
            "file": shown(&options.calibration),
            "sha256": calibration.hash,
            "samples": calibration.windows.len(),
            "length": calibration.length,
        },
        "seed": options.seed,
    })
}

/// Which of `layers` layers an earlier run with the same settings finished.
pub fn resume(working: &Working, layers: usize, settings: &Value) -> Result<Vec<bool>> {
    let file = working.directory.join(SETTINGS);
    let text = format!("{settings:#}\n");
    let mut kept = false;
    if file.is_file() {
        let before = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
        if before != text {
            return usage(format!(
                "{}: was begun with other settings; remove it, or give the same ones",
                working.directory.display()
            ));
        }
        kept = true;
    } else {
        write::text(&file, &text)?;
    }
    Ok((0..layers).map(|i| kept && working.layer(i).is_file()).collect())
}

/// Removes what only the run needed.
pub fn clean(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory).map_err(|e| Error::io(directory, e))? {
        let path = entry.map_err(|e| Error::io(directory, e))?.path();
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else if path.extension().is_some_and(|e| e == "part" || e == "writing") {
            std::fs::remove_file(&path)
        } else {
            continue;
        };
        removed.map_err(|e| Error::io(&path, e))?;
    }
    Ok(())
}

/// Names of the original's tensors that the output does not have.
pub fn dropped(config: &ModelConfig) -> impl Fn(&str) -> bool + use<> {
    let llama = matches!(config.attention, Attention::Grouped(_));
    move |name: &str| {
        llama
            && [".k_proj.weight", ".v_proj.weight", ".k_proj.bias", ".v_proj.bias"]
                .iter()
                .any(|end| name.ends_with(end))
            || name.ends_with(".rotary_emb.inv_freq")
    }
}

/// `Glm4MoeLiteForCausalLM` becomes `Glm4MoeLiteGQLAForCausalLM`.
fn converted_name(architecture: &str) -> String {
    let stem = architecture.strip_suffix("ForCausalLM").unwrap_or(architecture);
    let stem = stem.strip_suffix("Absorb").unwrap_or(stem);
    let stem = stem.strip_suffix("GQLA").unwrap_or(stem);
    format!("{stem}GQLAForCausalLM")
}

/// Writes `config.json` and, where transformers can run the result, `modeling.py`.
pub fn config(options: &Options, config: &ModelConfig, plan: &Plan, directory: &Path) -> Result<()> {
    let file = options.model.join("config.json");
    let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
    let mut map: Map<String, Value> =
        serde_json::from_str(&text).map_err(|e| Error::checkpoint(&file, format!("is not valid JSON: {e}")))?;
    let name = converted_name(&config.architecture);
    map.insert("architectures".into(), json!([name]));
    map.insert("num_key_value_heads".into(), json!(plan.groups));
    map.remove("auto_map");
    match &config.attention {
        Attention::Latent(_) => {
            if let Some(text) = modeling(&name) {
                map.insert("auto_map".into(), json!({"AutoModelForCausalLM": format!("modeling.{name}")}));
                write::text(&directory.join("modeling.py"), &text)?;
            }
        }
        Attention::Grouped(a) => {
            map.remove("head_dim");
            let fields = [
                ("kv_lora_rank", json!(plan.latent_rank)),
                ("q_lora_rank", Value::Null),
                ("qk_nope_head_dim", json!(a.head_dim)),
                ("qk_rope_head_dim", json!(plan.rope_dim)),
                ("v_head_dim", json!(a.head_dim)),
                ("qk_latent_layernorm", json!(false)),
                ("stored_inv_freq", json!(plan.stored_inv_freq)),
                ("rope_interleave", json!(false)),
            ];
            map.extend(fields.map(|(k, v)| (k.to_string(), v)));
        }
    }
    write::text(&directory.join("config.json"), &format!("{:#}\n", Value::Object(map)))
}

/// The class that lets transformers load a converted MLA model.
fn modeling(name: &str) -> Option<String> {
    let base = name.strip_suffix("GQLAForCausalLM")?;
    let module = match base {
        "Glm4MoeLite" => "glm4_moe_lite",
        "DeepseekV2" => "deepseek_v2",
        "DeepseekV3" => "deepseek_v3",
        _ => return None,
    };
    Some(include_str!("modeling.py").replace("MODULE", module).replace("BASE", base))
}

/// Writes `gqla_meta.json`: settings, what came of them, and the figures when measured.
pub fn meta(
    directory: &Path,
    settings: &Value,
    plan: &Plan,
    figures: Option<&Figures>,
    file: Option<&Path>,
) -> Result<()> {
    let mut meta = settings.clone();
    meta["rope_dim"] = json!(plan.rope_dim);
    meta["latent_rank"] = json!(plan.latent_rank);
    meta["cache_elements"] = json!({
        "before": plan.elements[0],
        "gqa_path": plan.elements[1],
        "absorb_path": plan.elements[2],
    });
    meta["evaluation"] = match figures {
        None => Value::Null,
        Some(figures) => {
            let mut value = json!(figures);
            value["file"] = json!(file.map(shown));
            value
        }
    };
    write::text(&directory.join("gqla_meta.json"), &format!("{meta:#}\n"))
}

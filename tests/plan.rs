//! The cost model and `gqla plan` against the published figures (SPEC.md section 1).

use std::process::{Command, Output};

use gqla::Error;
use gqla::config::ModelConfig;
use gqla::model::shard::Path;
use gqla::plan::cost::{distinct_experts, path_cost, spared_by_same_routing};
use gqla::plan::{Bound, Choice, Hardware, Load, PathCost, choose, shapes};

const LOAD: Load = Load { batch: 64, context: 8192, s_q: 1 };

fn model(name: &str) -> ModelConfig {
    shapes::named(name).unwrap_or_else(|| panic!("{name} is not a known model"))
}

fn card(name: &str) -> Hardware {
    Hardware::named(name).unwrap_or_else(|| panic!("{name} is not a known card"))
}

fn cost(name: &str, hardware: &str, world: usize, path: Path, s_q: usize) -> PathCost {
    path_cost(&model(name), &card(hardware), world, path, &Load { s_q, ..LOAD }).unwrap()
}

fn chosen(name: &str, hardware: &Hardware, world: usize, load: Load) -> Choice {
    choose(&model(name), hardware, world, &load).unwrap()
}

fn assert_near(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance, "{got} is not {want} ± {tolerance}");
}

#[test]
fn elements_a_token_are_those_published() {
    for (world, gqa) in [(1, 2112), (2, 1088), (4, 576), (8, 320)] {
        for name in ["deepseek-v3-gqla", "llama-3-8b-gqla"] {
            assert_eq!(
                cost(name, "h100", world, Path::Gqa, 1).cache_elements_per_token_per_layer,
                gqa,
                "{name} W={world}"
            );
            assert_eq!(cost(name, "h100", world, Path::Absorb, 1).cache_elements_per_token_per_layer, 576);
        }
    }
    let glm = "glm-4.7-flash-gqla";
    assert_eq!(cost(glm, "h100", 1, Path::Absorb, 1).cache_elements_per_token_per_layer, 576);
    assert_eq!(cost(glm, "h100", 1, Path::Gqa, 1).cache_elements_per_token_per_layer, 1856);
}

#[test]
fn llama_converted_caches_28_125_percent() {
    let before = cost("llama-3-8b", "h100", 1, Path::Gqa, 1);
    let after = cost("llama-3-8b-gqla", "h100", 1, Path::Absorb, 1);
    assert_eq!((after.cache_elements_per_token_per_layer, before.cache_elements_per_token_per_layer), (576, 2048));
    assert_eq!(after.cache_bytes_per_token as f64 / before.cache_bytes_per_token as f64, 0.28125);
    assert_eq!(before.cache_bytes_per_token, 2048 * 2 * 32);
}

#[test]
fn intensities_are_those_published() {
    for (path, s_q, want, digit) in [
        (Path::Absorb, 1, 241.8, 0.05),
        (Path::Absorb, 2, 483.6, 0.05),
        (Path::Gqa, 1, 19.4, 0.05),
        (Path::Gqa, 2, 38.79, 0.005),
    ] {
        assert_near(cost("deepseek-v3-gqla", "h100", 1, path, s_q).intensity, want, digit);
    }
    // More ranks: fewer heads on the same latent, and a rope key that weighs more on the GQA path.
    assert_near(cost("deepseek-v3-gqla", "h100", 4, Path::Absorb, 1).intensity, 241.8 / 4.0, 0.02);
    assert_near(cost("deepseek-v3-gqla", "h100", 8, Path::Gqa, 1).intensity, 16.0 * 320.0 / 320.0, 1e-9);
}

#[test]
fn ridges_are_those_published() {
    for (name, want) in [("h100", 295.0), ("h200", 206.0), ("h20", 37.0)] {
        assert_near(card(name).ridge(), want, 0.5);
    }
    let measured = card("h200").overridden(Some(4.3e12), Some(790e12), None, None);
    assert_near(measured.ridge(), 184.0, 0.5);
    assert!(measured.source.starts_with("bandwidth, flops given by the user"), "{}", measured.source);
}

#[test]
fn h100_absorb_is_just_below_its_ridge_and_h20_gqa_at_its_own() {
    let absorb = cost("deepseek-v3-gqla", "h100", 1, Path::Absorb, 1);
    assert_eq!(absorb.bound, Bound::Memory);
    assert_near(absorb.intensity / card("h100").ridge(), 0.82, 0.01);
    // Two tokens a step put it on the other side.
    assert_eq!(cost("deepseek-v3-gqla", "h100", 1, Path::Absorb, 2).bound, Bound::Compute);

    let gqa = cost("deepseek-v3-gqla", "h20", 1, Path::Gqa, 2);
    assert_near(gqa.intensity / card("h20").ridge(), 38.79 / 37.0, 0.001);
    assert_eq!(cost("deepseek-v3-gqla", "h20", 1, Path::Gqa, 1).bound, Bound::Memory);
}

#[test]
fn a_second_token_doubles_arithmetic_and_reads_nothing_more() {
    for path in [Path::Gqa, Path::Absorb] {
        let (one, two) = (cost("deepseek-v3-gqla", "h20", 2, path, 1), cost("deepseek-v3-gqla", "h20", 2, path, 2));
        assert_eq!(two.attention.bytes, one.attention.bytes);
        assert_eq!(two.attention.flops, 2.0 * one.attention.flops);
    }
}

#[test]
fn paths_tie_at_four_ranks_and_gqa_reads_1_8_times_less_at_eight() {
    let bytes = |world, path| cost("deepseek-v3-gqla", "h100", world, path, 1).attention.bytes;
    assert!(bytes(2, Path::Gqa) > bytes(2, Path::Absorb));
    assert_eq!(bytes(4, Path::Gqa), bytes(4, Path::Absorb));
    assert_near(bytes(8, Path::Absorb) / bytes(8, Path::Gqa), 1.8, 1e-12);
}

#[test]
fn h20_absorb_is_compute_bound_up_to_four_ranks_and_gqa_is_chosen_throughout() {
    for world in [1, 2, 4] {
        for s_q in [1, 2] {
            for (batch, context) in [(1, 1024), (64, 8192), (8, 131072)] {
                let load = Load { batch, context, s_q };
                let choice = chosen("deepseek-v3-gqla", &card("h20"), world, load);
                assert_eq!(choice.path, Path::Gqa, "W={world} {load:?}: {}", choice.reason);
                assert_eq!(choice.costs[1].path, Path::Absorb);
                assert_eq!(choice.costs[1].bound, Bound::Compute);
            }
        }
    }
    let reason = chosen("deepseek-v3-gqla", &card("h20"), 1, LOAD).reason;
    assert!(reason.contains("absorb path is compute-bound here, 241.8 FLOP/byte against a ridge of 37.0"), "{reason}");
}

#[test]
fn h100_chooses_by_bytes() {
    for (world, want) in [(1, Path::Absorb), (2, Path::Absorb), (4, Path::Gqa), (8, Path::Gqa)] {
        let choice = chosen("deepseek-v3-gqla", &card("h100"), world, LOAD);
        assert_eq!(choice.path, want, "W={world}: {}", choice.reason);
    }
}

#[test]
fn choice_follows_figures_and_not_the_name() {
    let slow = card("h100").overridden(None, Some(148e12), None, None);
    assert_eq!(chosen("deepseek-v3-gqla", &card("h100"), 1, LOAD).path, Path::Absorb);
    assert_eq!(chosen("deepseek-v3-gqla", &slow, 1, LOAD).path, Path::Gqa);
}

#[test]
fn where_one_path_can_run_it_is_chosen_and_the_reason_says_so() {
    let sixteen = chosen("deepseek-v3-gqla", &card("h20"), 16, LOAD);
    assert_eq!((sixteen.path, sixteen.costs.len()), (Path::Absorb, 1));
    for part in ["only the absorb path", "16 ranks", "8 groups"] {
        assert!(sixteen.reason.contains(part), "{}", sixteen.reason);
    }
    let llama = chosen("llama-3-8b", &card("h100"), 2, LOAD);
    assert_eq!((llama.path, llama.costs.len()), (Path::Gqa, 1));
    assert!(llama.reason.contains("only the gqa path") && llama.reason.contains("no latent"), "{}", llama.reason);
}

#[test]
fn memory_decides_where_only_one_path_holds_the_load() {
    let load = Load { batch: 32, context: 16384, s_q: 1 };
    // 16 GB of weights in bf16; 524288 tokens take 19.3 GB on the absorb path and 70.9 GB on the GQA path,
    // which is the faster one on a card this weak.
    let small = card("h20").overridden(None, Some(20e12), Some(60e9), None);
    let choice = chosen("llama-3-8b-gqla", &small, 1, load);
    assert_eq!(choice.path, Path::Absorb);
    assert!(choice.reason.contains("only the absorb path holds 32 sequences of 16384 tokens"), "{}", choice.reason);
    let large = card("h20").overridden(None, Some(20e12), Some(200e9), None);
    assert_eq!(chosen("llama-3-8b-gqla", &large, 1, load).path, Path::Gqa);
}

#[test]
fn what_fits_is_memory_less_weights_over_cache_bytes() {
    let cost = cost("llama-3-8b-gqla", "h100", 1, Path::Absorb, 1);
    // 0.92 of 80 GB, less the weights, over 576 elements of 2 bytes in 32 layers.
    let want = ((80e9 * 0.92 - cost.weight_bytes) / 36864.0) as u64;
    assert_eq!((cost.tokens_fit, cost.batch_fits), (want, want / 8192));
    assert!(self::cost("deepseek-v3-gqla", "h100", 1, Path::Absorb, 1).tokens_fit == 0, "671e9 weights in 80 GB");
}

#[test]
fn sizes_of_whole_models_are_right() {
    let billions = |name| cost(name, "h200", 1, Path::Gqa, 1).weight_bytes / 2e9;
    assert_near(billions("llama-3-8b"), 8.03, 0.01);
    assert_near(billions("deepseek-v2-lite"), 15.7, 0.1);
    assert_near(billions("deepseek-v3"), 671.0, 1.0);
    assert_near(billions("glm-4.7-flash"), 30.0, 0.8);
    // A step of one token of LLaMA-3-8B reads everything but the embedding.
    let step = path_cost(&model("llama-3-8b"), &card("h200"), 1, Path::Gqa, &Load { batch: 1, context: 1, s_q: 1 });
    assert_near(step.unwrap().weights.bytes / 1e9, 15.01, 0.01);
}

#[test]
fn experts_read_are_the_expected_distinct_ones() {
    let moe = model("glm-4.7-flash").moe.unwrap();
    assert_near(distinct_experts(&moe, 1), 4.0, 1e-9);
    assert_near(distinct_experts(&moe, 2), 64.0 - 60.0 * 60.0 / 64.0, 1e-9);
    assert!(distinct_experts(&moe, 512) > 63.99 && distinct_experts(&moe, 512) <= 64.0);
}

#[test]
fn tokens_that_choose_the_same_experts_read_what_one_token_reads() {
    let glm = model("glm-4.7-flash-gqla");
    assert_near(spared_by_same_routing(&glm, 2, 1), 0.0, 1e-3);
    let moe = glm.moe.clone().unwrap();
    // 46 sparse layers; bf16, gate, up and down, half of each on a rank.
    let expert = 2.0 * 3.0 * (glm.hidden * moe.width / 2) as f64;
    let spared = 46.0 * expert * (distinct_experts(&moe, 64) - moe.top_k as f64);
    assert_near(spared_by_same_routing(&glm, 2, 64) / spared, 1.0, 1e-9);
    assert_eq!(spared_by_same_routing(&model("llama-3-8b"), 2, 64), 0.0);
}

#[test]
fn all_reduces_are_two_a_layer_and_the_embeddings() {
    let hardware = card("h100");
    let none = cost("llama-3-8b", "h100", 1, Path::Gqa, 1);
    assert_eq!(none.all_reduce_s, 0.0);
    let bytes = (64 * 4096 * 2) as f64;
    let one = hardware.latency + 2.0 * 7.0 / 8.0 * bytes / hardware.link;
    assert_near(cost("llama-3-8b", "h100", 8, Path::Gqa, 1).all_reduce_s, 65.0 * one, 1e-12);
}

#[test]
fn ranks_share_the_weights() {
    let whole = cost("llama-3-8b", "h100", 1, Path::Gqa, 1);
    let eighth = cost("llama-3-8b", "h100", 8, Path::Gqa, 1);
    assert_eq!(eighth.weight_bytes * 8.0, whole.weight_bytes);
    // The latent's projections are on every rank, so GQLA divides by a little less.
    let (whole, eighth) =
        (cost("deepseek-v3-gqla", "h100", 1, Path::Gqa, 1), cost("deepseek-v3-gqla", "h100", 8, Path::Gqa, 1));
    assert!(eighth.weight_bytes * 8.0 > whole.weight_bytes && eighth.weight_bytes * 8.0 < whole.weight_bytes * 1.05);
}

#[test]
fn world_sizes_that_do_not_fit_are_refused_by_name() {
    let refusal = |name, world| match choose(&model(name), &card("h100"), world, &LOAD) {
        Err(error @ Error::Sharding(_)) => error.to_string(),
        other => panic!("{name} W={world}: {other:?}"),
    };
    let three = refusal("deepseek-v3-gqla", 3);
    for part in ["3 ranks", "8 groups", "1, 2, 4, 8", "128 query heads", "64, 128"] {
        assert!(three.contains(part), "{part:?} is not in {three:?}");
    }
    let llama = refusal("llama-3-8b", 16);
    assert!(llama.contains("16 ranks") && llama.contains("1, 2, 4, 8") && !llama.contains("latent"), "{llama}");
}

#[test]
fn loads_and_figures_of_zero_are_refused() {
    let model = model("llama-3-8b");
    for (world, load) in
        [(0, LOAD), (1, Load { batch: 0, ..LOAD }), (1, Load { context: 0, ..LOAD }), (1, Load { s_q: 0, ..LOAD })]
    {
        assert!(matches!(choose(&model, &card("h100"), world, &load), Err(Error::Usage(_))), "W={world} {load:?}");
    }
    let dead = card("h100").overridden(Some(0.0), None, None, None);
    assert!(matches!(choose(&model, &dead, 1, &LOAD), Err(Error::Usage(_))));
}

#[test]
fn cpus_choose_too() {
    let load = Load { batch: 1, context: 2048, s_q: 1 };
    for ranks in [1, 2, 4, 8] {
        let hardware = Hardware::cpu_share(8, ranks, 64e9);
        let choice = chosen("glm-4.7-flash-gqla", &hardware, ranks.min(4), load);
        assert_eq!(choice.costs.len(), 2);
        assert_eq!(
            choice.costs[0].cache_bytes_per_token_per_layer,
            choice.costs[0].cache_elements_per_token_per_layer * 4
        );
    }
    // A CPU has little arithmetic a byte: absorbing would be bound by it.
    let choice = chosen("deepseek-v3-gqla", &Hardware::cpu_share(64, 1, 2e12), 1, LOAD);
    assert_eq!(choice.path, Path::Gqa, "{}", choice.reason);
}

// The command.

fn gqla(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gqla")).args(args).output().expect("the binary runs")
}

fn plan_json(args: &[&str]) -> serde_json::Value {
    let out = gqla(&[&["plan", "--json"], args].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(out.stderr.is_empty());
    serde_json::from_slice(&out.stdout).expect("stdout is one JSON document")
}

#[test]
fn json_has_the_figures() {
    let report = plan_json(&["--model", "deepseek-v3-gqla", "--hardware", "h20", "--tp", "8", "--s-q", "2"]);
    assert_eq!(report["choice"], "gqa");
    assert_eq!(report["tp"], 8);
    assert_eq!(report["load"], serde_json::json!({"batch": 32, "context": 8192, "s_q": 2}));
    assert_near(report["hardware"]["ridge"].as_f64().unwrap(), 37.0, 1e-9);
    for (path, elements, bytes) in [("gqa", 320, 320 * 2 * 61), ("absorb", 576, 576 * 2 * 61)] {
        let cost = &report["paths"][path];
        assert_eq!(cost["path"], path);
        assert_eq!(cost["cache_elements_per_token_per_layer"], elements);
        assert_eq!(cost["cache_bytes_per_token"], bytes);
        for field in ["intensity", "memory_s", "compute_s", "step_s", "tokens_per_s", "all_reduce_s"] {
            assert!(cost[field].as_f64().is_some_and(|x| x > 0.0), "{path}.{field} is {}", cost[field]);
        }
        assert!(cost["tokens_fit"].is_u64() && cost["batch_fits"].is_u64());
    }
    assert_eq!(report["paths"]["absorb"]["bound"], "compute");
    assert!(report["reason"].as_str().is_some_and(|r| r.contains("gqa")));
}

#[test]
fn figures_on_the_command_line_override_the_cards() {
    let report = plan_json(&[
        "--model",
        "llama-3-8b-gqla",
        "--hardware",
        "h100",
        "--bandwidth",
        "4.0",
        "--flops",
        "148",
        "--memory",
        "96",
        "--link",
        "100",
    ]);
    let hardware = &report["hardware"];
    assert_near(hardware["ridge"].as_f64().unwrap(), 37.0, 1e-9);
    assert_eq!(hardware["memory_bytes"], 96e9);
    assert_eq!(hardware["link_bytes_per_s"], 100e9);
    assert!(hardware["source"].as_str().unwrap().contains("given by the user"));
}

#[test]
fn a_checkpoint_directory_plans_as_its_configuration_says() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/checkpoints/tiny-glm-gqla");
    let report = plan_json(&["--model", directory, "--tp", "8", "--hardware", "h100"]);
    assert_eq!(report["paths"]["gqa"]["cache_elements_per_token_per_layer"], 32 + 32 + 16);
    assert_eq!(report["paths"]["absorb"]["cache_elements_per_token_per_layer"], 128 + 16);
}

#[test]
fn the_table_is_readable() {
    let out = gqla(&["plan", "--model", "deepseek-v3-gqla", "--hardware", "h20", "--tp", "2"]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success());
    for part in ["gqa ←", "absorb", "1088", "576", "120.89", "choice: gqa. ", "batch × context that fits"] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn errors_are_one_line_with_their_exit_code() {
    let model = ["plan", "--model", "llama-3-8b"];
    for (args, code, part) in [
        (&["--tp", "3"][..], 4, "8 groups"),
        (&["--hardware", "h1000"], 2, "h100, h200, h20, a100-80gb, l40s, b200"),
        (&["--hardware", "measured"], 7, "needs a GPU"),
        (&["--batch", "0"], 2, "batch is 0"),
    ] {
        let out = gqla(&[&model[..], args].concat());
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
        assert!(out.stdout.is_empty());
        assert!(text.starts_with("gqla: ") && text.lines().count() == 1 && text.contains(part), "{args:?}: {text}");
    }
    let out = gqla(&["plan", "--model", "no-such-model"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("glm-4.7-flash-gqla"));
}

#[test]
fn wrong_flags_exit_2_and_help_and_version_0() {
    for args in [&["plan", "--nonsense"][..], &[], &["plan", "--model", "llama-3-8b", "--bandwidth", "-1"]] {
        assert_eq!(gqla(args).status.code(), Some(2), "{args:?}");
    }
    let help = gqla(&["--help"]);
    assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("Exit codes"));
    let version = gqla(&["--version"]);
    assert_eq!(String::from_utf8_lossy(&version.stdout).trim(), concat!("gqla ", env!("CARGO_PKG_VERSION")));
}

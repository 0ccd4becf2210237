//! NVRTC alone, no GPU: every source compiles for the oldest card, for Hopper and for later ones, for every head shape
//! that SPEC.md's models have and for the bundled checkpoints'.

use std::collections::BTreeSet;

use gqla::backend::AttentionShape;
use gqla::backend::cuda::kernels::{Source, compile, compiler_version, export, source};
use gqla::backend::cuda::{
    Cut, absorb_constants, append_constants, combines_output, decode_source, expanded_constants, expert_constants,
    latent_constants, prefill_constants, route_constants,
};
use gqla::config::{Moe, Scoring};

/// (heads, groups, nope, rope, value, latent) of one rank.
const SHAPES: [(usize, usize, usize, usize, usize, usize); 13] = [
    (32, 8, 128, 0, 128, 0),       // LLaMA-3-8B
    (16, 4, 128, 0, 128, 0),       // at W=2
    (128, 8, 128, 64, 128, 512),   // the canonical GQLA shape
    (16, 1, 128, 64, 128, 512),    // at W=8
    (20, 4, 192, 64, 256, 512),    // GLM-4.7-Flash, G=4
    (10, 2, 192, 64, 256, 512),    // at W=2
    (20, 20, 192, 64, 256, 512),   // as published
    (16, 16, 128, 64, 128, 512),   // DeepSeek-V2-Lite
    (128, 128, 128, 64, 128, 512), // DeepSeek-V3
    (16, 8, 32, 16, 32, 128),      // tiny-glm-gqla
    (16, 8, 32, 0, 32, 0),         // tiny-llama-gqa
    (24, 4, 40, 24, 56, 96),       // oddheads-yarn-moe
    (8, 8, 32, 16, 32, 64),        // deepseek-v3-mla
];

type Constants = Vec<(&'static str, i64)>;

fn shape((heads, groups, nope, rope, value, latent): (usize, usize, usize, usize, usize, usize)) -> AttentionShape {
    let heads_per_group = heads / groups;
    AttentionShape {
        heads,
        groups,
        first_head_in_group: 0,
        heads_per_group,
        nope,
        rope,
        value,
        latent,
        scale: 1.0,
        expand: latent > 0,
    }
}

/// Everything that is compiled for one architecture.
fn all(hopper: bool) -> BTreeSet<(&'static str, Constants)> {
    let mut jobs: BTreeSet<(&'static str, Constants)> = BTreeSet::new();
    let mut add = |s: &Source, constants: Constants| {
        jobs.insert((s.name, constants));
    };
    for s in [source::SPLIT_PLAN, source::ABSORB_PLAN, source::SELECT_ROWS, source::SILU_MUL, source::CHOOSE] {
        add(&s, vec![]);
    }
    for s in [source::EMBED, source::DUMMY_WEIGHTS, source::EXPERTS_TILE] {
        add(&s, vec![]);
    }
    for width in [192, 2048, 4096, 7168, 77] {
        add(&source::NORM, vec![("WIDTH", width)]);
        add(&source::NORM, vec![("WIDTH", width), ("X_BF16", 1)]);
        add(&source::ONE_SHOT, vec![("WIDTH", width)]);
        add(&source::ONE_SHOT, vec![("WIDTH", width), ("BEGINS", 1)]);
        for (results, top_k) in [(5, 4), (9, 8), (8, 8)] {
            let results = [("RESULTS", results), ("TOP_K", top_k)];
            add(&source::NORM, [&[("WIDTH", width)], &results[..]].concat());
            add(&source::ONE_SHOT, [&[("WIDTH", width)], &results[..]].concat());
        }
    }
    if hopper {
        for m in [1, 2, 4, 8, 16] {
            add(&source::GEMV, vec![("ROWS", m), ("OUT_F32", 0)]);
            add(&source::GEMV, vec![("ROWS", m), ("OUT_F32", 1)]);
        }
        add(&source::GEMV, vec![("ROWS", 8), ("PAIR", 1)]);
        for (n, gated, f32_out) in
            [(1344, 0, 0), (4096, 0, 0), (6144, 0, 0), (7168, 1, 0), (128256, 0, 1), (1003, 0, 1)]
        {
            for rows in [24, 64] {
                let cut = Cut::of(n, 4096, rows, gated == 1, 132);
                let (columns, passes, split) = (cut.columns as i64, cut.passes as i64, cut.split as i64);
                let cut = vec![("ROWS", rows as i64), ("COLUMNS", columns), ("PASSES", passes), ("SPLIT", split)];
                let constants = [cut, vec![("GATED", gated), ("OUT_F32", f32_out)]].concat();
                add(&source::STREAM_PRODUCT, constants);
            }
        }
        for columns in [32, 208] {
            add(&source::STREAM_PRODUCT, vec![("ROWS", 64), ("COLUMNS", columns), ("PASSES", 1), ("PAIR", 1)]);
        }
    }
    for dims in SHAPES {
        let s = shape(dims);
        let int = |x: usize| x as i64;
        for rows in [1, 2, 3, 4] {
            let (src, _, constants) = decode_source(&s, false, rows, hopper);
            for interleave in [false, true].into_iter().filter(|_| *src == source::GQA_DECODE) {
                add(src, [&constants[..], &append_constants(interleave)].concat());
            }
            add(src, constants);
            add(&source::COMBINE, vec![("DV", int(s.value)), ("SQ", int(rows))]);
        }
        add(&source::PREFILL, prefill_constants(&s, false, if hopper { 227 << 10 } else { 99 << 10 }));
        let interleave = i64::from(s.rope > 0);
        let (dn, dr) = (("DN", int(s.nope)), ("DR", int(s.rope)));
        add(&source::ROPE_APPEND_GROUPED, vec![dn, dr, ("DV", int(s.value)), ("INTERLEAVE", interleave)]);
        if s.latent == 0 {
            continue;
        }
        for rows in [1, 2, 3, 4] {
            let (src, _, constants) = decode_source(&s, true, rows, hopper);
            add(src, constants);
            add(&source::COMBINE, vec![("DV", int(s.latent)), ("SQ", int(rows))]);
        }
        add(&source::PREFILL, prefill_constants(&s, true, if hopper { 227 << 10 } else { 99 << 10 }));
        add(&source::GATHER_LATENTS, vec![("DC", int(s.latent)), dr]);
        for (per_group, interleave) in [(s.heads_per_group, true), (1, false)] {
            let shared = if hopper { 227 << 10 } else { 99 << 10 };
            for shared in [shared, shared / 2] {
                add(&source::PREFILL, expanded_constants(&s, per_group, interleave, shared));
            }
        }
        for interleave in [true, false] {
            for q_rank in [0, 768, 77] {
                add(&source::APPEND_LATENT, latent_constants(q_rank, s.latent, s.rope, interleave).to_vec());
            }
            for tile in [16, 32, 64] {
                add(&source::ABSORB_PRODUCT, absorb_constants(&s, interleave, tile).to_vec());
            }
        }
        if hopper && combines_output(&s) {
            for split in [4, 8] {
                add(&source::COMBINE_OUTPUT, vec![("SQ", 1), dn, ("DV", int(s.value)), ("SPLIT", split)]);
            }
        }
    }
    let moe = |experts, top_k, groups, top_groups, scoring| Moe {
        experts,
        top_k,
        width: 64,
        shared_width: 64,
        scoring,
        groups,
        top_groups,
        normalise: scoring == Scoring::NoAuxTc,
        scale: 1.0,
    };
    for (moe, hidden, width, shared) in [
        (moe(64, 4, 1, 1, Scoring::NoAuxTc), 2048, 1536, 1536),
        (moe(256, 8, 8, 4, Scoring::NoAuxTc), 7168, 1024, 1024),
        (moe(64, 6, 1, 1, Scoring::SoftmaxGreedy), 2048, 704, 1408),
        (moe(160, 6, 8, 3, Scoring::SoftmaxGroupLimited), 5120, 1536, 3072),
        (moe(8, 2, 1, 1, Scoring::NoAuxTc), 128, 16, 0),
    ] {
        for rows in [1, 64] {
            add(&source::ROUTE, route_constants(&moe, hidden, rows));
            let constants = expert_constants((moe.experts, moe.top_k, hidden), (width, shared), rows);
            if hopper && [hidden, width, shared].iter().all(|n| n % 64 == 0) {
                add(&source::EXPERTS_HOPPER, constants.clone());
            }
            add(&source::EXPERTS, constants);
        }
    }
    jobs
}

/// Compiles everything for `architecture`; the Hopper-only sources only there.
fn check(architecture: &str, hopper: bool) {
    if let Err(e) = compiler_version() {
        assert!(std::env::var_os("GQLA_NVRTC").is_none(), "{e}");
        eprintln!("NOT RUN for lack of NVRTC (install nvidia-cuda-nvrtc, or set GQLA_NVRTC): {e}");
        return;
    }
    let jobs: Vec<_> = all(hopper).into_iter().collect();
    let failures: Vec<String> = {
        use rayon::prelude::*;
        let one = |(name, constants): &(&str, Constants)| {
            let source = source::ALL.iter().find(|s| s.name == *name)?;
            match compile(source, constants, architecture) {
                Err(e) => Some(e.to_string()),
                Ok(ptx) => {
                    let missing = source.exports.iter().find(|e| export(&ptx, e).is_none())?;
                    Some(format!("{name} {constants:?} exports no {missing}"))
                }
            }
        };
        jobs.par_iter().filter_map(one).collect()
    };
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), jobs.len(), failures.join("\n"));
    eprintln!("{} kernels compiled for {architecture}", jobs.len());
}

#[test]
fn every_kernel_compiles_for_the_oldest_gpus() {
    check("compute_80", false);
}

#[test]
fn every_kernel_compiles_for_hopper() {
    check("compute_90a", true);
}

#[test]
fn every_kernel_compiles_for_later_gpus() {
    check("compute_100", false);
}

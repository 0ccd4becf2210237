//! The same model at other world sizes and on the other path: the same logits, and caches of the size they should have.

#[path = "common/model.rs"]
mod model;

use gqla::comm::threads;
use gqla::config::{Attention, ModelConfig};
use gqla::engine::{Engine, Event, Request, Sampling};
use gqla::model::shard::{Path, Shard, world_sizes};

fn prompts(name: &str) -> Vec<Vec<u32>> {
    model::lists(&model::golden(name)["prompts"])
}

#[test]
fn world_sizes_and_paths_give_the_same_logits() {
    for name in
        ["tiny-llama-gqa", "tiny-glm-gqla", "tiny-glm-mla", "realhead-h32g8", "oddheads-yarn-moe", "deepseek-v3-mla"]
    {
        let prompts = prompts(name);
        let config = ModelConfig::load(&model::checkpoint(name).0).unwrap();
        let one = model::logits(&model::config(name, Some(Path::Gqa)), 1, &prompts);
        for path in [Path::Gqa, Path::Absorb] {
            for world in world_sizes(&config, path).into_iter().filter(|w| *w <= 8) {
                let many = model::logits(&model::config(name, Some(path)), world, &prompts);
                for i in 0..prompts.len() {
                    let (error, size) = model::difference(&many[i], &one[i]);
                    assert!(error <= 1e-5 * (1.0 + size), "{name} {path} W={world} prompt {i}: {error} of {size}");
                    if path == Path::Gqa && world.is_power_of_two() && name != "oddheads-yarn-moe" {
                        assert_eq!(many[i], one[i], "{name} W={world} prompt {i}: not the same bits");
                    }
                }
            }
        }
    }
}

#[test]
fn logits_do_not_depend_on_how_a_prompt_is_cut() {
    let prompt: Vec<u32> = (0..500).map(|i| 1 + i * 37 % 700).collect();
    for path in [Path::Gqa, Path::Absorb] {
        let cut = |step_tokens: usize, world: usize| {
            let mut config = model::config("tiny-glm-gqla", Some(path));
            config.step_tokens = step_tokens;
            model::logits(&config, world, std::slice::from_ref(&prompt)).remove(0)
        };
        let whole = cut(512, 1);
        assert!(!whole.is_empty());
        for (step_tokens, world) in [(200, 1), (33, 1), (512, 2), (200, 4)] {
            assert_eq!(cut(step_tokens, world), whole, "{path}, {step_tokens} tokens a step, W={world}");
        }
    }
}

#[test]
fn sampled_tokens_do_not_depend_on_world_size_or_company() {
    // Without truncation the ranks choose, unless the company's log-probabilities bring the logits to rank 0.
    let ask = |top_p: f32, world: usize, company: usize| {
        let engine = Engine::start_threads(model::config("tiny-glm-gqla", Some(Path::Gqa)), world).unwrap();
        let request = |seed| Request {
            prompt: vec![1, 331, 774, 69],
            max_tokens: 40,
            ignore_eos: true,
            sampling: Sampling { temperature: 0.9, top_p, seed: Some(seed), ..Sampling::default() },
            ..Request::default()
        };
        let others: Vec<_> = (0..company)
            .map(|i| Request {
                logprobs: (i % 2 == 1).then_some(0),
                max_tokens: 10 * (i + 1),
                ..request(100 + i as u64)
            })
            .map(|other| engine.try_submit(other).unwrap())
            .collect();
        let mut stream = engine.try_submit(request(7)).unwrap();
        let mut tokens = vec![];
        while let Some(event) = stream.next_blocking() {
            match event {
                Event::Token(t) => tokens.push(t.id),
                Event::Finished(_) => {}
                other => panic!("{other:?}"),
            }
        }
        drop(others);
        engine.shutdown().unwrap();
        tokens
    };
    for top_p in [0.95, 1.0] {
        let alone = ask(top_p, 1, 0);
        assert_eq!(alone.len(), 40);
        for (world, company) in [(1, 5), (2, 0), (4, 3), (8, 0)] {
            assert_eq!(ask(top_p, world, company), alone, "top-p {top_p}, W={world} beside {company} others");
        }
    }
}

#[test]
fn caches_hold_what_the_paths_promise() {
    let model_config = ModelConfig::load(&model::checkpoint("tiny-glm-gqla").0).unwrap();
    let Attention::Latent(a) = &model_config.attention else { panic!("a latent model") };
    for world in [1, 2, 4, 8] {
        for (path, elements) in
            [(Path::Gqa, a.groups / world * (a.nope + a.value) + a.rope), (Path::Absorb, a.kv_rank + a.rope)]
        {
            let engine = Engine::start_threads(model::config("tiny-glm-gqla", Some(path)), world).unwrap();
            let info = engine.info();
            assert_eq!(info.layout.elements(), elements);
            // Counted from the allocation: f32 elements of four layers, nothing else.
            assert_eq!(info.cache_bytes_per_token, elements * 4 * 4, "{path} W={world}");
            engine.shutdown().unwrap();
        }
    }
}

#[test]
fn no_group_head_or_row_is_on_two_ranks() {
    for name in ["tiny-glm-gqla", "realhead-h32g8", "oddheads-yarn-moe", "tiny-llama-gqa"] {
        let config = ModelConfig::load(&model::checkpoint(name).0).unwrap();
        for world in world_sizes(&config, Path::Gqa) {
            let (mut groups, mut heads, mut rows) = (vec![], vec![], vec![]);
            for rank in 0..world {
                let owned = Shard { rank, world }.owned(&config, Path::Gqa).unwrap();
                groups.extend(owned.groups);
                heads.extend(owned.heads);
                rows.extend(owned.vocab);
            }
            assert!(groups.into_iter().eq(0..config.groups()), "{name} W={world}");
            assert!(heads.into_iter().eq(0..config.heads()), "{name} W={world}");
            assert!(rows.into_iter().eq(0..config.vocab), "{name} W={world}");
        }
    }
}

#[test]
fn a_world_that_does_not_fit_is_refused_with_those_that_do() {
    let refuse = |name: &str, path, world: usize| {
        let config = model::config(name, Some(path));
        let first = threads::world(world).into_iter().next().unwrap();
        match Engine::start(config, Box::new(first)) {
            Ok(_) => panic!("{name} {path} W={world} was taken"),
            Err(e) => (e.exit_code(), e.to_string()),
        }
    };
    let (code, text) = refuse("oddheads-yarn-moe", Path::Gqa, 8);
    assert_eq!(code, 4);
    assert!(text.contains("1, 2, 4") && text.contains("--path absorb"), "{text}");
    let (_, text) = refuse("oddheads-yarn-moe", Path::Absorb, 5);
    assert!(text.contains("1, 2, 3, 4, 6, 8, 12, 24"), "{text}");
    let (_, text) = refuse("tiny-llama-gqa", Path::Absorb, 2);
    assert!(text.contains("--path gqa"), "{text}");
}

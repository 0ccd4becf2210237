//! What serving costs: a step's scheduling at 256 sequences, and tokens a second of the engine alone at 64 streams.
//!
//! cargo bench --bench serving -- checkpoints/tiny-glm-gqla
//!
//! The same load over HTTP: gqla serve, then gqla bench serve --requests 256 --concurrency 64.

use std::time::Instant;

use gqla::engine::scheduler::{Limits, Scheduler};
use gqla::engine::{Config, Engine, Event, Request};

fn main() {
    scheduling();
    if let Some(model) = std::env::args().skip(1).find(|a| !a.starts_with('-')) {
        engine(&model);
    }
}

/// 256 sequences decode; every 64 steps each takes a new block and learns the key of a full one.
fn scheduling() {
    let sequences = 256u64;
    let limits = Limits { sequences: 256, step_tokens: 4096, blocks: 256 * 64, share_prefixes: true };
    let mut scheduler = Scheduler::new(limits);
    for id in 0..sequences {
        scheduler.add(id, vec![id as u32; 100 + id as usize], false);
    }
    while scheduler.plan().is_some_and(|p| p.step.spans.len() < 256 || p.outputs.len() < 256) {
        // Prompts are computed at first; whoever has ended its prompt decodes from then on.
        for id in 0..sequences {
            if scheduler.table(id).is_some_and(|(_, computed)| computed == scheduler.tokens(id).len()) {
                scheduler.push(id, 7);
            }
        }
    }
    let mut times = vec![];
    for _ in 0..2000 {
        for id in 0..sequences {
            scheduler.push(id, 7);
        }
        let begin = Instant::now();
        let plan = scheduler.plan();
        times.push(begin.elapsed());
        assert_eq!(plan.map_or(0, |p| p.outputs.len()), 256);
    }
    times.sort();
    println!("scheduling 256 sequences: median {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100]);
}

/// 256 requests of 64 and 64 tokens, 64 at a time.
fn engine(model: &str) {
    let Ok(engine) = Engine::start_threads(Config::new(model), 1) else {
        return eprintln!("{model} cannot be loaded");
    };
    let request = |i: u32| Request {
        prompt: (0..64).map(|k| (i * 7919 + k * 104_729) % 1000).collect(),
        max_tokens: 64,
        ignore_eos: true,
        ..Request::default()
    };
    let run = |from: u32| {
        let begin = Instant::now();
        let mut tokens = 0;
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..64)
                .map(|r| {
                    let (engine, request) = (&engine, &request);
                    scope.spawn(move || {
                        let mut tokens = 0;
                        for i in 0..4 {
                            let Ok(mut stream) = engine.try_submit(request(from + r * 4 + i)) else { continue };
                            while let Some(event) = stream.next_blocking() {
                                tokens += usize::from(matches!(event, Event::Token(_)));
                            }
                        }
                        tokens
                    })
                })
                .collect();
            tokens = readers.into_iter().map(|r| r.join().unwrap_or(0)).sum();
        });
        tokens as f64 / begin.elapsed().as_secs_f64()
    };
    run(0);
    println!("the engine alone, 64 streams: {:.0} tokens/s", run(10_000));
    let _ = engine.shutdown();
}

//! What serving costs: a step's scheduling at 256 sequences, tokens a second of the engine alone and over HTTP at 64
//! streams, the time to the first byte of a refusal.
//!
//! cargo bench --bench serving -- checkpoints/tiny-glm-gqla [ROUNDS]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use gqla::engine::scheduler::{Limits, Scheduler};
use gqla::engine::{Config, Engine, Event, Request};
use gqla::server::{self, Options};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    scheduling();
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with('-'));
    let Some(model) = arguments.next() else { return Ok(()) };
    let rounds = arguments.next().map_or(Ok(5), |r| r.parse())?;
    let engine = Engine::start_threads(Config::new(&model), 1)?;
    let mut options = Options::new(&model);
    options.access_log = false;
    options.api_key = Some(KEY.into());
    let router = server::router(engine.clone(), options)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    runtime.spawn(server::serve(listener, router, Duration::from_secs(20), Duration::ZERO, std::future::pending()));
    refusals(address)?;
    throughput(&engine, address, rounds)?;
    engine.shutdown()?;
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(())
}

const KEY: &str = "secret";

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// 256 sequences decode; every 64 steps each takes a new block and learns the key of a full one.
fn scheduling() {
    let sequences = 256u64;
    let limits = Limits { sequences: 256, step_tokens: 4096, blocks: 256 * 64, share_prefixes: true };
    let mut scheduler = Scheduler::new(limits);
    for id in 0..sequences {
        scheduler.add(id, vec![id as u32; 100 + id as usize], usize::MAX, false);
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

/// 256 requests of 64 and 64 tokens, 64 at a time: by turns the engine alone and over HTTP, whose client is a process of
/// its own. The medians of the rounds are compared.
fn throughput(engine: &Engine, address: SocketAddr, rounds: usize) -> Result<(), Failure> {
    let (mut alone, mut served) = (vec![], vec![]);
    for round in 0..=rounds as u32 {
        let pair = (engine_alone(engine, round * 1000), over_http(address, round)?);
        // The first round warms up.
        if round > 0 {
            println!("round {round}: the engine alone {:.0}, over HTTP {:.0} tokens/s", pair.0, pair.1);
            alone.push(pair.0);
            served.push(pair.1);
        }
    }
    let (alone, served) = (median(alone), median(served));
    let cost = 100.0 * (1.0 - served / alone);
    println!("64 streams: the engine alone {alone:.0}, over HTTP {served:.0} tokens/s: HTTP costs {cost:.1} %");
    Ok(())
}

fn engine_alone(engine: &Engine, from: u32) -> f64 {
    let request = |i: u32| Request {
        prompt: (0..64).map(|k| (i * 7919 + k * 104_729) % 1000).collect(),
        max_tokens: 64,
        ignore_eos: true,
        ..Request::default()
    };
    let begin = Instant::now();
    let tokens: usize = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..64)
            .map(|r| {
                let request = &request;
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
        readers.into_iter().map(|r| r.join().unwrap_or(0)).sum()
    });
    tokens as f64 / begin.elapsed().as_secs_f64()
}

fn over_http(address: SocketAddr, seed: u32) -> Result<f64, Failure> {
    let output = Command::new(env!("CARGO_BIN_EXE_gqla"))
        .args(["bench", "serve", "--requests", "256", "--concurrency", "64", "--api-key", KEY])
        .args(["--url", &format!("http://{address}"), "--seed", &seed.to_string()])
        .output()?;
    let result: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|e| format!("{e}: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(result["output_throughput"].as_f64().unwrap_or(0.0))
}

/// The time from the connection to the first byte of the answer, with nothing else to do.
fn refusals(address: SocketAddr) -> Result<(), Failure> {
    let post = |key: &str, body: &str| {
        let head =
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n";
        format!("{head}Authorization: Bearer {key}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    let long = format!(r#"{{"prompt": {:?}, "temperature": -1}}"#, "x ".repeat(20_000));
    let source = include_str!("../src/engine/coordinator.rs").repeat(3);
    let beyond = |text: &str| post(KEY, &serde_json::json!({"prompt": text}).to_string());
    let cases = [
        ("401", post("wrong", r#"{"prompt": "x"}"#)),
        ("400 not JSON", post(KEY, "{")),
        ("400 a field", post(KEY, r#"{"prompt": "x", "temperature": -1}"#)),
        ("400 a field beside 40 KB", post(KEY, &long)),
        ("400 40 KB of words beyond the context", beyond(&"x ".repeat(20_000))),
        ("400 source code twice as long as the context", beyond(&source[..24_000])),
        ("400 source code a tenth longer than the context", beyond(&source[..13_200])),
        ("404", post(KEY, r#"{"prompt": "x", "model": "other"}"#)),
        ("413", post(KEY, "").replace("Length: 0", "Length: 99999999")),
    ];
    for (what, request) in cases {
        let mut times = vec![];
        for _ in 0..200 {
            let begin = Instant::now();
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(request.as_bytes())?;
            let mut answer = [0; 12];
            stream.read_exact(&mut answer)?;
            times.push(begin.elapsed().as_secs_f64() * 1e3);
            if answer[9..] != what.as_bytes()[..3] {
                return Err(format!("{what}: {}", String::from_utf8_lossy(&answer)).into());
            }
        }
        times.sort_by(f64::total_cmp);
        println!("first byte of a refusal, {what}: median {:.2} ms, p99 {:.2} ms", times[100], times[198]);
    }
    Ok(())
}

//! The engine's contract: one terminal event a stream, cancellation gives blocks back, bounded submission, an end that
//! stays an end; and what the example of embedding prints.

#[path = "common/model.rs"]
mod model;

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gqla::engine::{Engine, Event, Refused, Request, TokenStream};
use gqla::error::Error;

fn engine(world: usize) -> Engine {
    Engine::start_threads(model::config("tiny-glm-gqla", None), world).unwrap()
}

fn request(max_tokens: usize) -> Request {
    Request { prompt: vec![1, 331, 774], max_tokens, ignore_eos: true, ..Request::default() }
}

/// All events; fails unless the last, and only the last, is terminal.
fn events(mut stream: TokenStream) -> Vec<Event> {
    let mut all = vec![];
    while let Some(event) = stream.next_blocking() {
        all.push(event);
    }
    assert!(stream.next_blocking().is_none());
    let terminal = |e: &Event| matches!(e, Event::Finished(_) | Event::Failed(_));
    assert!(terminal(all.last().unwrap()) && !all[..all.len() - 1].iter().any(terminal));
    all
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_stream_ends_once() {
    let engine = engine(2);
    let streams: Vec<_> = (1..12).map(|n| engine.try_submit(request(n)).unwrap()).collect();
    for (n, stream) in (1..12).zip(streams) {
        assert_eq!(events(stream).len(), n + 1);
    }
    assert_eq!(events(engine.try_submit(request(0)).unwrap()).len(), 1);
    engine.shutdown().unwrap();
    engine.shutdown().unwrap();
    engine.drain(Duration::from_secs(1)).unwrap();
    assert!(matches!(engine.try_submit(request(1)), Err(Refused::Stopped(_) | Refused::Draining)));
}

#[test]
fn a_dropped_stream_gives_its_blocks_back() {
    let engine = engine(1);
    let free = engine.stats().free_blocks;
    let mut streams: Vec<_> = (0..6).map(|_| engine.try_submit(request(300)).unwrap()).collect();
    for stream in &mut streams {
        assert!(matches!(stream.next_blocking(), Some(Event::Token(_))));
    }
    assert!(engine.stats().free_blocks < free);
    drop(streams);
    until("blocks are free again", || engine.stats().free_blocks == free && engine.stats().running == 0);
    assert_eq!(engine.stats().cancelled, 6);
    engine.shutdown().unwrap();
}

#[test]
fn more_than_the_bound_is_refused_at_once() {
    let mut config = model::config("tiny-glm-gqla", None);
    (config.max_sequences, config.max_waiting) = (2, 3);
    let engine = Engine::start_threads(config, 1).unwrap();
    let streams: Vec<_> = (0..5).map(|_| engine.try_submit(request(200)).unwrap()).collect();
    assert!(matches!(engine.try_submit(request(1)), Err(Refused::Full)));
    drop(streams);
    until("there is room again", || engine.try_submit(request(1)).is_ok());
    engine.shutdown().unwrap();
}

#[test]
fn impossible_requests_are_refused_by_field() {
    let engine = engine(1);
    let context = engine.info().max_context;
    let refuse = |r: Request, field: &str| match engine.try_submit(r) {
        Err(Refused::Invalid(Error::Request(why))) => assert!(why.contains(field), "{why}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{field} was taken"),
    };
    refuse(Request { prompt: vec![], ..request(1) }, "prompt");
    refuse(Request { prompt: vec![4096], ..request(1) }, "4096");
    refuse(request(context - 2), "max_tokens");
    refuse(request(usize::MAX), "max_tokens");
    let sampled = |change: fn(&mut gqla::engine::Sampling)| {
        let mut r = request(1);
        change(&mut r.sampling);
        r
    };
    refuse(sampled(|s| s.temperature = -1.0), "temperature");
    refuse(sampled(|s| s.temperature = f32::NAN), "temperature");
    refuse(sampled(|s| s.top_p = 0.0), "top_p");
    refuse(sampled(|s| s.logit_bias = vec![(9999, 1.0)]), "logit_bias");
    assert_eq!(events(engine.try_submit(request(context - 3)).unwrap()).len(), context - 2);
    engine.shutdown().unwrap();
}

#[test]
fn draining_finishes_what_runs_and_a_shutdown_fails_it() {
    let first = engine(2);
    let stream = first.try_submit(request(30)).unwrap();
    first.drain(Duration::from_secs(60)).unwrap();
    assert!(matches!(events(stream).last(), Some(Event::Finished(_))));

    let second = engine(2);
    let stream = second.try_submit(request(1500)).unwrap();
    second.shutdown().unwrap();
    assert!(matches!(events(stream).last(), Some(Event::Failed(Error::Stopped(_)))));
}

#[test]
fn two_engines_live_in_one_process() {
    let (a, b) = (engine(1), engine(2));
    let (x, y) = (a.try_submit(request(20)).unwrap(), b.try_submit(request(20)).unwrap());
    let tokens = |s| events(s).iter().filter_map(|e| if let Event::Token(t) = e { Some(t.id) } else { None }).collect();
    let (x, y): (Vec<u32>, Vec<u32>) = (tokens(x), tokens(y));
    assert_eq!(x, y);
    a.shutdown().unwrap();
    assert_eq!(events(b.try_submit(request(3)).unwrap()).len(), 4);
    b.shutdown().unwrap();
}

/// What a subscriber of the embedding program is told.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn every_request_and_every_step_is_a_span() {
    use tracing_subscriber::fmt::format::FmtSpan;
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_span_events(FmtSpan::NEW);
    subscriber.with_ansi(false).with_writer(move || writer.clone()).init();
    let engine = engine(1);
    assert_eq!(events(engine.try_submit(request(5)).unwrap()).len(), 6);
    let steps = engine.stats().steps;
    engine.shutdown().unwrap();
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    // Other tests of this file may be heard too.
    let lines = |part: &str| text.lines().filter(|l| l.contains(part)).count() as u64;
    assert!(lines("request{id=1 prompt_tokens=3}: gqla::engine::coordinator: new") >= 1, "{text}");
    assert!(lines("ended tokens=5") >= 1, "{text}");
    assert!(steps >= 5 && lines("step{number=") >= steps, "{text}");
}

#[test]
fn the_embedding_example_runs() {
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--example", "embed", "--manifest-path"])
        .arg(model::at("Cargo.toml"))
        .arg("--")
        .arg(model::checkpoint("tiny-glm-gqla").0)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.starts_with("gqa path, 2 ranks") || text.starts_with("absorb path, 2 ranks"), "{text}");
    assert_eq!(text.matches("Length, 24 tokens]").count(), 3, "{text}");
}

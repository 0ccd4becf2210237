//! `gqla generate`: one prompt, its continuation streamed to stdout.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use super::world::{self, ModelArgs};
use crate::comm::Communicator;
use crate::engine::setup::Config;
use crate::engine::{Engine, Event, Finished, Info, Reason, Request, Sampling};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

/// Continue a prompt. The text alone goes to stdout, token by token; a line about speed goes to stderr.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Draw among the most probable tokens that sum to this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Draw among this many of the most probable tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// The same seed gives the same text, at every world size [default: drawn]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Go on past the model's end-of-sequence tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object at the end instead of streaming
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let mut config = args.model.config();
    config.max_sequences = 1;
    config.max_waiting = 0;
    world::run(&args.model, config, |config, comm| lead(&args, config, comm))
}

fn lead(args: &Args, config: Config, comm: Box<dyn Communicator>) -> Result<()> {
    world::end_on_interrupt()?;
    let engine = Engine::start(config, comm)?;
    let written = answer(args, &engine, &args.model.model);
    // The ranks are let go whatever became of the answer.
    let stopped = engine.shutdown();
    written.and(stopped)
}

fn answer(args: &Args, engine: &Engine, directory: &std::path::Path) -> Result<()> {
    let tokenizer = Tokenizer::load(directory, &engine.info().model)?;
    let request = Request {
        prompt: tokenizer.encode(&args.prompt)?,
        max_tokens: args.max_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_p: args.top_p,
            top_k: args.top_k,
            seed: args.seed,
            ..Sampling::default()
        },
        ignore_eos: args.ignore_eos,
        ..Request::default()
    };
    let mut stream = engine.try_submit(request).map_err(|refused| Error::Request(refused.to_string()))?;
    let mut detokenizer = tokenizer.detokenizer();
    let (mut tokens, mut text) = (vec![], String::new());
    let began = Instant::now();
    let mut first = None;
    let finished = loop {
        let piece = match stream.next_blocking() {
            Some(Event::Token(token)) => {
                first.get_or_insert_with(Instant::now);
                tokens.push(token.id);
                detokenizer.push(token.id)?
            }
            Some(Event::Prompt(_)) => continue,
            Some(Event::Finished(finished)) => break finished,
            Some(Event::Failed(error)) => return Err(error),
            None => return Err(Error::Internal("a stream ended without an end".into())),
        };
        text.push_str(&piece);
        if !args.json && !write_out(&piece)? {
            return Ok(());
        }
    };
    let rest = detokenizer.finish()?;
    text.push_str(&rest);
    let decode = first.map_or(Duration::ZERO, |f| began.elapsed() - (f - began));
    if args.json {
        return super::print(&report(engine.info(), &finished, &tokens, &text, decode).to_string());
    }
    write_out(&rest)?;
    write_out("\n")?;
    eprintln!("{}", summary(engine.info(), &finished, decode));
    Ok(())
}

/// Writes to stdout at once. False: nobody reads any more.
fn write_out(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::io("stdout", e)),
    }
}

/// Tokens a second once the first had come.
fn speed(finished: &Finished, decode: Duration) -> f64 {
    if finished.tokens < 2 { 0.0 } else { (finished.tokens - 1) as f64 / decode.as_secs_f64().max(1e-9) }
}

fn summary(info: &Info, finished: &Finished, decode: Duration) -> String {
    format!(
        "path {} | {} rank{} | {} KV bytes a token on each rank | TTFT {:.1} ms | {:.1} tokens/s | {} tokens",
        info.path,
        info.world,
        if info.world == 1 { "" } else { "s" },
        info.cache_bytes_per_token,
        finished.ttft.as_secs_f64() * 1e3,
        speed(finished, decode),
        finished.tokens,
    )
}

fn report(info: &Info, finished: &Finished, tokens: &[u32], text: &str, decode: Duration) -> serde_json::Value {
    json!({
        "text": text,
        "tokens": tokens,
        "finish_reason": match finished.reason { Reason::Stop => "stop", Reason::Length => "length" },
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.tokens,
        "path": info.path.to_string(),
        "path_reason": info.path_reason,
        "world_size": info.world,
        "device": info.device,
        "kv_bytes_per_token_per_rank": info.cache_bytes_per_token,
        "kv_elements_per_token_per_layer_per_rank": info.layout.elements(),
        "ttft_ms": finished.ttft.as_secs_f64() * 1e3,
        "tokens_per_second": speed(finished, decode),
    })
}

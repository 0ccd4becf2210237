//! `gqla chat`: a conversation in the terminal.

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal, Write};

use super::world::{self, ModelArgs};
use crate::comm::Communicator;
use crate::engine::setup::Config;
use crate::engine::{Engine, Event, Request, Sampling};
use crate::error::{Error, Result};
use crate::server::template::{Bounds, Message, Template};
use crate::text::Tokenizer;

/// Talk with a model whose checkpoint has a chat template.
///
/// A line is a message; /reset forgets the conversation, /exit or the end of the input leaves. Answers alone go to
/// stdout.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,
    /// Draw among the most probable tokens that sum to this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// The same seed gives the same answers [default: drawn]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
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
    let talked = talk(args, &engine, &args.model.model);
    // The ranks are let go whatever became of the conversation.
    let stopped = engine.shutdown();
    talked.and(stopped)
}

fn talk(args: &Args, engine: &Engine, directory: &std::path::Path) -> Result<()> {
    let tokenizer = Tokenizer::load(directory, &engine.info().model)?;
    let template = Template::load(directory)?.ok_or_else(|| {
        Error::checkpoint(directory, "has no chat template: use gqla generate, or add a chat_template.jinja")
    })?;
    let message = |role: &str, content: &str| Message { role: role.into(), content: content.into(), name: None };
    let system: Vec<Message> = args.system.iter().map(|s| message("system", s)).collect();
    let mut messages = system.clone();
    loop {
        if std::io::stdin().is_terminal() {
            eprint!("> ");
        }
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line).map_err(|e| Error::io("stdin", e))?;
        match line.trim() {
            _ if read == 0 => return Ok(()),
            "/exit" => return Ok(()),
            "/reset" => messages = system.clone(),
            "" => {}
            text => {
                messages.push(message("user", text));
                let bounds = Bounds { work: 10_000_000, bytes: 16 << 20 };
                let prompt = template.render(&messages, true, &BTreeMap::new(), bounds)?;
                let prompt = tokenizer.encode_plain(&prompt)?;
                match answer(args, engine, &tokenizer, prompt)? {
                    Some(text) => messages.push(message("assistant", &text)),
                    // It did not fit, or nobody reads any more.
                    None => {
                        messages.pop();
                    }
                }
            }
        }
    }
}

/// Streams an answer to stdout. `None`: the conversation no longer fits in the context.
fn answer(args: &Args, engine: &Engine, tokenizer: &Tokenizer, prompt: Vec<u32>) -> Result<Option<String>> {
    let room = engine.info().max_context.saturating_sub(prompt.len());
    if room == 0 {
        eprintln!("gqla: the conversation fills the context; /reset begins a new one");
        return Ok(None);
    }
    let request = Request {
        prompt,
        max_tokens: args.max_tokens.min(room),
        sampling: Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed, ..Sampling::default() },
        ..Request::default()
    };
    let mut stream = engine.try_submit(request).map_err(|refused| Error::Request(refused.to_string()))?;
    let (mut detokenizer, mut text) = (tokenizer.detokenizer(), String::new());
    let write = |piece: &str| {
        let mut out = std::io::stdout().lock();
        out.write_all(piece.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("stdout", e))
    };
    loop {
        let piece = match stream.next_blocking() {
            Some(Event::Token(token)) => detokenizer.push(token.id)?,
            Some(Event::Prompt(_)) => continue,
            Some(Event::Finished(_)) => break,
            Some(Event::Failed(error)) => return Err(error),
            None => return Err(Error::Internal("a stream ended without an end".into())),
        };
        write(&piece)?;
        text.push_str(&piece);
    }
    let rest = detokenizer.finish()?;
    write(&rest)?;
    write("\n")?;
    text.push_str(&rest);
    Ok(Some(text))
}

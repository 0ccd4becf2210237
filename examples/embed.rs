//! Embedding the engine: two ranks as threads of this process, three requests streaming at once.
//!
//! cargo run --release --example embed -- checkpoints/tiny-glm-gqla

use gqla::engine::{Config, Engine, Event, Request, Sampling};
use gqla::text::Tokenizer;
use gqla::{Error, Result};

fn main() -> Result<()> {
    let directory = std::env::args().nth(1).ok_or_else(|| Error::Usage("usage: embed CHECKPOINT".into()))?;
    let engine = Engine::start_threads(Config::new(&directory), 2)?;
    let tokenizer = Tokenizer::load(directory.as_ref(), &engine.info().model)?;
    println!("{} path, {} ranks", engine.info().path, engine.info().world);

    let prompts = ["def fibonacci(n):", "import os\n", "class Stack:"];
    let streams = prompts.iter().map(|prompt| {
        let request = Request {
            prompt: tokenizer.encode(prompt)?,
            max_tokens: 24,
            sampling: Sampling { temperature: 0.7, seed: Some(1), ..Sampling::default() },
            ..Request::default()
        };
        engine.try_submit(request).map_err(|refused| Error::Request(refused.to_string()))
    });
    // All are submitted before the first is read: they share the engine's steps.
    let streams: Vec<_> = streams.collect::<Result<_>>()?;

    for (prompt, mut stream) in prompts.iter().zip(streams) {
        let mut text = tokenizer.detokenizer();
        print!("---\n{prompt}");
        while let Some(event) = stream.next_blocking() {
            match event {
                Event::Token(token) => print!("{}", text.push(token.id)?),
                Event::Prompt(_) => {}
                Event::Finished(end) => println!("{}\n[{:?}, {} tokens]", text.finish()?, end.reason, end.tokens),
                Event::Failed(error) => return Err(error),
            }
        }
    }

    // A stream that is dropped is cancelled, and its blocks are free again.
    let long = Request { prompt: tokenizer.encode("x = ")?, max_tokens: 1000, ..Request::default() };
    drop(engine.try_submit(long).map_err(|refused| Error::Request(refused.to_string()))?);
    engine.shutdown()
}

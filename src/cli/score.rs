//! `gqla score`: logits of token lists for outside comparison, and perplexity.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::world::{self, ModelArgs};
use crate::comm::Communicator;
use crate::engine::scorer::Scorer;
use crate::engine::setup::Config;
use crate::error::{Error, Result};

/// Write the logits of token lists, or measure perplexity.
///
/// With --tokens, FILE.json holds lists of token ids (`[[1, 5, …], …]`), and the output has one f32 tensor
/// `logits.{i}` `[len, vocab]` a list. With --perplexity, FILE.u16 holds little-endian 16-bit token ids, cut into windows.
#[derive(clap::Args, Debug)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["tokens", "perplexity"]))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Lists of token ids
    #[arg(long, value_name = "FILE.json", requires = "out")]
    tokens: Option<PathBuf>,
    /// Where the logits go
    #[arg(long, value_name = "FILE.safetensors", requires = "tokens")]
    out: Option<PathBuf>,
    /// Tokens to measure perplexity on
    #[arg(long, value_name = "FILE.u16")]
    perplexity: Option<PathBuf>,
    /// Tokens a window; the first is given, the others are predicted
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u64).range(2..))]
    window: u64,
    /// Windows to measure [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    windows: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let mut config = args.model.config();
    config.max_sequences = 1;
    world::run(&args.model, config, |config, comm| lead(&args, config, comm))
}

fn lead(args: &Args, config: Config, comm: Box<dyn Communicator>) -> Result<()> {
    world::end_on_interrupt()?;
    let mut scorer = Scorer::start(&config, comm)?;
    let done = match (&args.tokens, &args.out, &args.perplexity) {
        (Some(tokens), Some(out), _) => logits(&mut scorer, tokens, out),
        (_, _, Some(text)) => perplexity(&mut scorer, text, args),
        _ => Err(Error::Usage("give --tokens with --out, or --perplexity".into())),
    };
    match done {
        Ok(()) => scorer.finish(),
        Err(e) => {
            scorer.abort(&e);
            Err(e)
        }
    }
}

fn logits(scorer: &mut Scorer, tokens: &Path, out: &Path) -> Result<()> {
    let text = std::fs::read_to_string(tokens).map_err(|e| Error::io(tokens, e))?;
    let lists: Vec<Vec<u32>> = serde_json::from_str(&text)
        .map_err(|e| Error::Request(format!("{}: not a list of lists of token ids: {e}", tokens.display())))?;
    let vocab = scorer.info().model.vocab;
    let bar = world::bar(lists.iter().map(|l| l.len() as u64).sum(), "scoring");
    let mut scored: Vec<(usize, Vec<u8>)> = vec![];
    for (i, list) in lists.iter().enumerate() {
        let mut bytes = Vec::with_capacity(list.len() * vocab * 4);
        let visit = |_: usize, logits: &[f32]| {
            logits.iter().for_each(|l| bytes.extend(l.to_le_bytes()));
            bar.inc(1);
        };
        scorer.logits(list, visit).map_err(|e| match e {
            Error::Request(what) => Error::Request(format!("{}: list {i}: {what}", tokens.display())),
            other => other,
        })?;
        scored.push((list.len(), bytes));
    }
    bar.finish_and_clear();
    let mut tensors = BTreeMap::new();
    for (i, (rows, bytes)) in scored.iter().enumerate() {
        let view = TensorView::new(Dtype::F32, vec![*rows, vocab], bytes)
            .map_err(|e| Error::Internal(format!("logits.{i}: {e}")))?;
        tensors.insert(format!("logits.{i}"), view);
    }
    // Written beside and renamed, so that an interrupted run leaves no half file.
    let beside = out.with_extension("part");
    safetensors::serialize_to_file(&tensors, None, &beside)
        .map_err(|e| Error::Io { file: beside.clone(), what: e.to_string() })?;
    std::fs::rename(&beside, out).map_err(|e| Error::io(out, e))
}

fn perplexity(scorer: &mut Scorer, file: &Path, args: &Args) -> Result<()> {
    let bytes = std::fs::read(file).map_err(|e| Error::io(file, e))?;
    if bytes.len() % 2 != 0 {
        return Err(Error::Request(format!("{}: an odd number of bytes is not 16-bit tokens", file.display())));
    }
    let tokens: Vec<u32> = bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
    let window = args.window as usize;
    let there = tokens.len() / window;
    let windows = args.windows.map_or(there, |n| n as usize);
    if windows > there || there == 0 {
        let have = tokens.len();
        let what = format!("{}: {have} tokens make {there} windows of {window}", file.display());
        return Err(Error::Request(what));
    }
    let bar = world::bar(windows as u64, "perplexity");
    let (mut nll, mut count) = (0f64, 0usize);
    for tokens in tokens.chunks_exact(window).take(windows) {
        scorer.logits(tokens, |position, logits| {
            if let Some(next) = tokens.get(position + 1) {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
                nll += sum.ln() - f64::from(logits[*next as usize] - largest);
                count += 1;
            }
        })?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let perplexity = (nll / count as f64).exp();
    if args.json {
        let path = scorer.info().path.to_string();
        return super::print(&json!({"perplexity": perplexity, "windows": windows, "path": path}).to_string());
    }
    super::print(&format!("perplexity {perplexity:.4} over {windows} windows of {window} tokens"))
}

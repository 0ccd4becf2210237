//! `gqla bench serve`: a running server under a given arrival rate, as a client sees it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use plotters::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::engine::sampler::uniform;
use crate::error::{Error, Result};

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Arrival {
    /// At random, independently of each other
    Poisson,
    /// At equal distances
    Fixed,
}

/// Drive a running server and report what its clients see, with the result keys of vLLM's benchmark.
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Its key [default: the variable GQLA_API_KEY, else none]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Requests a second; several rates, separated by commas, are several runs; inf sends all at once
    #[arg(long, value_name = "RATE,…", default_value = "inf", value_delimiter = ',')]
    rate: Vec<f64>,
    /// When requests are sent
    #[arg(long, value_enum, default_value = "poisson")]
    arrival: Arrival,
    /// Requests of a run
    #[arg(long, value_name = "N", default_value_t = 64)]
    requests: usize,
    /// Requests under way at most [default: all]
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// Tokens of a prompt, drawn at random
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    prompt_tokens: usize,
    /// Tokens to generate, whatever they are
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    max_tokens: usize,
    /// Prompt tokens are drawn below this
    #[arg(long, value_name = "N", default_value_t = 1000)]
    vocab: u32,
    /// The seed of prompts and arrivals
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Write the results to this file; several rates make a list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Plot latency over throughput
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// One request as its client saw it.
#[derive(Debug, Clone, Default)]
struct Seen {
    error: Option<String>,
    /// The error is a 429.
    refused: bool,
    /// When it was sent, in seconds of the run.
    sent: f64,
    ttft: f64,
    itl: Vec<f64>,
    total: f64,
    tokens: usize,
}

/// What is read of a chunk.
#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Piece<'a>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow)]
    text: std::borrow::Cow<'a, str>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: usize,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    if args.rate.iter().any(|r| r.is_nan() || *r <= 0.0) || args.requests == 0 || args.prompt_tokens == 0 {
        return Err(Error::Usage("--rate, --requests and --prompt-tokens must be above 0".into()));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("asynchronous runtime", e))?;
    let target = Target::new(&args)?;
    let model = runtime.block_on(target.model())?;
    let mut results = vec![];
    for rate in &args.rate {
        let (seen, seconds) = runtime.block_on(drive(&args, &target, &model, *rate));
        let result = summary(&args, &model, *rate, &seen, seconds);
        eprintln!("{}", line(&result));
        if let Some(error) = seen.iter().filter(|s| !s.refused).find_map(|s| s.error.as_ref()) {
            eprintln!("gqla: a request failed: {error}");
        }
        results.push(result);
    }
    let all = if let [one] = &results[..] { one.clone() } else { json!(results) };
    if let Some(file) = &args.plot {
        plot(file, &results)?;
    }
    match &args.json {
        Some(file) => std::fs::write(file, format!("{all:#}\n")).map_err(|e| Error::io(file, e)),
        None => crate::cli::print(&format!("{all:#}")),
    }
}

/// Where requests go.
#[derive(Clone)]
struct Target {
    address: String,
    headers: String,
}

impl Target {
    fn new(args: &Args) -> Result<Target> {
        let host = args.url.trim_end_matches('/').strip_prefix("http://").filter(|h| !h.contains('/'));
        let host = host.ok_or_else(|| Error::Usage(format!("--url {}: must be http://HOST:PORT", args.url)))?;
        let address = if host.contains(':') { host.to_string() } else { format!("{host}:80") };
        let key = args.api_key.clone().or_else(|| std::env::var("GQLA_API_KEY").ok());
        let key = key.map_or(String::new(), |k| format!("Authorization: Bearer {k}\r\n"));
        Ok(Target { address, headers: format!("Host: {host}\r\nConnection: close\r\n{key}") })
    }

    /// Sends a request; the response's head has been read, and was no refusal.
    async fn send(&self, line: &str, body: &str) -> std::result::Result<BufReader<TcpStream>, String> {
        let failed = |e: std::io::Error| format!("{}: {e}", self.address);
        let mut stream = TcpStream::connect(&self.address).await.map_err(failed)?;
        let _ = stream.set_nodelay(true);
        let head = format!(
            "{line} HTTP/1.1\r\n{}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.headers,
            body.len()
        );
        stream.write_all(head.as_bytes()).await.map_err(failed)?;
        let mut reader = BufReader::new(stream);
        let mut text = String::new();
        reader.read_line(&mut text).await.map_err(failed)?;
        let status = text.split(' ').nth(1).unwrap_or("none").to_string();
        loop {
            text.clear();
            if reader.read_line(&mut text).await.map_err(failed)? == 0 || text == "\r\n" {
                break;
            }
        }
        if status == "200" {
            return Ok(reader);
        }
        text.clear();
        let _ = reader.read_to_string(&mut text).await;
        Err(format!("status {status}: {}", text.trim()))
    }

    /// The served model's name.
    async fn model(&self) -> Result<String> {
        let down = |e: String| Error::Usage(format!("{e}: is the server there? start it with gqla serve"));
        let mut reader = self.send("GET /v1/models", "").await.map_err(down)?;
        let mut body = String::new();
        reader.read_to_string(&mut body).await.map_err(|e| down(e.to_string()))?;
        let models: Value = serde_json::from_str(&body).map_err(|e| down(e.to_string()))?;
        Ok(models["data"][0]["id"].as_str().unwrap_or_default().to_string())
    }

    async fn complete(&self, body: String) -> Seen {
        let begin = Instant::now();
        let mut seen = Seen::default();
        if let Err(error) = self.read(&body, begin, &mut seen).await {
            seen.refused = error.starts_with("status 429");
            seen.error = Some(error);
        }
        seen.total = begin.elapsed().as_secs_f64();
        seen
    }

    async fn read(&self, body: &str, begin: Instant, seen: &mut Seen) -> std::result::Result<(), String> {
        let reader = self.send("POST /v1/completions", body).await?;
        // Chunk sizes stand on lines of their own, which are no events.
        let mut lines = reader.split(b'\n');
        let mut last = None;
        while let Some(line) = lines.next_segment().await.map_err(|e| e.to_string())? {
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            if data.trim_ascii() == b"[DONE]" {
                return Ok(());
            }
            let chunk: Chunk = serde_json::from_slice(data).map_err(|e| e.to_string())?;
            if let Some(error) = chunk.error {
                return Err(error["message"].to_string());
            }
            if let Some(usage) = chunk.usage {
                seen.tokens = usage.completion_tokens;
            }
            if chunk.choices.first().is_some_and(|c| !c.text.is_empty()) {
                let now = Instant::now();
                match last.replace(now) {
                    None => seen.ttft = (now - begin).as_secs_f64(),
                    Some(last) => seen.itl.push((now - last).as_secs_f64()),
                }
            }
        }
        Err("the connection ended early".into())
    }
}

/// Sends all requests at their times; what each saw, and how long all took.
async fn drive(args: &Args, target: &Target, model: &str, rate: f64) -> (Vec<Seen>, f64) {
    let slots = std::sync::Arc::new(tokio::sync::Semaphore::new(args.concurrency.unwrap_or(args.requests)));
    let begin = Instant::now();
    let (mut tasks, mut at) = (vec![], 0.0);
    for i in 0..args.requests as u64 {
        let draw = |k: u64| uniform(args.seed ^ (i + 1).wrapping_mul(0xD134_2543_DE82_EF95), k);
        let prompt: Vec<u32> =
            (0..args.prompt_tokens as u64).map(|k| (draw(k + 1) * f64::from(args.vocab)) as u32).collect();
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": args.max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        tokio::time::sleep_until((begin + Duration::from_secs_f64(at)).into()).await;
        // A closed semaphore would only mean that nothing bounds the requests under way.
        let slot = std::sync::Arc::clone(&slots).acquire_owned().await.ok();
        let target = target.clone();
        tasks.push(tokio::spawn(async move {
            let sent = begin.elapsed().as_secs_f64();
            let seen = Seen { sent, ..target.complete(body.to_string()).await };
            drop(slot);
            seen
        }));
        at += match args.arrival {
            Arrival::Fixed => 1.0 / rate,
            Arrival::Poisson => -(1.0 - draw(0)).ln() / rate,
        };
    }
    let mut seen = vec![];
    for task in tasks {
        let lost = |e: tokio::task::JoinError| Seen { error: Some(e.to_string()), ..Seen::default() };
        seen.push(task.await.unwrap_or_else(lost));
    }
    (seen, begin.elapsed().as_secs_f64())
}

/// vLLM's result keys.
fn summary(args: &Args, model: &str, rate: f64, seen: &[Seen], seconds: f64) -> Value {
    let good: Vec<&Seen> = seen.iter().filter(|s| s.error.is_none()).collect();
    let output: usize = good.iter().map(|s| s.tokens).sum();
    let input = good.len() * args.prompt_tokens;
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| out.insert(key.to_string(), value);
    put("date", json!(crate::server::template::strftime_now("%Y%m%d-%H%M%S")));
    put("endpoint_type", json!("openai"));
    put("backend", json!("openai"));
    put("label", Value::Null);
    put("model_id", json!(model));
    put("tokenizer_id", json!(model));
    put("num_prompts", json!(args.requests));
    put("request_rate", if rate.is_finite() { json!(rate) } else { json!("inf") });
    put("burstiness", json!(if args.arrival == Arrival::Poisson { Some(1.0) } else { None }));
    put("max_concurrency", json!(args.concurrency));
    put("duration", json!(seconds));
    put("completed", json!(good.len()));
    put("failed", json!(seen.len() - good.len()));
    let mut refused: Vec<f64> = seen.iter().filter(|s| s.refused).map(|s| s.total * 1e3).collect();
    refused.sort_by(f64::total_cmp);
    put("refused", json!(refused.len()));
    put("p99_refused_ms", json!(percentile(&refused, 0.99)));
    put("total_input_tokens", json!(input));
    put("total_output_tokens", json!(output));
    put("request_throughput", json!(good.len() as f64 / seconds));
    put("request_goodput", Value::Null);
    put("output_throughput", json!(output as f64 / seconds));
    put("total_token_throughput", json!((input + output) as f64 / seconds));
    let (tokens, requests) = peaks(&good);
    put("max_output_tokens_per_s", json!(tokens as f64));
    put("max_concurrent_requests", json!(requests));
    let per_token = |s: &&&Seen| s.tokens > 1;
    let figures: [(&str, Vec<f64>); 4] = [
        ("ttft", good.iter().map(|s| s.ttft).collect()),
        ("tpot", good.iter().filter(per_token).map(|s| (s.total - s.ttft) / (s.tokens - 1) as f64).collect()),
        ("itl", good.iter().flat_map(|s| s.itl.iter().copied()).collect()),
        ("e2el", good.iter().map(|s| s.total).collect()),
    ];
    for (name, mut values) in figures {
        values.iter_mut().for_each(|v| *v *= 1e3);
        values.sort_by(f64::total_cmp);
        let n = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / n;
        let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
        put(&format!("mean_{name}_ms"), json!(mean));
        put(&format!("median_{name}_ms"), json!(percentile(&values, 0.5)));
        put(&format!("std_{name}_ms"), json!(std));
        put(&format!("p99_{name}_ms"), json!(percentile(&values, 0.99)));
    }
    Value::Object(out)
}

/// The most tokens that came, and the most requests that were under way, in one second of the run.
fn peaks(good: &[&Seen]) -> (usize, usize) {
    let (mut tokens, mut requests) = (BTreeMap::<usize, usize>::new(), BTreeMap::<usize, usize>::new());
    for s in good {
        let mut at = s.sent + s.ttft;
        *tokens.entry(at as usize).or_default() += 1;
        for gap in &s.itl {
            at += gap;
            *tokens.entry(at as usize).or_default() += 1;
        }
        for second in s.sent as usize..=(s.sent + s.total) as usize {
            *requests.entry(second).or_default() += 1;
        }
    }
    let most = |counts: BTreeMap<usize, usize>| counts.into_values().max().unwrap_or(0);
    (most(tokens), most(requests))
}

/// The value below which the part `p` of sorted `values` lies, between neighbours as numpy does.
fn percentile(values: &[f64], p: f64) -> f64 {
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let at = p * last as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    values[low] + part * (values[(low + 1).min(last)] - values[low])
}

fn line(r: &Value) -> String {
    let n = |key: &str| r[key].as_f64().unwrap_or(0.0);
    format!(
        "rate {} | {} of {} done, {} refused (p99 {:.1} ms) | {:.2} requests/s, {:.1} tokens/s | TTFT {:.1} ms (p99 {:.1}) | TPOT {:.2} ms (p99 {:.2}) | \
         end to end {:.0} ms (p99 {:.0})",
        r["request_rate"],
        r["completed"],
        r["num_prompts"],
        r["refused"],
        n("p99_refused_ms"),
        n("request_throughput"),
        n("output_throughput"),
        n("median_ttft_ms"),
        n("p99_ttft_ms"),
        n("median_tpot_ms"),
        n("p99_tpot_ms"),
        n("median_e2el_ms"),
        n("p99_e2el_ms"),
    )
}

/// Median and p99 of the end-to-end time over the throughput, one point a rate.
fn plot(file: &std::path::Path, results: &[Value]) -> Result<()> {
    let failed = |e: String| Error::Io { file: file.into(), what: e };
    let points = |key: &str| -> Vec<(f64, f64)> {
        results
            .iter()
            .map(|r| (r["output_throughput"].as_f64().unwrap_or(0.0), r[key].as_f64().unwrap_or(0.0)))
            .collect()
    };
    let curves = [
        ("end to end, median", points("median_e2el_ms"), BLUE),
        ("end to end, p99", points("p99_e2el_ms"), RED),
        ("first token, median", points("median_ttft_ms"), GREEN),
    ];
    let most = |f: fn(&(f64, f64)) -> f64| curves.iter().flat_map(|c| &c.1).map(f).fold(1.0, f64::max) * 1.1;
    let area = SVGBackend::new(file, (800, 500)).into_drawing_area();
    let draw = || -> std::result::Result<(), Box<dyn std::error::Error>> {
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..most(|p| p.0), 0.0..most(|p| p.1))?;
        chart.configure_mesh().x_desc("tokens/s generated").y_desc("ms").draw()?;
        for (name, points, colour) in &curves {
            let line = LineSeries::new(points.iter().copied(), colour).point_size(4);
            chart.draw_series(line)?.label(*name).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour));
        }
        chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
        area.present()?;
        Ok(())
    };
    draw().map_err(|e| failed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0], 0.5), 2.5);
        assert_eq!(percentile(&[5.0], 0.99), 5.0);
        assert!((percentile(&[0.0, 100.0], 0.99) - 99.0).abs() < 1e-9);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }

    #[test]
    fn peaks_are_counted_by_the_second() {
        let seen = |sent: f64| Seen { sent, ttft: 0.3, itl: vec![0.4; 3], total: 1.6, tokens: 4, ..Seen::default() };
        let (a, b) = (seen(0.0), seen(0.9));
        // Tokens at 0.3, 0.7, 1.1, 1.5 and at 1.2, 1.6, 2.0, 2.4.
        assert_eq!(peaks(&[&a, &b]), (4, 2));
        assert_eq!(peaks(&[]), (0, 0));
    }
}

//! What Prometheus reads: the engine's counts, and the times that a client sees. The names are vLLM's, with our prefix,
//! where they mean the same.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;

use crate::engine::{Info, Stats};

/// Upper bounds in seconds.
const LONG: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0];
const SHORT: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0];

struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
    total: u64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len()], sum: 0.0, total: 0 }
    }

    fn add(&mut self, value: Duration) {
        let seconds = value.as_secs_f64();
        if let Some(i) = self.bounds.iter().position(|b| seconds <= *b) {
            self.counts[i] += 1;
        }
        self.sum += seconds;
        self.total += 1;
    }
}

struct Measured {
    ttft: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    success: BTreeMap<&'static str, u64>,
    failed: u64,
    responses: BTreeMap<u16, u64>,
}

/// One router's measurements.
pub struct Metrics {
    measured: Mutex<Measured>,
    info: String,
    cache_tokens: usize,
}

impl Metrics {
    /// Nothing measured yet.
    pub fn new(info: &Info) -> Metrics {
        let escape = |s: &str| s.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ");
        let measured = Measured {
            ttft: Histogram::new(LONG),
            inter_token: Histogram::new(SHORT),
            per_token: Histogram::new(SHORT),
            end_to_end: Histogram::new(LONG),
            queue: Histogram::new(LONG),
            success: BTreeMap::from([("stop", 0), ("length", 0)]),
            failed: 0,
            responses: BTreeMap::new(),
        };
        Metrics {
            measured: Mutex::new(measured),
            info: format!(
                "path=\"{}\",world_size=\"{}\",device=\"{}\",version=\"{}\"",
                info.path,
                info.world,
                escape(&info.device),
                env!("CARGO_PKG_VERSION")
            ),
            cache_tokens: info.blocks * crate::cache::BLOCK,
        }
    }

    fn measured(&self) -> std::sync::MutexGuard<'_, Measured> {
        self.measured.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A response began.
    pub fn responded(&self, status: u16) {
        *self.measured().responses.entry(status).or_default() += 1;
    }

    /// A choice's first token.
    pub fn first_token(&self, after: Duration) {
        self.measured().ttft.add(after);
    }

    /// A choice's next token.
    pub fn next_token(&self, after: Duration) {
        self.measured().inter_token.add(after);
    }

    /// A choice ended well. The times are from its submission: to its first step, its first token, its end.
    pub fn finished(&self, reason: &'static str, tokens: usize, queued: Duration, first: Duration, total: Duration) {
        let mut m = self.measured();
        *m.success.entry(reason).or_default() += 1;
        m.end_to_end.add(total);
        m.queue.add(queued);
        if tokens > 1 {
            m.per_token.add(total.saturating_sub(first) / (tokens - 1) as u32);
        }
    }

    /// A choice failed.
    pub fn failed(&self) {
        self.measured().failed += 1;
    }

    /// The text that Prometheus reads.
    pub fn render(&self, s: &Stats, answers: bool) -> String {
        let m = self.measured();
        let mut out = String::with_capacity(8192);
        let mut one = |name: &str, kind: &str, help: &str, value: f64| {
            let _ = writeln!(out, "# HELP gqla:{name} {help}\n# TYPE gqla:{name} {kind}\ngqla:{name} {value}");
        };
        let used = s.total_blocks - s.free_blocks;
        let usage = used as f64 / s.total_blocks.max(1) as f64;
        one("num_requests_running", "gauge", "Sequences in steps.", s.running as f64);
        one("num_requests_waiting", "gauge", "Sequences waiting for blocks or a slot.", s.waiting as f64);
        one("kv_cache_usage_perc", "gauge", "Part of the cache in use, 1 is all.", usage);
        one("kv_cache_capacity_tokens", "gauge", "Tokens that the cache holds.", self.cache_tokens as f64);
        one("prompt_tokens_total", "counter", "Tokens of prompts that have begun.", s.prompt_tokens as f64);
        one("generation_tokens_total", "counter", "Tokens generated.", s.generated_tokens as f64);
        one("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the cache.", s.prompt_tokens as f64);
        one("prefix_cache_hits_total", "counter", "Of those, found.", s.cached_tokens as f64);
        one("num_preemptions_total", "counter", "Sequences made to compute their cache again.", s.preemptions as f64);
        one(
            "computed_tokens_total",
            "counter",
            "Tokens computed in steps, prompts included.",
            s.computed_tokens as f64,
        );
        one("steps_total", "counter", "Steps computed.", s.steps as f64);
        one("step_time_seconds_total", "counter", "Time in steps.", s.step_time.as_secs_f64());
        one(
            "all_reduce_time_seconds_total",
            "counter",
            "Of that, in all-reduces (rank 0).",
            s.reduce_time.as_secs_f64(),
        );
        one("last_step_seconds", "gauge", "Time of the last step.", s.last_step.as_secs_f64());
        one("request_cancelled_total", "counter", "Requests given up by their readers.", s.cancelled as f64);
        one("request_failed_total", "counter", "Choices that failed.", m.failed as f64);
        one("ranks_answer", "gauge", "1 while every rank answers in time.", f64::from(u8::from(answers)));
        let _ = writeln!(out, "# HELP gqla:info What runs.\n# TYPE gqla:info gauge\ngqla:info{{{}}} 1", self.info);
        let _ = writeln!(
            out,
            "# HELP gqla:request_success_total Choices that ended.\n# TYPE gqla:request_success_total counter"
        );
        for (reason, count) in &m.success {
            let _ = writeln!(out, "gqla:request_success_total{{finished_reason=\"{reason}\"}} {count}");
        }
        let _ = writeln!(out, "# HELP gqla:http_responses_total Responses.\n# TYPE gqla:http_responses_total counter");
        for (status, count) in &m.responses {
            let _ = writeln!(out, "gqla:http_responses_total{{status=\"{status}\"}} {count}");
        }
        for (name, help, h) in [
            ("time_to_first_token_seconds", "From submission to the first token.", &m.ttft),
            ("inter_token_latency_seconds", "Between a choice's tokens.", &m.inter_token),
            ("time_per_output_token_seconds", "The same by vLLM's earlier name.", &m.inter_token),
            ("request_time_per_output_token_seconds", "A choice's mean time a token after the first.", &m.per_token),
            ("e2e_request_latency_seconds", "From submission to the end.", &m.end_to_end),
            ("request_queue_time_seconds", "From submission to the first step.", &m.queue),
        ] {
            let _ = writeln!(out, "# HELP gqla:{name} {help}\n# TYPE gqla:{name} histogram");
            let mut sum = 0;
            for (bound, count) in h.bounds.iter().zip(&h.counts) {
                sum += count;
                let _ = writeln!(out, "gqla:{name}_bucket{{le=\"{bound}\"}} {sum}");
            }
            let _ = writeln!(out, "gqla:{name}_bucket{{le=\"+Inf\"}} {}", h.total);
            let _ = writeln!(out, "gqla:{name}_sum {}\ngqla:{name}_count {}", h.sum, h.total);
        }
        out
    }
}

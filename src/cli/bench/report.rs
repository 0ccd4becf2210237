//! Times to figures, and the JSON that a published figure comes from.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::backend::cuda;
use crate::error::{Error, Result};

/// Times of repeated runs of one thing.
#[derive(Debug, Clone)]
pub struct Times(Vec<f64>);

impl Times {
    /// From any number of runs, at least one.
    pub fn new(times: &[Duration]) -> Times {
        let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        seconds.sort_unstable_by(f64::total_cmp);
        Times(seconds)
    }

    fn at(&self, quantile: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * quantile).round() as usize]
    }

    /// The median, in seconds.
    pub fn median(&self) -> f64 {
        self.at(0.5)
    }

    /// Median, 10th and 90th percentile in microseconds, and the number of runs.
    pub fn json(&self) -> Value {
        json!({
            "median_us": self.median() * 1e6,
            "p10_us": self.at(0.1) * 1e6,
            "p90_us": self.at(0.9) * 1e6,
            "runs": self.0.len(),
        })
    }

    /// "median (p10 – p90)" in milliseconds.
    pub fn text(&self) -> String {
        format!("{:.3} ({:.3} – {:.3})", self.median() * 1e3, self.at(0.1) * 1e3, self.at(0.9) * 1e3)
    }
}

/// What every report begins with: where and of what it was taken.
pub fn header(what: &str, device: &str, bandwidth: f64, world: usize) -> Value {
    json!({
        "bench": what,
        "device": device,
        "driver": driver(),
        "versions": std::collections::BTreeMap::from_iter(cuda::versions()),
        "version": env!("CARGO_PKG_VERSION"),
        "commit": commit(),
        "world_size": world,
        "copy_bandwidth_bytes_per_s": bandwidth,
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
    })
}

/// `GQLA_COMMIT`, or what git says of the folder we are in.
fn commit() -> Option<String> {
    std::env::var("GQLA_COMMIT").ok().or_else(|| {
        let output = std::process::Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    })
}

/// The GPU driver's version, where there is one.
fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    text.lines().next()?.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit())).map(str::to_string)
}

/// Writes the report where `--json` says.
pub fn write(file: Option<&PathBuf>, report: &Value) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    write_text(file, &format!("{report:#}\n"))
}

/// Writes a file, making its folder.
pub fn write_text(file: &Path, text: &str) -> Result<()> {
    if let Some(folder) = file.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    std::fs::write(file, text).map_err(|e| Error::io(file, e))
}

/// A table for people.
pub fn table(head: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED).set_header(head.to_vec());
    table
}

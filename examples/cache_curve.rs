//! What a converted Llama loses by how much of its cache is kept, by the published construction and by the adaptive one:
//! a table on stdout and a plot. docs/conversion.md has both for the bundled checkpoint.
//!
//! cargo run --release --example cache_curve -- checkpoints/tiny-llama-gqa tests/data/calibration.u16 \
//!     tests/data/held-out.u16 docs/cache-curve.svg 80 112 144 176 208 272 400

use std::path::Path;
use std::sync::atomic::AtomicBool;

use gqla::backend::cpu::{CpuBackend, fair_threads};
use gqla::comm::one::OneComm;
use gqla::config::{Attention, ModelConfig};
use gqla::convert::{self, Figures, Options, RopeMode};
use gqla::{Error, Result};
use plotters::prelude::*;

/// Elements a token and layer, and what was measured there.
type Curve = Vec<(usize, Figures)>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let sizes = args.iter().skip(4).map(|n| n.parse::<usize>().ok()).collect::<Option<Vec<_>>>();
    let (Some([model, calibration, held_out, plot]), Some(sizes)) = (args.first_chunk::<4>(), sizes) else {
        let usage = "usage: cache_curve CHECKPOINT CALIBRATION HELD-OUT PLOT.svg ELEMENTS…";
        return Err(Error::Usage(usage.into()));
    };
    let config = ModelConfig::load(model.as_ref())?;
    let Attention::Grouped(a) = &config.attention else {
        return Err(Error::Usage(format!("{model} is no Llama: its cache is a latent already")));
    };
    let whole = 2 * a.groups * a.head_dim;
    let scratch = tempfile::tempdir().map_err(|e| Error::io("a temporary directory", e))?;
    let out = scratch.path().join("converted");
    let published = RopeMode::Published { fold: 4 };
    println!("| elements | | d_r + d_c | KL | perplexity | top-1 agreement |\n|---|---|---|---|---|---|");
    let mut curves: [Curve; 2] = Default::default();
    for elements in sizes {
        let methods = [("published, fold 4", published), ("adaptive", RopeMode::Adaptive)];
        for ((name, rope), curve) in methods.into_iter().zip(&mut curves) {
            let mut options = Options::new(model, &out, calibration);
            (options.rope, options.cache_elements, options.samples) = (rope, Some(elements), 48);
            (options.evaluate, options.evaluate_windows) = (Some(held_out.into()), Some(40));
            let mut backend = CpuBackend::new(Box::new(OneComm::new()), fair_threads(1))?;
            let alone = Box::new(OneComm::new());
            let report = convert::convert(&options, &mut backend, alone, &AtomicBool::new(false), &|_, _, _| ())?;
            let made = ModelConfig::load(&out)?;
            std::fs::remove_dir_all(&out).map_err(|e| Error::io(&out, e))?;
            if let (Some(f), Attention::Latent(l)) = (report.figures, &made.attention) {
                println!(
                    "| {elements} ({:.1} %) | {name} | {} + {} | {:.4} | {:.3} | {:.4} |",
                    100.0 * elements as f64 / whole as f64,
                    l.rope,
                    l.kv_rank,
                    f.kl,
                    f.perplexity_after,
                    f.top1
                );
                curve.push((elements, f));
            }
        }
    }
    let title =
        format!("{}: KL to the original by cached elements a token and layer (of {whole})", config.architecture);
    draw(plot.as_ref(), &title, &curves).map_err(|e| Error::Io { file: plot.into(), what: e.to_string() })
}

fn draw(file: &Path, title: &str, curves: &[Curve; 2]) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(file, (760, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let points = || curves.iter().flatten();
    let (least, most) = points().map(|p| p.0 as f64).fold((f64::MAX, 1.0), |(a, b), x| (a.min(x), f64::max(b, x)));
    let (low, high) = points().map(|p| p.1.kl).fold((f64::MAX, 1e-6), |(a, b), x| (a.min(x), f64::max(b, x)));
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(38)
        .y_label_area_size(60)
        .build_cartesian_2d(least * 0.9..most * 1.05, (low.max(1e-6) / 1.5..high * 1.5).log_scale())?;
    chart.configure_mesh().x_desc("d_r + d_c").y_desc("KL, nats").x_label_formatter(&|x| format!("{x:.0}")).draw()?;
    let styles = [("published, fold 4", RGBColor(214, 96, 20)), ("adaptive", RGBColor(31, 119, 180))];
    for (curve, (name, colour)) in curves.iter().zip(styles) {
        let at = |p: &(usize, Figures)| (p.0 as f64, p.1.kl);
        chart
            .draw_series(LineSeries::new(curve.iter().map(at), colour))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        chart.draw_series(curve.iter().map(|p| Circle::new(at(p), 4, colour.filled())))?;
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
    root.present()?;
    Ok(())
}

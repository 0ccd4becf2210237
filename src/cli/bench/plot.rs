//! Plots of the scaling benchmark as SVG.

use std::path::Path;

use plotters::prelude::*;

use crate::error::{Error, Result};

/// One point of a scaling curve.
#[derive(Debug, Clone)]
pub struct Point {
    /// World size.
    pub world: usize,
    /// Tokens a second.
    pub tokens: f64,
    /// From one rank's measured shard and an all-reduce figure, not from a run of `world` ranks.
    pub projected: bool,
    /// FLOP a byte of attention over the cache.
    pub intensity: f64,
    /// FLOP/s of attention and weights together.
    pub flops: f64,
}

/// A path's curve.
#[derive(Debug, Clone)]
pub struct Curve {
    /// Its name.
    pub name: String,
    /// Points by rising world size.
    pub points: Vec<Point>,
}

const COLOURS: [RGBColor; 2] = [RGBColor(31, 119, 180), RGBColor(214, 96, 20)];

/// Tokens a second and efficiency against world size, and the roofline with every point, side by side.
pub fn scaling(file: &Path, title: &str, curves: &[Curve], bandwidth: f64, peak: f64) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::Io { file: file.into(), what: e.to_string() };
    let root = SVGBackend::new(file, (1320, 440)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| failed(&e))?;
    let titled = root.titled(title, ("sans-serif", 20)).map_err(|e| failed(&e))?;
    let areas = titled.split_evenly((1, 3));
    let points = || curves.iter().flat_map(|c| &c.points);
    let widest = points().map(|p| p.world).max().unwrap_or(1) as f64;
    let most = points().map(|p| p.tokens).fold(1.0, f64::max);
    throughput(&areas[0], curves, widest, most).map_err(|e| failed(&e))?;
    efficiency(&areas[1], curves, widest).map_err(|e| failed(&e))?;
    roofline(&areas[2], curves, bandwidth, peak).map_err(|e| failed(&e))?;
    root.present().map_err(|e| failed(&e))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn throughput(area: &Area, curves: &[Curve], widest: f64, most: f64) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .caption("tokens a second (hollow: projected)", ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(34)
        .y_label_area_size(64)
        .build_cartesian_2d((0.9..widest * 1.15).log_scale().base(2.0), 0.0..most * 1.1)?;
    chart.configure_mesh().x_desc("ranks").x_label_formatter(&|x| format!("{x:.0}")).draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS) {
        let at = |p: &Point| (p.world as f64, p.tokens);
        chart
            .draw_series(LineSeries::new(curve.points.iter().map(at), colour))?
            .label(curve.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        for p in &curve.points {
            let style = if p.projected { colour.stroke_width(1) } else { colour.filled() };
            chart.draw_series([Circle::new(at(p), 4, style)])?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()?;
    Ok(())
}

fn efficiency(area: &Area, curves: &[Curve], widest: f64) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .caption("efficiency: speed-up over one rank, by ranks", ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d((0.9..widest * 1.15).log_scale().base(2.0), 0.0..1.2)?;
    chart.configure_mesh().x_desc("ranks").x_label_formatter(&|x| format!("{x:.0}")).draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS) {
        let Some(first) = curve.points.first() else { continue };
        let one = first.tokens / first.world as f64;
        let at = |p: &Point| (p.world as f64, p.tokens / (one * p.world as f64));
        chart.draw_series(LineSeries::new(curve.points.iter().map(at), colour))?;
        for p in &curve.points {
            let style = if p.projected { colour.stroke_width(1) } else { colour.filled() };
            chart.draw_series([Circle::new(at(p), 4, style)])?;
        }
    }
    Ok(())
}

fn roofline(area: &Area, curves: &[Curve], bandwidth: f64, peak: f64) -> Drawn {
    let (low, high) = (1.0, 2000.0);
    let roof = |x: f64| (x * bandwidth).min(peak) / 1e12;
    let floor = roof(low) / 4.0;
    let mut chart = ChartBuilder::on(area)
        .caption("roofline: TFLOP/s a rank by FLOP a byte", ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(34)
        .y_label_area_size(64)
        .build_cartesian_2d((low..high).log_scale(), (floor..peak / 1e12 * 2.0).log_scale())?;
    chart.configure_mesh().x_desc("FLOP a byte").draw()?;
    let steps = (0..=100).map(|i| low * (high / low).powf(f64::from(i) / 100.0));
    chart.draw_series(LineSeries::new(steps.map(|x| (x, roof(x))), BLACK))?;
    for (curve, colour) in curves.iter().zip(COLOURS) {
        for p in &curve.points {
            let style = if p.projected { colour.stroke_width(1) } else { colour.filled() };
            chart.draw_series([Circle::new((p.intensity, p.flops / 1e12), 4, style)])?;
        }
    }
    Ok(())
}

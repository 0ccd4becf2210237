//! The time of a sum over two ranks with the residual and the norm that follow it, by NCCL and in one shot.
//!
//! `cargo run --release --example all_reduce [hidden]`: two GPUs, a thread each, dependent calls in a graph.

use gqla::backend::cuda::{AllReduce, CudaBackend, CudaOptions};
use gqla::backend::{Backend, Batch, Span};
use gqla::comm::threads;
use gqla::error::Result;

/// Calls of one graph.
const CALLS: usize = 64;

fn measure(all_reduce: AllReduce, rows: usize, hidden: usize) -> Result<Vec<f64>> {
    let ranks: Vec<_> = threads::world(2)
        .into_iter()
        .map(|comm| {
            std::thread::spawn(move || -> Result<Vec<f64>> {
                let options = CudaOptions { max_rows: 256, all_reduce, ..CudaOptions::default() };
                let mut b = CudaBackend::new(Box::new(comm), options)?;
                let span = Span { first: 0, rows, context: rows, blocks: (0..rows.div_ceil(64) as u32).collect() };
                let positions = (0..rows as u32).collect();
                b.begin(&Batch { tokens: vec![0; rows], positions, spans: vec![span], ..Batch::default() })?;
                let values: Vec<f32> = (0..rows * hidden).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
                let weight = b.vector(&vec![1.0; hidden])?;
                let (mut x, mut out) = (b.residual(rows, hidden)?, b.tensor(rows, hidden)?);
                let mut partial = b.tensor(rows, hidden)?;
                b.write(&mut partial, &values)?;
                // The sum is in place with NCCL and would run away: zeroes are summed for ever, at the same speed.
                b.write(&mut x, &values)?;
                let times = b.time(30, |b| {
                    for _ in 0..CALLS {
                        b.all_reduce_add_norm(&mut partial, None, &mut x, &weight, 1e-5, &mut out)?;
                    }
                    Ok(())
                })?;
                b.into_comm().finish()?;
                Ok(times)
            })
        })
        .collect();
    let mut slowest = vec![0f64; 30];
    for rank in ranks {
        let times = rank.join().unwrap_or_else(|_| Ok(vec![]))?;
        slowest.iter_mut().zip(times).for_each(|(s, t)| *s = s.max(t));
    }
    slowest.sort_by(f64::total_cmp);
    Ok(slowest)
}

fn main() -> Result<()> {
    let hidden: usize = std::env::args().nth(1).and_then(|h| h.parse().ok()).unwrap_or(4096);
    println!("sum over 2 ranks + residual + RMSNorm of {hidden}, µs a call (median, best) in a graph of {CALLS}");
    for rows in [1usize, 8, 32, 128] {
        for all_reduce in [AllReduce::Nccl, AllReduce::OneShot] {
            let times = measure(all_reduce, rows, hidden)?;
            let us = |t: f64| t / CALLS as f64 * 1e6;
            let kib = rows * hidden * 2 / 1024;
            println!("{kib:5} KiB  {all_reduce:?}: {:.2}  {:.2}", us(times[times.len() / 2]), us(times[0]));
        }
    }
    Ok(())
}

//! What the cost model needs to know of a card, and the cards it knows.

use crate::backend::Rates;

/// One rank's device and its links. Figures are peaks from the named source unless the user or a measurement gave them.
#[derive(Debug, Clone, PartialEq)]
pub struct Hardware {
    /// The card's name as `--hardware` takes it.
    pub name: String,
    /// Memory bandwidth, bytes/s.
    pub bandwidth: f64,
    /// Dense matrix arithmetic in the format below, FLOP/s.
    pub flops: f64,
    /// Memory, bytes.
    pub memory: f64,
    /// Link to the other ranks, bytes/s in one direction.
    pub link: f64,
    /// Time of a small all-reduce, s.
    pub latency: f64,
    /// Bytes of a cached element and of an activation: 2 (bf16) on GPUs, 4 (f32) on the CPU backend.
    pub element: usize,
    /// Where the figures come from.
    pub source: String,
}

/// A row of the table: TB/s, TFLOP/s (dense bf16), GB, GB/s in one direction, µs.
struct Card {
    name: &'static str,
    bandwidth: f64,
    flops: f64,
    memory: f64,
    link: f64,
    latency: f64,
    source: &'static str,
}

/// Time of a small all-reduce over NVLink: NCCL 2.28, 8 KiB, two H200, in a CUDA graph. Taken for every NVLink card.
const NVLINK_LATENCY: f64 = 6.4;
/// The same over PCIe: an assumption (a few times NVLink's), there being no measurement.
const PCIE_LATENCY: f64 = 20.0;
/// PCIe Gen4 x16 in one direction.
const PCIE_LINK: f64 = 32e9;

const CARDS: [Card; 6] = [
    Card {
        name: "h100",
        bandwidth: 3.35,
        flops: 989.0,
        memory: 80.0,
        link: 450.0,
        latency: NVLINK_LATENCY,
        source: "NVIDIA H100 data sheet, SXM: 3.35 TB/s, 1979 TFLOP/s bf16 with sparsity, 80 GB, NVLink 900 GB/s both ways",
    },
    Card {
        name: "h200",
        bandwidth: 4.8,
        flops: 989.0,
        memory: 141.0,
        link: 450.0,
        latency: NVLINK_LATENCY,
        source: "NVIDIA H200 data sheet, SXM: 4.8 TB/s, 1979 TFLOP/s bf16 with sparsity, 141 GB, NVLink 900 GB/s both ways",
    },
    Card {
        name: "h20",
        bandwidth: 4.0,
        flops: 148.0,
        memory: 96.0,
        link: 450.0,
        latency: NVLINK_LATENCY,
        source: "NVIDIA H20 as published by resellers: 4.0 TB/s, 148 TFLOP/s bf16 dense, 96 GB, NVLink 900 GB/s both ways",
    },
    Card {
        name: "a100-80gb",
        bandwidth: 2.039,
        flops: 312.0,
        memory: 80.0,
        link: 300.0,
        latency: NVLINK_LATENCY,
        source: "NVIDIA A100 data sheet, 80GB SXM: 2039 GB/s, 312 TFLOP/s bf16 dense, 80 GB, NVLink 600 GB/s both ways",
    },
    Card {
        name: "l40s",
        bandwidth: 0.864,
        flops: 362.05,
        memory: 48.0,
        link: 32.0,
        latency: PCIE_LATENCY,
        source: "NVIDIA L40S data sheet: 864 GB/s, 362.05 TFLOP/s bf16 dense, 48 GB, PCIe Gen4 x16 64 GB/s both ways",
    },
    Card {
        name: "b200",
        bandwidth: 8.0,
        flops: 2250.0,
        memory: 180.0,
        link: 900.0,
        latency: NVLINK_LATENCY,
        source: "NVIDIA DGX B200 data sheet, an eighth: 64 TB/s, 1440 GB; bf16 2.25 PFLOP/s dense; NVLink 1.8 TB/s both ways",
    },
];

impl Hardware {
    /// The card called `name`, if the table has it.
    pub fn named(name: &str) -> Option<Hardware> {
        let wanted = name.to_ascii_lowercase();
        let card = CARDS.iter().find(|c| c.name == wanted)?;
        Some(Hardware {
            name: card.name.to_string(),
            bandwidth: card.bandwidth * 1e12,
            flops: card.flops * 1e12,
            memory: card.memory * 1e9,
            link: card.link * 1e9,
            latency: card.latency * 1e-6,
            element: 2,
            source: card.source.to_string(),
        })
    }

    /// The names [`named`](Hardware::named) knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        CARDS.iter().map(|c| c.name)
    }

    /// One rank's share of a CPU host: `bandwidth` bytes/s, `flops` FLOP/s in f32, `memory` bytes.
    pub fn cpu(bandwidth: f64, flops: f64, memory: f64) -> Hardware {
        Hardware {
            name: "cpu".to_string(),
            bandwidth,
            flops,
            memory,
            // Ranks of a host exchange through its memory: a copy in and a copy out.
            link: bandwidth / 2.0,
            latency: 5e-6,
            element: 4,
            source: "given by the caller".to_string(),
        }
    }

    /// One of `ranks` equal shares of a typical host of `cores` cores with `memory` bytes: defaults for choosing a
    /// path where nothing was measured (8 GB/s and 60 GFLOP/s a core, 200 GB/s a host at most).
    pub fn cpu_share(cores: usize, ranks: usize, memory: f64) -> Hardware {
        let (cores, ranks) = (cores.max(1) as f64, ranks.max(1) as f64);
        Hardware {
            source:
                "defaults for a CPU host: 8 GB/s and 60 GFLOP/s (f32) a core, at most 200 GB/s, shared by the ranks"
                    .to_string(),
            ..Hardware::cpu((8e9 * cores).min(200e9) / ranks, 60e9 * cores / ranks, memory / ranks)
        }
    }

    /// A device as it was measured. Where sums were not, links are reckoned as PCIe's, which is the same for both paths.
    pub fn measured(name: &str, rates: &Rates) -> Hardware {
        let (latency, link) = rates.sums.unwrap_or((PCIE_LATENCY * 1e-6, PCIE_LINK));
        let links =
            if rates.sums.is_some() { "bandwidth, product, sums" } else { "bandwidth and product; links assumed" };
        Hardware {
            name: name.to_string(),
            bandwidth: rates.bandwidth,
            flops: rates.flops,
            memory: rates.memory,
            link,
            latency,
            element: 2,
            source: format!("measured here: {links}"),
        }
    }

    /// Replaces figures by the user's (SI units: bytes/s, FLOP/s, bytes, bytes/s) and says so in `source`.
    pub fn overridden(
        mut self,
        bandwidth: Option<f64>,
        flops: Option<f64>,
        memory: Option<f64>,
        link: Option<f64>,
    ) -> Hardware {
        let mut given = vec![];
        let mut set = |name, value: Option<f64>, field: &mut f64| {
            if let Some(value) = value {
                *field = value;
                given.push(name);
            }
        };
        set("bandwidth", bandwidth, &mut self.bandwidth);
        set("flops", flops, &mut self.flops);
        set("memory", memory, &mut self.memory);
        set("link", link, &mut self.link);
        if !given.is_empty() {
            self.source = format!("{} given by the user; otherwise {}", given.join(", "), self.source);
        }
        self
    }

    /// FLOP a byte above which arithmetic, not memory, bounds a kernel.
    pub fn ridge(&self) -> f64 {
        self.flops / self.bandwidth
    }
}

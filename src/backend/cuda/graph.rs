//! A decode step as one graph: recorded once for a number of sequences, replayed from then on.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Gpu, check, null};
use super::step::bucket;
use crate::backend::{Batch, DECODE_ROWS};
use crate::error::Result;

/// What a recorded step was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub program: u32,
    /// Sequences, padding included.
    pub spans: usize,
    /// Rows of each.
    pub rows: usize,
    /// Logits are wanted, of every row.
    pub outputs: bool,
}

/// The key of a batch that can be a graph: decoding sequences of equally many rows, all of whose rows are outputs or
/// none.
pub(crate) fn key(program: u32, batch: &Batch, most_spans: usize, most_rows: usize) -> Option<Key> {
    let rows = batch.spans.first()?.rows;
    let spans = bucket(batch.spans.len());
    let even = rows <= DECODE_ROWS && batch.spans.iter().all(|s| s.rows == rows);
    let outputs = !batch.outputs.is_empty();
    let all = batch.outputs.len() == batch.rows() || !outputs;
    (even && all && spans <= most_spans && spans * rows <= most_rows).then_some(Key { program, spans, rows, outputs })
}

/// A recorded step.
pub(crate) struct Graph {
    gpu: Arc<Gpu>,
    exec: sys::CUgraphExec,
}

// SAFETY: driver handles may be used from any thread, one at a time here.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `body` enqueues, without running it.
    pub fn record(gpu: &Arc<Gpu>, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let (mut graph, mut exec) = (null(), null());
        // SAFETY: a live stream, out-parameters; capturing is always ended.
        unsafe {
            // Relaxed: other threads of the process (NCCL's) may allocate meanwhile.
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            check(sys::cuStreamBeginCapture_v2(gpu.stream(), mode), "recording a step")?;
            let recorded = body();
            let ended = check(sys::cuStreamEndCapture(gpu.stream(), &mut graph), "recording a step");
            let made = recorded.and(ended).and_then(|()| {
                check(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0), "making a graph of a step")
            });
            if !graph.is_null() {
                let _ = sys::cuGraphDestroy(graph);
            }
            made?;
        }
        Ok(Graph { gpu: gpu.clone(), exec })
    }

    /// Enqueues the step.
    pub fn launch(&self) -> Result<()> {
        // SAFETY: live handles.
        check(unsafe { sys::cuGraphLaunch(self.exec, self.gpu.stream()) }, "launching a step")
    }
}

impl Graph {
    /// Runs it alone and gives the GPU's seconds.
    pub fn time(&self) -> Result<f64> {
        let milliseconds = self.gpu.time(|| self.launch())?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours.
        unsafe {
            let _ = sys::cuGraphExecDestroy(self.exec);
        }
    }
}

/// The graphs recorded so far; those of an older generation point to memory that is gone.
#[derive(Default)]
pub(crate) struct Graphs {
    generation: u64,
    graphs: HashMap<Key, Graph>,
    /// Steps replayed.
    pub replays: u64,
}

impl Graphs {
    pub fn get(&mut self, key: Key, generation: u64) -> Option<&Graph> {
        if self.generation != generation {
            self.graphs.clear();
            self.generation = generation;
        }
        let found = self.graphs.get(&key);
        self.replays += u64::from(found.is_some());
        found
    }

    pub fn put(&mut self, key: Key, generation: u64, graph: Graph) {
        if self.generation != generation {
            self.graphs.clear();
            self.generation = generation;
        }
        self.graphs.insert(key, graph);
    }
}

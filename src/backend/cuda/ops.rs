//! [`Backend`] for the GPU: one method, one or two launches.

use std::time::Duration;

use rayon::prelude::*;

use super::attention::{Form, Fresh};
use super::context::{Memory, Pinned, bytes_of};
use super::experts::Results;
use super::graph::{self, Graph};
use super::kernels::{Launch, arguments, source};
use super::memory;
use super::reduce::{self, Reduce};
use super::sums::Added;
use super::{
    Cache, CudaBackend, Experts, Matrix, Operand, RopeTable, Routing, Tensor, Vector, address, cache_bytes, expect,
};
use crate::backend::{AttentionShape, Backend, Batch, Budget, ExpertSlices, Linear, Normed, Rates, Reduction, View};
use crate::cache::{BLOCK, Layout};
use crate::checkpoint::Slice;
use crate::comm::Communicator;
use crate::comm::nccl::Element;
use crate::config::{ModelConfig, Moe, Rope};
use crate::error::{Error, Result};
use crate::model::shard::Owned;

/// The kernels' parameter blocks, field by field as in `kernels/`.
#[repr(C)]
struct Embed(u64, u64, u64, u64, i32, i32, i32);
#[repr(C)]
struct Norm(u64, u64, u64, f32);
#[repr(C)]
struct SelectRows(u64, u64, u64, i32);
#[repr(C)]
struct SiluMul(u64, u64, i32, i32, i32);
#[repr(C)]
struct AppendGrouped {
    inputs: [u64; 10],
    strides: [i32; 3],
    heads: i32,
    groups: i32,
    max_blocks: i32,
}
impl CudaBackend {
    pub(super) fn rows(&self) -> usize {
        self.inputs.rows
    }

    /// The products of the chosen experts, not summed.
    fn experts_products(&mut self, e: &Experts, routing: &Routing, x: &Tensor) -> Result<Results> {
        let rows = self.rows();
        let results = self.experts.products(&self.gpu, &self.kernels, e, routing, rows, x.at())?;
        if results.grown {
            self.attention.generation.set(self.attention.generation.get() + 1);
        }
        Ok(results)
    }

    /// Whether a grouped cache and the angles are of the shape.
    fn fits_groups(&self, shape: &AttentionShape, rope: &RopeTable, rope_key: bool, cache: &Cache) -> Result<()> {
        let (groups, nope, value) = (shape.groups, shape.nope, shape.value);
        let turned = if rope_key { shape.rope } else { nope };
        expect(
            cache.layout == Layout::Grouped { groups, nope, rope: shape.rope, value } && rope.pairs * 2 == turned,
            || format!("{:?} for {shape:?}, with {} pairs to turn", cache.layout, rope.pairs),
        )?;
        expect(self.inputs.max_blocks * BLOCK >= rope.positions, || {
            format!("{} positions on a backend made for fewer", rope.positions)
        })
    }

    /// Waits for the step and brings `bytes` bytes at `at` to page-locked memory.
    fn fetch(&mut self, at: u64, bytes: usize) -> Result<()> {
        self.gpu.attach()?;
        let head = self.head.get_mut();
        if head.host.as_ref().is_none_or(|h| h.slice::<u8>().len() < bytes) {
            head.host = None;
            head.host = Some(Pinned::new(&self.gpu, bytes.next_power_of_two())?);
        }
        if let Some(host) = head.host.as_mut() {
            self.gpu.download(at, &mut host.slice_mut::<u8>()[..bytes])?;
        }
        self.wait()
    }

    /// Memory of at least `bytes`, grown where it is smaller; never inside a graph.
    pub(super) fn ensure(&self, slot: &mut Option<Memory>, bytes: usize) -> Result<u64> {
        if slot.as_ref().is_none_or(|m| m.bytes() < bytes) {
            *slot = None;
            self.attention.generation.set(self.attention.generation.get() + 1);
            *slot = Some(Memory::new(&self.gpu, bytes)?);
        }
        slot.as_ref().map(Memory::at).ok_or_else(|| Error::Internal("a workspace that is not there".into()))
    }
}

impl Backend for CudaBackend {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Vector = Vector;
    type Cache = Cache;
    type Experts = Experts;
    type Routing = Routing;
    type RopeTable = RopeTable;

    fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let rows = if rows == 0 { 0 } else { rows.max(self.tensor_rows()) };
        let memory = Memory::new(&self.gpu, rows * cols * 2)?;
        Ok(Tensor { memory, rows, cols, element: Element::Bf16 })
    }

    fn summed(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let rows = rows.max(self.tensor_rows());
        let memory = self.reduce.memory(&self.gpu, rows * cols * 2)?;
        Ok(Tensor { memory, rows, cols, element: Element::Bf16 })
    }

    fn residual(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let rows = rows.max(self.tensor_rows());
        let memory = self.reduce.memory(&self.gpu, rows * cols * 4)?;
        Ok(Tensor { memory, rows, cols, element: Element::F32 })
    }

    fn matrix(&self, parts: &[Slice], _: Reduction) -> Result<Matrix> {
        self.loader.matrix(&self.kernels, parts)
    }

    fn vector(&self, data: &[f32]) -> Result<Vector> {
        self.loader.vector(data)
    }

    fn cache(&self, layout: Layout, blocks: usize) -> Result<Cache> {
        Ok(Cache { memory: Memory::new(&self.gpu, cache_bytes(layout, blocks))?, layout })
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        cache.memory.bytes()
    }

    fn experts(&self, slices: &ExpertSlices, moe: &Moe) -> Result<Experts> {
        Experts::load(&self.gpu, &self.loader, &self.kernels, slices, moe)
    }

    fn routing(&self, rows: usize, moe: &Moe) -> Result<Routing> {
        Routing::new(&self.gpu, rows.max(self.tensor_rows()), moe)
    }

    fn rope_table(&self, rope: &Rope, inv_freq: &[f64], magnitude: f64, positions: usize) -> Result<RopeTable> {
        let pairs = inv_freq.len();
        let table = |f: fn(f64) -> f64| -> Result<Memory> {
            let mut values = vec![0f32; positions * pairs];
            values.par_chunks_mut(pairs.max(1)).enumerate().for_each(|(p, row)| {
                for (v, w) in row.iter_mut().zip(inv_freq) {
                    *v = (f(p as f64 * w) * magnitude) as f32;
                }
            });
            let memory = Memory::uninit(&self.gpu, values.len() * 4)?;
            self.gpu.upload(memory.at(), bytes_of(&values))?;
            self.gpu.synchronize()?;
            Ok(memory)
        };
        Ok(RopeTable { cos: table(f64::cos)?, sin: table(f64::sin)?, interleave: rope.interleave, pairs, positions })
    }

    fn loaded(&mut self) {
        self.loader.finish();
    }

    fn step<F: FnMut(&mut Self) -> Result<()>>(&mut self, program: u32, batch: &Batch, mut body: F) -> Result<()> {
        let side = self.next_side()?;
        let usable = self.options.graphs && self.reduce.on_stream();
        let (most_spans, most_rows) = (self.inputs.spans(), self.tensor_rows());
        let key = graph::key(program, batch, most_spans, most_rows).filter(|_| usable);
        match key {
            Some(key) => self.inputs.begin_padded(batch, side, key.spans, key.rows)?,
            None => self.inputs.begin(batch, side)?,
        }
        self.tokens.begin()?;
        let beyond = self.guarded();
        let recorded = key.and_then(|key| self.graphs.get(key, self.attention.generation.get()));
        if let Some(graph) = recorded {
            self.comm.guard(beyond);
            graph.launch()?;
            self.comm.guard(None);
            return self.tokens.end();
        }
        self.attention.begin();
        body(self).map_err(|e| self.blame(e))?;
        self.tokens.end()?;
        // Once as it is, which loads kernels and makes workspaces; then recorded for the times to come.
        if let Some(key) = key {
            self.attention.begin();
            let gpu = self.gpu.clone();
            let graph = Graph::record(&gpu, || body(self))?;
            self.graphs.put(key, self.attention.generation.get(), graph);
        }
        self.comm.guard(None);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        let side = self.next_side()?;
        self.inputs.begin(batch, side)?;
        self.attention.begin();
        Ok(())
    }

    fn embed(&self, table: &Matrix, first: usize, out: &mut Tensor) -> Result<()> {
        expect(table.cols == out.cols, || format!("an embedding of {} into {}", table.cols, out.cols))?;
        let bf16 = out.element == Element::Bf16;
        let f = self.kernels.get(&source::EMBED, "embed", if bf16 { &[("X_BF16", 1)] } else { &[] })?;
        let (first, owned, hidden) = (first as i32, table.rows as i32, table.cols as i32);
        let (tokens, chosen) = (self.inputs.tokens(), self.tokens.device.at());
        let a = Embed(tokens, chosen, table.memory.at(), out.at(), first, owned, hidden);
        self.kernels.launch(f, Launch::new(self.rows(), 256), arguments![a])
    }

    fn embed_all_reduce_norm(
        &mut self,
        table: &Matrix,
        first: usize,
        partial: &mut Tensor,
        x: &mut Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        if self.is_one_shot(x) {
            // A row is one rank's, and the others' are zeros: bf16 holds the sum.
            self.embed(table, first, partial)?;
            return self.add_norm(true, Added::Beginning(partial), None, x, weight, eps, out);
        }
        self.embed(table, first, x)?;
        self.sum(x)?;
        self.norm(x, weight, eps, out)
    }

    fn norm(&self, x: &Tensor, weight: &Vector, eps: f32, out: &mut Tensor) -> Result<()> {
        expect(x.cols == weight.len && out.cols == x.cols, || format!("a norm of {} columns", x.cols))?;
        let mut constants = vec![("WIDTH", x.cols as i64)];
        if x.element == Element::Bf16 {
            constants.push(("X_BF16", 1));
        }
        let f = self.kernels.get(&source::NORM, "norm_rows", &constants)?;
        let a = Norm(x.at(), weight.memory.at(), out.at(), eps);
        self.kernels.launch(f, Launch::new(self.rows(), f.exports()[0]), arguments![a])
    }

    fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        self.sum(x)
    }

    fn all_reduce_add_norm(
        &mut self,
        partial: &mut Tensor,
        bias: Option<&Vector>,
        x: &mut Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        expect(x.cols == weight.len && partial.cols == x.cols, || format!("a norm of {} columns", x.cols))?;
        let one_shot = self.is_one_shot(x);
        if !one_shot {
            self.sum(partial)?;
        }
        self.add_norm(one_shot, Added::Tensor(partial), bias, x, weight, eps, out)
    }

    fn linear(&self, weight: &Matrix, bias: Option<&Vector>, x: View<Tensor>, out: &mut Tensor) -> Result<()> {
        expect(x.width == weight.cols && weight.rows <= out.cols && x.tensor.element == Element::Bf16, || {
            format!("a [{}, {}] product of {} columns into {}", weight.rows, weight.cols, x.width, out.cols)
        })?;
        let x = Operand { at: address(&x), stride: x.tensor.cols };
        self.product(weight, bias, x, self.rows(), Operand { at: out.at(), stride: out.cols }, false)
    }

    fn linear_pair(&self, first: Linear<Self>, second: Linear<Self>) -> Result<()> {
        for l in [&first, &second] {
            expect(l.x.width == l.weight.cols && l.weight.rows <= l.out.cols, || {
                format!("a [{}, {}] product of {} columns", l.weight.rows, l.weight.cols, l.x.width)
            })?;
        }
        if self.product_pair([&first, &second], self.rows())? {
            return Ok(());
        }
        self.linear(first.weight, None, first.x, first.out)?;
        self.linear(second.weight, None, second.x, second.out)
    }

    fn norm_latents(&self, latent: Normed<Self>, q: Option<Normed<Self>>, eps: f32) -> Result<()> {
        self.latents((latent.x, Some(latent.weight)), Some(latent.out), q, eps, None)
    }

    fn rope_append_grouped(
        &self,
        shape: &AttentionShape,
        rope: &RopeTable,
        q: View<Tensor>,
        kv: View<Tensor>,
        k_rope: Option<View<Tensor>>,
        q_out: &mut Tensor,
        cache: &mut Cache,
    ) -> Result<()> {
        self.fits_groups(shape, rope, k_rope.is_some(), cache)?;
        let (groups, nope, value) = (shape.groups, shape.nope, shape.value);
        let constants = [
            ("DN", nope as i64),
            ("DR", shape.rope as i64),
            ("DV", value as i64),
            ("INTERLEAVE", i64::from(rope.interleave)),
        ];
        let f = self.kernels.get(&source::ROPE_APPEND_GROUPED, "rope_append_grouped", &constants)?;
        let units = shape.heads * (nope + shape.rope) + shape.rope + groups * (nope + value);
        let a = AppendGrouped {
            inputs: [
                address(&q),
                address(&kv),
                k_rope.as_ref().map_or(0, address),
                rope.cos.at(),
                rope.sin.at(),
                self.inputs.positions(),
                self.inputs.row_seq(),
                self.inputs.tables(0),
                q_out.at(),
                cache.memory.at(),
            ],
            strides: [q.tensor.cols as i32, kv.tensor.cols as i32, k_rope.map_or(0, |k| k.tensor.cols as i32)],
            heads: shape.heads as i32,
            groups: groups as i32,
            max_blocks: self.inputs.max_blocks as i32,
        };
        let grid = (units.div_ceil(f.exports()[0]).div_ceil(128), self.rows(), 1);
        self.kernels.launch(f, Launch { grid, block: 128, ..Launch::default() }, arguments![a])
    }

    fn append_latent(
        &self,
        shape: &AttentionShape,
        rope: &RopeTable,
        latent: (View<Tensor>, Option<&Vector>),
        k_rope: View<Tensor>,
        q: Option<Normed<Self>>,
        eps: f32,
        cache: &mut Cache,
    ) -> Result<()> {
        expect(
            cache.layout == Layout::Latent { latent: shape.latent, rope: shape.rope } && rope.pairs * 2 == shape.rope,
            || format!("{:?} for {shape:?}, with {} pairs to turn", cache.layout, rope.pairs),
        )?;
        expect(self.inputs.max_blocks * BLOCK >= rope.positions, || {
            format!("{} positions on a backend made for fewer", rope.positions)
        })?;
        expect((latent.0.width, k_rope.width) == (shape.latent, shape.rope), || {
            format!("a latent of {} columns and a key of {} for {shape:?}", latent.0.width, k_rope.width)
        })?;
        self.latents(latent, None, q, eps, Some((rope, k_rope, cache)))
    }

    fn attend_grouped(&self, shape: &AttentionShape, q: &Tensor, cache: &Cache, out: &mut Tensor) -> Result<()> {
        self.attend(shape, Form::Grouped, q, cache, out)
    }

    fn append_attend_grouped(
        &self,
        shape: &AttentionShape,
        rope: &RopeTable,
        q: View<Tensor>,
        kv: View<Tensor>,
        k_rope: Option<View<Tensor>>,
        q_turned: &mut Tensor,
        cache: &mut Cache,
        out: &mut Tensor,
    ) -> Result<()> {
        self.fits_groups(shape, rope, k_rope.is_some(), cache)?;
        let operand = |x: &View<Tensor>| Operand { at: address(x), stride: x.tensor.cols };
        let fresh = Fresh {
            q: operand(&q),
            kv: operand(&kv),
            k_rope: k_rope.as_ref().map_or(Operand { at: 0, stride: 0 }, operand),
            cos: rope.cos.at(),
            sin: rope.sin.at(),
            interleave: rope.interleave,
        };
        let (kernels, inputs) = (&self.kernels, &self.inputs);
        if self.attention.append_attend(kernels, inputs, shape, fresh, cache.memory.at(), out.at())? {
            return Ok(());
        }
        self.rope_append_grouped(shape, rope, q, kv, k_rope, q_turned, cache)?;
        self.attend_grouped(shape, q_turned, cache, out)
    }

    fn absorb_query(
        &self,
        shape: &AttentionShape,
        rope: &RopeTable,
        kv_up: &Matrix,
        q: View<Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        let q = Operand { at: address(&q), stride: q.tensor.cols };
        self.absorb("absorb_query", shape, Some(rope), kv_up, q, out, shape.latent)
    }

    fn attend_latent(&self, shape: &AttentionShape, q: &Tensor, cache: &Cache, out: &mut Tensor) -> Result<()> {
        self.attend(shape, Form::Latent, q, cache, out)
    }

    fn absorb_output(&self, shape: &AttentionShape, kv_up: &Matrix, latent: &Tensor, out: &mut Tensor) -> Result<()> {
        let latent = Operand { at: latent.at(), stride: latent.cols };
        self.absorb("absorb_output", shape, None, kv_up, latent, out, shape.value)
    }

    fn attend_absorbed(
        &self,
        shape: &AttentionShape,
        kv_up: &Matrix,
        q: &Tensor,
        cache: &Cache,
        latent: &mut Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        let (q_at, cache_at, latent_at) = (q.at(), cache.memory.at(), latent.at());
        let (weights, out_at) = (kv_up.memory.at(), out.at());
        let fused = self.attention.attend_absorbed(
            &self.kernels,
            &self.inputs,
            shape,
            (q_at, cache_at, latent_at),
            weights,
            out_at,
        )?;
        if fused {
            return Ok(());
        }
        self.attend_latent(shape, q, cache, latent)?;
        self.absorb_output(shape, kv_up, latent, out)
    }

    fn expands(&self, shape: &AttentionShape) -> bool {
        [shape.nope, shape.rope, shape.value, shape.latent].iter().all(|n| n.is_multiple_of(8))
    }

    fn attend_expanded(
        &mut self,
        shape: &AttentionShape,
        rope: &RopeTable,
        kv_up: &Matrix,
        q: View<Tensor>,
        cache: &Cache,
        out: &mut Tensor,
    ) -> Result<()> {
        self.expand(shape, rope, kv_up, Operand { at: address(&q), stride: q.tensor.cols }, cache, out)
    }

    fn silu_mul(&self, gate_up: &Tensor, width: usize, out: &mut Tensor) -> Result<()> {
        let f = self.kernels.get(&source::SILU_MUL, "silu_mul", &[])?;
        let a = SiluMul(gate_up.at(), out.at(), width as i32, gate_up.cols as i32, out.cols as i32);
        let grid = (width.div_ceil(2048), self.rows(), 1);
        self.kernels.launch(f, Launch { grid, block: 256, ..Launch::default() }, arguments![a])
    }

    fn gated(
        &self,
        weight: &Matrix,
        bias: Option<&Vector>,
        x: View<Tensor>,
        width: usize,
        gate_up: &mut Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        let operand = Operand { at: address(&x), stride: x.tensor.cols };
        let streamed = self.is_streamed(weight, operand, self.rows());
        if !streamed && !self.is_skinny(weight, operand, self.rows()) {
            self.linear(weight, bias, x, gate_up)?;
            return self.silu_mul(gate_up, width, out);
        }
        expect(x.width == weight.cols && weight.rows == 2 * width && width <= out.cols, || {
            format!("a gated [{}, {}] product into {} columns", weight.rows, weight.cols, out.cols)
        })?;
        let out = Operand { at: out.at(), stride: out.cols };
        if streamed {
            return self.stream(weight, width, bias, (operand, self.rows()), out, true, false);
        }
        self.skinny("gemv_gated", weight, width, bias, (operand, self.rows()), out, false)
    }

    fn route(&self, moe: &Moe, gate: &Matrix, bias: Option<&Vector>, x: &Tensor, routing: &mut Routing) -> Result<()> {
        routing.choose(&self.kernels, moe, gate, bias, (x.at(), x.cols), (self.inputs.row_seq(), self.rows()))
    }

    fn moe(&mut self, experts: &Experts, routing: &Routing, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let results = self.experts_products(experts, routing, x)?;
        self.experts.sum(&self.kernels, experts, self.rows(), &results, out.at())
    }

    fn moe_all_reduce_add_norm(
        &mut self,
        experts: &Experts,
        routing: &Routing,
        partial: &mut Tensor,
        x: &mut Tensor,
        weight: &Vector,
        eps: f32,
        h: &mut Tensor,
    ) -> Result<()> {
        let one_shot = self.is_one_shot(x);
        if !one_shot && !matches!(self.reduce, Reduce::Alone) {
            self.moe(experts, routing, h, partial)?;
            return self.all_reduce_add_norm(partial, None, x, weight, eps, h);
        }
        let results = self.experts_products(experts, routing, h)?;
        self.add_norm(one_shot, Added::Experts(&results), None, x, weight, eps, h)
    }

    fn select_outputs(&self, x: &Tensor, out: &mut Tensor) -> Result<()> {
        expect(self.inputs.outputs <= out.rows && x.cols == out.cols, || {
            format!("{} outputs into {} rows", self.inputs.outputs, out.rows)
        })?;
        let f = self.kernels.get(&source::SELECT_ROWS, "select_rows", &[])?;
        let a = SelectRows(x.at(), self.inputs.output_rows(), out.at(), x.cols as i32);
        self.kernels.launch(f, Launch::new(self.inputs.outputs, 256), arguments![a])
    }

    fn head(&mut self, head: &Matrix, x: &Tensor, first: usize, choose: bool) -> Result<()> {
        let outputs = self.inputs.outputs;
        let mut state = self.head.borrow_mut();
        state.vocab = head.rows;
        if outputs == 0 {
            return Ok(());
        }
        let logits = self.ensure(&mut state.logits, outputs * head.rows * 4)?;
        let operand = Operand { at: x.at(), stride: x.cols };
        self.product(head, None, operand, outputs, Operand { at: logits, stride: head.rows }, true)?;
        drop(state);
        if choose { self.choose(logits, head.rows, first) } else { Ok(()) }
    }

    fn read_logits(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        let head = self.head.get_mut();
        let (at, count) = (head.logits.as_ref().map_or(0, Memory::at), self.inputs.wanted * head.vocab);
        logits.clear();
        if count == 0 {
            return Ok(());
        }
        self.fetch(at, count * 4)?;
        if let Some(host) = &self.head.get_mut().host {
            logits.extend_from_slice(&host.slice::<f32>()[..count]);
        }
        Ok(())
    }

    fn read_best(&mut self, best: &mut Vec<(f32, u32)>) -> Result<()> {
        let wanted = self.inputs.wanted;
        best.clear();
        if wanted == 0 {
            return Ok(());
        }
        self.fetch(self.tokens.best.at(), wanted * 8)?;
        if let Some(host) = &self.head.get_mut().host {
            best.extend(
                host.slice::<[u32; 2]>()[..wanted].iter().map(|[score, token]| (f32::from_bits(*score), *token)),
            );
        }
        Ok(())
    }

    fn overlaps(&self) -> bool {
        self.reduce.on_stream()
    }

    fn read_tokens(&mut self, behind: bool, count: usize, tokens: &mut Vec<u32>) -> Result<()> {
        expect(count <= self.tokens.rows(), || format!("{count} tokens of a step"))?;
        self.wait_for_tokens(behind)?;
        self.tokens.read(behind, count, tokens);
        Ok(())
    }

    fn watch(&mut self) -> Result<()> {
        self.watch_device()
    }

    fn step_time(&self, behind: bool) -> Result<Option<Duration>> {
        self.tokens.time(behind).map(Some)
    }

    fn read(&self, x: &Tensor, rows: usize) -> Result<Vec<f32>> {
        reduce::read(&self.gpu, x.at(), rows.min(x.rows) * x.cols, x.element)
    }

    fn write_rows(&self, values: &[f32], x: &mut Tensor) -> Result<()> {
        self.write(x, values)
    }

    fn budget(&self, model: &ModelConfig, owned: &Owned) -> Result<Option<Budget>> {
        Ok(Some(super::predict(model, owned, &self.options, &self.gpu.info, self.gpu.taken()?)))
    }

    fn budget_cache(&self, budget: &Budget, blocks: usize) -> usize {
        memory::cache(budget, blocks)
    }

    fn memory_taken(&self) -> Result<usize> {
        // What other ranks take of a shared GPU cannot be told from this one's.
        if self.options.share_gpus { Ok(0) } else { self.gpu.taken() }
    }

    fn fitting_blocks(&self, model: &ModelConfig, owned: &Owned, wanted: usize, utilization: f64) -> Result<usize> {
        let budget = super::predict(model, owned, &self.options, &self.gpu.info, self.gpu.taken()?);
        memory::blocks(&budget, &self.gpu, utilization, wanted)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.wait()
    }

    fn describe(&self) -> String {
        let (major, minor) = self.gpu.info.capability;
        format!("{}, compute capability {major}.{minor}", self.gpu.info.name)
    }

    fn cache_element(&self) -> usize {
        2
    }

    fn fill_cache(&self, cache: &mut Cache, seed: u64) -> Result<()> {
        let cols = cache.layout.elements();
        let shape = (cache.memory.bytes() / 2 / cols.max(1), cols);
        self.loader.noise(&self.kernels, cache.memory.at(), shape, seed, (0, 0), 1.0)
    }

    fn noise_tensor(&self, rows: usize, cols: usize, seed: u64) -> Result<Tensor> {
        let tensor = self.summed(rows, cols)?;
        self.loader.noise(&self.kernels, tensor.at(), (tensor.rows, cols), seed, (0, 0), 1.0)?;
        Ok(tensor)
    }

    fn bandwidth(&mut self) -> Result<f64> {
        const BYTES: usize = 1 << 30;
        const COPIES: usize = 8;
        let (from, to) = (Memory::uninit(&self.gpu, BYTES)?, Memory::uninit(&self.gpu, BYTES)?);
        self.loader.noise(&self.kernels, from.at(), (BYTES / 8192, 4096), 1, (0, 0), 1.0)?;
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            self.gpu.synchronize()?;
            let began = std::time::Instant::now();
            (0..COPIES).try_for_each(|_| self.gpu.copy(from.at(), to.at(), BYTES))?;
            self.gpu.synchronize()?;
            best = best.min(began.elapsed().as_secs_f64());
        }
        Ok((2 * BYTES * COPIES) as f64 / best)
    }

    fn rates(&mut self, hidden: usize) -> Result<Option<Rates>> {
        self.measure(hidden).map(Some)
    }

    fn sums(&self) -> String {
        self.reduce.describe(self.one_shot.is_some())
    }

    fn reduce_time(&mut self) -> Option<Duration> {
        (!self.reduce.waits()).then(|| std::mem::take(&mut self.waited))
    }

    fn comm(&mut self) -> &mut dyn Communicator {
        &mut *self.comm
    }

    fn into_comm(mut self) -> Box<dyn Communicator> {
        self.graphs = super::Graphs::default();
        if let Reduce::Nccl(nccl) = std::mem::replace(&mut self.reduce, Reduce::Alone) {
            self.comm.guard(Some(super::LEAVING));
            nccl.finish();
            self.comm.guard(None);
        }
        self.comm
    }
}

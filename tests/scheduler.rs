//! The scheduler and the coordinator without a model: blocks, prefixes, fairness and ends, under a million random steps.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gqla::cache::BLOCK;
use gqla::comm::Communicator;
use gqla::comm::one::OneComm;
use gqla::engine::coordinator::{Command, Coordinator, Job};
use gqla::engine::message::{FROM, Step, Tables};
use gqla::engine::runner::{Outputs, Run};
use gqla::engine::scheduler::{Limits, Plan, Scheduler};
use gqla::engine::stats::Shared;
use gqla::engine::{Event, Reason, Request};
use gqla::error::Result;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A hash of the tokens up to each position: what a cache holds there, if it is the right one.
fn extend(hash: u64, token: u32) -> u64 {
    mix(hash ^ u64::from(token).wrapping_mul(0x2545_F491_4F6C_DD1D))
}

/// A cache that remembers what was written where, and a "model" whose next token is a hash of all before it. It keeps
/// the last step's tokens for steps that name them.
struct Device {
    tables: Tables,
    cells: Vec<u64>,
    last: Vec<u32>,
}

impl Device {
    fn new(blocks: usize) -> Device {
        Device { tables: Tables::default(), cells: vec![0; blocks * BLOCK], last: vec![] }
    }

    /// Appends the step's tokens and attends: every position before a token must hold the hash of just those tokens
    /// that lead to it, which the sequence's last cell and the tokens themselves determine. Returns each output row's hash.
    fn execute(&mut self, step: &Step) -> Result<Vec<u64>> {
        let mut batch = self.tables.batch(step)?;
        for token in batch.tokens.iter_mut().filter(|t| **t & FROM != 0) {
            *token = self.last[(*token & !FROM) as usize];
        }
        let mut rows = vec![0; batch.rows()];
        // All rows are written before any is read, as a layer does.
        for span in &batch.spans {
            let cell = |p: usize| span.blocks[p / BLOCK] as usize * BLOCK + p % BLOCK;
            let from = span.context - span.rows;
            let mut hash = if from == 0 { 0 } else { self.cells[cell(from - 1)] };
            for row in 0..span.rows {
                hash = extend(hash, batch.tokens[span.first + row]);
                self.cells[cell(from + row)] = hash;
                rows[span.first + row] = hash;
            }
        }
        for span in &batch.spans {
            // The last row's own cell must not have been overwritten by another sequence of the step.
            let p = span.context - 1;
            assert_eq!(
                self.cells[span.blocks[p / BLOCK] as usize * BLOCK + p % BLOCK],
                rows[span.first + span.rows - 1]
            );
        }
        let outputs: Vec<u64> = batch.outputs.iter().map(|row| rows[*row as usize]).collect();
        self.last = outputs.iter().map(|hash| token(*hash)).collect();
        Ok(outputs)
    }

    /// Whether the table `blocks` holds exactly what `hashes` (one a token) says.
    fn holds(&self, blocks: &[u32], hashes: &[u64]) -> bool {
        hashes.iter().enumerate().all(|(p, h)| self.cells[blocks[p / BLOCK] as usize * BLOCK + p % BLOCK] == *h)
    }
}

/// A sequence as the driver knows it.
struct Client {
    hashes: Vec<u64>,
    /// The rows of all its prompt's positions are wanted; how many have come.
    all_rows: bool,
    scored: usize,
    prompt: usize,
    generated: usize,
    /// Tokens it may generate, as the scheduler knows.
    most: usize,
    /// Tokens after which it ends, as it will turn out.
    wanted: usize,
    running: bool,
}

const VOCAB: u32 = 1000;

fn token(hash: u64) -> u32 {
    (hash % u64::from(VOCAB)) as u32
}

/// The driver: random arrivals (many with common prefixes), lengths, cancels, and a cache that is too small.
struct Drive {
    random: Random,
    limits: Limits,
    scheduler: Scheduler,
    device: Device,
    /// Each step is planned before what the one before it gave is known.
    overlaps: bool,
    flying: Option<(Plan, Vec<u64>)>,
    clients: BTreeMap<u64, Client>,
    prefixes: Vec<Vec<u32>>,
    next: u64,
    shared_tokens: usize,
    ended: u64,
    cancelled: u64,
    /// Rows that were computed for sequences that had ended.
    dropped: u64,
}

impl Drive {
    fn new(seed: u64) -> Drive {
        let mut random = Random(seed);
        let blocks = 6 + random.below(30);
        let limits = Limits {
            sequences: 1 + random.below(12),
            step_tokens: 1 + random.below(200),
            blocks,
            share_prefixes: random.below(8) > 0,
        };
        let prefixes = (0..4)
            .map(|_| (0..random.below(4 * BLOCK)).map(|_| random.below(VOCAB as usize) as u32).collect())
            .collect();
        Drive {
            scheduler: Scheduler::new(limits),
            device: Device::new(blocks),
            random,
            limits,
            clients: BTreeMap::new(),
            prefixes,
            next: 1,
            shared_tokens: 0,
            ended: 0,
            cancelled: 0,
            dropped: 0,
            overlaps: seed.is_multiple_of(2),
            flying: None,
        }
    }

    fn arrive(&mut self) {
        let most = (self.limits.blocks * BLOCK).min(6 * BLOCK);
        let r = &mut self.random;
        let mut prompt = self.prefixes[r.below(4)].clone();
        prompt.extend((0..1 + r.below(BLOCK)).map(|_| r.below(VOCAB as usize) as u32));
        prompt.truncate(most - 1);
        let most = 1 + r.below((most - prompt.len()).min(BLOCK + 10));
        let wanted = if r.below(3) == 0 { 1 + r.below(most) } else { most };
        let mut hash = 0;
        let hashes = prompt.iter().map(|t| {
            hash = extend(hash, *t);
            hash
        });
        let hashes: Vec<u64> = hashes.collect();
        let all_rows = r.below(6) == 0;
        self.scheduler.add(self.next, prompt, most, all_rows);
        let prompt = hashes.len();
        let client = Client { hashes, all_rows, scored: 0, prompt, generated: 0, most, wanted, running: false };
        self.clients.insert(self.next, client);
        self.next += 1;
    }

    /// One step and all that must hold of it. False: nothing to do.
    fn step(&mut self) -> bool {
        let computed = |s: &Scheduler, id: u64| s.table(id).map_or(0, |t| t.1);
        let flying = self.flying.as_ref().map_or(&[][..], |f| &f.0.outputs);
        let awaited = |id: u64, c: &Client| usize::from(flying.contains(&(id, c.hashes.len() - 1)));
        // Its last token is under way.
        let over = |id: u64, c: &Client| awaited(id, c) == 1 && c.generated + 1 == c.most;
        let decodes =
            |id: u64, c: &Client| computed(&self.scheduler, id) + 1 == c.hashes.len() + awaited(id, c) && !over(id, c);
        let decoding: Vec<u64> = self.clients.iter().filter(|(id, c)| decodes(**id, c)).map(|c| *c.0).collect();
        let decoding: Vec<u64> = decoding.into_iter().filter(|id| self.scheduler.table(*id).is_some()).collect();
        let oldest = self.clients.iter().next().filter(|(id, c)| !over(**id, c)).map(|c| *c.0);
        let before = oldest.map(|id| computed(&self.scheduler, id));
        let preemptions = self.scheduler.preemptions;
        let Some(plan) = self.scheduler.plan() else {
            if let Some((plan, hashes)) = self.flying.take() {
                self.outputs(&plan, &hashes);
                return true;
            }
            assert!(self.clients.is_empty(), "{} sequences wait for ever", self.clients.len());
            return false;
        };
        assert!(plan.step.tokens.len() <= self.limits.step_tokens);
        assert!(plan.step.spans.iter().all(|s| s.rows > 0));
        let slots: std::collections::BTreeSet<u32> = plan.step.spans.iter().map(|s| s.slot).collect();
        assert_eq!(slots.len(), plan.step.spans.len(), "two sequences in a slot");
        // The oldest of all advances in every step: so does everyone once, and nobody is starved.
        assert!(
            oldest.map(|id| computed(&self.scheduler, id)) > before || oldest.is_none(),
            "the oldest does not advance"
        );
        for id in &plan.began {
            assert!(!std::mem::replace(&mut self.clients.get_mut(id).unwrap().running, true), "{id} begins twice");
        }
        // Whoever streams goes on streaming, whatever prompt is being computed beside it, unless blocks ran out.
        if self.scheduler.preemptions == preemptions {
            for id in decoding {
                assert!(plan.outputs.iter().any(|o| o.0 == id), "{id} was stalled");
            }
        }
        let hashes = self.device.execute(&plan.step).unwrap();
        if let Some((plan, hashes)) = self.flying.replace((plan, hashes)) {
            self.outputs(&plan, &hashes);
        }
        if let Some((plan, hashes)) = self.flying.take_if(|_| !self.overlaps) {
            self.outputs(&plan, &hashes);
        }
        true
    }

    fn outputs(&mut self, plan: &Plan, hashes: &[u64]) {
        for ((id, position), hash) in plan.outputs.iter().zip(hashes) {
            let Some(c) = self.clients.get_mut(id) else {
                assert!(self.overlaps, "{id} has ended");
                self.dropped += 1;
                continue;
            };
            assert_eq!(*hash, c.hashes[*position], "sequence {id} was computed from another's cache");
            assert!(*position <= c.scored || !c.all_rows, "{id}: a row is left out");
            c.scored = c.scored.max(*position + 1);
            if *position + 1 < c.hashes.len() {
                assert!(c.all_rows, "{id}: a row that nobody wants");
                continue;
            }
            assert!(!c.all_rows || c.scored >= c.prompt);
            c.generated += 1;
            let token = token(*hash);
            c.hashes.push(extend(*hash, token));
            if c.generated == c.wanted {
                self.shared_tokens += self.scheduler.cached(*id);
                self.ended += 1;
                self.remove(*id);
            } else {
                self.scheduler.push(*id, token);
            }
        }
    }

    fn remove(&mut self, id: u64) {
        assert!(self.clients.remove(&id).is_some(), "{id} ends twice");
        self.scheduler.remove(id);
    }

    fn cancel(&mut self) {
        let n = self.random.below(self.clients.len());
        let id = *self.clients.keys().nth(n).unwrap();
        self.cancelled += 1;
        self.remove(id);
    }

    /// Nobody holds a block that another writes: a block in two tables holds the same content in both, and all of it.
    fn check_tables(&self) {
        let mut held = std::collections::BTreeSet::<u32>::new();
        for (id, c) in &self.clients {
            let Some((blocks, computed)) = self.scheduler.table(*id) else { continue };
            assert!(
                self.device.holds(blocks, &c.hashes[..computed.min(c.hashes.len())]),
                "the cache of {id} is not its own"
            );
            held.extend(blocks);
        }
        let (free, total) = self.scheduler.blocks();
        assert_eq!(free + held.len(), total, "a block is lost");
    }
}

#[test]
fn a_million_random_steps_lose_share_and_starve_nothing() {
    let wanted: u64 = 1_000_000;
    let (mut steps, mut seed, mut shared, mut preempted, mut ended, mut cancelled) = (0, 0, 0, 0, 0, 0);
    let mut dropped = 0;
    while steps < wanted {
        seed += 1;
        let mut d = Drive::new(seed);
        let rate = 1 + d.random.below(12);
        for tick in 0..4000 {
            if d.clients.len() < 40 && d.random.below(12) < rate && d.random.below(6) == 0 {
                for _ in 0..1 + d.random.below(4) {
                    d.arrive();
                }
            }
            if !d.clients.is_empty() && d.random.below(60) == 0 {
                d.cancel();
            }
            steps += u64::from(d.step());
            if tick % 16 == 0 {
                d.check_tables();
            }
        }
        while d.step() {
            steps += 1;
        }
        assert_eq!(d.scheduler.blocks(), (d.limits.blocks, d.limits.blocks), "seed {seed}: blocks are lost");
        assert_eq!(d.scheduler.counts(), (0, 0));
        assert_eq!(d.ended + d.cancelled, d.next - 1, "every sequence ends once");
        shared += d.shared_tokens;
        preempted += d.scheduler.preemptions;
        ended += d.ended;
        cancelled += d.cancelled;
        dropped += d.dropped;
    }
    eprintln!(
        "{steps} steps: {ended} ended, {cancelled} cancelled, {preempted} pre-empted, {shared} tokens shared, {dropped} rows dropped"
    );
    assert!(
        shared > 1_000_000 && preempted > 5000 && cancelled > 1000 && dropped > 1000,
        "the driver does not reach every case"
    );
}

fn scheduler(sequences: usize, step_tokens: usize, blocks: usize) -> Scheduler {
    Scheduler::new(Limits { sequences, step_tokens, blocks, share_prefixes: true })
}

#[test]
fn a_long_prompt_leaves_room_for_those_who_stream() {
    let mut s = scheduler(8, 64, 64);
    (1..=3).for_each(|id| s.add(id, vec![id as u32; 4], 1000, false));
    assert_eq!(s.plan().unwrap().step.tokens.len(), 12);
    (1..=3).for_each(|id| s.push(id, 9));
    s.add(4, vec![7; 1000], 1000, false);
    for chunk in 0..16 {
        let plan = s.plan().unwrap();
        let rows: Vec<u32> = plan.step.spans.iter().map(|s| s.rows).collect();
        assert_eq!(rows[..3], [1, 1, 1], "chunk {chunk}");
        assert!(plan.step.tokens.len() <= 64 && rows[3] >= 32);
        (1..=3).for_each(|id| s.push(id, 9));
    }
}

#[test]
fn a_common_prefix_is_computed_once() {
    let mut s = scheduler(8, 512, 64);
    let prompt: Vec<u32> = (0..200).collect();
    s.add(1, prompt.clone(), 1000, false);
    assert_eq!(s.plan().unwrap().step.tokens.len(), 200);
    s.add(2, prompt.clone(), 1000, false);
    s.add(3, prompt[..192].to_vec(), 1000, false);
    s.push(1, 5);
    // Three full blocks are found by the second; the third must compute its last token, so it shares two.
    assert_eq!(s.plan().unwrap().step.tokens.len(), 1 + 8 + 64);
    assert_eq!((s.cached(1), s.cached(2), s.cached(3)), (0, 192, 128));
    (1..=3).for_each(|id| s.remove(id));
    assert_eq!(s.blocks(), (64, 64));
    // What nobody holds is still known, until its blocks are needed.
    s.add(4, prompt.clone(), 1000, false);
    assert_eq!(s.plan().unwrap().step.tokens.len(), 8);
    s.remove(4);
    s.add(5, (1000..1000 + 64 * 64).collect(), 1000, false);
    while s.plan().is_some_and(|p| p.outputs.is_empty()) {}
    s.remove(5);
    s.add(6, prompt, 1000, false);
    assert_eq!(s.plan().unwrap().step.tokens.len(), 200);
}

#[test]
fn the_youngest_gives_way_and_comes_back_first() {
    let mut s = scheduler(4, 512, 4);
    let prompt = |first: u32| (first..first + 64).collect::<Vec<_>>();
    (1..=4).for_each(|id| s.add(id, prompt(100 * id as u32), 1000, false));
    assert_eq!(s.plan().unwrap().step.spans.len(), 4);
    (1..=4).for_each(|id| s.push(id, 9));
    // Every sequence needs a second block: the two youngest lose theirs.
    let plan = s.plan().unwrap();
    assert_eq!(plan.outputs.iter().map(|o| o.0).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((s.counts(), s.preemptions), ((2, 2), 2));
    s.remove(1);
    s.push(2, 9);
    assert_eq!(s.plan().unwrap().outputs.iter().map(|o| o.0).collect::<Vec<_>>(), [2, 3]);
}

/// The coordinator's rank without a model.
struct Fake {
    comm: OneComm,
    device: Device,
    overlaps: bool,
    launched: VecDeque<Outputs>,
}

impl Run for Fake {
    fn launch(&mut self, step: &Step) -> Result<()> {
        assert!(self.launched.len() <= usize::from(self.overlaps));
        let tokens = self.device.execute(step)?.into_iter().map(token).collect();
        self.launched.push_back(Outputs { tokens, logits: vec![] });
        Ok(())
    }
    fn collect(&mut self) -> Result<Outputs> {
        Ok(self.launched.pop_front().expect("a step was launched"))
    }
    fn overlaps(&self) -> bool {
        self.overlaps
    }
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }
    fn comm(&mut self) -> &mut dyn Communicator {
        &mut self.comm
    }
    fn reduce_time(&mut self) -> Option<Duration> {
        None
    }
    fn cache_bytes(&self) -> usize {
        0
    }
    fn finish(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[test]
fn every_stream_gets_its_own_tokens_and_one_end() {
    serve_many(false);
}

#[test]
fn so_it_does_when_steps_overlap() {
    serve_many(true);
}

fn serve_many(overlaps: bool) {
    let blocks = 24;
    let (commands, inbox) = crossbeam_channel::unbounded();
    let shared = Arc::new(Shared::new(blocks));
    let fake = Fake { comm: OneComm::new(), device: Device::new(blocks), overlaps, launched: VecDeque::new() };
    let limits = Limits { sequences: 8, step_tokens: 96, blocks, share_prefixes: true };
    let coordinator = Coordinator::new(Box::new(fake), Scheduler::new(limits), inbox, Arc::clone(&shared), vec![0]);
    let thread = std::thread::spawn(move || coordinator.run());
    let mut random = Random(1);
    let mut readers = vec![];
    let total = 3000u64;
    for id in 1..=total {
        let prompt: Vec<u32> = (0..1 + random.below(5 * BLOCK) as u32).map(|i| i % 7 + 1).collect();
        let (max, cancel) = (1 + random.below(40), random.below(5) == 0);
        let (events, stream) = async_channel::bounded(max + 3);
        let request = Request { prompt: prompt.clone(), max_tokens: max, ..Request::default() };
        let job = Job { id, request, events, submitted: Instant::now(), start: Arc::default() };
        shared.outstanding.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        commands.send(Command::Submit(Box::new(job))).unwrap();
        if cancel {
            commands.send(Command::Cancel(id)).unwrap();
        }
        readers.push((prompt, max, cancel, stream));
        if id % 50 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    for (prompt, max, cancelled, stream) in readers {
        let mut hash = prompt.iter().fold(0, |h, t| extend(h, *t));
        let mut tokens = 0;
        let end = loop {
            match stream.recv_blocking() {
                Ok(Event::Token(t)) => {
                    assert_eq!(u64::from(t.id), hash % u64::from(VOCAB));
                    hash = extend(hash, t.id);
                    tokens += 1;
                }
                Ok(end) => break Some(end),
                Err(_) => break None,
            }
        };
        match end {
            Some(Event::Finished(f)) => {
                assert_eq!(
                    (f.prompt_tokens, f.tokens),
                    (prompt.len(), if f.reason == Reason::Stop { tokens + 1 } else { max })
                );
                assert!(f.queued <= f.ttft && f.ttft <= f.total);
            }
            None => assert!(cancelled),
            Some(other) => panic!("{other:?}"),
        }
        assert!(stream.recv_blocking().is_err(), "something came after the end");
    }
    commands.send(Command::Drain(Instant::now() + Duration::from_secs(60))).unwrap();
    thread.join().unwrap().unwrap();
    let s = shared.stats();
    assert_eq!((s.finished + s.cancelled, s.free_blocks, s.running, s.waiting), (total, blocks, 0, 0));
    assert_eq!(shared.outstanding.load(std::sync::atomic::Ordering::Acquire), 0);
    assert!(s.cached_tokens > 0 && s.cancelled > 0);
}

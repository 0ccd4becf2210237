//! What the coordinator tells the world about itself, readable from any thread.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::engine::coordinator::Job;
use crate::engine::request::Event;
use crate::error::Error;

/// The least time in which a rank has to answer before it is said not to. With the coordinator's heartbeat a loss shows
/// within 0.7 s, unless steps take longer than half of this.
const PROMPT: Duration = Duration::from_millis(400);

/// A snapshot of the engine.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Sequences in steps.
    pub running: usize,
    /// Sequences waiting for blocks or a slot.
    pub waiting: usize,
    /// Blocks free.
    pub free_blocks: usize,
    /// Blocks in all.
    pub total_blocks: usize,
    /// Steps computed.
    pub steps: u64,
    /// Tokens computed in steps, prompts included.
    pub computed_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Requests ended, by success, failure and cancellation.
    pub finished: u64,
    /// Requests failed.
    pub failed: u64,
    /// Requests cancelled by their reader.
    pub cancelled: u64,
    /// Sequences made to compute their cache again.
    pub preemptions: u64,
    /// Time in steps.
    pub step_time: Duration,
    /// The last step's time.
    pub last_step: Duration,
    /// The slowest late step's: a slow one counts a sixteenth less with every step after it.
    pub slowest_step: Duration,
    /// Of all steps' time, in all-reduces (rank 0's view).
    pub reduce_time: Duration,
    /// Tokens of the prompts of requests that have begun.
    pub prompt_tokens: u64,
    /// Of those, found in the cache.
    pub cached_tokens: u64,
    /// Sum of times to first token, over `first_tokens` requests.
    pub ttft: Duration,
    /// Requests that have had a first token.
    pub first_tokens: u64,
}

/// State shared between the coordinator's thread and the engine's handles.
#[derive(Debug)]
pub struct Shared {
    stats: Mutex<Stats>,
    stopped: Mutex<Option<Error>>,
    /// When the ranks were last asked for something that they have not answered yet, and whether that is a step.
    asked: Mutex<Option<(Instant, bool)>>,
    /// Requests submitted and not ended.
    pub outstanding: AtomicUsize,
    seeds: AtomicU64,
}

impl Shared {
    /// Fresh state of an engine with `blocks` blocks.
    pub fn new(blocks: usize) -> Shared {
        let entropy = std::collections::hash_map::RandomState::new();
        let seed = std::hash::BuildHasher::hash_one(&entropy, std::process::id());
        Shared {
            stats: Mutex::new(Stats { free_blocks: blocks, total_blocks: blocks, ..Stats::default() }),
            stopped: Mutex::new(None),
            asked: Mutex::new(None),
            outstanding: AtomicUsize::new(0),
            seeds: AtomicU64::new(seed),
        }
    }

    /// A snapshot.
    pub fn stats(&self) -> Stats {
        lock(&self.stats).clone()
    }

    /// Why the engine has stopped, if it has.
    pub fn stopped(&self) -> Option<Error> {
        lock(&self.stopped).clone()
    }

    /// Whether every rank is heard of: the engine runs, and no answer is overdue. A step is overdue at twice the time of
    /// the slowest late one.
    pub fn answers(&self) -> bool {
        let in_time = lock(&self.asked).is_none_or(|(since, step)| {
            let slow = if step { 2 * lock(&self.stats).slowest_step } else { Duration::ZERO };
            since.elapsed() < PROMPT.max(slow)
        });
        in_time && self.stopped().is_none()
    }

    /// How long the ranks have owed an answer.
    pub fn unanswered(&self) -> Duration {
        lock(&self.asked).map_or(Duration::ZERO, |(since, _)| since.elapsed())
    }

    pub(super) fn stop(&self, why: Error) {
        lock(&self.stopped).get_or_insert(why);
    }

    /// The ranks are asked for a step, or only whether they are there.
    pub(super) fn beat_begins(&self, step: bool) {
        *lock(&self.asked) = Some((Instant::now(), step));
    }

    pub(super) fn beat_ends(&self) {
        *lock(&self.asked) = None;
    }

    pub(super) fn draw_seed(&self) -> u64 {
        let n = self.seeds.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        n ^ (n >> 31)
    }

    pub(super) fn blocks(&self, (free, total): (usize, usize), (running, waiting): (usize, usize)) {
        let mut s = lock(&self.stats);
        (s.free_blocks, s.total_blocks, s.running, s.waiting) = (free, total, running, waiting);
    }

    pub(super) fn stepped(&self, rows: usize, reduce: Duration, preemptions: u64) {
        let mut s = lock(&self.stats);
        s.steps += 1;
        s.computed_tokens += rows as u64;
        s.reduce_time += reduce;
        s.preemptions = preemptions;
    }

    pub(super) fn generated(&self) {
        lock(&self.stats).generated_tokens += 1;
    }

    pub(super) fn took(&self, time: Duration) {
        let mut s = lock(&self.stats);
        s.step_time += time;
        s.last_step = time;
        // The first finds everything cold.
        if s.steps > 1 {
            s.slowest_step = time.max(s.slowest_step - s.slowest_step / 16);
        }
    }

    pub(super) fn first_token(&self, after: Duration) {
        let mut s = lock(&self.stats);
        s.ttft += after;
        s.first_tokens += 1;
    }

    /// A request's first step has been planned; `cached` tokens of its prompt were there.
    pub(super) fn began(&self, job: &Job, cached: usize) {
        job.start.cached.store(cached, Ordering::Relaxed);
        job.start.queued.store(job.submitted.elapsed().as_micros() as u64, Ordering::Relaxed);
        let mut s = lock(&self.stats);
        s.prompt_tokens += job.request.prompt.len() as u64;
        s.cached_tokens += cached as u64;
    }

    pub(super) fn finished(&self, event: &Event) {
        self.outstanding.fetch_sub(1, Ordering::AcqRel);
        let mut s = lock(&self.stats);
        match event {
            Event::Finished(_) => s.finished += 1,
            _ => s.failed += 1,
        }
    }

    pub(super) fn cancelled(&self, job: &Job) {
        self.outstanding.fetch_sub(1, Ordering::AcqRel);
        lock(&self.stats).cancelled += 1;
        job.events.close();
    }
}

/// A poisoned lock still guards plain numbers: take them.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

//! Rank 0's loop: take commands, plan a step, tell the ranks, compute, sample, hand tokens out.
//!
//! On ranks whose steps overlap, a step is planned, told and launched while the one before it is being computed: it
//! names that one's tokens by output row. A sequence that turns out to have ended makes a row that nobody waits for.
//! Where rank 0 needs logits to choose, the steps follow each other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use async_channel::{Sender, TrySendError};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::backend::Draw;
use crate::engine::message::{Message, Step, Want};
use crate::engine::request::{Event, Finished, Logprob, Reason, Request, Token};
use crate::engine::runner::{Outputs, Run};
use crate::engine::sampler;
use crate::engine::scheduler::{Plan, Scheduler};
use crate::engine::stats::Shared;
use crate::error::{Error, Result};

/// The loop's two waits.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How often an idle coordinator makes sure that every rank still answers.
    pub heartbeat: Duration,
    /// After a failure, how long readers have for the last events before this process ends with the others.
    pub grace: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing { heartbeat: Duration::from_millis(300), grace: Duration::from_millis(300) }
    }
}

/// What other threads ask of the coordinator.
pub enum Command {
    /// A validated request.
    Submit(Box<Job>),
    /// The stream was dropped.
    Cancel(u64),
    /// Finish what runs and stop, failing what is left at the deadline.
    Drain(Instant),
}

/// A request on its way.
pub struct Job {
    /// Its number.
    pub id: u64,
    /// What is asked.
    pub request: Request,
    /// Where its events go.
    pub events: Sender<Event>,
    /// When it was submitted.
    pub submitted: Instant,
    /// What its stream can know once it runs.
    pub start: Arc<Start>,
}

/// How a request began.
#[derive(Debug, Default)]
pub struct Start {
    /// Tokens of its prompt found in the cache.
    pub cached: AtomicUsize,
    /// Microseconds from submission to its first step.
    pub queued: AtomicU64,
}

/// A request being served.
struct Active {
    job: Job,
    seed: u64,
    tokens: usize,
    began: Option<Instant>,
    first_token: Option<Instant>,
    span: tracing::Span,
    /// Prompt log-probabilities so far, one a position from the second on.
    prompt_logprobs: Vec<Option<Logprob>>,
}

/// A step that the ranks have begun.
struct Flight {
    /// Whose rows its outputs are, as in [`Plan`].
    outputs: Vec<(u64, usize)>,
    rows: usize,
    launched: Instant,
}

/// The loop's state.
pub struct Coordinator {
    runner: Box<dyn Run>,
    scheduler: Scheduler,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    eos: Vec<u32>,
    active: BTreeMap<u64, Active>,
    /// The step under way.
    flying: Option<Flight>,
    /// When the last step's outputs were there.
    landed: Option<Instant>,
    message: Vec<u8>,
    /// Cut short at this moment, once draining.
    deadline: Option<Instant>,
    timing: Timing,
}

impl Coordinator {
    /// A coordinator of a loaded runner.
    pub fn new(
        runner: Box<dyn Run>,
        scheduler: Scheduler,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
        eos: Vec<u32>,
    ) -> Coordinator {
        Coordinator {
            runner,
            scheduler,
            commands,
            shared,
            eos,
            active: BTreeMap::new(),
            flying: None,
            landed: None,
            message: vec![],
            deadline: None,
            timing: Timing::default(),
        }
    }

    /// Other waits than the usual.
    pub fn with_timing(self, timing: Timing) -> Coordinator {
        Coordinator { timing, ..self }
    }

    /// Serves until told to stop. On an error every stream is failed, and the other ranks are ended.
    pub fn run(mut self) -> Result<()> {
        let result = self.serve();
        let why = match &result {
            Ok(()) => Error::Stopped("it was shut down".into()),
            Err(e) => e.clone(),
        };
        self.shared.stop(why.clone());
        for a in std::mem::take(&mut self.active).into_values() {
            finish(&self.shared, &a.job, Event::Failed(why.clone()));
        }
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(job) = command {
                finish(&self.shared, &job, Event::Failed(why.clone()));
            }
        }
        match &result {
            Ok(()) => {
                self.tell(&Message::Shutdown)?;
                self.runner.finish()
            }
            Err(e) => {
                if self.runner.comm().world() > 1 {
                    std::thread::sleep(self.timing.grace);
                    self.runner.comm().abort(e.exit_code(), &e.to_string());
                }
                result
            }
        }
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            if !self.take_commands()? {
                return Ok(());
            }
            match self.scheduler.plan() {
                Some(plan) => self.step(plan)?,
                None => self.land()?,
            }
        }
    }

    /// Takes what has come; waits while there is nothing to compute. False: it is time to stop.
    fn take_commands(&mut self) -> Result<bool> {
        loop {
            let idle = self.active.is_empty() && self.flying.is_none();
            if self.deadline.is_some_and(|d| idle || Instant::now() >= d) {
                return Ok(false);
            }
            let command = if idle {
                match self.commands.recv_timeout(self.timing.heartbeat) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => {
                        self.heartbeat()?;
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return Ok(false),
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(crossbeam_channel::TryRecvError::Empty) => return Ok(true),
                    // The engine's handle is gone: finish what streams are still read.
                    Err(crossbeam_channel::TryRecvError::Disconnected) => return Ok(true),
                }
            };
            match command {
                Command::Submit(job) => self.admit(*job),
                Command::Cancel(id) => self.cancel(id),
                Command::Drain(deadline) => {
                    self.deadline = Some(self.deadline.map_or(deadline, |d| d.min(deadline)));
                }
            }
        }
    }

    fn heartbeat(&mut self) -> Result<()> {
        if self.runner.comm().world() > 1 {
            self.shared.beat_begins(false);
            self.tell(&Message::Heartbeat)?;
            self.runner.comm().barrier()?;
        }
        self.shared.beat_ends();
        Ok(())
    }

    fn tell(&mut self, message: &Message) -> Result<()> {
        if self.runner.comm().world() > 1 {
            message.encode(&mut self.message);
            self.runner.comm().broadcast(&mut self.message, None)?;
        }
        Ok(())
    }

    fn admit(&mut self, job: Job) {
        let r = &job.request;
        if r.max_tokens == 0 && r.prompt_logprobs.is_none() {
            let done = Finished {
                reason: Reason::Length,
                prompt_tokens: r.prompt.len(),
                cached_tokens: 0,
                tokens: 0,
                queued: Duration::ZERO,
                ttft: Duration::ZERO,
                total: job.submitted.elapsed(),
            };
            return finish(&self.shared, &job, Event::Finished(done));
        }
        self.scheduler.add(job.id, r.prompt.clone(), r.max_tokens, r.prompt_logprobs.is_some());
        let seed = r.sampling.seed.unwrap_or_else(|| self.shared.draw_seed());
        let span = tracing::debug_span!("request", id = job.id, prompt_tokens = r.prompt.len());
        let active = Active { span, seed, tokens: 0, began: None, first_token: None, prompt_logprobs: vec![None], job };
        self.active.insert(active.job.id, active);
    }

    fn cancel(&mut self, id: u64) {
        self.scheduler.remove(id);
        if let Some(active) = self.active.remove(&id) {
            tracing::debug!(parent: &active.span, tokens = active.tokens, "cancelled");
            self.shared.cancelled(&active.job);
        }
        self.shared.blocks(self.scheduler.blocks(), self.scheduler.counts());
    }

    /// Begins a step; hands out what the one before it gave, which was computed until now.
    fn step(&mut self, plan: Plan) -> Result<()> {
        let Plan { mut step, outputs, began } = plan;
        self.choose(&mut step, &outputs);
        let overlaps = self.runner.overlaps() && step.want == Want::Tokens;
        if !overlaps {
            self.land()?;
        }
        let launched = Instant::now();
        for id in &began {
            if let Some(active) = self.active.get_mut(id) {
                active.began = Some(launched);
                self.shared.began(&active.job, self.scheduler.cached(*id));
            }
        }
        let rows = step.tokens.len();
        let _span = tracing::debug_span!("step", number = step.number, rows, sequences = step.spans.len()).entered();
        if self.flying.is_none() {
            self.shared.beat_begins(true);
        }
        let message = Message::Step(step);
        self.tell(&message)?;
        let Message::Step(step) = message else { return Ok(()) };
        self.runner.launch(&step)?;
        let before = self.flying.replace(Flight { outputs, rows, launched });
        if let Some(before) = before {
            self.collect(before)?;
        }
        if overlaps { Ok(()) } else { self.land() }
    }

    /// Who chooses the tokens of a step's outputs, and how.
    fn choose(&self, step: &mut Step, outputs: &[(u64, usize)]) {
        let device = |id: &u64| self.active.get(id).is_none_or(|a| a.job.request.device_chooses());
        if !outputs.iter().all(|(id, _)| device(id)) {
            step.want = Want::Logits;
            return;
        }
        let draw = |&(id, position): &(u64, usize)| {
            let Some(active) = self.active.get(&id) else { return Draw::default() };
            let index = (position + 1).saturating_sub(active.job.request.prompt.len());
            Draw::new(active.seed, index as u64, active.job.request.sampling.temperature)
        };
        let draws: Vec<Draw> = outputs.iter().map(draw).collect();
        if draws.iter().any(|d| d.temperature > 0.0) {
            step.draws = draws;
        }
    }

    /// Waits for the step under way, if any, and hands out what it gave.
    fn land(&mut self) -> Result<()> {
        self.flying.take().map_or(Ok(()), |flight| self.collect(flight))
    }

    /// Waits for the oldest step under way and hands out what it gave.
    fn collect(&mut self, flight: Flight) -> Result<()> {
        let mut outputs = self.runner.collect()?;
        let reduce = self.runner.reduce_time().unwrap_or_default();
        self.shared.beat_ends();
        if self.flying.is_some() {
            self.shared.beat_begins(true);
        }
        self.shared.blocks(self.scheduler.blocks(), self.scheduler.counts());
        // Counted before anyone hears of the tokens, so that who has heard finds them counted.
        self.shared.stepped(flight.rows, reduce, self.scheduler.preemptions);
        let vocab = outputs.logits.len() / flight.outputs.len().max(1);
        for (row, (id, position)) in flight.outputs.iter().enumerate() {
            let logits = row * vocab..(row + 1) * vocab;
            self.output(*id, *position, row, logits, &mut outputs);
        }
        // Steps that overlap share the time: each counts from the end of the one before it.
        let now = Instant::now();
        let since = self.landed.replace(now).map_or(flight.launched, |before| before.max(flight.launched));
        self.shared.took(now - since);
        Ok(())
    }

    /// One output row: a prompt position to score, or the end of the sequence, where the next token is drawn.
    fn output(&mut self, id: u64, position: usize, row: usize, logits: std::ops::Range<usize>, outputs: &mut Outputs) {
        let Some(active) = self.active.get_mut(&id) else { return };
        let tokens = self.scheduler.tokens(id);
        let prompt = active.job.request.prompt.len();
        if let Some(top) = active.job.request.prompt_logprobs {
            // A sequence computed again after a pre-emption comes past positions that are done.
            if position + 1 < prompt && active.prompt_logprobs.len() == position + 1 {
                let scored = sampler::logprob(&outputs.logits[logits.clone()], tokens[position + 1], top);
                active.prompt_logprobs.push(Some(scored));
            }
            if position + 1 == prompt && active.tokens == 0 {
                let all = std::mem::take(&mut active.prompt_logprobs);
                if send(&active.job.events, Event::Prompt(all)).is_err() {
                    self.cancel(id);
                    return;
                }
                if active.job.request.max_tokens == 0 {
                    self.end(id, Reason::Length);
                    return;
                }
            }
        }
        if position + 1 < tokens.len() {
            return;
        }
        let request = &active.job.request;
        let ends = |t: u32| (!request.ignore_eos && self.eos.contains(&t)) || request.stop_tokens.contains(&t);
        let mut scored = None;
        let token = if logits.is_empty() {
            outputs.tokens[row]
        } else {
            let logits = &mut outputs.logits[logits];
            let original = request.logprobs.map(|_| logits.to_vec());
            let (before, text) = tokens.split_at(prompt);
            let mut banned = vec![];
            if text.len() < request.min_tokens {
                banned.extend(self.eos.iter().chain(&request.stop_tokens).copied());
            }
            let token = sampler::sample(&request.sampling, active.seed, logits, before, text, &banned);
            scored = original.zip(request.logprobs).map(|(l, top)| sampler::logprob(&l, token, top));
            token
        };
        active.tokens += 1;
        self.shared.generated();
        let now = Instant::now();
        if active.first_token.is_none() {
            active.first_token = Some(now);
            self.shared.first_token(now - active.job.submitted);
        }
        if ends(token) {
            self.end(id, Reason::Stop);
            return;
        }
        let (count, limit) = (active.tokens, request.max_tokens);
        match send(&active.job.events, Event::Token(Token { id: token, logprob: scored })) {
            Err(()) => self.cancel(id),
            Ok(()) if count >= limit => self.end(id, Reason::Length),
            Ok(()) => self.scheduler.push(id, token),
        }
    }

    fn end(&mut self, id: u64, reason: Reason) {
        let cached = self.scheduler.cached(id);
        self.scheduler.remove(id);
        self.shared.blocks(self.scheduler.blocks(), self.scheduler.counts());
        if let Some(a) = self.active.remove(&id) {
            let since = |moment: Option<Instant>| moment.map_or(Duration::ZERO, |m| m - a.job.submitted);
            let done = Finished {
                reason,
                prompt_tokens: a.job.request.prompt.len(),
                cached_tokens: cached,
                tokens: a.tokens,
                queued: since(a.began),
                ttft: since(a.first_token),
                total: a.job.submitted.elapsed(),
            };
            tracing::debug!(parent: &a.span, tokens = a.tokens, cached, ?reason, queued = ?done.queued, ttft = ?done.ttft,
                total = ?done.total, "ended");
            finish(&self.shared, &a.job, Event::Finished(done));
        }
    }
}

/// The one terminal event.
fn finish(shared: &Shared, job: &Job, event: Event) {
    shared.finished(&event);
    // A reader that is gone or has stopped reading loses the event with the stream.
    let _ = send(&job.events, event);
    job.events.close();
}

/// Hands an event to a stream; an error when nobody reads it or it has fallen behind by the whole channel.
fn send(events: &Sender<Event>, event: Event) -> std::result::Result<(), ()> {
    match events.try_send(event) {
        Ok(()) => Ok(()),
        Err(TrySendError::Full(_) | TrySendError::Closed(_)) => Err(()),
    }
}

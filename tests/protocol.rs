//! The protocol between the coordinator and the workers, explored exhaustively: the real loops of 2 and 3 ranks over
//! the threads communicator, with two requests and a cancellation arriving at every pair of moments that differ for
//! the coordinator, and a rank lost before every operation. In every run: the same order of operations on every rank,
//! one end a stream, and nobody waits for ever.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use gqla::comm::{Communicator, threads};
use gqla::engine::coordinator::{Command, Coordinator, Job, Timing};
use gqla::engine::message::{FROM, Message, Step};
use gqla::engine::runner::{Outputs, Run};
use gqla::engine::scheduler::{Limits, Scheduler};
use gqla::engine::stats::Shared;
use gqla::engine::{Event, Request, worker};
use gqla::error::{Error, Result};

/// What a rank does with the others, and what with.
type Log = Arc<Mutex<Vec<String>>>;

/// Commands that arrive while rank 0 is in its n-th operation, sorted.
type Script = Vec<(usize, Action)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Submit(u64),
    Cancel(u64),
    Drain,
}

/// A communicator that counts its operations, notes them, delivers commands, and is lost before a given one.
struct Watched {
    inner: Box<dyn Communicator>,
    log: Log,
    count: usize,
    lost_at: Option<usize>,
    deliver: Option<Box<dyn FnMut(usize) + Send>>,
}

impl Watched {
    fn before(&mut self, what: String) -> Result<()> {
        self.moment()?;
        self.log.lock().unwrap().push(what);
        Ok(())
    }

    /// A moment at which commands arrive or the rank is lost.
    fn moment(&mut self) -> Result<()> {
        if self.lost_at == Some(self.count) {
            return Err(Error::Interrupted);
        }
        if let Some(deliver) = &mut self.deliver {
            deliver(self.count);
        }
        self.count += 1;
        Ok(())
    }
}

impl Communicator for Watched {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn world(&self) -> usize {
        self.inner.world()
    }
    fn local(&self) -> (usize, usize) {
        self.inner.local()
    }
    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<()> {
        self.before(format!("all-reduce {}", buffer.len()))?;
        self.inner.all_reduce(buffer)
    }
    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.before(format!("all-gather {}", mine.len()))?;
        self.inner.all_gather(mine, all)
    }
    fn broadcast(&mut self, message: &mut Vec<u8>, patience: Option<Duration>) -> Result<()> {
        self.before("broadcast".into())?;
        self.inner.broadcast(message, patience)?;
        let what = match Message::decode(message)? {
            Message::Step(s) => format!("step {} of {} rows", s.number, s.tokens.len()),
            other => format!("{other:?}"),
        };
        self.log.lock().unwrap().push(what);
        Ok(())
    }
    fn arrived(&mut self) -> Result<bool> {
        self.inner.arrived()
    }
    fn barrier(&mut self) -> Result<()> {
        self.before("barrier".into())?;
        self.inner.barrier()
    }
    fn set_watchdog(&mut self, bound: Duration) {
        self.inner.set_watchdog(bound);
    }
    fn abort(&mut self, code: i32, why: &str) {
        self.inner.abort(code, why);
    }
    fn finish(self: Box<Self>) -> Result<()> {
        self.inner.finish()
    }
}

/// A rank whose model is one all-reduce and one all-gather. Some of its tokens end a sequence.
struct Rank {
    comm: Watched,
    overlaps: bool,
    launched: VecDeque<Vec<u32>>,
    /// Outputs of the last step.
    last: usize,
}

impl Run for Rank {
    fn launch(&mut self, step: &Step) -> Result<()> {
        let named = step.tokens.iter().filter(|t| **t & FROM != 0);
        let most = if self.overlaps { 1 } else { 0 };
        if self.launched.len() > most || named.clone().any(|t| !self.overlaps || (t & !FROM) as usize >= self.last) {
            return Err(Error::Internal(format!("{} steps under way, then {step:?}", self.launched.len())));
        }
        self.comm.all_reduce(&mut vec![1.0; step.tokens.len()])?;
        let mut all = vec![0; step.outputs.len() * self.comm.world()];
        self.comm.all_gather(&vec![7; step.outputs.len()], &mut all)?;
        let end = |row: usize| (step.number as usize + row).is_multiple_of(4);
        self.launched.push_back((0..step.outputs.len()).map(|row| if end(row) { 0 } else { 7 }).collect());
        self.last = step.outputs.len();
        Ok(())
    }
    fn collect(&mut self) -> Result<Outputs> {
        self.comm.moment()?;
        let tokens = self.launched.pop_front().ok_or_else(|| Error::Internal("nothing was launched".into()))?;
        Ok(Outputs { tokens, logits: vec![] })
    }
    fn overlaps(&self) -> bool {
        self.overlaps
    }
    fn settle(&mut self) -> Result<()> {
        self.launched.clear();
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
        Box::new(self.comm).finish()
    }
}

/// What came of a run.
struct Outcome {
    operations: usize,
    logs: Vec<Vec<String>>,
    results: Vec<Result<()>>,
}

/// Runs a world with a script, its steps overlapping or not, and `lost`: this rank is lost before its n-th operation.
fn run(world: usize, overlaps: bool, script: &Script, lost: Option<(usize, usize)>) -> Outcome {
    let logs: Vec<Log> = (0..world).map(|_| Log::default()).collect();
    let mut ranks = threads::world(world).into_iter().enumerate().map(|(rank, mut end)| {
        end.set_watchdog(Duration::from_secs(20));
        let lost_at = lost.filter(|l| l.0 == rank).map(|l| l.1);
        let comm = Watched { inner: Box::new(end), log: logs[rank].clone(), count: 0, lost_at, deliver: None };
        Rank { comm, overlaps, launched: VecDeque::new(), last: 0 }
    });
    let mut first = ranks.next().unwrap();
    let workers: Vec<_> = ranks
        .map(|mut rank| {
            std::thread::spawn(move || {
                let result = worker::serve(&mut rank, Duration::from_secs(20));
                match &result {
                    Ok(()) => Box::new(rank).finish()?,
                    // A lost rank says nothing: it is gone.
                    Err(Error::Interrupted) => {}
                    Err(e) => rank.comm().abort(6, &e.to_string()),
                }
                result
            })
        })
        .collect();

    let (commands, inbox) = crossbeam_channel::unbounded();
    let shared = Arc::new(Shared::new(8));
    let streams: Arc<Mutex<Vec<async_channel::Receiver<Event>>>> = Arc::default();
    let act = {
        let (shared, streams, commands) = (shared.clone(), streams.clone(), commands.clone());
        move |action: Action| act(action, &commands, &shared, &streams)
    };
    let mut pending = script.clone();
    pending.reverse();
    let deliver = move |operation: usize| {
        while pending.last().is_some_and(|(at, _)| *at <= operation) {
            act(pending.pop().unwrap().1);
        }
    };
    first.comm.deliver = Some(Box::new(deliver));
    let limits = Limits { sequences: 2, step_tokens: 4, blocks: 8, share_prefixes: true };
    let timing = Timing { heartbeat: Duration::ZERO, grace: Duration::ZERO };
    let coordinator = Coordinator::new(Box::new(first), Scheduler::new(limits), inbox, shared.clone(), vec![0]);
    let lead = coordinator.with_timing(timing).run();
    drop(commands);
    let mut results = vec![lead];
    results.extend(workers.into_iter().map(|w| w.join().unwrap()));

    // One end a stream and nothing after it; a cancelled stream has none, and one whose coordinator died may have.
    for stream in streams.lock().unwrap().iter() {
        let mut ends = 0;
        while let Ok(event) = stream.try_recv() {
            assert_eq!(ends, 0, "something after the end");
            ends += usize::from(matches!(event, Event::Finished(_) | Event::Failed(_)));
        }
        let cancelled = script.iter().any(|(_, a)| matches!(a, Action::Cancel(_)));
        assert!(stream.is_closed() && (ends == 1 || cancelled), "a stream without an end");
    }
    if results.iter().all(Result::is_ok) {
        let s = shared.stats();
        assert_eq!((s.free_blocks, s.running, s.waiting), (8, 0, 0), "{script:?}: something is held for ever");
    }
    let logs: Vec<Vec<String>> = logs.iter().map(|l| l.lock().unwrap().clone()).collect();
    // Rank 0 can be lost in a step's collection too.
    let is_operation = |entry: &&String| {
        entry.starts_with("all-") || entry.starts_with("step ") || ["broadcast", "barrier"].contains(&entry.as_str())
    };
    Outcome { operations: logs[0].iter().filter(is_operation).count(), logs, results }
}

fn act(
    action: Action,
    commands: &Sender<Command>,
    shared: &Shared,
    streams: &Mutex<Vec<async_channel::Receiver<Event>>>,
) {
    let command = match action {
        Action::Submit(id) => {
            let (events, stream) = async_channel::bounded(8);
            streams.lock().unwrap().push(stream);
            shared.outstanding.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
            // The first needs two chunks before its first token; the second decodes at once.
            let request = Request { prompt: vec![1; if id == 1 { 6 } else { 2 }], max_tokens: 3, ..Request::default() };
            Command::Submit(Box::new(Job { id, request, events, submitted: Instant::now(), start: Arc::default() }))
        }
        Action::Cancel(id) => Command::Cancel(id),
        Action::Drain => Command::Drain(Instant::now() + Duration::from_secs(20)),
    };
    // The coordinator may have ended already.
    let _ = commands.send(command);
}

/// The same operations in the same order on all ranks; a rank that was lost or failed has a part of them.
fn same_order(outcome: &Outcome) {
    let longest = outcome.logs.iter().max_by_key(|l| l.len()).unwrap();
    for (rank, log) in outcome.logs.iter().enumerate() {
        let shared = log.len().min(longest.len());
        assert_eq!(log[..shared], longest[..shared], "rank {rank} did something else");
    }
}

/// Every script: the first request at once, the second and the cancellation of the first at all moments, then the end.
fn scripts() -> Vec<Script> {
    // The two requests take at most 6 steps of 4 moments; what comes after 18 finds one of them, or nothing.
    let moments = 0..18;
    let mut all = vec![];
    for second in moments.clone() {
        for cancel in moments.clone().map(Some).chain([None]) {
            for victim in [1, 2] {
                let mut script = vec![(0, Action::Submit(1)), (second, Action::Submit(2))];
                script.extend(cancel.map(|at| (at, Action::Cancel(victim))));
                script.sort_by_key(|s| s.0);
                // Draining at once, and after everything.
                for drain in [second.max(cancel.unwrap_or(0)), 28] {
                    let mut script = script.clone();
                    script.push((drain, Action::Drain));
                    all.push(script);
                }
            }
        }
    }
    all
}

#[test]
fn every_arrival_and_cancel_keeps_the_ranks_in_step() {
    let mut seen = HashSet::new();
    for (world, overlaps) in [(2, false), (2, true), (3, true)] {
        for script in scripts() {
            let outcome = run(world, overlaps, &script, None);
            assert!(outcome.results.iter().all(Result::is_ok), "{script:?}: {:?}", outcome.results);
            same_order(&outcome);
            assert!(outcome.logs.iter().all(|l| l.len() == outcome.logs[0].len()), "{script:?}");
            seen.insert((overlaps, outcome.logs[0].clone()));
        }
    }
    for overlaps in [false, true] {
        let histories = seen.iter().filter(|s| s.0 == overlaps).count();
        assert!(histories > 50, "only {histories} different histories, overlapping: {overlaps}");
    }
}

#[test]
fn a_rank_lost_before_any_operation_ends_all_in_order() {
    let mut losses = 0;
    for (world, overlaps) in [(2, false), (2, true), (3, true)] {
        // A script for every history among a fifth of all scripts; every operation of every rank.
        let mut histories = HashSet::new();
        for script in scripts().into_iter().step_by(5) {
            let whole = run(world, overlaps, &script, None);
            if !histories.insert(whole.logs[0].clone()) {
                continue;
            }
            for rank in 0..world {
                for at in 0..whole.operations {
                    let begin = Instant::now();
                    let outcome = run(world, overlaps, &script, Some((rank, at)));
                    same_order(&outcome);
                    let reached = matches!(outcome.results[rank], Err(Error::Interrupted));
                    losses += usize::from(reached);
                    let failed = outcome.results.iter().filter(|r| r.is_err()).count();
                    // A rank that gets past its last operation before it is lost is not missed.
                    assert!(!reached || failed == world, "{script:?} {rank}@{at}: {:?}", outcome.results);
                    assert!(begin.elapsed() < Duration::from_secs(10), "{script:?} {rank}@{at}: a rank hung");
                }
            }
        }
    }
    eprintln!("{losses} losses");
    assert!(losses > 5000, "only {losses} losses were tried");
}

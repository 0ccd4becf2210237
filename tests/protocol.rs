//! The protocol between the coordinator and the workers, explored exhaustively: the real loops of 2 and 3 ranks over
//! the threads communicator, with two requests and a cancellation arriving at every pair of moments, and a rank lost
//! before every operation of every history. In every run: the same order of operations on every rank, one end a stream,
//! and nobody waits for ever.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// A world that is explored: its ranks, and whether their steps overlap.
type World = (usize, bool);
const WORLDS: [World; 4] = [(2, false), (2, true), (3, false), (3, true)];

/// A rank that waits this long has been forgotten.
const WATCHDOG: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Submit(u64),
    Cancel(u64),
    Drain,
}

/// A moment at which commands arrive or a rank is lost.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Moment {
    Broadcast,
    Other,
    Collection,
}

/// A communicator that counts its operations, notes them, delivers commands, and is lost before a given one.
struct Watched {
    inner: Box<dyn Communicator>,
    log: Log,
    /// Of every operation, and on rank 0 of every collection of a step: whether it was a broadcast, the only thing before
    /// which the coordinator takes commands.
    moments: Arc<Mutex<Vec<Moment>>>,
    count: usize,
    lost_at: Option<usize>,
    deliver: Option<Box<dyn FnMut(usize) + Send>>,
}

impl Watched {
    fn before(&mut self, what: String) -> Result<()> {
        self.moment(if what == "broadcast" { Moment::Broadcast } else { Moment::Other })?;
        self.log.lock().unwrap().push(what);
        Ok(())
    }

    fn moment(&mut self, kind: Moment) -> Result<()> {
        if self.lost_at == Some(self.count) {
            return Err(Error::Interrupted);
        }
        if let Some(deliver) = &mut self.deliver {
            deliver(self.count);
        }
        self.count += 1;
        self.moments.lock().unwrap().push(kind);
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
        self.comm.moment(Moment::Collection)?;
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
    /// Rank 0's.
    moments: Vec<Moment>,
    logs: Vec<Vec<String>>,
    results: Vec<Result<()>>,
}

/// Runs a world with a script, and `lost`: this rank is lost before its n-th moment.
fn run((world, overlaps): World, script: &Script, lost: Option<(usize, usize)>) -> Outcome {
    let moments: Arc<Mutex<Vec<Moment>>> = Arc::default();
    let logs: Vec<Log> = (0..world).map(|_| Log::default()).collect();
    let mut ranks = threads::world(world).into_iter().enumerate().map(|(rank, mut end)| {
        end.set_watchdog(WATCHDOG);
        let lost_at = lost.filter(|l| l.0 == rank).map(|l| l.1);
        let moments = if rank == 0 { moments.clone() } else { Arc::default() };
        let log = logs[rank].clone();
        let comm = Watched { inner: Box::new(end), log, moments, count: 0, lost_at, deliver: None };
        Rank { comm, overlaps, launched: VecDeque::new(), last: 0 }
    });
    let mut first = ranks.next().unwrap();
    let workers: Vec<_> = ranks
        .map(|mut rank| {
            std::thread::spawn(move || {
                let result = worker::serve(&mut rank, WATCHDOG);
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
    let moments = moments.lock().unwrap().clone();
    Outcome { moments, logs, results }
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
            shared.outstanding.fetch_add(1, Ordering::AcqRel);
            // The first needs two chunks before its first token; the second decodes at once.
            let request = Request { prompt: vec![1; if id == 1 { 6 } else { 2 }], max_tokens: 3, ..Request::default() };
            Command::Submit(Box::new(Job { id, request, events, submitted: Instant::now(), start: Arc::default() }))
        }
        Action::Cancel(id) => Command::Cancel(id),
        Action::Drain => Command::Drain(Instant::now() + WATCHDOG),
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

/// Runs `task` for every item, many at once: a run mostly waits for its own threads.
fn at_once<T: Sync>(items: &[T], task: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    task(item);
                }
            });
        }
    });
}

/// Every script in every world, with what comes of it.
fn explore(task: impl Fn(World, &Script, Outcome) + Sync) {
    let all: Vec<(World, Script)> = WORLDS.iter().flat_map(|w| scripts().into_iter().map(|s| (*w, s))).collect();
    at_once(&all, |(world, script)| {
        let outcome = run(*world, script, None);
        assert!(outcome.results.iter().all(Result::is_ok), "{script:?}: {:?}", outcome.results);
        task(*world, script, outcome);
    });
}

#[test]
fn every_arrival_and_cancel_keeps_the_ranks_in_step() {
    let seen = Mutex::new(HashSet::new());
    explore(|world, script, outcome| {
        same_order(&outcome);
        assert!(outcome.logs.iter().all(|l| l.len() == outcome.logs[0].len()), "{script:?}");
        seen.lock().unwrap().insert((world.1, outcome.logs[0].clone()));
    });
    for overlaps in [false, true] {
        let histories = seen.lock().unwrap().iter().filter(|s| s.0 == overlaps).count();
        assert!(histories > 50, "only {histories} different histories, overlapping: {overlaps}");
    }
}

/// A rank to be lost, and the moment of rank 0's at which that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Loss {
    rank: usize,
    /// Of the rank's own moments.
    at: usize,
    moment: usize,
}

/// Rank 0 needs every rank in every operation but a broadcast: so many moments after another's loss it has ended.
const AFTER: usize = 3;

/// Every loss in a run that has these moments. Another rank has all of rank 0's but the collections.
fn losses(world: usize, moments: &[Moment]) -> Vec<Loss> {
    let mut all = vec![];
    for rank in 0..world {
        let own = (0..moments.len()).filter(|m| rank == 0 || moments[*m] != Moment::Collection);
        all.extend(own.enumerate().map(|(at, moment)| Loss { rank, at, moment }));
    }
    all
}

/// What a loss finds: of two scripts in which this is the same, one is enough.
///
/// The coordinator takes commands before a broadcast, so before the last one that is surely over when the rank is lost
/// it only counts between which broadcasts a command has come; from there on, in which moment. What comes when rank 0
/// has ended never comes.
fn found(script: &Script, moments: &[Moment], loss: Loss) -> Vec<(usize, Action)> {
    let broadcast = |m: &usize| moments[*m] == Moment::Broadcast;
    let settled = (0..loss.moment.saturating_sub(1)).rev().find(broadcast).unwrap_or(0);
    let taken = |at: usize| (at + 1..=settled).find(broadcast).unwrap_or(at);
    script.iter().filter(|(at, _)| *at <= loss.moment + AFTER).map(|(at, action)| (taken(*at), *action)).collect()
}

#[test]
fn a_rank_lost_before_any_operation_ends_all_in_order() {
    let seen = Mutex::new(HashSet::new());
    let all = Mutex::new(vec![]);
    explore(|world, script, whole| {
        for loss in losses(world.0, &whole.moments) {
            if seen.lock().unwrap().insert((world, loss, found(script, &whole.moments, loss))) {
                all.lock().unwrap().push((world, script.clone(), loss));
            }
        }
    });
    let all = all.into_inner().unwrap();
    at_once(&all, |(world, script, loss)| {
        let begin = Instant::now();
        let outcome = run(*world, script, Some((loss.rank, loss.at)));
        same_order(&outcome);
        assert!(outcome.results.iter().all(Result::is_err), "{script:?} {loss:?}: {:?}", outcome.results);
        assert!(matches!(outcome.results[loss.rank], Err(Error::Interrupted)), "{script:?} {loss:?}");
        assert!(outcome.moments.len() <= loss.moment + AFTER, "{script:?} {loss:?}: {:?}", outcome.moments);
        assert!(begin.elapsed() < WATCHDOG / 2, "{script:?} {loss:?}: a rank hung");
    });
    eprintln!("{} losses", all.len());
    assert!(all.len() > 10_000, "only {} losses were tried", all.len());
}

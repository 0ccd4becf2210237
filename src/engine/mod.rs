//! The engine: requests in, streams of tokens out. It knows nothing of HTTP or of an asynchronous runtime.
//!
//! Rank 0 calls [`Engine::start`] and every other rank [`run_worker`], with the same configuration. One thread a rank
//! computes; streams can be read from any thread, blocking or `async`.

pub mod coordinator;
pub mod device;
pub mod message;
pub mod request;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod scorer;
pub mod setup;
pub mod stats;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_channel::Receiver;
use crossbeam_channel::Sender;

use crate::comm::{Communicator, threads};
use crate::error::{Error, Result};
use coordinator::{Command, Coordinator, Job, Start};
pub use request::{Event, Finished, Logprob, Reason, Request, Sampling, Token};
use scheduler::{Limits, Scheduler};
pub use setup::{Config, Info};
use stats::Shared;
pub use stats::Stats;

/// A running engine; rank 0's handle. Cloning shares it. Dropping the last handle lets running streams finish.
#[derive(Clone)]
pub struct Engine {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    info: Arc<Info>,
    bound: usize,
    next: Arc<AtomicU64>,
    threads: Arc<std::sync::Mutex<Vec<JoinHandle<Result<()>>>>>,
    draining: Arc<std::sync::atomic::AtomicBool>,
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// As many requests are queued as may be; try later.
    #[error("the queue is full")]
    Full,
    /// The engine is finishing and takes nothing new.
    #[error("the engine is shutting down")]
    Draining,
    /// The request cannot be served as asked.
    #[error("{0}")]
    Invalid(Error),
    /// The engine has stopped.
    #[error("{0}")]
    Stopped(Error),
}

impl Engine {
    /// Starts rank 0 of a world: loads the model, then serves on a thread of its own. Every other rank must be in
    /// [`run_worker`] with the same configuration.
    pub fn start(config: Config, comm: Box<dyn Communicator>) -> Result<Engine> {
        let (commands, inbox) = crossbeam_channel::unbounded();
        let (ready, is_ready) = crossbeam_channel::bounded(1);
        let bound = config.max_sequences + config.max_waiting;
        let body = move || -> Result<()> {
            let mut comm = Some(comm);
            let (runner, info) = match setup::load(&config, &mut comm) {
                Ok(loaded) => loaded,
                Err(e) => {
                    if let Some(comm) = comm.as_mut().filter(|c| c.world() > 1) {
                        comm.abort(e.exit_code(), &e.to_string());
                    }
                    // Nobody receives when the starter is gone too.
                    let _ = ready.send(Err(e.clone()));
                    return Err(e);
                }
            };
            let shared = Arc::new(Shared::new(info.blocks));
            let limits = Limits {
                sequences: config.max_sequences,
                step_tokens: info.step_tokens,
                blocks: info.blocks,
                share_prefixes: config.share_prefixes,
            };
            let eos = info.model.eos.clone();
            let _ = ready.send(Ok((info, Arc::clone(&shared))));
            Coordinator::new(runner, Scheduler::new(limits), inbox, shared, eos).run()
        };
        let thread = spawn("coordinator", body)?;
        let (info, shared) = match is_ready.recv() {
            Ok(loaded) => loaded?,
            Err(_) => {
                let panicked = Error::Internal("the coordinator ended while loading".into());
                return Err(thread.join().unwrap_or(Err(panicked.clone())).err().unwrap_or(panicked));
            }
        };
        Ok(Engine {
            commands,
            shared,
            info: Arc::new(info),
            bound,
            next: Arc::new(AtomicU64::new(1)),
            threads: Arc::new(std::sync::Mutex::new(vec![thread])),
            draining: Arc::default(),
        })
    }

    /// Starts a whole world of `world` ranks as threads of this process.
    pub fn start_threads(config: Config, world: usize) -> Result<Engine> {
        let mut ends = threads::world(world).into_iter();
        let Some(first) = ends.next() else {
            return Err(Error::Usage("a world has at least one rank".into()));
        };
        let mut workers = vec![];
        for end in ends {
            let config = config.clone();
            workers.push(spawn("worker", move || run_worker(config, Box::new(end)))?);
        }
        let engine = Engine::start(config, Box::new(first))?;
        lock(&engine.threads).extend(workers);
        Ok(engine)
    }

    /// Queues a request, or says at once why not. Dropping the stream cancels it.
    pub fn try_submit(&self, request: Request) -> std::result::Result<TokenStream, Refused> {
        if let Some(why) = self.shared.stopped() {
            return Err(Refused::Stopped(why));
        }
        if self.draining.load(Ordering::Acquire) {
            return Err(Refused::Draining);
        }
        request.validate(self.info.model.vocab, self.info.max_context).map_err(Refused::Invalid)?;
        let taken = self.shared.outstanding.fetch_add(1, Ordering::AcqRel);
        if taken >= self.bound {
            self.shared.outstanding.fetch_sub(1, Ordering::AcqRel);
            return Err(Refused::Full);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        // Never more than max_tokens + 2 events, and memory only for those that wait to be read.
        let (events, receiver) = async_channel::unbounded();
        let (prompt_tokens, start) = (request.prompt.len(), Arc::default());
        let job = Job { id, request, events, submitted: Instant::now(), start: Arc::clone(&start) };
        if self.commands.send(Command::Submit(Box::new(job))).is_err() {
            let why = self.shared.stopped().unwrap_or(Error::Stopped("its thread has ended".into()));
            self.shared.outstanding.fetch_sub(1, Ordering::AcqRel);
            return Err(Refused::Stopped(why));
        }
        Ok(TokenStream { id, events: receiver, commands: self.commands.clone(), prompt_tokens, start, done: false })
    }

    /// What was loaded, and where.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// A snapshot of counts and times.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Why the engine has stopped, if it has.
    pub fn stopped(&self) -> Option<Error> {
        self.shared.stopped()
    }

    /// How long the ranks have owed an answer; a rank that is lost makes this grow.
    pub fn unanswered(&self) -> Duration {
        self.shared.unanswered()
    }

    /// Whether every rank answers in time. False while one is lost and not yet given up.
    pub fn answers(&self) -> bool {
        self.shared.answers()
    }

    /// Requests that run or wait at most; more are refused.
    pub fn capacity(&self) -> usize {
        self.bound
    }

    /// Whether a request would be queued rather than refused for want of room.
    pub fn has_room(&self) -> bool {
        self.shared.outstanding.load(Ordering::Acquire) < self.bound
    }

    /// Whether [`drain`](Engine::drain) or [`shutdown`](Engine::shutdown) has been called.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Takes nothing new from now on; what runs goes on. [`drain`](Engine::drain) does this too.
    pub fn close(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Takes nothing new, finishes what runs for at most `patience`, then stops. Twice is fine.
    pub fn drain(&self, patience: Duration) -> Result<()> {
        self.draining.store(true, Ordering::Release);
        // An engine that has stopped needs no telling.
        let _ = self.commands.send(Command::Drain(Instant::now() + patience));
        self.join()
    }

    /// Stops at once; streams that run are failed. Twice is fine.
    pub fn shutdown(&self) -> Result<()> {
        self.drain(Duration::ZERO)
    }

    fn join(&self) -> Result<()> {
        let threads = std::mem::take(&mut *lock(&self.threads));
        let mut result = Ok(());
        for thread in threads {
            let ended = thread.join().unwrap_or_else(|_| Err(Error::Internal("a rank's thread panicked".into())));
            result = result.and(ended);
        }
        result
    }
}

/// Runs any rank but 0 until rank 0 says that it is over.
pub fn run_worker(config: Config, comm: Box<dyn Communicator>) -> Result<()> {
    let mut comm = Some(comm);
    let result = setup::load(&config, &mut comm).map(|(runner, _)| runner);
    match result {
        Ok(mut runner) => match worker::serve(&mut *runner, config.watchdog) {
            Ok(()) => runner.finish(),
            Err(e) => {
                runner.comm().abort(e.exit_code(), &e.to_string());
                Err(e)
            }
        },
        Err(e) => {
            // What is wrong with the checkpoint or the flags is wrong on every rank: rank 0 says it for all.
            std::thread::sleep(Duration::from_secs(1));
            if let Some(comm) = comm.as_mut() {
                comm.abort(e.exit_code(), &e.to_string());
            }
            Err(e)
        }
    }
}

/// The events of one request. Dropping it cancels the request.
pub struct TokenStream {
    id: u64,
    events: Receiver<Event>,
    commands: Sender<Command>,
    prompt_tokens: usize,
    start: Arc<Start>,
    done: bool,
}

impl TokenStream {
    /// The next event, waiting for it; `None` after the terminal one.
    pub fn next_blocking(&mut self) -> Option<Event> {
        let event = self.events.recv_blocking().ok();
        self.note(event)
    }

    /// The next event; `None` after the terminal one.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await.ok();
        self.note(event)
    }

    /// An event that is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        let event = self.events.try_recv().ok();
        if event.is_none() && !self.events.is_closed() { None } else { self.note(event) }
    }

    /// The next event within `patience`, and whether the stream has ended.
    pub fn next_timeout(&mut self, patience: Duration) -> (Option<Event>, bool) {
        let until = Instant::now() + patience;
        loop {
            if let Some(event) = self.try_next() {
                return (Some(event), self.done);
            }
            if self.done || Instant::now() >= until {
                return (None, self.done);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Tokens of the prompt, and those of them found in the cache (0 before the first event).
    pub fn prompt_tokens(&self) -> (usize, usize) {
        (self.prompt_tokens, self.start.cached.load(Ordering::Relaxed))
    }

    /// From submission to the first step (0 before that).
    pub fn queued(&self) -> Duration {
        Duration::from_micros(self.start.queued.load(Ordering::Relaxed))
    }

    fn note(&mut self, event: Option<Event>) -> Option<Event> {
        if self.done {
            return None;
        }
        // A stream always ends in a terminal event: one that closed without has lost it to a full channel.
        let event = event.unwrap_or_else(|| Event::Failed(Error::Stopped("the stream was not read in time".into())));
        self.done = matches!(event, Event::Finished(_) | Event::Failed(_));
        Some(event)
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if !self.done {
            // An engine that has stopped has nothing to cancel.
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() -> Result<()> + Send + 'static) -> Result<JoinHandle<Result<()>>> {
    let spawned = std::thread::Builder::new().name(format!("gqla-{name}")).spawn(body);
    spawned.map_err(|e| Error::Internal(format!("no thread for the {name}: {e}")))
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

//! `gqla serve`: the engine over HTTP, until SIGTERM.

use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use tokio::sync::mpsc::UnboundedReceiver;

use super::world::{self, ModelArgs};
use crate::cache::BLOCK;
use crate::comm::Communicator;
use crate::engine::setup::Config;
use crate::engine::{Engine, Stats};
use crate::error::{Error, Result};
use crate::server::{self, Limits, Options};

/// Of the time that mpirun leaves, for telling streams of their end and for ending in order.
const KILL_MARGIN: Duration = Duration::from_millis(500);

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Serve a model over HTTP in OpenAI's wire format.
///
/// SIGTERM or ctrl-C finishes what runs, refuses the rest with 503, and exits with 0; a second one ends at once. An mpirun
/// of your own passes SIGUSR1 on to its ranks, which means the same; SIGTERM makes it kill its ranks after two seconds
/// (--mca odls_base_sigkill_timeout T: after 2 T), which are left to what runs.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The address to listen on; 0.0.0.0 is every interface
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// The port; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    port: u16,
    /// The key that every route but /health wants [default: the variable GQLA_API_KEY, else none]
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// The model's name in requests [default: the checkpoint's directory]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Sequences in a step at most
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_sequences: u32,
    /// Requests that wait beside those; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_waiting: u32,
    /// Compute every prompt whole, even where its beginning is in the cache
    #[arg(long)]
    no_prefix_cache: bool,
    /// Seconds that running requests have after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = world::seconds)]
    drain_timeout: f64,
    /// Seconds after which a client that does not read is disconnected
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, value_parser = world::seconds)]
    slow_reader: f64,
    /// Bytes of a request's body at most
    #[arg(long, value_name = "BYTES", default_value_t = 2 << 20)]
    max_body: usize,
    /// Tokens of a prompt at most [default: the context]
    #[arg(long, value_name = "TOKENS")]
    max_prompt_tokens: Option<usize>,
    /// max_tokens of a request at most [default: the context]
    #[arg(long, value_name = "TOKENS")]
    max_max_tokens: Option<usize>,
    /// Choices of a prompt (n) at most
    #[arg(long, value_name = "N", default_value_t = 16)]
    max_n: usize,
    /// Stop strings of a request at most
    #[arg(long, value_name = "N", default_value_t = 16)]
    max_stop: usize,
    /// Entries of logit_bias at most
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_logit_bias: usize,
    /// Alternatives of a log-probability at most
    #[arg(long, value_name = "N", default_value_t = 20)]
    max_logprobs: usize,
    /// Instructions that a chat template may execute for a request, which bounds its time
    #[arg(long, value_name = "N", default_value_t = 2_000_000)]
    max_template_work: u64,
    /// Bytes that a chat template may write
    #[arg(long, value_name = "BYTES", default_value_t = 2 << 20)]
    max_template_bytes: usize,
    /// Prompts of a request at most
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_prompts: usize,
    /// How log lines are written
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Write no line a request
    #[arg(long)]
    no_access_log: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    world::supervise(&args.model)?;
    log_to_stderr(args.log_format);
    let mut config = args.model.config();
    config.max_sequences = args.max_sequences as usize;
    config.max_waiting = args.max_waiting as usize;
    config.share_prefixes = !args.no_prefix_cache;
    let signals = Signals::listen()?;
    world::run(&args.model, config, |config, comm| lead(&args, config, comm, signals))
}

fn log_to_stderr(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("GQLA_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Where a subscriber is installed already, that one stays.
    let _ = match format {
        LogFormat::Json => log.json().flatten_event(true).try_init(),
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).try_init(),
    };
}

/// Requests to end, as they come; each with the time that is left before the process is killed. Ranks other than 0 leave
/// them to rank 0, which tells them when to end.
struct Signals {
    came: UnboundedReceiver<Duration>,
    serving: Arc<AtomicBool>,
}

impl Signals {
    fn listen() -> Result<Signals> {
        use signal_hook::consts::{SIGCONT, SIGINT, SIGTERM, SIGUSR1};
        let bad = |e| Error::io("signal handler", e);
        let mut signals = SignalsInfo::<WithOrigin>::new([SIGCONT, SIGINT, SIGTERM, SIGUSR1]).map_err(bad)?;
        let (send, came) = tokio::sync::mpsc::unbounded_channel();
        let serving = Arc::new(AtomicBool::new(false));
        let begun = Arc::clone(&serving);
        let rank = std::env::var("OMPI_COMM_WORLD_RANK").ok();
        let (worker, parent) = (rank.as_ref().is_some_and(|rank| rank != "0"), std::os::unix::process::parent_id());
        let watch = move || {
            let mut killing = false;
            for origin in signals.forever() {
                let by_mpirun = rank.is_some() && origin.process.is_some_and(|p| p.pid as u32 == parent);
                let left = match origin.signal {
                    // The first that a rank hears of a mpirun which is to end.
                    SIGCONT if by_mpirun => time_to_kill().saturating_sub(KILL_MARGIN),
                    SIGCONT => continue,
                    SIGTERM if by_mpirun && killing => continue,
                    _ => Duration::MAX,
                };
                killing |= origin.signal == SIGCONT;
                if !worker && !begun.load(Ordering::Acquire) {
                    eprintln!("\ngqla: {}", Error::Interrupted);
                    std::process::exit(Error::Interrupted.exit_code());
                }
                // On ranks other than 0 nobody receives.
                let _ = send.send(left);
            }
        };
        std::thread::Builder::new().name("gqla-signals".into()).spawn(watch).map_err(bad)?;
        Ok(Signals { came, serving })
    }
}

/// How long Open MPI lets its ranks live once it has been told to end: it sends SIGCONT at once, SIGTERM after its
/// `odls_base_sigkill_timeout` (1 s), SIGKILL after as long again.
fn time_to_kill() -> Duration {
    let timeout = std::env::var("OMPI_MCA_odls_base_sigkill_timeout").ok().and_then(|t| t.parse().ok()).unwrap_or(1);
    Duration::from_secs(2 * timeout)
}

fn lead(args: &Args, config: Config, comm: Box<dyn Communicator>, signals: Signals) -> Result<()> {
    let key = args.api_key.clone().or_else(|| std::env::var("GQLA_API_KEY").ok()).filter(|k| !k.is_empty());
    let address = SocketAddr::new(args.host, args.port);
    // Before the weights are read: a port in use is told at once.
    let listener = std::net::TcpListener::bind(address)
        .and_then(|l| l.set_nonblocking(true).map(|()| l))
        .map_err(|e| Error::Usage(format!("cannot listen on {address}: {e}; choose another --host or --port")))?;
    if !args.host.is_loopback() && key.is_none() {
        eprintln!("gqla: warning: {address} is open to others and there is no --api-key");
    }
    let directory = args.model.model.clone();
    let engine = Engine::start(config, comm)?;
    let served = serve(args, &engine, listener, &directory, key, signals);
    // The ranks are let go whatever became of the serving.
    let stopped = engine.shutdown();
    served.and(stopped)
}

fn serve(
    args: &Args,
    engine: &Engine,
    listener: std::net::TcpListener,
    directory: &std::path::Path,
    key: Option<String>,
    mut signals: Signals,
) -> Result<()> {
    let options = Options {
        name: args.served_model_name.clone(),
        api_key: key,
        limits: Limits {
            body: args.max_body,
            prompt_tokens: args.max_prompt_tokens.unwrap_or(usize::MAX),
            max_tokens: args.max_max_tokens.unwrap_or(usize::MAX),
            prompts: args.max_prompts,
            n: args.max_n,
            stops: args.max_stop,
            logit_bias: args.max_logit_bias,
            logprobs: args.max_logprobs,
            template_work: args.max_template_work,
            template_bytes: args.max_template_bytes,
            ..Limits::default()
        },
        access_log: !args.no_access_log,
        ..Options::new(directory)
    };
    let router = server::router(engine.clone(), options)?;
    server::warm_up(engine)?;
    // Few threads: the cores are the model's.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("asynchronous runtime", e))?;
    let stopped_early = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(|e| Error::io("listener", e))?;
        let address = listener.local_addr().map_err(|e| Error::io("listener", e))?;
        signals.serving.store(true, Ordering::Release);
        eprintln!("{}", banner(engine, address));
        tokio::spawn(report(engine.clone()));
        let (aborted, abort) = (Arc::new(AtomicBool::new(false)), engine.clone());
        let told = Arc::clone(&aborted);
        let drain = Duration::from_secs_f64(args.drain_timeout);
        let stop = async move {
            let Some(left) = until_stopped(&abort, &mut signals).await else { return };
            let drain = drain.min(left);
            eprintln!("gqla: finishing what runs, for at most {drain:?}; another signal ends it at once");
            abort.close();
            let draining = abort.clone();
            let mut drained = tokio::task::spawn_blocking(move || draining.drain(drain));
            tokio::select! {
                // What became of the ranks is told when they are joined.
                _ = &mut drained => {}
                _ = signals.came.recv() => {
                    told.store(true, Ordering::Release);
                    let abort = abort.clone();
                    let _ = tokio::task::spawn_blocking(move || abort.shutdown()).await;
                    let _ = drained.await;
                }
            }
        };
        let slow = Duration::from_secs_f64(args.slow_reader);
        let served = server::serve(listener, router, slow, Duration::from_secs(2), stop).await;
        served.map_err(|e| Error::io("listener", e))?;
        Ok::<_, Error>(aborted.load(Ordering::Acquire))
    });
    runtime.shutdown_timeout(Duration::from_millis(200));
    if stopped_early? { Err(Error::Interrupted) } else { Ok(()) }
}

/// Waits for a signal, and gives the time that is left, or for the engine's own end.
async fn until_stopped(engine: &Engine, signals: &mut Signals) -> Option<Duration> {
    loop {
        tokio::select! {
            left = signals.came.recv() => return left,
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                if engine.stopped().is_some() {
                    return None;
                }
            }
        }
    }
}

fn banner(engine: &Engine, address: SocketAddr) -> String {
    let info = engine.info();
    format!(
        "gqla: serving on http://{address} | path {} | {} rank{} | cache {} tokens | context {} tokens | {}",
        info.path,
        info.world,
        if info.world == 1 { "" } else { "s" },
        info.blocks * BLOCK,
        info.max_context,
        info.device,
    )
}

/// A line every ten seconds while busy.
async fn report(engine: Engine) {
    const EVERY: Duration = Duration::from_secs(10);
    let mut last = engine.stats();
    loop {
        tokio::time::sleep(EVERY).await;
        let now = engine.stats();
        if now.steps != last.steps {
            eprintln!("{}", line(&last, &now, EVERY));
        }
        last = now;
    }
}

fn line(last: &Stats, now: &Stats, every: Duration) -> String {
    let rate = |now: u64, last: u64| (now - last) as f64 / every.as_secs_f64();
    let generated = rate(now.generated_tokens, last.generated_tokens);
    let used = 100.0 * (now.total_blocks - now.free_blocks) as f64 / now.total_blocks.max(1) as f64;
    let step = (now.step_time - last.step_time).as_secs_f64() * 1e3 / (now.steps - last.steps).max(1) as f64;
    format!(
        "gqla: {} running, {} waiting | cache {used:.0} % | {generated:.1} tokens/s generated, {:.1} computed | \
         step {step:.1} ms | {} ended",
        now.running,
        now.waiting,
        rate(now.computed_tokens, last.computed_tokens),
        now.finished + now.cancelled + now.failed,
    )
}

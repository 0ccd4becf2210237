//! `gqla serve` as processes: SIGTERM, ranks killed and stopped with streams open, mpirun killed.
//!
//! GQLA_SOAK=20 repeats each loss twenty times.

#[path = "common/mod.rs"]
mod common;
#[path = "common/http.rs"]
mod http;
#[path = "common/model.rs"]
mod model;

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{alive, children, mpirun, pids, signal, until};
use serde_json::{Value, json};

/// A server in processes of its own.
struct Served {
    child: Child,
    address: SocketAddr,
    stderr: Arc<Mutex<String>>,
    ranks: Vec<u32>,
}

impl Served {
    fn start(ranks: usize, extra: &[&str]) -> Served {
        let mut command = if ranks > 1 { mpirun(ranks) } else { Command::new(env!("CARGO_BIN_EXE_gqla")) };
        if ranks > 1 {
            command.arg(env!("CARGO_BIN_EXE_gqla"));
        }
        Served::run(command, ranks, &[&["--no-access-log"], extra].concat())
    }

    /// `command` starts `ranks` of `gqla`, to which the arguments are added.
    fn run(mut command: Command, ranks: usize, extra: &[&str]) -> Served {
        command.args(["serve", "--port", "0", "--step-tokens", "64", "--threads", "1", "--model"]);
        command.arg(model::checkpoint("tiny-glm-gqla").0).args(extra);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = Arc::new(Mutex::new(String::new()));
        let (mut lines, all) = (BufReader::new(child.stderr.take().unwrap()), stderr.clone());
        std::thread::spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|n| n > 0) {
                all.lock().unwrap().push_str(&line);
                line.clear();
            }
        });
        let mut address = None;
        until("it serves", Duration::from_secs(60), || {
            let text = stderr.lock().unwrap();
            let url = text.split("http://").nth(1).and_then(|t| t.split(' ').next());
            address = url.and_then(|a| a.parse().ok());
            address.is_some()
        });
        let mut of_ranks = vec![child.id()];
        if ranks > 1 {
            // Of mpirun, which may be the child's own.
            let mut found = pids(child.id());
            if found.is_empty() {
                found = children(child.id()).into_iter().flat_map(pids).collect();
            }
            found.sort();
            of_ranks = found.into_iter().map(|f| f.1).collect();
            assert_eq!(of_ranks.len(), ranks);
        }
        Served { child, address: address.unwrap(), stderr, ranks: of_ranks }
    }

    fn stream(&self, prompt: Value) -> TcpStream {
        let body = json!({"prompt": prompt, "max_tokens": 1500, "ignore_eos": true, "stream": true});
        http::send(self.address, "POST", "/v1/completions", &[], Some(body.to_string().as_bytes())).unwrap()
    }

    fn status(&self, path: &str) -> Option<u16> {
        let stream = http::send(self.address, "GET", path, &[], None).ok()?;
        stream.set_read_timeout(Some(Duration::from_millis(300))).ok()?;
        http::read(stream).ok().map(|r| r.status)
    }

    /// Waits for the end, and until no rank is left.
    fn ends(&mut self, limit: Duration) -> (ExitStatus, String) {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < limit, "still there after {limit:?}: {}", self.stderr.lock().unwrap());
            std::thread::sleep(Duration::from_millis(10));
        };
        let ranks = self.ranks.clone();
        until("all ranks are gone", limit.saturating_sub(begin.elapsed()).max(Duration::from_millis(50)), || {
            !ranks.iter().any(|p| alive(*p))
        });
        std::thread::sleep(Duration::from_millis(50));
        (status, self.stderr.lock().unwrap().clone())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        for rank in &self.ranks {
            if alive(*rank) {
                signal(*rank, "KILL");
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads until the first events have come.
fn begun(stream: &mut TcpStream) {
    let mut bytes = [0; 512];
    assert!(stream.read(&mut bytes).unwrap() > 0);
}

/// The rest of a stream whose beginning has been read.
fn rest(mut stream: TcpStream) -> String {
    let mut bytes = vec![];
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_termination_finishes_what_runs_and_refuses_the_rest() {
    for ranks in [1, 2] {
        // However slow the machine is: what runs is finished.
        let mut s = Served::start(ranks, &["--drain-timeout", "300"]);
        assert_eq!(s.status("/ready"), Some(200));
        let mut stream = s.stream(json!("def f(x):"));
        begun(&mut stream);
        // mpirun passes SIGUSR1 on to its ranks; SIGTERM would end them.
        signal(s.child.id(), if ranks == 1 { "TERM" } else { "USR1" });
        until("new requests are refused", Duration::from_secs(2), || s.status("/ready") == Some(503));
        let body = json!({"prompt": "x"}).to_string();
        let refused = http::request(s.address, "POST", "/v1/completions", &[], Some(body.as_bytes()));
        assert_eq!((refused.status, s.status("/health")), (503, Some(200)));
        assert!(rest(stream).contains("data: [DONE]"), "the running stream was not finished");
        let (status, stderr) = s.ends(Duration::from_secs(20));
        assert_eq!(status.code(), Some(0), "{stderr}");
    }
}

#[test]
fn ranks_that_gqla_starts_itself_are_told_to_end_by_it() {
    let options = ["--tp", "2", "--drain-timeout", "300"];
    let mut s = Served::run(Command::new(env!("CARGO_BIN_EXE_gqla")), 2, &options);
    let mut stream = s.stream(json!("def f(x):"));
    begun(&mut stream);
    signal(s.child.id(), "TERM");
    until("new requests are refused", Duration::from_secs(2), || s.status("/ready") == Some(503));
    assert!(rest(stream).contains("data: [DONE]"), "the running stream was not finished");
    let (status, stderr) = s.ends(Duration::from_secs(20));
    assert_eq!(status.code(), Some(0), "{stderr}");

    // A second signal ends at once, and the end of the one that was started is the end of all.
    for how in ["TERM", "KILL"] {
        let mut s = Served::run(Command::new(env!("CARGO_BIN_EXE_gqla")), 2, &["--tp", "2"]);
        let mut stream = s.stream(json!("def f(x):"));
        begun(&mut stream);
        signal(s.child.id(), how);
        if how == "TERM" {
            until("it drains", Duration::from_secs(2), || s.status("/ready") == Some(503));
            signal(s.child.id(), how);
        }
        let (status, stderr) = s.ends(Duration::from_secs(10));
        assert!(!status.success() && !rest(stream).contains("[DONE]"), "{stderr}");
    }
}

#[test]
fn an_mpirun_that_is_terminated_leaves_its_ranks_time_to_tell() {
    // Open MPI kills its ranks two of these after it was told to end.
    for (timeout, finishes) in [(1, false), (8, true)] {
        let mut command = mpirun(2);
        command.args(["--mca", "odls_base_sigkill_timeout", &timeout.to_string()]);
        command.arg(env!("CARGO_BIN_EXE_gqla"));
        let mut s = Served::run(command, 2, &[]);
        // So long that it cannot end in time with the shorter one, and so short that it does with the other.
        let (tokens, n) = if finishes { (100, 1) } else { (1900, 16) };
        let body = json!({"prompt": "x", "max_tokens": tokens, "n": n, "ignore_eos": true, "stream": true}).to_string();
        let mut stream = http::send(s.address, "POST", "/v1/completions", &[], Some(body.as_bytes())).unwrap();
        begun(&mut stream);
        signal(s.child.id(), "TERM");
        until("new requests are refused", Duration::from_secs(1), || s.status("/ready") != Some(200));
        let text = rest(stream);
        assert_eq!((text.contains("data: [DONE]"), text.contains("\"error\"")), (finishes, !finishes), "{timeout}");
        let (status, stderr) = s.ends(Duration::from_secs(2 * timeout + 8));
        assert!(!status.success() && stderr.contains("finishing what runs"), "{stderr}");
    }
}

#[test]
fn what_it_says_is_for_people_and_for_programs() {
    let mut s = Served::run(Command::new(env!("CARGO_BIN_EXE_gqla")), 1, &["--log-format", "json"]);
    let text = || s.stderr.lock().unwrap().clone();
    let banner = text();
    for part in [format!("http://{}", s.address), "path ".into(), "1 rank ".into(), "cache ".into(), " tokens".into()] {
        assert!(banner.contains(&part), "no {part:?} in {banner}");
    }
    // A line every ten seconds while busy.
    let line = |text: &str| text.lines().find(|l| l.contains(" running, ")).map(str::to_string);
    let begin = Instant::now();
    while line(&text()).is_none() {
        assert!(begin.elapsed() < Duration::from_secs(40), "no line: {}", text());
        assert!(rest(s.stream(json!("def f(x):"))).contains("[DONE]"));
    }
    let line = line(&text()).unwrap();
    for part in ["waiting", "cache", "tokens/s generated", "step", "ended"] {
        assert!(line.contains(part), "no {part:?} in {line}");
    }
    assert_eq!(s.status("/health"), Some(200));
    until("it is logged", Duration::from_secs(10), || text().contains("/health"));
    let access: Vec<Value> = text().lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let of = |path: &str| access.iter().find(|l| l["path"] == path).unwrap_or_else(|| panic!("no {path}: {}", text()));
    let completion = of("/v1/completions");
    assert_eq!((&completion["target"], &completion["method"]), (&json!("gqla::access"), &json!("POST")));
    assert_eq!((&completion["status"], &of("/health")["method"]), (&json!(200), &json!("GET")));
    assert!(completion["ms"].as_f64().unwrap() > 0.0 && completion["timestamp"].is_string());
    signal(s.child.id(), "TERM");
    assert_eq!(s.ends(Duration::from_secs(10)).0.code(), Some(0));

    // Bound wider than this machine without a key, it warns; the warning comes first.
    for (key, warns) in [(None, true), (Some("secret"), false)] {
        let mut options = vec!["--host", "0.0.0.0"];
        options.extend(key.iter().flat_map(|key| ["--api-key", key]));
        let s = Served::run(Command::new(env!("CARGO_BIN_EXE_gqla")), 1, &options);
        assert_eq!(s.stderr.lock().unwrap().contains("is open to others and there is no --api-key"), warns);
    }

    let mut s = Served::run(Command::new(env!("CARGO_BIN_EXE_gqla")), 1, &[]);
    assert!(s.address.ip().is_loopback() && !s.stderr.lock().unwrap().contains("is open"));
    assert_eq!(s.status("/ready"), Some(200));
    signal(s.child.id(), "TERM");
    let (_, text) = s.ends(Duration::from_secs(10));
    let access = text.lines().find(|l| l.contains("gqla::access")).unwrap_or_else(|| panic!("no access line: {text}"));
    assert!(access.contains("path=\"/ready\"") && access.contains("status=200"), "{access}");
}

#[test]
fn the_drain_has_a_bound_and_a_second_signal_ends_at_once() {
    let mut s = Served::start(1, &["--drain-timeout", "0.3"]);
    let mut stream = s.stream(json!("def f(x):"));
    begun(&mut stream);
    signal(s.child.id(), "TERM");
    let events = rest(stream);
    assert!(events.contains("\"error\"") && !events.contains("[DONE]"), "{events}");
    assert_eq!(s.ends(Duration::from_secs(10)).0.code(), Some(0));

    let mut s = Served::start(1, &[]);
    let mut stream = s.stream(json!("def f(x):"));
    begun(&mut stream);
    signal(s.child.id(), "TERM");
    until("it drains", Duration::from_secs(2), || s.status("/ready") == Some(503));
    signal(s.child.id(), "TERM");
    let begin = Instant::now();
    let (status, _) = s.ends(Duration::from_secs(5));
    assert!(status.code() == Some(130) && begin.elapsed() < Duration::from_secs(5));
    assert!(!rest(stream).contains("[DONE]"));
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    Idle,
    Prefill,
    Decode,
}

/// Loses `victim` of two ranks, and checks what is seen from outside.
fn lose(victim: usize, how: &str, when: When, watchdog: u64) {
    let mut s = Served::start(2, &["--watchdog", &watchdog.to_string()]);
    let stream = match when {
        When::Idle => None,
        // Some 60 chunks of a prompt: the signal comes in one of the first.
        When::Prefill => Some(s.stream(json!(vec![7; 2500]))),
        When::Decode => {
            let mut stream = s.stream(json!("def f(x):"));
            begun(&mut stream);
            Some(stream)
        }
    };
    if when == When::Prefill {
        std::thread::sleep(Duration::from_millis(30));
    }
    signal(s.ranks[victim], how);
    if victim == 1 {
        // From a second after the loss on, the coordinator says that it is not ready, or is gone.
        until("it is not ready", Duration::from_secs(1), || s.status("/ready") != Some(200));
    }
    let limit = Duration::from_secs(if how == "KILL" { 10 } else { watchdog + 5 });
    let (status, stderr) = s.ends(limit);
    assert!(!status.success(), "{when:?}");
    assert!(stderr.contains(&format!("rank {victim}")), "{how} in {when:?}: rank {victim} is not named:\n{stderr}");
    if let Some(stream) = stream {
        let text = rest(stream);
        assert!(!text.contains("[DONE]"), "{how} in {when:?}: the stream seems to have ended well");
    }
}

fn times() -> usize {
    std::env::var("GQLA_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

#[test]
fn killed_ranks_end_everything() {
    for _ in 0..times() {
        for when in [When::Idle, When::Prefill, When::Decode] {
            (0..2).for_each(|victim| lose(victim, "KILL", when, 3));
        }
    }
}

#[test]
fn stopped_ranks_end_everything_after_the_watchdog() {
    for _ in 0..times() {
        for when in [When::Idle, When::Prefill, When::Decode] {
            (0..2).for_each(|victim| lose(victim, "STOP", when, 3));
        }
    }
}

#[test]
fn with_the_usual_watchdog_a_stopped_rank_ends_everything_within_35_seconds() {
    // Side by side: each mostly waits.
    std::thread::scope(|scope| {
        for (victim, when) in [(0, When::Decode), (1, When::Decode), (1, When::Idle)] {
            scope.spawn(move || lose(victim, "STOP", when, 30));
        }
    });
}

#[test]
fn a_killed_mpirun_leaves_no_orphans() {
    let mut s = Served::start(2, &[]);
    let mut stream = s.stream(json!("def f(x):"));
    begun(&mut stream);
    signal(s.child.id(), "KILL");
    s.ends(Duration::from_secs(10));
    assert!(!rest(stream).contains("[DONE]"));
}

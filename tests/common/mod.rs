//! What several test files need.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// `mpirun` for `ranks` ranks on this machine; the caller adds the program and its arguments.
pub fn mpirun(ranks: usize) -> Command {
    gqla::comm::launch::mpirun(ranks).unwrap_or_else(|error| panic!("{error}; launch/test does both"))
}

/// A running command whose output is collected, and which does not outlive its test.
pub struct Job {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

/// How a [`Job`] ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Job {
    pub fn start(command: &mut Command) -> Job {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        Job { child, stdout: collect(stdout), stderr: collect(stderr) }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end; a command that takes longer than `limit` is killed and fails the test.
    pub fn end_within(mut self, limit: Duration) -> Ended {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break Some(status);
            }
            if begin.elapsed() > limit {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        // Orphans may keep the pipes open: what has been read by then must do.
        let text = |output: &Receiver<String>| output.recv_timeout(Duration::from_secs(15)).unwrap_or_default();
        let (stdout, stderr) = (text(&self.stdout), text(&self.stderr));
        match status {
            Some(status) => Ended { status, stdout, stderr },
            None => panic!("still running after {limit:?}\nstdout:\n{stdout}\nstderr:\n{stderr}"),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// A command under mpirun that runs for long enough to be disturbed.
pub struct Run {
    child: Child,
    stderr: std::thread::JoinHandle<String>,
}

impl Run {
    /// How long a rank may take to appear.
    const APPEARS: Duration = Duration::from_secs(10);

    pub fn start(command: &mut Command) -> Run {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut stderr = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut text = vec![];
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Run { child, stderr }
    }

    /// mpirun's own process.
    pub fn mpirun(&self) -> u32 {
        self.child.id()
    }

    /// The process of `rank`, once it has been started.
    pub fn pid(&self, rank: usize) -> u32 {
        let mut found = None;
        until("the rank is there", Run::APPEARS, || {
            found = pids(self.child.id()).into_iter().find(|(r, _)| *r == rank).map(|p| p.1);
            found.is_some()
        });
        found.unwrap()
    }

    pub fn all(&self, ranks: usize) -> Vec<u32> {
        (0..ranks).map(|r| self.pid(r)).collect()
    }

    /// Waits for the first streamed bytes.
    pub fn streaming(&mut self) {
        let mut byte = [0; 16];
        assert!(self.child.stdout.as_mut().unwrap().read(&mut byte).unwrap() > 0, "nothing was streamed");
    }

    /// mpirun ends within the limit, unsuccessfully, and no rank is left. Returns its code and stderr.
    pub fn ends(mut self, ranks: &[u32], limit: Duration) -> (i32, String) {
        let begin = Instant::now();
        // What is still streamed must not block the ranks.
        let mut stdout = self.child.stdout.take().unwrap();
        std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if begin.elapsed() > limit {
                let _ = self.child.kill();
                panic!("mpirun still runs after {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        until("all ranks are gone", limit, || !ranks.iter().any(|p| alive(*p)));
        assert!(!status.success());
        (status.code().unwrap_or(-1), self.stderr.join().unwrap())
    }
}

/// Sends `signal` ("KILL", "STOP", …) to a process.
pub fn signal(pid: u32, signal: &str) {
    let status = Command::new("sh").arg("-c").arg(format!("kill -{signal} {pid}")).status().unwrap();
    assert!(status.success(), "kill -{signal} {pid}");
}

/// Whether the process exists and has not ended (a zombie has).
pub fn alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit(')').next().unwrap_or("").trim_start();
    !state.starts_with('Z') && !state.starts_with('X')
}

/// Waits until `done`, and fails the test after `limit`.
pub fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The processes that `parent` has started.
pub fn children(parent: u32) -> Vec<u32> {
    let of = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|e| e.file_name().to_string_lossy().parse().ok()).filter(|pid| of(*pid) == Some(parent)).collect()
}

/// The ranks that `mpirun` has started: (rank, process).
pub fn pids(mpirun: u32) -> Vec<(usize, u32)> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let stat = String::from_utf8_lossy(&read("stat")).into_owned();
        let parent = stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(1)?.parse::<u32>().ok());
        // Between fork and exec a rank still is mpirun, without its environment.
        let name = String::from_utf8_lossy(&read("comm")).trim().to_string();
        if parent != Some(mpirun) || name != "gqla" {
            continue;
        }
        let environ = read("environ");
        let rank = environ.split(|b| *b == 0).find_map(|v| v.strip_prefix(b"OMPI_COMM_WORLD_RANK="));
        if let Some(rank) = rank.and_then(|r| std::str::from_utf8(r).ok()?.parse().ok()) {
            found.push((rank, pid));
        }
    }
    found
}

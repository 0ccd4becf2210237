//! The program itself under mpirun on GPUs: the text of several ranks, and the loss of one.
//!
//! `GQLA_BIN` names the program where the tests are carried to another machine. With fewer GPUs than ranks they share.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use gqla::backend::cuda::available;

use crate::common::{Job, Run, mpirun, signal, until};
use crate::engine::common::{checkpoint, golden};

const LIMIT: Duration = Duration::from_secs(10);

fn program() -> PathBuf {
    std::env::var_os("GQLA_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_gqla").into()).into()
}

/// The GPUs there are, or nothing (said on stderr).
fn gpus() -> Option<usize> {
    match available() {
        Ok(gpus) => Some(gpus.len()),
        Err(e) => {
            eprintln!("NOT RUN for lack of a GPU: {e}");
            None
        }
    }
}

/// `gqla COMMAND` on `world` ranks, which share GPUs where there are fewer.
fn gqla(world: usize, gpus: usize, command: &[&str]) -> Command {
    let mut run = mpirun(world);
    run.arg(program()).args(command).args(["--device", "cuda"]);
    if gpus < world {
        run.arg("--share-gpus");
    }
    run
}

#[test]
fn the_program_writes_the_references_text_on_any_number_of_ranks() {
    let Some(gpus) = gpus() else { return };
    let (golden, model) = (golden("tiny-glm-gqla"), checkpoint("tiny-glm-gqla").0);
    for world in [1, 2, 4, 8] {
        for (path, sums) in [("gqa", "auto"), ("absorb", "auto"), ("gqa", "one-shot")] {
            if sums == "one-shot" && world != 2 {
                continue;
            }
            let mut command = gqla(world, gpus, &["generate", "--json", "--max-tokens", "48", "--ignore-eos"]);
            command.args(["--all-reduce", sums]);
            command.args(["--path", path, "--prompt", golden["texts"][0].as_str().unwrap()]);
            command.arg("--model").arg(&model);
            let ended = Job::start(&mut command).end_within(Duration::from_secs(120));
            assert!(ended.status.success(), "{}", ended.stderr);
            let report: serde_json::Value = serde_json::from_str(ended.stdout.lines().last().unwrap_or("")).unwrap();
            let (ours, theirs) = (&report["tokens"], &golden["greedy"][0]);
            let margins: Vec<f64> = serde_json::from_value(theirs["margins"].clone()).unwrap();
            let sure = margins.iter().position(|m| *m < 0.25).unwrap_or(margins.len()).min(48);
            assert_eq!(report["world_size"], world);
            for i in 0..sure {
                assert_eq!(ours[i], theirs["tokens"][i], "token {i}, {path} path, {world} ranks");
            }
            eprintln!("{path} path, {world} ranks, sums {sums}: {sure} tokens are the reference's");
        }
    }
}

/// The ways to lose a rank. A stopped one is given up by the watchdog, with the exit code of a lost rank.
const LOSSES: [(&str, usize); 4] = [("KILL", 0), ("KILL", 1), ("STOP", 0), ("STOP", 1)];

/// All ranks end within the limit, and say which one was lost.
fn lose(run: Run, (how, victim): (&str, usize), what: &str) {
    let ranks = run.all(2);
    // Into the midst of a step.
    std::thread::sleep(Duration::from_millis(500));
    signal(ranks[victim], how);
    let (code, stderr) = run.ends(&ranks, LIMIT);
    assert!(stderr.contains(&format!("rank {victim}")), "{what}: rank {victim} is not named:\n{stderr}");
    if how == "STOP" {
        assert_eq!(code, 6, "{what}:\n{stderr}");
    }
    eprintln!("{what}: {how} of rank {victim} ended all");
}

#[test]
fn a_rank_lost_in_decode_ends_all() {
    let Some(gpus) = gpus() else { return };
    // On one GPU, one-shot sums run as they do between GPUs, only slower.
    for sums in if gpus < 2 { ["auto", "one-shot"] } else { ["auto", "nccl"] } {
        for loss in LOSSES {
            let tokens = ["generate", "--max-tokens", "3000", "--ignore-eos", "--prompt", "def f(x):"];
            let mut command = gqla(2, gpus, &tokens);
            command.args(["--watchdog", "2", "--all-reduce", sums]);
            let mut run = Run::start(command.arg("--model").arg(checkpoint("tiny-glm-gqla").0));
            run.streaming();
            lose(run, loss, &format!("generate, sums {sums}"));
        }
    }
}

#[test]
fn a_rank_lost_in_a_benchmark_ends_all() {
    let Some(gpus) = gpus() else { return };
    for loss in LOSSES {
        let steps = ["bench", "decode", "--batch", "8", "--context", "512", "--steps", "1000000", "--watchdog", "2"];
        let mut command = gqla(2, gpus, &steps);
        // Its first line comes when the model is loaded.
        let mut run = Run::start(command.arg("--model").arg(checkpoint("tiny-glm-gqla").0));
        run.streaming();
        lose(run, loss, "bench decode");
    }
}

#[test]
fn a_rank_lost_while_serving_ends_all() {
    let Some(gpus) = gpus() else { return };
    for loss in [("KILL", 1), ("STOP", 1)] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let mut command = gqla(2, gpus, &["serve", "--watchdog", "2", "--port", &port.to_string()]);
        let run = Run::start(command.arg("--model").arg(checkpoint("tiny-glm-gqla").0));
        let mut stream = None;
        until("it serves", Duration::from_secs(60), || {
            stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok();
            stream.is_some()
        });
        let mut stream = stream.unwrap();
        let body = r#"{"prompt": "def f(x):", "max_tokens": 3000, "ignore_eos": true, "stream": true}"#;
        let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
        write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        while !line.contains("data:") {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "the stream ended before its first token");
        }
        std::thread::spawn(move || lines.read_to_end(&mut vec![]));
        lose(run, loss, "serve");
    }
}

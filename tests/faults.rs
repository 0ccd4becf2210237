//! `gqla generate` under mpirun: what a user sees when a rank dies, stalls, disagrees, or ctrl-C is pressed.

#[path = "common/mod.rs"]
mod common;
#[path = "common/model.rs"]
mod model;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Run, mpirun, signal, until};

const LIMIT: Duration = Duration::from_secs(10);

fn start(ranks: usize, extra: &[&str], prompt: &str) -> Run {
    let mut command = mpirun(ranks);
    command.arg(env!("CARGO_BIN_EXE_gqla")).args([
        "generate",
        "--max-tokens",
        "3000",
        "--ignore-eos",
        "--prompt",
        prompt,
    ]);
    Run::start(command.arg("--model").arg(model::checkpoint("tiny-glm-gqla").0).args(extra))
}

const SHORT: &str = "def fibonacci(n):";

#[test]
fn a_killed_rank_ends_all_in_decode() {
    for victim in [0, 1, 3] {
        let mut run = start(4, &[], SHORT);
        run.streaming();
        let ranks = run.all(4);
        signal(ranks[victim], "KILL");
        let (_, stderr) = run.ends(&ranks, LIMIT);
        assert!(stderr.contains(&format!("rank {victim}")), "rank {victim} is not named:\n{stderr}");
    }
}

/// Names of a process's threads.
fn threads(pid: u32) -> Vec<String> {
    let all = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    all.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok()).collect()
}

/// From when the ranks have begun to load. What becomes of a rank that is killed before, while it still
/// connects to mpirun, is mpirun's doing: 4.1's can hang in its own finalisation when all ranks are gone.
#[test]
fn a_killed_rank_ends_all_while_loading_and_in_prefill() {
    for (pause, prompt) in [(0, SHORT.to_string()), (60, "x = 1\n".repeat(900))] {
        let run = start(2, &["--step-tokens", "64", "--threads", "2"], &prompt);
        let ranks = run.all(2);
        // Its threads are there from just before it reads the weights to its end.
        let loads = |pid: &u32| threads(*pid).iter().any(|name| name.starts_with("gqla-cpu-"));
        until("the ranks load", Duration::from_secs(60), || ranks.iter().all(loads));
        std::thread::sleep(Duration::from_millis(pause));
        signal(ranks[1], "KILL");
        let (_, stderr) = run.ends(&ranks, LIMIT);
        assert!(stderr.contains("rank 1"), "rank 1 is not named:\n{stderr}");
    }
}

#[test]
fn a_stopped_rank_ends_all_after_the_watchdog() {
    for victim in [0, 1] {
        let mut run = start(2, &["--watchdog", "2"], SHORT);
        run.streaming();
        let ranks = run.all(2);
        signal(ranks[victim], "STOP");
        let (_, stderr) = run.ends(&ranks, LIMIT + Duration::from_secs(2));
        assert!(stderr.contains(&format!("rank {victim}")), "rank {victim} is not named:\n{stderr}");
    }
}

#[test]
fn interrupting_mpirun_ends_all_at_once() {
    let mut run = start(2, &[], SHORT);
    run.streaming();
    let ranks = run.all(2);
    signal(run.mpirun(), "INT");
    run.ends(&ranks, LIMIT);
}

#[test]
fn an_interrupt_alone_exits_with_130() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_gqla"))
        .args(["generate", "--max-tokens", "3000", "--ignore-eos", "--prompt", SHORT, "--model"])
        .arg(model::checkpoint("tiny-glm-gqla").0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0; 4];
    assert!(child.stdout.as_mut().unwrap().read(&mut byte).unwrap() > 0);
    signal(child.id(), "INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&output.stderr).trim_end().ends_with("gqla: interrupted"));
}

#[test]
fn ranks_that_see_different_checkpoints_are_refused_by_name() {
    // Rank 1 is told another directory: the same model but for one byte of a weight file's header.
    let other = tempfile::tempdir().unwrap();
    let from = model::checkpoint("tiny-llama-gqa").0;
    for file in std::fs::read_dir(&from).unwrap().flatten() {
        std::fs::copy(file.path(), other.path().join(file.file_name())).unwrap();
    }
    let config = other.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("1e-05", "1e-06")).unwrap();
    let script = r#"[ "$OMPI_COMM_WORLD_RANK" = 1 ] && m="$2" || m="$1"; exec "$0" generate --prompt x --model "$m""#;
    let mut command = mpirun(2);
    command.args(["sh", "-c", script, env!("CARGO_BIN_EXE_gqla")]).arg(&from).arg(other.path());
    let output = common::Job::start(&mut command).end_within(Duration::from_secs(20));
    assert!(!output.status.success());
    assert!(output.stderr.contains("rank 1") && output.stderr.contains("checkpoint"), "{}", output.stderr);
}

#[test]
fn a_truncated_checkpoint_is_one_message() {
    let broken = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(model::checkpoint("tiny-llama-gqa").0).unwrap().flatten() {
        std::fs::copy(file.path(), broken.path().join(file.file_name())).unwrap();
    }
    let weights = broken.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gqla"))
        .args(["generate", "--prompt", "x", "--model"])
        .arg(broken.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(3), 1), "{stderr}");
    assert!(stderr.contains("model.safetensors") && output.stdout.is_empty(), "{stderr}");
}

//! `gqla convert` as a process: ranks under mpirun, ctrl-C, a full disk.

#[path = "common/mod.rs"]
mod common;
#[path = "common/model.rs"]
mod model;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Ended, Job, alive, mpirun, pids, signal, until};
use gqla::checkpoint::Checkpoint;
use tempfile::TempDir;

const GQLA: &str = env!("CARGO_BIN_EXE_gqla");
const LIMIT: Duration = Duration::from_secs(600);

/// The arguments of a small conversion to `out`.
fn arguments(model: &str, out: &Path, more: &[&str]) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let (model, calibration) = (text(&model::checkpoint(model).0), text(&model::at("tests/data/calibration.u16")));
    let fixed = ["convert", "--model", &model, "--out", &text(out), "--calibration", &calibration, "--length", "256"];
    fixed.iter().chain(more).map(|s| s.to_string()).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn succeeded(ended: &Ended) {
    assert!(ended.status.success(), "{}", ended.stderr);
}

#[test]
fn ranks_under_mpirun_make_the_same_checkpoint() {
    let place = TempDir::new().unwrap();
    // A rank's threads are its own: with another number, eigenproblems are rounded differently.
    let settings: [(&str, &[usize], &[&str]); 2] = [
        ("tiny-glm-gqla", &[2, 4], &["--groups", "4", "--weights", "nll"]),
        ("tiny-llama-gqa", &[2], &["--rope-dim", "40", "--latent-rank", "104"]),
    ];
    for (model, worlds, more) in settings {
        let more = [more, &["--samples", "4", "--dtype", "f32", "--threads", "1"]].concat();
        let alone = place.path().join(format!("{model}-alone"));
        succeeded(&Job::start(Command::new(GQLA).args(arguments(model, &alone, &more))).end_within(LIMIT));
        let before = Checkpoint::open(&alone).unwrap();
        // Everything is spilled to disk, too.
        for &ranks in worlds {
            let out = place.path().join(format!("{model}-{ranks}"));
            let more = [&more[..], &["--spill", "0"]].concat();
            succeeded(&Job::start(mpirun(ranks).arg(GQLA).args(arguments(model, &out, &more))).end_within(LIMIT));
            let after = Checkpoint::open(&out).unwrap();
            assert_eq!(after.names(), before.names());
            for name in before.names() {
                let floats = |c: &Checkpoint| -> Vec<f64> {
                    let (dtype, _, bytes) = c.raw(name).unwrap();
                    match dtype {
                        "F32" => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
                        _ => bytes.iter().map(|b| f64::from(*b)).collect(),
                    }
                };
                let (ours, theirs) = (floats(&after), floats(&before));
                let power = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let error = power(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
                let size = power(&mut theirs.iter().copied());
                assert!(error <= 1e-6 * size, "{name} on {ranks} ranks: {error:e} of {size}");
            }
        }
    }
    assert!(names(place.path()).iter().all(|name| name.starts_with("tiny-")), "{:?}", names(place.path()));
}

#[test]
fn ctrl_c_leaves_nothing_and_says_so() {
    let place = TempDir::new().unwrap();
    let (out, working) = (place.path().join("out"), place.path().join("out.converting"));
    let begun = || working.join("layer-00000.part").exists();
    let job = Job::start(Command::new(GQLA).args(arguments("tiny-glm-mla", &out, &["--groups", "8"])));
    until("the first layer", LIMIT, begun);
    signal(job.pid(), "INT");
    let ended = job.end_within(Duration::from_secs(10));
    assert_eq!(ended.status.code(), Some(130), "{}", ended.stderr);
    assert!(ended.stderr.contains("interrupted: nothing is left"), "{}", ended.stderr);
    assert!(names(place.path()).is_empty(), "{:?}", names(place.path()));

    // Under mpirun, which gives its ranks a second.
    let job = Job::start(mpirun(2).arg(GQLA).args(arguments("tiny-glm-mla", &out, &["--groups", "8"])));
    until("the first layer", LIMIT, begun);
    let ranks = pids(job.pid());
    assert_eq!(ranks.len(), 2);
    signal(job.pid(), "INT");
    let ended = job.end_within(Duration::from_secs(20));
    assert!(!ended.status.success());
    until("the ranks' end", Duration::from_secs(10), || !ranks.iter().any(|(_, pid)| alive(*pid)));
    assert!(names(place.path()).is_empty(), "{:?}", names(place.path()));
}

#[test]
fn resume_goes_on_after_ctrl_c() {
    let place = TempDir::new().unwrap();
    let (out, working) = (place.path().join("out"), place.path().join("out.converting"));
    let given = arguments("tiny-glm-mla", &out, &["--groups", "8", "--samples", "8", "--resume"]);
    let job = Job::start(Command::new(GQLA).args(&given));
    until("the second layer", LIMIT, || working.join("layer-00001.part").exists());
    signal(job.pid(), "INT");
    let ended = job.end_within(Duration::from_secs(10));
    assert_eq!(ended.status.code(), Some(130), "{}", ended.stderr);
    assert!(ended.stderr.contains("the same command goes on from there"), "{}", ended.stderr);
    assert_eq!(names(place.path()), ["out.converting"]);
    let made = |name: &str| std::fs::metadata(working.join(name)).unwrap().modified().unwrap();
    let kept = made("layer-00001.part");

    // What goes on leaves the finished layers alone.
    let job = Job::start(Command::new(GQLA).args(&given));
    until("the third layer", LIMIT, || working.join("layer-00002.part").exists());
    assert_eq!(made("layer-00001.part"), kept);
    succeeded(&job.end_within(LIMIT));
    assert_eq!(names(place.path()), ["out"]);
}

#[test]
fn a_full_disk_leaves_nothing_and_says_so() {
    let place = TempDir::new().unwrap();
    let out = place.path().join("out");
    // No file of more than 1 MB may be written, and the signal that says so is ignored: a disk that is full.
    for more in [["--spill", "4"], ["--spill", "0"]] {
        let given = arguments("tiny-glm-mla", &out, &[&["--groups", "8", "--samples", "8"], &more[..]].concat());
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; ulimit -f 2048; exec \"$0\" \"$@\"", GQLA]).args(given);
        let ended = Job::start(&mut command).end_within(LIMIT);
        assert_eq!(ended.status.code(), Some(3), "{}", ended.stderr);
        assert!(ended.stderr.contains("free some space"), "{}", ended.stderr);
        assert!(ended.stderr.contains("nothing is left of the conversion"), "{}", ended.stderr);
        assert!(names(place.path()).is_empty(), "{:?}", names(place.path()));
    }
}

#[test]
fn two_conversions_to_one_place_do_not_meet() {
    let place = TempDir::new().unwrap();
    let (out, working) = (place.path().join("out"), place.path().join("out.converting"));
    let given = arguments("tiny-glm-mla", &out, &["--groups", "8", "--samples", "8"]);
    let first = Job::start(Command::new(GQLA).args(&given));
    until("the first layer", LIMIT, || working.join("layer-00000.part").exists());
    let second = Job::start(Command::new(GQLA).args(&given)).end_within(LIMIT);
    assert_eq!(second.status.code(), Some(2), "{}", second.stderr);
    assert!(second.stderr.contains("another conversion"), "{}", second.stderr);
    succeeded(&first.end_within(LIMIT));
    assert_eq!(names(place.path()), ["out"]);
}

//! The same under `mpirun`, and what becomes of all ranks when one of them, or `mpirun`, is stopped or killed.
//!
//! Each test runs this binary again under `mpirun`; there [`rank`] is the program, and `GQLA_TEST_CASE` says which.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gqla::comm::{agree, connect, launch};

use crate::common::{Ended, Job, alive, mpirun, signal, until};

/// Well above what any case takes, on two busy cores too.
const LIMIT: Duration = Duration::from_secs(60);
/// All ranks must be gone by then once something is wrong.
const GONE: Duration = Duration::from_secs(10);

/// What one rank does under `mpirun`.
#[test]
#[ignore = "one rank's program: the other tests run it under mpirun"]
fn rank() {
    let case = std::env::var("GQLA_TEST_CASE").unwrap_or_default();
    if case == "relaunch" && launch::launched().is_none() {
        panic!("{:?}", launch::relaunch(3));
    }
    let mut comm = connect().unwrap();
    let rank = comm.rank();
    if let Ok(world) = std::env::var("GQLA_TEST_WORLD") {
        assert_eq!(comm.world().to_string(), world);
    }
    match case.as_str() {
        "agree" => {
            let error = agree(&mut *comm, "checkpoint", if rank == 2 { 8 } else { 7 }).unwrap_err();
            comm.abort(error.exit_code(), &error.to_string());
        }
        "mismatch" => {
            let error = comm.all_gather(&vec![1; 3 + rank / 2], &mut vec![0; (3 + rank / 2) * 3]).unwrap_err();
            comm.abort(error.exit_code(), &error.to_string());
        }
        "reduce" => {
            announce(rank);
            comm.set_watchdog(Duration::from_secs(1));
            let mut buffer = vec![1.0; std::env::var("GQLA_TEST_LENGTH").unwrap().parse().unwrap()];
            let error = loop {
                if let Err(error) = comm.all_reduce(&mut buffer) {
                    break error;
                }
            };
            comm.abort(error.exit_code(), &error.to_string());
        }
        "idle" => {
            announce(rank);
            // Rank 0 waits for requests that do not come, the others for rank 0.
            if rank == 0 {
                std::thread::sleep(LIMIT);
            }
            let _ = comm.broadcast(&mut Vec::new(), None);
        }
        "outside" => {
            comm.set_watchdog(Duration::from_millis(500));
            comm.barrier().unwrap();
            let counter = Arc::new(AtomicU64::new(0));
            comm.progress(counter.clone());
            // A call that gets on for longer than the bound, and a long time between calls: nothing is amiss.
            comm.guard(Some(Duration::from_millis(500)));
            for _ in 0..30 {
                std::thread::sleep(Duration::from_millis(100));
                counter.fetch_add(1, Ordering::Relaxed);
            }
            comm.guard(None);
            std::thread::sleep(Duration::from_secs(2));
            announce(rank);
            if rank == 0 {
                // A driver's call that does not return.
                comm.guard(Some(Duration::from_secs(1)));
                std::thread::sleep(LIMIT);
            }
            let error = comm.broadcast(&mut Vec::new(), None).unwrap_err();
            comm.abort(error.exit_code(), &error.to_string());
        }
        "huge" => {
            // More than one exchange's worth, and not a multiple of it.
            let length = (1 << 24) + 5;
            let mut sum: Vec<f32> = (0..length).map(|i| ((i + rank) % 1000) as f32).collect();
            comm.all_reduce(&mut sum).unwrap();
            assert!((0..length).all(|i| sum[i] == (i % 1000 + (i + 1) % 1000) as f32));
            let mine: Vec<u8> = (0..3 * length).map(|i| (i * 3 + rank) as u8).collect();
            let mut all = vec![0; 2 * mine.len()];
            comm.all_gather(&mine, &mut all).unwrap();
            assert!((0..mine.len()).all(|i| [all[i], all[mine.len() + i]] == [(i * 3) as u8, (i * 3 + 1) as u8]));
            comm.finish().unwrap();
        }
        "cpu" => {
            comm.barrier().unwrap();
            let before = cpu_seconds();
            if rank == 0 {
                std::thread::sleep(Duration::from_millis(1500));
            }
            comm.broadcast(&mut Vec::new(), None).unwrap();
            let spent = cpu_seconds() - before;
            assert!(spent < 0.3, "rank {rank} spent {spent} s of CPU in 1.5 s of waiting");
            comm.finish().unwrap();
        }
        "abort" => {
            announce(rank);
            match rank {
                0 => std::thread::sleep(LIMIT),
                1 => {
                    std::thread::sleep(Duration::from_secs(1));
                    comm.abort(5, "too little memory for the cache");
                }
                _ => {}
            }
            let _ = comm.broadcast(&mut Vec::new(), None);
        }
        _ => {
            crate::every_operation(&mut *comm).unwrap();
            agree(&mut *comm, "checkpoint", 7).unwrap();
            assert_eq!(comm.local(), (rank, comm.world()), "all ranks are on this host");
            comm.finish().unwrap();
        }
    }
}

/// Tells the test this rank's process id.
fn announce(rank: usize) {
    let folder = std::env::var("GQLA_TEST_PIDS").unwrap();
    let (draft, file) = (format!("{folder}/{rank}.draft"), format!("{folder}/{rank}"));
    std::fs::write(&draft, std::process::id().to_string()).unwrap();
    std::fs::rename(draft, file).unwrap();
}

/// CPU time of this process so far.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // User and system time, in hundredths of a second on Linux.
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

/// One `mpirun` at a time: several would only slow each other down.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn program(mut command: Command, case: &str) -> Command {
    command.env("GQLA_TEST_CASE", case);
    command.args(["--ignored", "--exact", "mpi::rank", "--nocapture", "--test-threads=1"]);
    command
}

fn under_mpirun(ranks: usize, case: &str) -> Command {
    let mut command = mpirun(ranks);
    command.arg(std::env::current_exe().unwrap()).env("GQLA_TEST_WORLD", ranks.to_string());
    program(command, case)
}

/// Starts `case` and waits until its ranks have begun; returns their process ids.
fn begin(ranks: usize, case: &str, length: usize) -> (Job, Vec<u32>) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = under_mpirun(ranks, case);
    command.env("GQLA_TEST_PIDS", folder.path()).env("GQLA_TEST_LENGTH", length.to_string());
    let job = Job::start(&mut command);
    let read = |rank: usize, folder: &Path| std::fs::read_to_string(folder.join(rank.to_string())).ok()?.parse().ok();
    let mut pids = Vec::new();
    until("all ranks begin", LIMIT, || {
        pids = (0..ranks).filter_map(|rank| read(rank, folder.path())).collect();
        pids.len() == ranks
    });
    (job, pids)
}

/// The job must have failed, said `says`, and left no process.
fn must_fail(ended: Ended, pids: &[u32], says: &str) {
    assert!(!ended.status.success(), "{ended:?}");
    assert!(ended.stderr.contains(says), "no `{says}` in:\n{}", ended.stderr);
    all_gone(pids);
}

fn all_gone(pids: &[u32]) {
    until("all ranks end", GONE, || !pids.iter().any(|&pid| alive(pid)));
}

#[test]
fn every_operation_is_right_under_mpirun() {
    let _alone = alone();
    for ranks in [1, 2, 3, 4, 8] {
        let ended = Job::start(&mut under_mpirun(ranks, "operations")).end_within(LIMIT);
        assert!(ended.status.success(), "{ranks} ranks: {ended:?}");
    }
}

#[test]
fn sums_and_gathers_of_more_than_one_message_are_right() {
    let _alone = alone();
    let ended = Job::start(&mut under_mpirun(2, "huge")).end_within(LIMIT);
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn a_program_starts_mpirun_for_itself() {
    let _alone = alone();
    let mut command = program(Command::new(std::env::current_exe().unwrap()), "relaunch");
    let ended = Job::start(command.env("GQLA_TEST_WORLD", "3")).end_within(LIMIT);
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn a_missing_mpirun_is_named_with_the_remedy() {
    let mut command = program(Command::new(std::env::current_exe().unwrap()), "relaunch");
    let ended = Job::start(command.env("PATH", "/nowhere")).end_within(LIMIT);
    assert!(!ended.status.success() && ended.stderr.contains("launch/test"), "{ended:?}");
}

#[test]
fn ranks_that_disagree_are_named_under_mpirun() {
    let _alone = alone();
    let ended = Job::start(&mut under_mpirun(4, "agree")).end_within(LIMIT);
    must_fail(ended, &[], "rank 2: checkpoint differs");
    let ended = Job::start(&mut under_mpirun(3, "mismatch")).end_within(LIMIT);
    must_fail(ended, &[], "rank 2: ");
}

#[test]
fn another_world_size_than_mpirun_started_is_refused() {
    let _alone = alone();
    let mut command = program(Command::new(std::env::current_exe().unwrap()), "operations");
    let ended = Job::start(command.env("OMPI_COMM_WORLD_SIZE", "3")).end_within(LIMIT);
    must_fail(ended, &[], "mpirun started 3 ranks, but MPI sees 1");
}

/// Stopped at arbitrary points of small and of large all-reduces, the rank is named by whoever speaks first.
#[test]
fn a_stopped_rank_is_named_and_all_end() {
    let _alone = alone();
    for (ranks, victim, length) in [(2, 1, 16), (4, 2, 300_000), (4, 3, 4096), (8, 0, 64)] {
        let (job, pids) = begin(ranks, "reduce", length);
        signal(pids[victim], "STOP");
        let ended = job.end_within(LIMIT);
        must_fail(ended, &pids, &format!("rank {victim}: did not come to all-reduce"));
    }
}

#[test]
fn a_killed_rank_is_named_and_all_end() {
    let _alone = alone();
    for (case, victim) in [("idle", 1), ("idle", 0), ("reduce", 2)] {
        let (job, pids) = begin(4, case, 1024);
        signal(pids[victim], "KILL");
        let ended = job.end_within(LIMIT);
        must_fail(ended, &pids, &format!("process rank {victim} with PID"));
    }
}

#[test]
fn a_rank_whose_call_into_another_library_does_not_return_ends_all_and_names_who_is_missing() {
    let _alone = alone();
    let call = "gqla: rank 0: a call into the device's driver or NCCL does not return";
    for (victim, says) in [(Some(1), "and there is no answer from rank 1;"), (None, "though every rank answers;")] {
        let (job, pids) = begin(3, "outside", 0);
        if let Some(victim) = victim {
            signal(pids[victim], "STOP");
        }
        let ended = job.end_within(LIMIT);
        assert_eq!(ended.status.code(), Some(6), "{ended:?}");
        must_fail(ended, &pids, &format!("{call}, {says}"));
    }
}

#[test]
fn an_abort_ends_all_with_its_code_even_a_stopped_rank() {
    let _alone = alone();
    let (job, pids) = begin(4, "abort", 0);
    signal(pids[2], "STOP");
    let ended = job.end_within(LIMIT);
    assert_eq!(ended.status.code(), Some(5), "{ended:?}");
    must_fail(ended, &pids, "gqla: rank 1: too little memory for the cache\n");
}

#[test]
fn ranks_end_when_mpirun_is_killed() {
    let _alone = alone();
    for (case, stopped) in [("idle", false), ("reduce", false), ("idle", true)] {
        let (job, pids) = begin(4, case, 1024);
        if stopped {
            signal(pids[3], "STOP");
        }
        signal(job.pid(), "KILL");
        all_gone(&pids);
    }
}

#[test]
fn idle_ranks_leave_the_cores_alone() {
    let _alone = alone();
    let ended = Job::start(&mut under_mpirun(4, "cpu")).end_within(LIMIT);
    assert!(ended.status.success(), "{ended:?}");
}

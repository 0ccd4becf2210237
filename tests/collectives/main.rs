//! The collectives of every communicator: the right sums, the same bits on every rank, and waits that end with the
//! name of the rank at fault.

#[cfg(feature = "mpi")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "mpi")]
mod mpi;

use std::time::{Duration, Instant};

use gqla::comm::one::OneComm;
use gqla::comm::threads::{ThreadsComm, world};
use gqla::comm::{Communicator, agree, tree_sum};
use gqla::{Error, Result};

/// On both sides of where an all-reduce changes from one exchange to two, for every world size.
const LENGTHS: [usize; 11] = [0, 1, 2, 7, 64, 1001, 1025, 2049, 4096, 8193, 100_003];

/// Runs `work` on every end of a world of `size` threads, and returns what each end returned.
fn on_threads<T: Send>(size: usize, work: impl Fn(&mut ThreadsComm) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let ends: Vec<_> = world(size).into_iter().map(|mut end| scope.spawn(move || work(&mut end))).collect();
        ends.into_iter().map(|end| end.join().unwrap()).collect()
    })
}

/// Numbers of very different magnitudes, whose sum depends on the order: rank `rank`'s part of sum `salt`.
fn rough(rank: usize, salt: usize, length: usize) -> Vec<f32> {
    let mut state = (rank * 7919 + salt * 104_729 + 1) as u64;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (mantissa, exponent) = ((state >> 40) as f32 / 16_777_216.0 - 0.5, (state >> 33) % 20);
            mantissa * (exponent as f32 - 10.0).exp2()
        })
        .collect()
}

/// The tree order spelled out: neighbours, pairs, fours, with an odd one out carried to the next round.
fn in_tree_order(mut values: Vec<f32>) -> f32 {
    while values.len() > 1 {
        values = values.chunks(2).map(|pair| pair.iter().copied().reduce(|a, b| a + b).unwrap()).collect();
    }
    values[0]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Every operation, with results known in advance; runs on any communicator.
fn every_operation(comm: &mut dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world());
    for (round, &length) in LENGTHS.iter().chain(&LENGTHS).enumerate() {
        let mut exact: Vec<f32> = (0..length).map(|i| ((i * 31 + rank * 17 + round) % 4096) as f32).collect();
        comm.all_reduce(&mut exact)?;
        for (i, sum) in exact.iter().enumerate() {
            let expected: usize = (0..world).map(|rank| (i * 31 + rank * 17 + round) % 4096).sum();
            assert_eq!(*sum, expected as f32, "element {i} of {length} on rank {rank} of {world}");
        }

        let mut sum = rough(rank, round, length);
        comm.all_reduce(&mut sum)?;
        let parts: Vec<Vec<f32>> = (0..world).map(|rank| rough(rank, round, length)).collect();
        let expected: Vec<f32> =
            (0..length).map(|i| in_tree_order(parts.iter().map(|part| part[i]).collect())).collect();
        assert_eq!(bits(&sum), bits(&expected), "{length} elements on rank {rank} of {world}");

        let byte = |rank: usize, i: usize| (i * 7 + rank * 13 + round) as u8;
        let mine: Vec<u8> = (0..length).map(|i| byte(rank, i)).collect();
        let mut all = vec![0xAA; world * length];
        comm.all_gather(&mine, &mut all)?;
        let expected: Vec<u8> = (0..world).flat_map(|rank| (0..length).map(move |i| byte(rank, i))).collect();
        assert_eq!(all, expected, "{length} bytes on rank {rank} of {world}");

        // Two in a row: rank 0 need not wait for the others between them.
        for repeat in 0..2 {
            let expected: Vec<u8> = (0..length * 5).map(|i| byte(repeat, i)).collect();
            let mut message = if rank == 0 { expected.clone() } else { vec![1; repeat * 40] };
            comm.broadcast(&mut message, Some(Duration::from_secs(20)))?;
            assert_eq!(message, expected, "broadcast {repeat} on rank {rank} of {world}");
        }
        comm.barrier()?;
    }
    Ok(())
}

#[test]
fn tree_sum_takes_the_tree_order() {
    for count in 1..=17 {
        for width in [0, 1, 5] {
            let parts: Vec<Vec<f32>> = (0..count).map(|rank| rough(rank, count, width)).collect();
            let expected: Vec<f32> =
                (0..width).map(|i| in_tree_order(parts.iter().map(|part| part[i]).collect())).collect();
            let mut sum = vec![f32::NAN; width];
            tree_sum(&mut parts.concat(), width, &mut sum);
            assert_eq!(bits(&sum), bits(&expected), "{count} parts of {width}");
        }
    }
}

#[test]
fn a_world_of_one_is_done_already() {
    let mut comm = OneComm::new();
    every_operation(&mut comm).unwrap();
    comm.abort(6, "no more");
    let error = comm.barrier().unwrap_err();
    assert!(error.to_string().contains("no more"), "{error}");
}

#[test]
fn threads_compute_every_operation() {
    for size in 1..=8 {
        for result in on_threads(size, |comm| every_operation(comm)) {
            result.unwrap();
        }
    }
}

/// Eight segments' partial sums: a world of W holds 8/W of them each, adds its own in tree order, then all-reduces.
/// The bits must be the same at every power of two.
#[test]
fn power_of_two_worlds_agree_on_segmented_sums() {
    for length in [5, 20_000] {
        let segments: Vec<Vec<f32>> = (0..8).map(|segment| rough(segment, 3, length)).collect();
        let mut results = Vec::new();
        for size in [1, 2, 4, 8] {
            let own = 8 / size;
            results.extend(on_threads(size, |comm| {
                let mut sum = vec![0.0; length];
                tree_sum(&mut segments[comm.rank() * own..][..own].concat(), length, &mut sum);
                comm.all_reduce(&mut sum).unwrap();
                bits(&sum)
            }));
        }
        assert!(results.iter().all(|result| *result == results[0]));
    }
}

#[test]
fn a_rank_that_disagrees_is_named_everywhere() {
    for error in on_threads(4, |comm| {
        agree(comm, "world size", 4).unwrap();
        let mine = if comm.rank() >= 2 { 8 } else { 7 };
        agree(comm, "checkpoint", mine).unwrap_err()
    }) {
        assert!(matches!(error, Error::Rank { rank: 2, .. }), "{error}");
        assert!(error.to_string().contains("checkpoint differs"), "{error}");
    }
}

#[test]
fn a_rank_that_comes_to_another_operation_is_named() {
    let errors = on_threads(2, |comm| match comm.rank() {
        0 => comm.all_reduce(&mut [0.0; 3]).unwrap_err(),
        _ => comm.all_reduce(&mut [0.0; 4]).unwrap_err(),
    });
    assert!(matches!(errors[0], Error::Rank { rank: 1, .. }), "{}", errors[0]);
    assert!(matches!(errors[1], Error::Rank { rank: 0, .. }), "{}", errors[1]);
}

#[test]
fn an_all_gather_into_the_wrong_room_is_refused() {
    for error in on_threads(2, |comm| comm.all_gather(&[1, 2], &mut [0; 5]).unwrap_err()) {
        assert!(matches!(error, Error::Internal(_)), "{error}");
    }
}

#[test]
fn a_rank_that_stalls_is_named_within_the_watchdog() {
    let results = on_threads(4, |comm| {
        comm.set_watchdog(Duration::from_millis(200));
        comm.barrier().unwrap();
        let begin = Instant::now();
        if comm.rank() == 2 {
            // Alive and not dropped, but elsewhere.
            std::thread::sleep(Duration::from_millis(1500));
            return None;
        }
        Some((comm.all_reduce(&mut [1.0; 10]).unwrap_err(), begin.elapsed()))
    });
    for (error, elapsed) in results.into_iter().flatten() {
        assert!(matches!(error, Error::Rank { rank: 2, .. }), "{error}");
        assert!(elapsed < Duration::from_millis(1400), "{elapsed:?}");
    }
}

#[test]
fn an_end_that_is_dropped_fails_the_others_at_once() {
    let results = on_threads(3, |comm| match comm.rank() {
        1 => None,
        _ => Some(comm.barrier().unwrap_err()),
    });
    for error in results.into_iter().flatten() {
        assert!(matches!(error, Error::Rank { rank: 1, .. }), "{error}");
    }
}

#[test]
fn an_abort_ends_every_wait_naming_the_rank() {
    let errors = on_threads(4, |comm| match comm.rank() {
        0 => comm.barrier().unwrap_err(),
        3 => {
            std::thread::sleep(Duration::from_millis(50));
            comm.abort(6, "out of memory");
            comm.barrier().unwrap_err()
        }
        _ => comm.broadcast(&mut Vec::new(), None).unwrap_err(),
    });
    for error in errors {
        assert!(matches!(error, Error::Rank { rank: 3, .. }), "{error}");
        assert!(error.to_string().contains("out of memory"), "{error}");
    }
}

#[test]
fn a_broadcast_that_never_comes_ends_with_its_patience() {
    let ends = world(2);
    let mut ends = ends.into_iter();
    let (_zero, mut one) = (ends.next().unwrap(), ends.next().unwrap());
    let error = one.broadcast(&mut Vec::new(), Some(Duration::from_millis(30))).unwrap_err();
    assert!(matches!(error, Error::Rank { rank: 0, .. }), "{error}");
}

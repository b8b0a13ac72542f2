//! Collectives of more bytes than MPI counts in one call, over real MPI. Takes 4.5 GiB of memory while it runs.

mod common;

use std::process::Command;

use common::cli::MPI_ENVIRONMENT;
use fsdp_qlora::testing::{Comm, MpiComm, World};

/// Says that this process is a rank which the test has started.
const IS_RANK: &str = "LARGE_MESSAGES_IS_RANK";

const RANKS: usize = 2;

/// Bytes of each part: two of them pass 2 GiB, and they do not divide into pieces.
const PART: usize = (1 << 30) + 12_345;

/// Places in a part that are not zero: pages that nobody writes to take no memory.
const MARKS: [usize; 5] = [0, 4095, (64 << 20) - 1, 64 << 20, PART - 1];

#[test]
fn two_ranks_exchange_more_than_two_gib() {
    if std::env::var_os(IS_RANK).is_none() {
        let mut command = Command::new(std::env::var("MPIEXEC").unwrap_or("mpirun".into()));
        command.args(["-np", &RANKS.to_string()]).arg(std::env::current_exe().unwrap());
        command.args(["--exact", "two_ranks_exchange_more_than_two_gib"]).env(IS_RANK, "1").envs(MPI_ENVIRONMENT);
        let output = command.output().expect("mpirun (scripts/setup installs it)");
        let text = [output.stdout, output.stderr].concat();
        return assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
    }
    let world = World::init().unwrap();
    assert_eq!(world.world_size, RANKS);
    let mut comm = MpiComm::new(&world).unwrap();
    let mut send = vec![0u8; RANKS * PART];
    for to in 0..RANKS {
        MARKS.iter().enumerate().for_each(|(i, at)| send[to * PART + at] = mark(world.rank, to, i));
    }
    let mut recv = vec![0u8; RANKS * PART];
    comm.all_to_all(&send, &mut recv).unwrap();
    check(&mut recv, |from, i| mark(from, world.rank, i));
    comm.all_gather(&send[..PART], &mut recv).unwrap();
    check(&mut recv, |from, i| mark(from, 0, i));
}

/// Returns the byte at a mark of the part that a rank has for another.
fn mark(from: usize, to: usize, i: usize) -> u8 {
    (1 + 100 * from + 50 * to + i) as u8
}

/// Every byte of what has come is right.
fn check(recv: &mut [u8], expected: impl Fn(usize, usize) -> u8) {
    for (from, part) in recv.as_chunks_mut::<PART>().0.iter_mut().enumerate() {
        for (i, &at) in MARKS.iter().enumerate() {
            assert_eq!(std::mem::take(&mut part[at]), expected(from, i), "byte {at} of rank {from}");
        }
        let zeros = vec![0; 1 << 20];
        assert!(part.chunks(zeros.len()).all(|chunk| chunk == &zeros[..chunk.len()]), "of rank {from}");
    }
}

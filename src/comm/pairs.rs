//! Collectives made of messages between pairs of ranks, for more bytes than one MPI call can count.

use anyhow::{Result, ensure};

use super::Comm;

/// Bytes of the largest message between two ranks; longer ones go in pieces.
pub const PIECE_BYTES: usize = 64 << 20;

/// For each turn, the rank to send to and the rank to receive from, this rank itself first. All ranks take the same
/// turn at the same time, so that each message finds its receiver.
pub fn turns(rank: usize, world_size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..world_size).map(move |turn| ((rank + turn) % world_size, (rank + world_size - turn) % world_size))
}

/// Does [`Comm::all_gather`] without extra memory.
pub fn all_gather(comm: &mut impl Comm, send: &[u8], recv: &mut [u8]) -> Result<()> {
    for (to, from) in turns(comm.rank(), comm.world_size()) {
        comm.send_receive(to, send, from, &mut recv[from * send.len()..][..send.len()])?;
    }
    Ok(())
}

/// Does [`Comm::all_gather_in_place`].
pub fn all_gather_in_place(comm: &mut (impl Comm + ?Sized), whole: &mut [u8]) -> Result<()> {
    let (rank, world_size) = (comm.rank(), comm.world_size());
    ensure!(whole.len().is_multiple_of(world_size), "all_gather_in_place: {} bytes of {world_size} ranks", whole.len());
    let part = whole.len() / world_size;
    let range = |rank: usize| rank * part..(rank + 1) * part;
    for (to, from) in turns(rank, world_size).skip(1) {
        let [own, theirs] = whole.get_disjoint_mut([range(rank), range(from)])?;
        comm.send_receive(to, own, from, theirs)?;
    }
    Ok(())
}

/// Does [`Comm::all_to_all`] without extra memory.
pub fn all_to_all(comm: &mut impl Comm, send: &[u8], recv: &mut [u8]) -> Result<()> {
    let part = send.len() / comm.world_size();
    for (to, from) in turns(comm.rank(), comm.world_size()) {
        comm.send_receive(to, &send[to * part..][..part], from, &mut recv[from * part..][..part])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::local::LocalComm;
    use super::*;

    #[test]
    fn pairs_give_what_one_call_gives() {
        for (world_size, part) in [(1, 5), (2, 0), (2, 7), (3, 1), (5, 64)] {
            std::thread::scope(|scope| {
                for mut comm in LocalComm::world(world_size) {
                    scope.spawn(move || {
                        let byte = |i: usize| (comm.rank() * 41 + i * 7) as u8;
                        let send: Vec<u8> = (0..part * world_size).map(byte).collect();
                        let [mut one_call, mut in_pairs] = [(); 2].map(|()| vec![0; part * world_size]);
                        comm.all_to_all(&send, &mut one_call).unwrap();
                        all_to_all(&mut comm, &send, &mut in_pairs).unwrap();
                        assert_eq!(in_pairs, one_call);
                        comm.all_gather(&send[..part], &mut one_call).unwrap();
                        all_gather(&mut comm, &send[..part], &mut in_pairs).unwrap();
                        assert_eq!(in_pairs, one_call);
                        in_pairs.fill(0xFF);
                        in_pairs[comm.rank() * part..][..part].copy_from_slice(&send[..part]);
                        comm.all_gather_in_place(&mut in_pairs).unwrap();
                        assert_eq!(in_pairs, one_call);
                    });
                }
            });
        }
    }
}

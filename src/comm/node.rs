//! Memory that the ranks of a node share: one mapping of exact size by each rank, which the others map too.

use anyhow::{Context, Result, bail};

use super::{Comm, all_gather_u64, anywhere};
use crate::device::cpu::{Cpu, HostRegion};
use crate::device::{Arena, Device, HostBuffer, MemoryPlan};

/// Memory for the plan of each rank of `comm`, in rank order, zeroed, for copies to and from `device`; every rank writes to its own.
/// Collective.
pub fn arenas<D: Device>(device: &D, comm: &mut dyn Comm, plan: &MemoryPlan) -> Result<Vec<Arena<Cpu>>> {
    let regions = share(comm, plan.total_bytes())?.into_iter();
    regions.map(|region| Ok(Arena::over_host(device.pin(region)?, plan.clone()))).collect()
}

/// The next range of each arena.
pub fn carve(arenas: &mut [Arena<Cpu>], name: &str, len: usize) -> Result<Vec<HostBuffer<u8>>> {
    arenas.iter_mut().map(|arena| arena.carve(name, len)).collect()
}

/// `bytes` of memory of each rank, which every rank maps. Collective; when it fails on one rank it fails on all.
fn share(comm: &mut dyn Comm, bytes: usize) -> Result<Vec<HostRegion>> {
    let own = HostRegion::shareable(bytes);
    let processes = all_gather_u64(comm, u64::from(std::process::id()))?;
    let files = all_gather_u64(comm, own.as_ref().map_or(u64::MAX, |(_, file)| HostRegion::number(file)))?;
    let all = own.and_then(|(own, file)| {
        let (rank, mut own) = (comm.rank(), Some(own));
        let regions =
            processes.iter().zip(&files).enumerate().map(|(r, (process, number))| match own.take_if(|_| r == rank) {
                Some(own) => Ok(own),
                None => HostRegion::shared_by(*process, *number, bytes)
                    .with_context(|| format!("memory of rank {r} of this node cannot be shared")),
            });
        Ok((regions.collect::<Result<Vec<_>>>()?, file))
    });
    // The descriptors stay open until every rank has mapped the memory, which this waits for.
    let failed = anywhere(comm, all.is_err())?;
    match all {
        Ok((regions, _)) if !failed => Ok(regions),
        Ok(_) => bail!("another rank of this node cannot share memory"),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::barrier;
    use super::super::local::LocalComm;
    use super::*;

    #[test]
    fn what_a_rank_writes_the_others_read() {
        let seen: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = LocalComm::world(3)
                .into_iter()
                .map(|mut comm| {
                    scope.spawn(move || {
                        let mut plan = MemoryPlan::default();
                        plan.push("x", 5000);
                        let mut arenas = arenas(&Cpu::new(1), &mut comm, &plan).unwrap();
                        let mut buffers = carve(&mut arenas, "x", 5000).unwrap();
                        let rank = comm.rank();
                        buffers[rank].view_mut().host_mut().fill(rank as u8 + 1);
                        barrier(&mut comm).unwrap();
                        buffers.iter().map(|b| b.view().host()[4999]).collect()
                    })
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        });
        assert_eq!(seen, vec![vec![1, 2, 3]; 3]);
    }
}

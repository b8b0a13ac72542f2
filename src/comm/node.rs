//! Memory that the ranks of a node share: one mapping of exact size by each rank, which the others map too.

use anyhow::{Context, Result};

use super::{Comm, all_gather_u64, barrier};
use crate::device::cpu::HostRegion;

/// `bytes` of memory of each rank of `comm`, in rank order, zeroed; every rank maps all of them and writes to its own. Collective;
/// when it fails on one rank it fails on all.
pub fn share(comm: &mut dyn Comm, bytes: usize) -> Result<Vec<HostRegion>> {
    let own = HostRegion::shareable(bytes);
    let number =
        |file: &Result<(HostRegion, std::fs::File)>| file.as_ref().map_or(u64::MAX, |(_, f)| HostRegion::number(f));
    let processes = all_gather_u64(comm, u64::from(std::process::id()))?;
    let files = all_gather_u64(comm, number(&own))?;
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
    let failed = all_gather_u64(comm, u64::from(all.is_err()))?.iter().any(|&f| f != 0);
    // The descriptors stay open until every rank has mapped the memory.
    barrier(comm)?;
    match all {
        Ok((regions, _)) if !failed => Ok(regions),
        Ok(_) => anyhow::bail!("another rank of this node cannot share memory"),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::LocalComm;
    use super::*;
    use crate::device::cpu::Cpu;
    use crate::device::{Arena, Buffer, MemoryPlan};

    #[test]
    fn what_a_rank_writes_the_others_read() {
        let seen: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = LocalComm::world(3)
                .into_iter()
                .map(|mut comm| {
                    scope.spawn(move || {
                        let mut plan = MemoryPlan::default();
                        plan.push("x", 5000);
                        let regions = share(&mut comm, plan.total_bytes()).unwrap();
                        let mut buffers: Vec<Buffer<Cpu, u8>> = regions
                            .into_iter()
                            .map(|region| Arena::over_host(region, plan.clone()).carve("x", 5000).unwrap())
                            .collect();
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

//! Memory that the ranks of a node share. Each rank makes one mapping of exact size, which the others map too.
//!
//! A rank writes its own part of a [`Draft`], which the others cannot read yet. Publishing waits for all ranks; from
//! then on all parts can be read and none can be written. So no rank ever reads memory that another rank is writing.
#![expect(unsafe_code, reason = "maps memory that the ranks of a node share")]

use anyhow::{Context, Result, bail};

use super::{Comm, all_gather_u64, anywhere, barrier};
use crate::device::cpu::{Cpu, HostRegion};
use crate::device::{Arena, Device, Element, HostBuffer, MemoryPlan, View};

/// Zeroed memory for the plan of each rank, in rank order. Only this rank's part can be reached.
pub struct Draft {
    arenas: Vec<Arena<Cpu>>,
    own: usize,
    /// The range of each rank, for each name that was carved.
    carved: Vec<Vec<HostBuffer<u8>>>,
}

/// A range of host memory that is never written again.
pub struct Published<T>(HostBuffer<T>);

impl<T: Element> Published<T> {
    /// The range.
    pub fn view(&self) -> View<'_, Cpu, T> {
        self.0.view()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl Draft {
    /// Maps memory for copies to and from `device`; each rank of `comm` has the same plan. Collective; if it fails on
    /// one rank, it fails on all.
    pub fn new<D: Device>(device: &D, comm: &mut dyn Comm, plan: &MemoryPlan) -> Result<Draft> {
        let regions = share(comm, plan.total_bytes())?.into_iter();
        let arenas: Result<Vec<_>> =
            regions.map(|region| Arena::over_host(device.pin(region)?, plan.clone())).collect();
        if anywhere(comm, arenas.is_err())? {
            arenas?;
            bail!("another rank of this node cannot pin shared memory");
        }
        Ok(Draft { arenas: arenas?, own: comm.rank(), carved: Vec::new() })
    }

    /// Returns this rank's part of the next range of the plan.
    pub fn carve(&mut self, name: &str, len: usize) -> Result<&mut [u8]> {
        let parts: Result<Vec<_>> = self.arenas.iter_mut().map(|arena| arena.carve(name, len)).collect();
        self.carved.push(parts?);
        let parts = self.carved.last_mut().context("a range was carved")?;
        Ok(parts[self.own].view_mut().host_mut())
    }

    /// Returns every rank's part of each carved range. Collective: returns when every rank has written its part.
    pub fn publish(self, comm: &mut dyn Comm) -> Result<Vec<Vec<Published<u8>>>> {
        barrier(comm)?;
        Ok(self.carved.into_iter().map(|parts| parts.into_iter().map(Published).collect()).collect())
    }
}

/// Maps `bytes` of memory of each rank on every rank. Collective; if it fails on one rank, it fails on all.
fn share(comm: &mut dyn Comm, bytes: usize) -> Result<Vec<HostRegion>> {
    let own = HostRegion::shareable(bytes);
    let processes = all_gather_u64(comm, u64::from(std::process::id()))?;
    let files = all_gather_u64(comm, own.as_ref().map_or(u64::MAX, |(_, file)| file.number()))?;
    let all = own.and_then(|(own, file)| {
        let (rank, mut own) = (comm.rank(), Some(own));
        let regions =
            processes.iter().zip(&files).enumerate().map(|(r, (process, number))| match own.take_if(|_| r == rank) {
                Some(own) => Ok(own),
                // SAFETY: a `Draft` gives out this rank's memory alone, to write, until all ranks have come to
                // `publish`, and after that all memory, to read.
                None => unsafe { HostRegion::shared_by(*process, *number, bytes) }
                    .with_context(|| format!("memory of rank {r} of this node cannot be shared")),
            });
        Ok((regions.collect::<Result<Vec<_>>>()?, file))
    });
    // The files stay open until every rank has mapped the memory, which this waits for.
    let failed = anywhere(comm, all.is_err())?;
    match all {
        Ok((regions, _)) if !failed => Ok(regions),
        Ok(_) => bail!("another rank of this node cannot share memory"),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
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
                        ["x", "y"].iter().for_each(|name| plan.push(name, 5000));
                        let mut draft = Draft::new(&Cpu::new(1), &mut comm, &plan).unwrap();
                        let rank = comm.rank() as u8;
                        draft.carve("x", 5000).unwrap().fill(rank + 1);
                        draft.carve("y", 5000).unwrap().fill(rank + 11);
                        let ranges = draft.publish(&mut comm).unwrap();
                        ranges.iter().flatten().map(|part| part.view().host()[4999]).collect()
                    })
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        });
        assert_eq!(seen, vec![vec![1, 2, 3, 11, 12, 13]; 3]);
    }
}

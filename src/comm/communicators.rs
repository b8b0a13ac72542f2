//! NCCL's communicators of a rank, and the sum of gradients over them.

use std::sync::Arc;

use anyhow::{Result, ensure};
use cudarc::driver::CudaStream;

use super::nccl::Nccl;
use super::{Comm, Groups, Position};
use crate::device::cuda::{Cuda, HalfType};
use crate::device::{Arena, Buffer, Device, ViewMut};

/// NCCL's communicators between the ranks that hold a base together and between those that hold the same shard;
/// `None` for a group of one rank.
pub(super) struct Communicators {
    pub shards: Option<Arc<Nccl>>,
    pub replicas: Option<Arc<Nccl>>,
}

impl Communicators {
    /// Connects the ranks of each group. Collective.
    pub fn new(groups: &mut Groups) -> Result<Communicators> {
        let connect = |comm: &mut dyn Comm| match comm.world_size() {
            1 => Ok(None),
            _ => anyhow::Ok(Some(Arc::new(Nccl::new(comm)?))),
        };
        Ok(Communicators { shards: connect(&mut *groups.shards)?, replicas: connect(&mut *groups.replicas)? })
    }

    pub fn all(&self) -> Vec<Arc<Nccl>> {
        self.shards.iter().chain(&self.replicas).cloned().collect()
    }

    /// Runs each collective once on a few bytes. NCCL allocates its buffers at the first use, which must come before
    /// memory is planned.
    pub fn use_first<A: HalfType>(&self, cuda: &Cuda<A>, stream: &CudaStream) -> Result<()> {
        const BYTES_OF_A_RANK: usize = 256;
        for nccl in self.all() {
            let len = nccl.world_size() * BYTES_OF_A_RANK;
            let carve = |arena: &mut Arena<Cuda<A>>| -> Result<[Buffer<Cuda<A>, u8>; 2]> {
                Ok([arena.carve("sent", len)?, arena.carve("received", len)?])
            };
            let [mut sent, mut received] = Arena::carved(cuda, carve)?;
            cuda.fill_bytes(sent.view_mut(), 0)?;
            cuda.order(cuda.compute(), stream)?;
            nccl.all_gather_in_place(sent.view_mut(), stream)?;
            nccl.all_to_all(sent.view(), received.view_mut(), stream)?;
            cuda.order(stream, cuda.compute())?;
            cuda.synchronize()?;
        }
        Ok(())
    }

    /// Replaces this rank's shard of `full` by the sum over all ranks. The other ranks' values arrive in `received`.
    pub fn sum_over_ranks<A: HalfType>(
        &self,
        cuda: &Cuda<A>,
        Position { shard, num_shards, .. }: Position,
        mut full: ViewMut<'_, Cuda<A>, f32>,
        received: &mut Buffer<Cuda<A>, f32>,
        stream: &CudaStream,
    ) -> Result<()> {
        if let Some(nccl) = &self.shards {
            let len = full.len();
            sum_part(cuda, nccl, full.range_mut(0..len), received, stream)?;
        }
        let Some(nccl) = &self.replicas else { return Ok(()) };
        let part = full.len() / num_shards;
        let mut own = full.into_range(shard * part..(shard + 1) * part);
        sum_part(cuda, nccl, own.range_mut(0..part), received, stream)?;
        nccl.all_gather_in_place(own, stream)
    }
}

/// Replaces this rank's part of `values` by the sum over the communicator's ranks.
fn sum_part<A: HalfType>(
    cuda: &Cuda<A>,
    nccl: &Nccl,
    mut values: ViewMut<'_, Cuda<A>, f32>,
    received: &mut Buffer<Cuda<A>, f32>,
    stream: &CudaStream,
) -> Result<()> {
    let (len, ranks, rank) = (values.len(), nccl.world_size(), nccl.rank());
    ensure!(len.is_multiple_of(ranks) && len <= received.len(), "{len} gradients, {} planned", received.len());
    nccl.all_to_all(values.view(), received.first_mut(len), stream)?;
    // The sum overwrites this rank's part, which has been sent already.
    let own = rank * (len / ranks)..(rank + 1) * (len / ranks);
    cuda.sum_parts_on(stream, values.range_mut(own), received.first(len))
}

//! The memory that a choice of [`Limits`] costs. The allocations of a run are known to the byte, the driver's
//! additions to some MiB.

use anyhow::Result;

use crate::comm::Gather;
use crate::device::cuda::PINNED_BYTES_OF_A_TABLE_BYTE;
use crate::device::{MemoryPlan, Ops};
use crate::fsdp::layout::UnitLayout;
use crate::fsdp::memory::{Limits, Memory, ShardedTrainables};
use crate::model::spec::ModelSpec;
use crate::model::trainable::{Kind, Trainables};

/// Host bytes of a process with CUDA's libraries, those that MPI and NCCL add, and those of NCCL's sockets, all
/// without page cache. They were measured with `bench step` on H100s (2026-11-28; with NCCL 2026-11-25).
const LIBRARIES_HOST_BYTES: usize = 300_000_000;
const COMMUNICATION_HOST_BYTES: usize = 359_000_000;
const SOCKETS_HOST_BYTES: usize = 85_000_000;

/// A model over some ranks, as far as memory goes.
#[derive(Clone, Copy)]
pub struct Sizes<'a> {
    pub spec: &'a ModelSpec,
    pub layouts: &'a [UnitLayout],
    pub trainables: Option<&'a Trainables>,
    pub world_size: usize,
}

/// All memory of a rank.
#[derive(Debug)]
pub struct Cost {
    /// The ranges that are allocated on the device, by name.
    pub device: MemoryPlan,
    pub host: MemoryPlan,
    /// Bytes of the device that the driver takes for its table of pinned pages.
    pub table_bytes: usize,
}

impl Cost {
    pub fn device_bytes(&self) -> usize {
        self.device.total_bytes() + self.table_bytes
    }

    pub fn host_bytes(&self) -> usize {
        self.host.total_bytes()
    }
}

impl Sizes<'_> {
    pub fn num_shards(&self) -> usize {
        self.layouts[0].num_shards()
    }

    pub fn num_replicas(&self) -> usize {
        self.world_size / self.num_shards()
    }

    /// Number of this rank's groups that need a communicator: the ranks that hold a base together and the ranks that
    /// hold the same shard. A group of one rank needs none.
    pub fn num_communicators(&self) -> usize {
        usize::from(self.num_shards() > 1) + usize::from(self.num_replicas() > 1)
    }

    /// The trainable values over the ranks.
    pub fn sharded(&self) -> Option<ShardedTrainables<'_>> {
        let (num_shards, num_replicas) = (self.num_shards(), self.num_replicas());
        self.trainables.map(|trainables| ShardedTrainables { trainables, num_shards, num_replicas })
    }

    /// Longest gradient buffer that will be reduced, in elements.
    pub fn max_gradients(&self) -> usize {
        self.sharded().map_or(0, |sharded| sharded.padded_len())
    }

    /// Host memory of a rank's process on a GPU besides what is pinned, without page cache: libraries, the values
    /// that a new adapter starts from (A; B is zero, and no page of it has been written), and an embedding table that
    /// is not in a file.
    pub fn process_bytes(&self, ranks_per_gpu: usize, embedding_bytes: usize) -> usize {
        let communication = if self.world_size > 1 { COMMUNICATION_HOST_BYTES } else { 0 };
        let sockets = if ranks_per_gpu > 1 { SOCKETS_HOST_BYTES } else { 0 };
        let all = self.trainables.iter().flat_map(|trainables| &trainables.layers).flat_map(|layer| layer.list());
        let values: usize = all.filter(|trainable| trainable.kind == Kind::A).map(|a| a.range.len()).sum();
        let adapter = values * size_of::<f32>();
        LIBRARIES_HOST_BYTES + communication + sockets + adapter + embedding_bytes
    }

    /// All memory of a run with these limits, in the activation type of `D`. On the host shards are mapped files,
    /// unless a node shares them.
    pub fn cost<D: Ops>(&self, limits: &Limits) -> Result<Cost> {
        let plans = Memory::<D>::plan(self.spec, self.sharded(), self.layouts, limits)?;
        let mut cost = Cost { device: plans.device, host: plans.host, table_bytes: 0 };
        if D::IS_HOST {
            if limits.gather == Gather::Host {
                self.layouts.iter().for_each(|layout| cost.host.push("shards", layout.shard_bytes()));
            }
            return Ok(cost);
        }
        // Bytes of other ranks' shards that this rank maps too.
        let mut shared = 0;
        for (layout, resident) in self.layouts.iter().zip(limits.residency.of_units(self.layouts.len())) {
            let (shard, all) = (layout.shard_bytes(), layout.gathered_bytes());
            match (resident, limits.gather) {
                (false, Gather::Collective) => cost.host.push("shards", shard),
                (false, Gather::Host) => {
                    cost.host.push("shards", shard);
                    shared += all - shard;
                }
                (true, Gather::Collective) => cost.device.push("shards", shard),
                (true, Gather::Host) => cost.device.push("shards", all),
            }
        }
        if self.world_size > 1 {
            cost.device.push("received gradients", self.max_gradients() * size_of::<f32>());
        }
        cost.table_bytes = (cost.host_bytes() + shared) / PINNED_BYTES_OF_A_TABLE_BYTE;
        Ok(cost)
    }
}

/// `1.5 GiB`
pub fn text(bytes: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

//! Memory: what a choice of [`Limits`] costs, to the byte.

use anyhow::Result;

use crate::comm::Gather;
use crate::device::Device;
use crate::device::cuda::PINNED_BYTES_OF_A_TABLE_BYTE;
use crate::fsdp::layout::{TrainableLayout, UnitLayout};
use crate::fsdp::memory::{Limits, Memory, Plans};
use crate::model::config::ModelConfig;
use crate::model::layer::LayerLora;

/// A model over some ranks, as far as memory goes.
#[derive(Clone, Copy)]
pub struct Sizes<'a> {
    pub config: &'a ModelConfig,
    pub layouts: &'a [UnitLayout],
    pub lora: Option<&'a LayerLora>,
    pub world_size: usize,
    /// Whether shards that are not resident take pinned memory; else they are mapped files.
    pub pins_shards: bool,
}

impl Sizes<'_> {
    pub fn num_shards(&self) -> usize {
        self.layouts[0].num_shards()
    }

    pub fn num_replicas(&self) -> usize {
        self.world_size / self.num_shards()
    }

    /// Groups of ranks that talk: those that hold a base, and those that hold the same shard, where they are more than one.
    pub fn num_communicators(&self) -> usize {
        usize::from(self.num_shards() > 1) + usize::from(self.num_replicas() > 1)
    }

    /// A layer's trainable values.
    pub fn trainable(&self) -> Option<TrainableLayout> {
        let (num_shards, num_replicas) = (self.num_shards(), self.num_replicas());
        self.lora.map(|lora| TrainableLayout { len: lora.layout.len, num_shards, num_replicas })
    }

    /// Longest gradient buffer that will be reduced, in elements.
    pub fn max_gradients(&self) -> usize {
        self.trainable().map_or(0, |layout| layout.padded_len())
    }

    /// All memory of a run with these limits, in the activation type of `D`, and what the driver takes of the device for pinned memory.
    pub fn cost<D: Device>(&self, limits: &Limits) -> Result<Plans> {
        let adapter = self.lora.zip(self.trainable());
        let mut plans = Memory::<D>::plan(self.config, adapter, self.layouts, limits)?;
        if !self.pins_shards {
            if limits.gather == Gather::Host {
                self.layouts.iter().for_each(|layout| plans.host.push("shards", layout.shard_bytes()));
            }
            return Ok(plans);
        }
        let mut shared = 0;
        for (layout, resident) in self.layouts.iter().zip(limits.residency.of_units(self.layouts.len())) {
            match (resident, limits.gather) {
                (false, Gather::Collective) => plans.host.push("shards", layout.shard_bytes()),
                (false, Gather::Host) => {
                    plans.host.push("shards", layout.shard_bytes());
                    shared += layout.gathered_bytes() - layout.shard_bytes();
                }
                (true, Gather::Collective) => plans.device.push("shards", layout.shard_bytes()),
                (true, Gather::Host) => plans.device.push("shards", layout.gathered_bytes()),
            }
        }
        if self.world_size > 1 {
            plans.device.push("received gradients", self.max_gradients() * size_of::<f32>());
        }
        let mapped = plans.host.total_bytes() + shared;
        plans.device.push("tables of pinned memory", mapped / PINNED_BYTES_OF_A_TABLE_BYTE);
        Ok(plans)
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

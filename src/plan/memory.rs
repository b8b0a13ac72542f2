//! Memory: what a choice of [`Limits`] costs, and the cheapest choice that fits into what is there.

use anyhow::{Result, bail};

use crate::device::{Device, MemoryPlan};
use crate::fsdp::exec::adapter_memory;
use crate::fsdp::layout::{TrainableLayout, UnitLayout};
use crate::fsdp::memory::{Limits, Memory, Plans, Residency};
use crate::fsdp::schedule::Recompute;
use crate::fsdp::unit::NumUnits;
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

/// What a rank may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub device: usize,
    pub host: usize,
}

/// What the recipe wants; nothing: what fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    pub recompute: Option<Recompute>,
    /// Units whose shards are resident.
    pub units: Option<usize>,
    pub trainables: Option<bool>,
    pub offload_boundaries: Option<bool>,
}

impl Sizes<'_> {
    fn units(&self) -> NumUnits {
        NumUnits::new(self.config)
    }

    /// All memory of a run with these limits, in the activation type of `D`.
    pub fn cost<D: Device>(&self, limits: &Limits) -> Result<Plans> {
        let adapter = adapter_memory(self.layouts, self.lora, self.world_size);
        let mut plans = Memory::<D>::plan(self.config, adapter, self.layouts, limits)?;
        if !self.pins_shards {
            return Ok(plans);
        }
        for (layout, resident) in self.layouts.iter().zip(limits.residency.of_units(self.layouts.len())) {
            let plan = if resident { &mut plans.device } else { &mut plans.host };
            plan.push("shards", layout.shard_bytes());
        }
        if self.world_size > 1 {
            let bytes = max_gradients(self.lora, self.world_size) * size_of::<f32>();
            plans.device.push("received gradients", bytes);
        }
        Ok(plans)
    }

    /// The limits that cost least time among those that fit: everything on the device; else layers are recomputed; else shards
    /// stream from the host, all but as many as there is room for; else boundaries wait there too; else the adapter and its
    /// optimizer state do. `limits` gives everything but recompute and residency.
    pub fn decide<D: Device>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Result<Limits> {
        let mut smallest = None;
        for choice in self.choices(limits, wishes) {
            let cost = self.cost::<D>(&choice)?;
            if self.fits(&cost, budget) {
                return self.with_more_units::<D>(choice, wishes, budget);
            }
            smallest = Some(cost);
        }
        let Some(cost) = smallest else { bail!("the keys of fsdp leave no choice") };
        let table = |plan: &MemoryPlan| {
            let owners = plan.by_owner().into_iter().take(6);
            owners.map(|(name, bytes)| format!("{name} {}", text(bytes))).collect::<Vec<_>>().join(", ")
        };
        bail!(
            "a rank needs at least {} of device memory ({}) and may take {}; {} of host memory ({}) and may take {}; lower \
             data.max_length, training.per_device_train_batch_size or training.gradient_accumulation_steps, set \
             fsdp.accumulation: micro_batch, raise fsdp.vram_budget or fsdp.host_budget, or start more ranks",
            text(cost.device.total_bytes()),
            table(&cost.device),
            text(budget.device),
            text(cost.host.total_bytes()),
            table(&cost.host),
            text(budget.host)
        )
    }

    fn fits(&self, cost: &Plans, budget: Budget) -> bool {
        cost.device.total_bytes() <= budget.device && cost.host.total_bytes() <= budget.host
    }

    /// Cheapest in time first. Where units stream, none is resident yet.
    fn choices(&self, limits: Limits, wishes: &Wishes) -> Vec<Limits> {
        let all = Residency::ALL;
        let streamed = Residency { units: 0, ..all };
        let offloaded = Residency { boundary_buffers: 0, ..streamed };
        let minimal = Residency { trainables: false, ..offloaded };
        let mut choices: Vec<Limits> = Vec::new();
        for (recompute, residency) in [
            (Recompute::Nothing, all),
            (Recompute::All, all),
            (Recompute::All, streamed),
            (Recompute::All, offloaded),
            (Recompute::All, minimal),
        ] {
            let boundary_buffers = match wishes.offload_boundaries {
                Some(true) => 0,
                Some(false) => usize::MAX,
                None => residency.boundary_buffers,
            };
            let choice = Limits {
                recompute: wishes.recompute.unwrap_or(recompute),
                residency: Residency {
                    units: wishes.units.unwrap_or(residency.units),
                    trainables: wishes.trainables.unwrap_or(residency.trainables),
                    boundary_buffers,
                },
                ..limits
            };
            if choices.last() != Some(&choice) {
                choices.push(choice);
            }
        }
        choices
    }

    /// As many resident units as there is room for.
    fn with_more_units<D: Device>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Result<Limits> {
        if wishes.units.is_some() || limits.residency.units > 0 || !self.pins_shards {
            return Ok(limits);
        }
        let with = |units| Limits { residency: Residency { units, ..limits.residency }, ..limits };
        let (mut fits, mut too_many) = (0, self.units().count() + 1);
        while fits + 1 < too_many {
            let middle = (fits + too_many) / 2;
            match self.fits(&self.cost::<D>(&with(middle))?, budget) {
                true => fits = middle,
                false => too_many = middle,
            }
        }
        Ok(with(fits))
    }
}

/// Longest gradient buffer that will be reduced, in elements.
pub fn max_gradients(lora: Option<&LayerLora>, world_size: usize) -> usize {
    lora.map_or(0, |l| TrainableLayout { len: l.layout.len, num_parts: world_size }.padded_len())
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

//! The parts of the decision what is kept where that the user may fix, and the choices that they leave.

use crate::comm::Gather;
use crate::fsdp::memory::Residency;
use crate::fsdp::schedule::Keep;

/// The parts of the decision that the user has fixed; for the others, `None` or a range, the fastest choice is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    pub keep: KeepRange,
    /// Units whose shards are resident.
    pub units: Option<usize>,
    /// Layers whose dense weights stay on the device.
    pub dense_layers: Option<usize>,
    pub trainables: Option<bool>,
    pub offload_boundaries: Option<bool>,
    /// The only way to gather, or `None` if both are possible.
    pub gather: Option<Gather>,
    pub levers: Levers,
}

/// The keys and options that can make a run fit, under the names that the user's command has for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Levers {
    /// The key that chooses between layer- and micro-batch-major accumulation.
    pub accumulation: Option<&'static str>,
    /// The key that sets the micro-batches of a step, and the value that makes it one micro-batch.
    pub micro_batches: Option<(&'static str, usize)>,
    /// The key that sets the sequences of a micro-batch. `max_length` is the key that sets the tokens of a sequence.
    pub batch_size: Option<&'static str>,
    pub max_length: Option<&'static str>,
    /// Keys that say what is kept where.
    pub placement: Vec<&'static str>,
}

/// The least and the most that forward keeps for backward. As much is kept as memory allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepRange {
    pub least: Keep,
    pub most: Keep,
}

impl KeepRange {
    pub const ANY: KeepRange = KeepRange { least: Keep::NOTHING, most: Keep::EVERYTHING };
    /// Everything is recomputed but LoRA's u.
    pub const AT_MOST_LORA: KeepRange = KeepRange { least: Keep::NOTHING, most: Keep::LORA };

    /// Leaves no choice.
    pub const fn only(keep: Keep) -> KeepRange {
        KeepRange { least: keep, most: keep }
    }

    pub fn is_decided(&self) -> bool {
        self.least == self.most
    }
}

impl Default for KeepRange {
    fn default() -> Self {
        Self::ANY
    }
}

/// Ways to gather that are possible.
pub(super) fn gathers(wishes: &Wishes) -> Vec<Gather> {
    wishes.gather.map_or(vec![Gather::Collective, Gather::Host], |gather| vec![gather])
}

/// Returns the choices of what streams: nothing, then shards, then boundaries too, then also the adapter and its
/// optimizer state.
pub(super) fn residencies(wishes: &Wishes) -> Vec<Residency> {
    let all = Residency::ALL;
    let streamed = Residency { units: 0, ..all };
    let offloaded = Residency { boundary_buffers: 0, ..streamed };
    let minimal = Residency { trainables: false, ..offloaded };
    let mut residencies: Vec<Residency> = Vec::new();
    for residency in [all, streamed, offloaded, minimal] {
        let boundary_buffers = match wishes.offload_boundaries {
            Some(true) => 0,
            Some(false) => usize::MAX,
            None => residency.boundary_buffers,
        };
        let residency = Residency {
            units: wishes.units.unwrap_or(residency.units),
            trainables: wishes.trainables.unwrap_or(residency.trainables),
            boundary_buffers,
        };
        if residencies.last() != Some(&residency) {
            residencies.push(residency);
        }
    }
    residencies
}

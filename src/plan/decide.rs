//! The decision: of all choices of what is kept where, the fastest one that fits.

use anyhow::{Result, bail};

use crate::comm::Gather;
use crate::device::{Device, MemoryPlan};
use crate::fsdp::memory::{Limits, Residency};
use crate::fsdp::schedule::{Accumulation, Keep};

use super::memory::{Cost, text};
use super::throughput::Workload;

/// What a rank may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub device: usize,
    pub host: usize,
}

/// What the recipe wants; nothing: what is fastest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    pub keep: Option<Keep>,
    /// Units whose shards are resident.
    pub units: Option<usize>,
    pub trainables: Option<bool>,
    pub offload_boundaries: Option<bool>,
    /// Nothing where either is possible.
    pub gather: Option<Gather>,
}

/// Ways to share the room that is left between kept activations and resident units.
const SHARES: usize = 4;

/// A choice must be faster by this much to be taken over one that moves less.
const GAIN: f64 = 0.995;

impl Workload<'_> {
    /// The fastest limits that fit. `limits` gives everything but what is kept and where.
    pub fn decide<D: Device>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Result<Limits> {
        let mut best: Option<(f64, Limits)> = None;
        for gather in gathers(wishes) {
            for residency in residencies(wishes) {
                let least = self.least::<D>(Limits { gather, residency, ..limits }, wishes, budget);
                if !self.fits::<D>(&least, budget)? {
                    continue;
                }
                let mut last = None;
                for share in (0..=SHARES).rev() {
                    let choice = self.fill::<D>(least, wishes, budget, share)?;
                    if last.replace(choice) == Some(choice) {
                        continue;
                    }
                    let seconds = self.predict(&choice).seconds;
                    if best.is_none_or(|(fastest, _)| seconds < GAIN * fastest) {
                        best = Some((seconds, choice));
                    }
                }
                // Nothing is faster than what moves nothing and computes nothing again.
                if residency == Residency::ALL
                    && last.is_some_and(|l| l.keep == Keep::EVERYTHING || wishes.keep.is_some())
                {
                    break;
                }
            }
        }
        match best {
            Some((_, choice)) => Ok(choice),
            None => bail!(self.refusal::<D>(limits, wishes, budget)?),
        }
    }

    fn fits<D: Device>(&self, limits: &Limits, budget: Budget) -> Result<bool> {
        let cost = self.sizes.cost::<D>(limits)?;
        Ok(cost.device_bytes() <= budget.device && cost.host_bytes() <= budget.host)
    }

    /// The least of these limits that is wished: nothing kept, and as few units on the device as host memory has room for.
    fn least<D: Device>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Limits {
        let least = Limits { keep: wishes.keep.unwrap_or(Keep::NOTHING), ..limits };
        if wishes.units.is_some() || limits.residency.units > 0 {
            return least;
        }
        let host = |units| self.sizes.cost::<D>(&with_units(least, units)).map(|cost| cost.host_bytes());
        let fits = |units: usize| host(units).is_ok_and(|host| host <= budget.host);
        let units = first(0, self.sizes.layouts.len(), fits);
        with_units(least, if fits(units) { units } else { 0 })
    }

    /// Uses the room that `least`, which fits, leaves: `share` of it first for activations, the rest for units, what is then left
    /// again for activations.
    fn fill<D: Device>(&self, least: Limits, wishes: &Wishes, budget: Budget, share: usize) -> Result<Limits> {
        let (mut choice, num_units) = (least, self.sizes.layouts.len());
        let device = self.sizes.cost::<D>(&choice)?.device_bytes();
        let for_activations = device + (budget.device - device) / SHARES * share;
        if wishes.keep.is_none() {
            choice = self.most_kept::<D>(choice, Budget { device: for_activations, ..budget });
        }
        if wishes.units.is_none() && least.residency.units < num_units {
            let fits = |units: usize| self.fits::<D>(&with_units(choice, units), budget).unwrap_or(false);
            choice = with_units(choice, first(choice.residency.units, num_units, |units| !fits(units + 1)));
        }
        if wishes.keep.is_none() {
            choice = self.most_kept::<D>(choice, budget);
        }
        Ok(choice)
    }

    /// The most that can be kept: the dearest part of as many layers as fit, then the next.
    fn most_kept<D: Device>(&self, limits: Limits, budget: Budget) -> Limits {
        let layers = self.sizes.config.num_hidden_layers;
        let attention_first = self.attention_is_dearer(&limits);
        let with = |stage: usize| {
            let of = |place: usize| stage.saturating_sub(place * layers).min(layers);
            let (attention, mlp) = if attention_first { (of(0), of(1)) } else { (of(1), of(0)) };
            let keep = if stage == 3 * layers { Keep::EVERYTHING } else { Keep { attention, mlp, rest: of(2) } };
            Limits { keep, ..limits }
        };
        let fits = |stage: usize| self.fits::<D>(&with(stage), budget).unwrap_or(false);
        with(first(0, 3 * layers, |stage| !fits(stage + 1)))
    }

    /// What is needed, what is there, and which keys make it fit, those first that cost least.
    fn refusal<D: Device>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Result<String> {
        let smallest = |wishes: &Wishes, limits: Limits| -> Result<Cost> {
            let residency = residencies(wishes).pop().unwrap_or(Residency::ALL);
            let gather = wishes.gather.unwrap_or(Gather::Collective);
            self.sizes.cost::<D>(&self.least::<D>(Limits { gather, residency, ..limits }, wishes, budget))
        };
        let cost = smallest(wishes, limits)?;
        let needs = |cost: &Cost| (cost.device_bytes(), cost.host_bytes());
        let fits = |cost: &Cost| needs(cost).0 <= budget.device && needs(cost).1 <= budget.host;
        let mut keys = Vec::new();
        // Keeps a change that makes it fit; says whether it does.
        let mut offer = |key: String, wishes: &Wishes, limits: Limits| -> Result<bool> {
            let cost = smallest(wishes, limits)?;
            if fits(&cost) {
                let (device, host) = (text(needs(&cost).0), text(needs(&cost).1));
                keys.push(format!("{key} (needs {device} of device and {host} of host memory)"));
            }
            Ok(fits(&cost))
        };
        let free = Wishes { gather: wishes.gather, ..Wishes::default() };
        if *wishes != free {
            let key = "fsdp.offload_params, fsdp.resident_units, fsdp.activation_offload and fsdp.activation_checkpointing: auto";
            offer(key.into(), &free, limits)?;
        }
        let by_micro_batch = Limits { accumulation: Accumulation::MicroBatch, ..limits };
        offer("fsdp.accumulation: micro_batch".into(), wishes, by_micro_batch)?;
        for (key, value) in [
            ("training.gradient_accumulation_steps", limits.max_micro_batches),
            ("training.per_device_train_batch_size", limits.max_tokens / limits.max_length.max(1)),
            ("data.max_length", limits.max_length),
        ] {
            let mut smaller = value / 2;
            while smaller > 0 && !offer(format!("{key}: {smaller}"), wishes, reduced(limits, key, value, smaller))? {
                smaller /= 2;
            }
        }
        for (needed, there, memory, key) in [
            (needs(&cost).0, budget.device, "device memory", "vram_budget"),
            (needs(&cost).1, budget.host, "host memory", "host_budget"),
        ] {
            if needed > there {
                keys.push(format!("{} more of {memory} (a larger machine, or fsdp.{key})", text(needed - there)));
            }
        }
        keys.push("more ranks".into());
        let table = |plan: &MemoryPlan| {
            let owners = plan.by_owner().into_iter().take(6);
            owners.map(|(name, bytes)| format!("{name} {}", text(bytes))).collect::<Vec<_>>().join(", ")
        };
        Ok(format!(
            "a rank needs at least {} of device memory ({}) and may take {}; {} of host memory ({}) and may take {}. What would make \
             it fit: {}",
            text(needs(&cost).0),
            table(&cost.device),
            limit(budget.device),
            text(needs(&cost).1),
            table(&cost.host),
            limit(budget.host),
            keys.into_iter().take(3).collect::<Vec<_>>().join("; ")
        ))
    }
}

fn limit(bytes: usize) -> String {
    if bytes == usize::MAX { "any amount".into() } else { text(bytes) }
}

fn with_units(limits: Limits, units: usize) -> Limits {
    Limits { residency: Residency { units, ..limits.residency }, ..limits }
}

/// The limits where a key goes from `value` to `smaller`.
fn reduced(limits: Limits, key: &str, value: usize, smaller: usize) -> Limits {
    match key {
        "training.gradient_accumulation_steps" => Limits { max_micro_batches: smaller, ..limits },
        "data.max_length" => {
            Limits { max_length: smaller, max_tokens: limits.max_tokens / value.max(1) * smaller, ..limits }
        }
        _ => Limits { max_tokens: limits.max_length * smaller, ..limits },
    }
}

/// The first number from `from` to below `to` that has a property which all later ones have; `to` where none has.
fn first(from: usize, to: usize, has: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (from, to);
    while low < high {
        let middle = (low + high) / 2;
        if has(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// Those that are possible.
fn gathers(wishes: &Wishes) -> Vec<Gather> {
    wishes.gather.map_or(vec![Gather::Collective, Gather::Host], |gather| vec![gather])
}

/// What streams, the least first: shards; boundaries; the adapter and its optimizer state.
fn residencies(wishes: &Wishes) -> Vec<Residency> {
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

#[cfg(test)]
mod tests {
    use super::super::throughput::Links;
    use super::super::throughput::tests::with_workload;
    use super::*;
    use crate::device::cuda::Cuda;
    use crate::fsdp::schedule::Mode;

    type Gpu = Cuda<half::bf16>;
    const GIB: usize = 1 << 30;
    const COLLECTIVE: Wishes = Wishes {
        keep: None,
        units: None,
        trainables: None,
        offload_boundaries: None,
        gather: Some(Gather::Collective),
    };

    /// Llama-3.1-8B over some ranks of a node.
    fn with_8b<T>(world_size: usize, f: impl FnOnce(&Workload<'_>) -> T) -> T {
        with_workload(("llama-3.1-8b", None), world_size, ("rtx3090", 10e9), f)
    }

    fn limits() -> Limits {
        Limits::new(Mode::Train, 1024, 8)
    }

    #[test]
    fn with_room_for_everything_nothing_moves() {
        let budget = Budget { device: 80 * GIB, host: 0 };
        let choice = with_8b(1, |work| work.decide::<Gpu>(limits(), &COLLECTIVE, budget).unwrap());
        assert_eq!((choice.residency, choice.keep), (Residency::ALL, Keep::EVERYTHING));
    }

    #[test]
    fn every_choice_fits_and_more_room_is_never_slower() {
        with_8b(1, |work| {
            let mut last = f64::INFINITY;
            for device in [3, 4, 6, 8, 12, 16, 24, 48].map(|gib| gib * GIB) {
                let budget = Budget { device, host: 16 * GIB };
                let choice = work.decide::<Gpu>(limits(), &COLLECTIVE, budget).unwrap();
                let cost = work.sizes.cost::<Gpu>(&choice).unwrap();
                assert!(cost.device_bytes() <= budget.device && cost.host_bytes() <= budget.host);
                // What is left would not hold one more unit, or one more layer's part.
                assert!(device - cost.device_bytes() < GIB || choice.keep == Keep::EVERYTHING, "{choice:?}");
                let seconds = work.predict(&choice).seconds;
                assert!(seconds <= 1.001 * last, "{device}: {seconds} after {last}");
                last = seconds;
            }
        });
    }

    #[test]
    fn where_the_host_is_short_units_stay_on_the_device() {
        with_8b(1, |work| {
            let of = |host: usize| work.decide::<Gpu>(limits(), &COLLECTIVE, Budget { device: 7 * GIB, host });
            let short = of(3 * GIB).unwrap().residency;
            assert!(short.units > of(16 * GIB).unwrap().residency.units, "{short:?}");
        });
    }

    #[test]
    fn what_is_wished_is_done() {
        let wishes = Wishes { keep: Some(Keep::DEAREST), units: Some(7), trainables: Some(false), ..COLLECTIVE };
        let budget = Budget { device: 40 * GIB, host: 40 * GIB };
        let choice = with_8b(1, |work| work.decide::<Gpu>(limits(), &wishes, budget).unwrap());
        assert_eq!((choice.keep, choice.residency.units, choice.residency.trainables), (Keep::DEAREST, 7, false));
    }

    #[test]
    fn shared_host_memory_is_taken_where_the_way_between_cards_is_slow() {
        let gather = |link: f64| {
            with_8b(2, |work| {
                let work = Workload { links: Links { shards_bytes_per_s: link, replicas_bytes_per_s: link }, ..*work };
                let budget = Budget { device: 6 * GIB, host: 40 * GIB };
                let any = Wishes { gather: None, ..COLLECTIVE };
                work.decide::<Gpu>(Limits::new(Mode::Train, 256, 1), &any, budget).unwrap().gather
            })
        };
        assert_eq!((gather(1e9), gather(300e9)), (Gather::Host, Gather::Collective));
    }

    #[test]
    fn a_refusal_names_keys_that_help() {
        with_8b(1, |work| {
            let budget = Budget { device: 3 * GIB, host: usize::MAX };
            let limits = Limits { max_length: 2048, ..Limits::new(Mode::Train, 4 * 2048, 8) };
            let error = work.decide::<Gpu>(limits, &COLLECTIVE, budget).unwrap_err().to_string();
            assert!(error.contains("a rank needs at least") && error.contains("may take any amount"), "{error}");
            let key = "training.per_device_train_batch_size: ";
            let named = error.split(key).nth(1).unwrap_or_else(|| panic!("{key} is not in {error}"));
            let smaller: usize = named.split(' ').next().unwrap().parse().unwrap();
            let limits = Limits { max_tokens: smaller * 2048, ..limits };
            work.decide::<Gpu>(limits, &COLLECTIVE, budget).unwrap();
        });
    }
}

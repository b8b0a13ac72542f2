//! Decides what is kept where: takes the fastest choice that fits.

use anyhow::{Context, Result};

use crate::comm::Gather;
use crate::device::{MemoryPlan, Ops};
use crate::fsdp::memory::{Limits, Residency};
use crate::fsdp::schedule::{Accumulation, Keep, Mode};
use crate::model::stage::Widths;

use super::memory::{Cost, text};
use super::throughput::Workload;
use super::wishes::{KeepRange, Levers, Wishes, gathers, residencies};

/// The memory that a rank may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub device: usize,
    pub host: usize,
}

/// No choice fits. The text says how much is needed, how much is there, and which keys would help.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DoesNotFit(String);

/// Ways to share the room that is left between kept activations and resident units.
const SHARES: usize = 4;

/// A choice must be faster by this much to be taken over one that moves less.
const GAIN: f64 = 0.995;

impl Workload<'_> {
    /// The fastest limits that fit. `limits` gives everything but what is kept and where.
    ///
    /// # Errors
    /// [`DoesNotFit`] where none does.
    pub fn decide<D: Ops>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Result<Limits> {
        self.check_magnitude(&limits, wishes)?;
        let mut best: Option<(f64, Limits)> = None;
        for gather in gathers(wishes) {
            for residency in residencies(wishes) {
                let least = self.least::<D>(Limits { gather, residency, ..limits }, wishes, budget);
                if !self.fits::<D>(&least, budget)? {
                    continue;
                }
                let mut choices = Vec::new();
                for share in (0..=SHARES).rev() {
                    let choice = self.fill::<D>(least, wishes, budget, share)?;
                    choices.push(self.most_dense::<D>(choice, wishes, budget));
                }
                let dense = self.most_dense::<D>(least, wishes, budget);
                choices.push(self.most_kept::<D>(dense, wishes, budget));
                choices.dedup();
                for choice in &choices {
                    let seconds = self.predict(choice).seconds;
                    if best.is_none_or(|(fastest, _)| seconds < GAIN * fastest) {
                        best = Some((seconds, *choice));
                    }
                }
                // No choice is faster than one that moves nothing, recomputes as little as it may, and dequantizes no layer again.
                let is_fastest = |choice: &Limits| {
                    let is_dense = choice.dense_layers >= self.sizes.spec.num_layers();
                    choice.keep == wishes.keep.most && (is_dense || !self.may_be_dense::<D>(choice, wishes))
                };
                if residency == Residency::ALL && choices.iter().any(is_fastest) {
                    break;
                }
            }
        }
        match best {
            Some((_, choice)) => Ok(choice),
            None => Err(DoesNotFit(self.refusal::<D>(limits, wishes, budget)?).into()),
        }
    }

    /// Refuses what no machine holds before it is planned: sizes of buffers, and lists of them, that are beyond all
    /// bounds.
    fn check_magnitude(&self, limits: &Limits, wishes: &Wishes) -> Result<(), DoesNotFit> {
        const MOST_BYTES: f64 = (1u64 << 50) as f64;
        /// A schedule has some actions for each of them, and is gone through for each choice.
        const MOST_INPUTS: usize = 1 << 18;
        let spec = self.sizes.spec;
        let inputs = limits.max_micro_batches * (spec.num_layers() + 1);
        if inputs > MOST_INPUTS {
            let lever = wishes.levers.micro_batches.map_or(String::new(), |(name, _)| format!(": lower {name}"));
            return Err(DoesNotFit(format!(
                "a step has {} micro-batches in {} layers, {inputs} inputs of layers, and at most {MOST_INPUTS} can be planned{lever}",
                limits.max_micro_batches,
                spec.num_layers()
            )));
        }
        let widest = Widths::new(spec, None).widest();
        let trains_layer_major = limits.mode == Mode::Train && limits.accumulation == Accumulation::Layer;
        let boundaries = if trains_layer_major { inputs } else { 2 };
        let tokens = limits.max_tokens.max(limits.max_context) as f64;
        let bytes = tokens * size_of::<u16>() as f64 * (widest as f64 + boundaries as f64 * spec.hidden_size as f64);
        if bytes < MOST_BYTES {
            return Ok(());
        }
        Err(DoesNotFit(format!(
            "a rank needs more than {} for activations: {} micro-batches of {} tokens in {} layers",
            text(MOST_BYTES as usize),
            limits.max_micro_batches,
            tokens,
            spec.num_layers()
        )))
    }

    fn fits<D: Ops>(&self, limits: &Limits, budget: Budget) -> Result<bool> {
        let cost = self.sizes.cost::<D>(limits)?;
        Ok(cost.device_bytes() <= budget.device && cost.host_bytes() <= budget.host)
    }

    /// Returns the choice that takes least of the device within the wishes: as few activations are kept as may be, and
    /// as few units are on the device as host memory has room for the others.
    fn least<D: Ops>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Limits {
        let dense_layers = wishes.dense_layers.unwrap_or(0);
        let least = Limits { keep: wishes.keep.least, dense_layers, ..limits };
        if wishes.units.is_some() || limits.residency.units > 0 {
            return least;
        }
        let host = |units| self.sizes.cost::<D>(&with_units(least, units)).map(|cost| cost.host_bytes());
        let fits = |units: usize| host(units).is_ok_and(|host| host <= budget.host);
        let units = first(0, self.sizes.layouts.len(), fits);
        with_units(least, if fits(units) { units } else { 0 })
    }

    /// Uses the room that `least`, which fits, leaves: `share` of it first for activations, the rest for units, what
    /// is then left again for activations.
    fn fill<D: Ops>(&self, least: Limits, wishes: &Wishes, budget: Budget, share: usize) -> Result<Limits> {
        let (mut choice, num_units) = (least, self.sizes.layouts.len());
        let device = self.sizes.cost::<D>(&choice)?.device_bytes();
        let for_activations = device + (budget.device - device) / SHARES * share;
        choice = self.most_kept::<D>(choice, wishes, Budget { device: for_activations, ..budget });
        if wishes.units.is_none() && least.residency.units < num_units {
            let fits = |units: usize| self.fits::<D>(&with_units(choice, units), budget).unwrap_or(false);
            let units = first(choice.residency.units, num_units, |units| !fits(units + 1));
            // If all units are resident they may need no slots, and all may fit where one less would not.
            choice = with_units(choice, if fits(num_units) { num_units } else { units });
        }
        Ok(self.most_kept::<D>(choice, wishes, budget))
    }

    /// Returns the choice that keeps most within the wishes: the group that is dearest to recompute for its size in as
    /// many layers as fit, then the next group.
    fn most_kept<D: Ops>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Limits {
        if wishes.keep.is_decided() {
            return limits;
        }
        let KeepRange { least, most } = wishes.keep;
        let layers = self.sizes.spec.num_layers();
        let attention_first = self.attention_is_dearer(&limits);
        let with = |stage: usize| {
            let of = |place: usize| stage.saturating_sub(place * layers).min(layers);
            let (attention, mlp) = if attention_first { (of(1), of(2)) } else { (of(2), of(1)) };
            let kept = Keep { lora: of(0), attention, mlp, rest: of(3) };
            let keep = if stage == 4 * layers { most } else { kept.at_least(least).at_most(most) };
            Limits { keep, ..limits }
        };
        let fits = |stage: usize| self.fits::<D>(&with(stage), budget).unwrap_or(false);
        with(first(0, 4 * layers, |stage| !fits(stage + 1)))
    }

    /// Returns whether dense weights may take what room is left: a rank has the whole base on its device.
    fn may_be_dense<D: Ops>(&self, limits: &Limits, wishes: &Wishes) -> bool {
        let resident = limits.residency.of_units(self.sizes.layouts.len());
        let mut units = self.sizes.layouts.iter().zip(resident);
        wishes.dense_layers.is_none() && units.all(|(layout, resident)| limits.has_whole::<D>(layout, resident))
    }

    /// Returns the choice with the dense weights of as many layers as there is still room for, where they may take it.
    fn most_dense<D: Ops>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Limits {
        if !self.may_be_dense::<D>(&limits, wishes) {
            return limits;
        }
        let with = |dense_layers: usize| Limits { dense_layers, ..limits };
        let fits = |num: usize| self.fits::<D>(&with(num), budget).unwrap_or(false);
        with(first(0, self.sizes.spec.num_layers(), |num| !fits(num + 1)))
    }

    /// Returns the cost of the choice that lacks least memory; of several such choices, that of the one that takes least
    /// of the device.
    fn smallest<D: Ops>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Result<Cost> {
        let gather = wishes.gather.unwrap_or(Gather::Collective);
        let cost = |residency: Residency| {
            self.sizes.cost::<D>(&self.least::<D>(Limits { gather, residency, ..limits }, wishes, budget))
        };
        let lacks = |cost: &Cost| {
            let host = cost.host_bytes().saturating_sub(budget.host);
            cost.device_bytes().saturating_sub(budget.device).saturating_add(host)
        };
        let costs = residencies(wishes).into_iter().rev().map(cost).collect::<Result<Vec<Cost>>>()?;
        costs.into_iter().min_by_key(lacks).context("there is no choice of what is kept where")
    }

    /// Returns the text of a refusal: how much is needed, how much is there, and which keys make the run fit, the
    /// cheapest first.
    fn refusal<D: Ops>(&self, limits: Limits, wishes: &Wishes, budget: Budget) -> Result<String> {
        let cost = self.smallest::<D>(limits, wishes, budget)?;
        let needs = |cost: &Cost| (cost.device_bytes(), cost.host_bytes());
        let fits = |cost: &Cost| needs(cost).0 <= budget.device && needs(cost).1 <= budget.host;
        let mut keys = Vec::new();
        // Keeps a change that makes the run fit, and says whether it does.
        let mut offer = |key: String, wishes: &Wishes, limits: Limits| -> Result<bool> {
            let cost = self.smallest::<D>(limits, wishes, budget)?;
            if fits(&cost) {
                let (device, host) = (text(needs(&cost).0), text(needs(&cost).1));
                keys.push(format!("{key} (needs {device} of device and {host} of host memory)"));
            }
            Ok(fits(&cost))
        };
        let Levers { accumulation, micro_batches, batch_size, max_length, placement } = &wishes.levers;
        let free = Wishes { gather: wishes.gather, levers: wishes.levers.clone(), ..Wishes::default() };
        if *wishes != free && !placement.is_empty() {
            offer(format!("{}: auto", placement.join(", ")), &free, limits)?;
        }
        if let Some(key) = accumulation {
            let by_micro_batch = Limits { accumulation: Accumulation::MicroBatch, ..limits };
            offer(format!("{key}: micro_batch"), wishes, by_micro_batch)?;
        }
        let sequences = limits.max_tokens / limits.max_length.max(1);
        let with_micro_batches = |n| Limits { max_micro_batches: n, ..limits };
        let with_sequences = |n| Limits { max_tokens: limits.max_length * n, ..limits };
        let with_length = |n| Limits { max_length: n, max_tokens: sequences * n, ..limits };
        let smaller: [(_, usize, &dyn Fn(usize) -> Limits); 3] = [
            (*micro_batches, limits.max_micro_batches, &with_micro_batches),
            (batch_size.map(|name| (name, 1)), sequences, &with_sequences),
            (max_length.map(|name| (name, 1)), limits.max_length, &with_length),
        ];
        for (lever, value, with) in smaller {
            let Some((name, factor)) = lever else { continue };
            let mut smaller = value / 2;
            while smaller > 0 && !offer(format!("{name}: {}", smaller * factor), wishes, with(smaller))? {
                smaller /= 2;
            }
        }
        for (needed, there, memory, key) in [
            (needs(&cost).0, budget.device, "device memory", "vram_budget"),
            (needs(&cost).1, budget.host, "host memory", "host_budget"),
        ] {
            if needed > there {
                keys.push(format!(
                    "{} more of {memory} (a larger machine, or fsdp.{key}) for each rank",
                    text(needed - there)
                ));
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

/// The first number from `from` to below `to` that has a property which all later ones have; `to` where none has.
fn first(from: usize, to: usize, has: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (from, to);
    while low < high {
        let middle = (low + high) / 2;
        if has(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::super::throughput::Links;
    use super::super::throughput::tests::with_workload;
    use super::*;
    use crate::device::cuda::Cuda;

    type Gpu = Cuda<half::bf16>;
    const GIB: usize = 1 << 30;

    /// The wishes of `train` with gathers by collectives.
    fn collective() -> Wishes {
        let levers = Levers {
            accumulation: Some("fsdp.accumulation"),
            micro_batches: Some(("training.gradient_accumulation_steps", 1)),
            batch_size: Some("training.per_device_train_batch_size"),
            max_length: Some("data.max_length"),
            placement: vec!["fsdp.offload_params"],
        };
        Wishes { gather: Some(Gather::Collective), levers, ..Wishes::default() }
    }

    /// Llama-3.1-8B over some ranks of a node.
    fn with_8b<T>(world_size: usize, f: impl FnOnce(&Workload<'_>) -> T) -> T {
        with_workload(("llama-3.1-8b", None), world_size, ("rtx3090", 10e9), f)
    }

    fn limits() -> Limits {
        Limits::new(Mode::Train, 1024, 8)
    }

    #[test]
    fn with_room_for_everything_nothing_moves() {
        let budget = Budget { device: 80 * GIB, host: 16 << 20 };
        let choice = with_8b(1, |work| work.decide::<Gpu>(limits(), &collective(), budget).unwrap());
        assert_eq!((choice.residency, choice.keep), (Residency::ALL, Keep::EVERYTHING));
    }

    #[test]
    fn every_choice_fits_and_more_room_is_never_slower() {
        with_8b(1, |work| {
            let mut last = f64::INFINITY;
            for device in [3, 4, 6, 8, 12, 16, 24, 48].map(|gib| gib * GIB) {
                let budget = Budget { device, host: 16 * GIB };
                let choice = work.decide::<Gpu>(limits(), &collective(), budget).unwrap();
                let cost = work.sizes.cost::<Gpu>(&choice).unwrap();
                assert!(cost.device_bytes() <= budget.device && cost.host_bytes() <= budget.host);
                // The room that is left would hold neither one more unit nor one more layer's group.
                assert!(device - cost.device_bytes() < GIB || choice.keep == Keep::EVERYTHING, "{choice:?}");
                let seconds = work.predict(&choice).seconds;
                assert!(seconds <= 1.001 * last, "{device}: {seconds} after {last}");
                last = seconds;
            }
        });
    }

    #[test]
    fn u_is_kept_first_and_in_as_many_layers_as_there_is_room_for() {
        with_8b(1, |work| {
            let wishes = Wishes { keep: KeepRange::AT_MOST_LORA, ..collective() };
            let cost = |keep| work.sizes.cost::<Gpu>(&Limits { keep, ..limits() }).unwrap().device_bytes();
            let (without, with) = (cost(Keep::NOTHING), cost(Keep::LORA));
            let of = |device: usize, wishes: &Wishes| {
                let (units, trainables, offload_boundaries) = (Some(usize::MAX), Some(true), Some(false));
                let resident = Wishes { units, trainables, offload_boundaries, ..wishes.clone() };
                work.decide::<Gpu>(limits(), &resident, Budget { device, host: 40 * GIB }).unwrap()
            };
            assert_eq!(of(40 * GIB, &wishes).keep, Keep::LORA, "nothing else where there is room");
            assert_eq!(of(without, &wishes).keep, Keep::NOTHING, "no u where there is none");
            let some = of(without + (with - without) / 2, &wishes).keep;
            assert!((1..32).contains(&some.lora) && Keep { lora: 0, ..some } == Keep::NOTHING, "{some:?}");
            // The fastest choice begins with u too.
            assert_eq!(of(without + (with - without) / 2, &collective()).keep, some);
            assert!(of(with + GIB, &collective()).keep.lora >= 32);
        });
    }

    #[test]
    fn dense_weights_take_what_everything_else_leaves() {
        with_8b(1, |work| {
            let bytes = |dense_layers| {
                let keep = Keep::EVERYTHING;
                work.sizes.cost::<Gpu>(&Limits { keep, dense_layers, ..limits() }).unwrap().device_bytes()
            };
            let of = |device: usize, wishes: &Wishes| {
                work.decide::<Gpu>(limits(), wishes, Budget { device, host: 40 * GIB }).unwrap()
            };
            let (none, all) = (bytes(0), bytes(32));
            // 6.98 billion weights, and the buffers that no layer needs any more.
            let layer = 2 * 218_103_808;
            assert_eq!(all - none, 31 * layer);
            assert_eq!(of(none, &collective()).dense_layers, 0);
            assert_eq!(of(none + 7 * layer + layer / 2, &collective()).dense_layers, 7);
            assert_eq!(of(all, &collective()).dense_layers, 32);
            let less = of(none - GIB, &Wishes { offload_boundaries: Some(false), ..collective() });
            assert!(less.dense_layers == 0 && less.keep != Keep::EVERYTHING, "activations come first: {less:?}");
            assert_eq!(of(all, &Wishes { dense_layers: Some(3), ..collective() }).dense_layers, 3);
            assert_eq!(of(all, &Wishes { units: Some(4), ..collective() }).dense_layers, 0, "the base is not there");
            let seconds =
                |dense_layers| work.predict(&Limits { dense_layers, keep: Keep::EVERYTHING, ..limits() }).seconds;
            assert!(seconds(32) < seconds(16) && seconds(16) < seconds(0));
        });
        // Each rank of two has half of the base.
        let budget = Budget { device: 80 * GIB, host: 40 * GIB };
        assert_eq!(with_8b(2, |work| work.decide::<Gpu>(limits(), &collective(), budget).unwrap().dense_layers), 0);
    }

    #[test]
    fn where_the_host_is_short_units_stay_on_the_device() {
        with_8b(1, |work| {
            let of = |host: usize| work.decide::<Gpu>(limits(), &collective(), Budget { device: 7 * GIB, host });
            let short = of(3 * GIB).unwrap().residency;
            assert!(short.units > of(16 * GIB).unwrap().residency.units, "{short:?}");
        });
    }

    #[test]
    fn what_is_wished_is_done() {
        let wishes =
            Wishes { keep: KeepRange::only(Keep::DEAREST), units: Some(7), trainables: Some(false), ..collective() };
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
                let any = Wishes { gather: None, ..collective() };
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
            let error = work.decide::<Gpu>(limits, &collective(), budget).unwrap_err();
            let error = error.downcast_ref::<DoesNotFit>().unwrap().to_string();
            assert!(error.contains("a rank needs at least") && error.contains("may take any amount"), "{error}");
            let key = "training.per_device_train_batch_size: ";
            let named = error.split(key).nth(1).unwrap_or_else(|| panic!("{key} is not in {error}"));
            let smaller: usize = named.split(' ').next().unwrap().parse().unwrap();
            let limits = Limits { max_tokens: smaller * 2048, ..limits };
            work.decide::<Gpu>(limits, &collective(), budget).unwrap();
        });
    }

    #[test]
    fn a_refusal_asks_for_no_host_memory_that_the_device_can_spare() {
        with_8b(1, |work| {
            let budget = Budget { device: 40 * GIB, host: 1 << 20 };
            let limits = Limits { snapshot: true, ..limits() };
            let error = work.decide::<Gpu>(limits, &collective(), budget).unwrap_err().to_string();
            assert!(error.contains("of host memory (snapshot "), "{error}");
        });
    }

    #[test]
    fn a_refusal_names_what_the_command_reads_alone() {
        with_8b(1, |work| {
            let levers = Levers { max_length: Some("--max-length"), ..Levers::default() };
            let wishes = Wishes { levers, keep: KeepRange::only(Keep::NOTHING), ..collective() };
            let limits = Limits { max_length: 1 << 20, ..Limits::new(Mode::Score, 1 << 20, 4) };
            let budget = Budget { device: 3 * GIB, host: usize::MAX };
            let error = work.decide::<Gpu>(limits, &wishes, budget).unwrap_err().to_string();
            assert!(
                error.contains("--max-length: ") && !error.contains("training.") && !error.contains("data."),
                "{error}"
            );
        });
    }

    #[test]
    fn sizes_beyond_all_bounds_do_not_fit() {
        with_8b(1, |work| {
            for limits in [
                Limits::new(Mode::Train, 1 << 31, 1 << 12),
                Limits::new(Mode::Train, 2, 1 << 14),
                Limits::new(Mode::Generate, 1 << 37, 1),
            ] {
                let budget = Budget { device: usize::MAX, host: usize::MAX };
                let error = work.decide::<Gpu>(limits, &collective(), budget).unwrap_err();
                assert!(error.is::<DoesNotFit>(), "{error}");
            }
        });
    }
}

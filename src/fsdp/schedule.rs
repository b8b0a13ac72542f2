//! The schedule of a run: a pure function makes the list of actions from the inputs.
//!
//! Layer-major order gathers each unit once a pass and sends all micro-batches through it, so the boundaries of all
//! micro-batches travel between layers. Micro-batch-major order sends one micro-batch after the other through the
//! whole model, which gathers everything 2·M times. Both sum gradients in the same order, so they give the same bits.
#![doc = include_str!("schedule.md")]

use serde::{Deserialize, Serialize};

use crate::choices::choices;
use crate::model::stage::Saved;

use super::offload;
use super::unit::{NumUnits, Unit};

/// The purpose of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forward, loss, backward, update.
    Train,
    /// Forward and the log-probability of each target token.
    Score,
    /// Forward and the logits of the last token.
    Generate,
}

choices! {
    /// The outer loop of a step.
    Accumulation {
        /// Layers: each is gathered once a pass, for all micro-batches.
        Layer = "layer",
        /// Micro-batches: each gathers all layers.
        MicroBatch = "micro_batch",
    }
}

/// The groups of saved values ([`Saved`]) that forward keeps for backward, besides boundaries: for each group the
/// number of layers that keep it, counted from the last layer. The other layers compute it again. A layer that keeps
/// any group keeps LoRA's u too, so that there are fewer combinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Absent in lines of benchmarks that are older than the group.
    #[serde(default)]
    pub lora: usize,
    pub attention: usize,
    pub mlp: usize,
    pub rest: usize,
}

impl Keep {
    /// Keeps no group, so that all layers are recomputed.
    pub const NOTHING: Keep = Keep { lora: 0, attention: 0, mlp: 0, rest: 0 };
    /// Keeps LoRA's u alone, which costs most to compute again for its size.
    pub const LORA: Keep = Keep { lora: usize::MAX, ..Keep::NOTHING };
    /// Keeps the groups that cost most to compute again.
    pub const DEAREST: Keep = Keep { attention: usize::MAX, mlp: usize::MAX, ..Keep::LORA };
    /// Keeps every group, so that no layer is recomputed.
    pub const EVERYTHING: Keep = Keep { rest: usize::MAX, ..Keep::DEAREST };

    /// Returns this choice for a model of `layers` layers.
    pub fn clamped(self, layers: usize) -> Keep {
        let lora = self.lora.max(self.attention).max(self.mlp).max(self.rest);
        let all = Keep { lora: layers, attention: layers, mlp: layers, rest: layers };
        Keep { lora, ..self }.at_most(all)
    }

    /// Returns the larger number of each group.
    pub fn at_least(self, least: Keep) -> Keep {
        self.with(least, usize::max)
    }

    /// Returns the smaller number of each group.
    pub fn at_most(self, most: Keep) -> Keep {
        self.with(most, usize::min)
    }

    fn with(self, other: Keep, f: fn(usize, usize) -> usize) -> Keep {
        Keep {
            lora: f(self.lora, other.lora),
            attention: f(self.attention, other.attention),
            mlp: f(self.mlp, other.mlp),
            rest: f(self.rest, other.rest),
        }
    }

    /// Returns the groups that layer `layer` of `layers` keeps.
    pub fn of(&self, layer: usize, layers: usize) -> Saved {
        let kept = |num: usize| layers - layer <= num;
        let Keep { lora, attention, mlp, rest } = self.clamped(layers);
        Saved { lora: kept(lora), attention: kept(attention), mlp: kept(mlp), rest: kept(rest) }
    }
}

/// A micro-batch as the schedule sees it, alike on every rank. Its tokens and documents differ from rank to rank and
/// decide nothing here, so they are in the batch itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// True if the adapter takes part, false if the base alone computes.
    pub adapter: bool,
    /// True if the micro-batch has a backward pass. Dropout is drawn for these alone.
    pub gradient: bool,
}

impl Descriptor {
    /// A micro-batch to learn from.
    pub const TRAINED: Descriptor = Descriptor { adapter: true, gradient: true };

    /// Describes a micro-batch of which only the scores are wanted, with the adapter or without it.
    pub fn scored(adapter: bool) -> Descriptor {
        Descriptor { adapter, gradient: false }
    }

    /// Describes what a run in a mode is planned for.
    pub fn of(mode: Mode) -> Descriptor {
        if mode == Mode::Train { Self::TRAINED } else { Self::scored(true) }
    }
}

/// The inputs of a schedule, which are the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inputs {
    pub units: NumUnits,
    pub mode: Mode,
    /// One for each of M micro-batches. M is the largest of any rank: a rank that has fewer runs empty ones.
    pub micro_batches: Vec<Descriptor>,
    pub accumulation: Accumulation,
    pub keep: Keep,
    /// Buffers for gathered units.
    pub num_slots: usize,
    /// Buffers for boundaries on the device, see [`Inputs::min_boundary_buffers`].
    pub num_boundary_buffers: usize,
}

/// Gradient buffers of a layer-major schedule: one accumulates while the other is reduced.
pub const NUM_GRAD_SLOTS: usize = 2;

/// One item of a schedule. `micro` is a micro-batch, `slot` a slot, `grad_slot` a gradient buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Starts the all-gather of a unit's frozen and trainable shards into a slot.
    Gather {
        unit: Unit,
        slot: usize,
    },
    /// Waits for a gather; the slot holds the unit from here on.
    Wait {
        unit: Unit,
        slot: usize,
    },
    /// Makes the unit's dense weights from its slot.
    Dequantize {
        unit: Unit,
        slot: usize,
    },
    /// Gives up the gathered unit; the slot is free from here on.
    Reshard {
        unit: Unit,
        slot: usize,
    },
    Embed {
        micro: usize,
    },
    /// With `saves`, backward reads all saved values as this leaves them.
    Forward {
        layer: usize,
        micro: usize,
        saves: bool,
    },
    /// Gathers and norms the tokens that count in the loss.
    HeadBegin {
        micro: usize,
    },
    HeadPiece {
        piece: usize,
        micro: usize,
    },
    /// The log-probability of each target token comes to the host.
    HeadScore {
        micro: usize,
    },
    /// The objective's coefficients go to the device, and the gradient of the last boundary is made.
    HeadBackward {
        micro: usize,
    },
    Recompute {
        layer: usize,
        micro: usize,
    },
    /// Adds to the layer's gradients, after clearing them when `first`.
    Backward {
        layer: usize,
        micro: usize,
        grad_slot: usize,
        first: bool,
    },
    /// Starts the reduce-scatter of a layer's gradients.
    Reduce {
        layer: usize,
        grad_slot: usize,
    },
    /// Waits for a reduce-scatter; the layer's gradient shard is there and the gradient buffer is free from here on.
    WaitReduce {
        layer: usize,
        grad_slot: usize,
    },
    /// Starts copying a micro-batch's input of a layer to the host; its device buffer is not free yet.
    Put {
        layer: usize,
        micro: usize,
    },
    /// Waits for a put; the boundary is on the host and its device buffer is free from here on.
    WaitPut {
        layer: usize,
        micro: usize,
    },
    /// Starts copying a boundary back, into a free device buffer.
    Fetch {
        layer: usize,
        micro: usize,
    },
    /// Waits for a fetch; the boundary is on the device from here on.
    WaitFetch {
        layer: usize,
        micro: usize,
    },
    /// Computes the global norm, clips, and updates with AdamW.
    Optimizer,
}

impl Action {
    /// Returns whether the action waits for another queue.
    pub fn is_wait(&self) -> bool {
        use Action::{Wait, WaitFetch, WaitPut, WaitReduce};
        matches!(self, Wait { .. } | WaitReduce { .. } | WaitPut { .. } | WaitFetch { .. })
    }
}

impl Inputs {
    /// Number of gradient buffers that the schedule uses.
    pub fn num_grad_slots(&self) -> usize {
        match (self.mode, self.accumulation) {
            (Mode::Train, Accumulation::Layer) => NUM_GRAD_SLOTS.min(self.units.layers),
            (Mode::Train, Accumulation::MicroBatch) => self.units.layers,
            _ => 0,
        }
    }

    /// M.
    pub fn num_micro_batches(&self) -> usize {
        self.micro_batches.len()
    }

    /// The micro-batches that have a backward pass, in their order.
    pub fn trained(&self) -> impl DoubleEndedIterator<Item = usize> {
        (0..self.num_micro_batches()).filter(|&micro| self.micro_batches[micro].gradient)
    }

    /// Returns, for each micro-batch, its place among those that have a backward pass; `None` if it has none.
    pub fn places_of_trained(&self) -> Vec<Option<usize>> {
        let mut num_trained = 0;
        let place = |descriptor: &Descriptor| {
            num_trained += usize::from(descriptor.gradient);
            descriptor.gradient.then(|| num_trained - 1)
        };
        self.micro_batches.iter().map(place).collect()
    }

    /// Number of micro-batches whose boundaries and kept activations live at the same time.
    pub fn num_live_micro_batches(&self) -> usize {
        match self.accumulation {
            Accumulation::Layer => self.num_micro_batches(),
            Accumulation::MicroBatch => 1,
        }
    }

    /// Number of live micro-batches that have a backward pass.
    pub(super) fn num_live_trained(&self) -> usize {
        self.trained().count().min(self.num_live_micro_batches())
    }

    /// Number of device buffers that hold all boundaries of a step. A micro-batch without backward needs one buffer,
    /// and one more is being written.
    pub fn max_boundary_buffers(&self) -> usize {
        let trained = self.num_live_trained();
        let scored = self.num_live_micro_batches() - trained;
        trained * (self.units.layers + 1) + if scored > 0 { scored + 1 } else { 0 }
    }

    /// Fewest device buffers that a step can run with: those of one layer, and two that are on their way to or from
    /// the host.
    pub fn min_boundary_buffers(&self) -> usize {
        (self.num_live_micro_batches() + 2).min(self.max_boundary_buffers())
    }

    /// Number of boundaries that wait for backward on the host.
    pub fn num_offloaded_boundaries(&self) -> usize {
        match self.num_boundary_buffers < self.max_boundary_buffers() {
            true => {
                self.num_live_trained() * self.units.layers + self.min_boundary_buffers() - self.num_boundary_buffers
            }
            false => 0,
        }
    }

    /// Returns whether some activations of a layer are computed again for a micro-batch. If nothing runs between its
    /// forward through the last layer and its backward but the head, the values still lie where forward left them.
    pub fn recomputes(&self, layer: usize, micro: usize) -> bool {
        let turns_back = match self.accumulation {
            Accumulation::Layer => self.trained().next() == Some(micro) && micro + 1 == self.num_micro_batches(),
            Accumulation::MicroBatch => true,
        };
        let layers = self.units.layers;
        let is_there = turns_back && layer + 1 == layers;
        !is_there && !self.keep.of(layer, layers).all()
    }

    fn grad_slot(&self, layer: usize) -> usize {
        layer % self.num_grad_slots().max(1)
    }
}

/// A unit and the actions that run while it is unsharded.
struct Visit {
    unit: Unit,
    /// Actions that run before the unit is needed.
    before: Vec<Action>,
    compute: Vec<Action>,
    after: Vec<Action>,
}

/// Builds the list of actions.
pub fn build(inputs: &Inputs) -> Vec<Action> {
    let all: Vec<usize> = (0..inputs.num_micro_batches()).collect();
    let mut visits = Vec::new();
    match inputs.accumulation {
        Accumulation::Layer => pass(inputs, &all, &mut visits),
        Accumulation::MicroBatch => all.chunks(1).for_each(|micro| pass(inputs, micro, &mut visits)),
    }
    let mut actions = weave(&merge(visits), inputs.num_slots);
    if inputs.mode == Mode::Train {
        let reduced_late = (0..inputs.units.layers).filter(|&layer| layer < inputs.num_grad_slots());
        actions
            .extend(reduced_late.rev().map(|layer| Action::WaitReduce { layer, grad_slot: inputs.grad_slot(layer) }));
        actions.push(Action::Optimizer);
    }
    offload::with_copies(&actions, inputs)
}

/// Adds the visits of forward (and backward) of some micro-batches through the whole model.
fn pass(inputs: &Inputs, micros: &[usize], visits: &mut Vec<Visit>) {
    let NumUnits { layers, head_pieces } = inputs.units;
    let trained: Vec<usize> = micros.iter().copied().filter(|&micro| inputs.micro_batches[micro].gradient).collect();
    let visit = |unit| Visit { unit, before: Vec::new(), compute: Vec::new(), after: Vec::new() };
    for layer in 0..layers {
        let mut v = visit(Unit::Layer(layer));
        for (i, &micro) in micros.iter().enumerate() {
            // The host looks up the next micro-batch while the device computes.
            match (layer, i) {
                (0, 0) => v.before.push(Action::Embed { micro }),
                (0, _) => v.compute.push(Action::Embed { micro }),
                _ => {}
            }
            let saves = inputs.micro_batches[micro].gradient && !inputs.recomputes(layer, micro);
            v.compute.push(Action::Forward { layer, micro, saves });
        }
        visits.push(v);
    }
    for piece in 0..head_pieces {
        let mut v = visit(Unit::HeadPiece(piece));
        if piece == 0 {
            v.before.extend(micros.iter().map(|&micro| Action::HeadBegin { micro }));
        }
        v.compute.extend(micros.iter().map(|&micro| Action::HeadPiece { piece, micro }));
        if piece + 1 == head_pieces {
            // An objective may need the scores of several micro-batches before it has the coefficients of one.
            v.after.extend(micros.iter().map(|&micro| Action::HeadScore { micro }));
            v.after.extend(trained.iter().map(|&micro| Action::HeadBackward { micro }));
        }
        visits.push(v);
    }
    if !trained.is_empty() {
        visits.extend((0..layers).rev().map(|layer| backward_visit(inputs, &trained, layer)));
    }
}

/// Makes the visit of backward of the micro-batches that have one.
fn backward_visit(inputs: &Inputs, trained: &[usize], layer: usize) -> Visit {
    let (first, last) = (inputs.trained().next(), inputs.trained().next_back());
    let grad_slot = inputs.grad_slot(layer);
    let (mut before, mut compute, mut after) = (Vec::new(), Vec::new(), Vec::new());
    let reused = layer + inputs.num_grad_slots();
    if trained.first().copied() == first && reused < inputs.units.layers {
        before.push(Action::WaitReduce { layer: reused, grad_slot });
    }
    for &micro in trained {
        if inputs.recomputes(layer, micro) {
            compute.push(Action::Recompute { layer, micro });
        }
        compute.push(Action::Backward { layer, micro, grad_slot, first: Some(micro) == first });
    }
    if trained.last().copied() == last {
        after.push(Action::Reduce { layer, grad_slot });
    }
    Visit { unit: Unit::Layer(layer), before, compute, after }
}

/// Merges neighbouring visits of the same unit: layer 0 ends the backward of one micro-batch and begins the forward
/// of the next.
fn merge(visits: Vec<Visit>) -> Vec<Visit> {
    let mut merged: Vec<Visit> = Vec::new();
    for visit in visits {
        match merged.last_mut() {
            Some(last) if last.unit == visit.unit => {
                last.compute.append(&mut last.after);
                last.compute.extend(visit.before.into_iter().chain(visit.compute));
                last.after = visit.after;
            }
            _ => merged.push(visit),
        }
    }
    merged
}

/// Inserts the gathers, each as early as a slot is free: while one unit computes, the next is on its way.
fn weave(visits: &[Visit], num_slots: usize) -> Vec<Action> {
    let mut actions = Vec::new();
    let gather = |i: usize| visits.get(i).map(|v| Action::Gather { unit: v.unit, slot: i % num_slots });
    actions.extend((0..num_slots - 1).filter_map(gather));
    for (i, visit) in visits.iter().enumerate() {
        let (unit, slot) = (visit.unit, i % num_slots);
        actions.extend(gather(i + num_slots - 1));
        actions.extend(&visit.before);
        actions.extend([Action::Wait { unit, slot }, Action::Dequantize { unit, slot }]);
        actions.extend(&visit.compute);
        actions.push(Action::Reshard { unit, slot });
        actions.extend(&visit.after);
    }
    actions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_keeps_a_group_keeps_u_too() {
        let of = |lora, attention, mlp, rest| Keep { lora, attention, mlp, rest };
        assert_eq!(of(0, 1, 0, 2).clamped(4), of(2, 1, 0, 2));
        assert_eq!(of(3, 1, 9, 0).clamped(4), of(4, 1, 4, 0));
        assert_eq!([Keep::NOTHING, Keep::LORA].map(|keep| keep.clamped(4).lora), [0, 4]);
        for keep in [of(0, 1, 0, 2), of(1, 0, 2, 0), of(3, 1, 2, 0), Keep::LORA, Keep::DEAREST, Keep::EVERYTHING] {
            for layer in 0..4 {
                let Saved { lora, attention, mlp, rest } = keep.of(layer, 4);
                assert!(lora || !(attention || mlp || rest), "{keep:?}, layer {layer}");
                assert_eq!(lora, 4 - layer <= keep.clamped(4).lora, "{keep:?}, layer {layer}");
            }
        }
        assert!(!Keep::DEAREST.of(3, 4).all() && Keep::EVERYTHING.of(0, 4).all());
    }

    #[test]
    fn lines_of_benchmarks_without_u_are_read() {
        let read = |line: &str| serde_json::from_str::<Keep>(line).unwrap();
        assert_eq!(read(r#"{"attention": 0, "mlp": 0, "rest": 0}"#), Keep::NOTHING);
        assert_eq!(read(&serde_json::to_string(&Keep::LORA.clamped(4)).unwrap()), Keep { lora: 4, ..Keep::NOTHING });
    }

    #[test]
    fn the_documented_schedule_is_what_is_built() {
        let inputs = Inputs {
            units: NumUnits { layers: 2, head_pieces: 1 },
            mode: Mode::Train,
            micro_batches: vec![Descriptor::TRAINED; 2],
            accumulation: Accumulation::Layer,
            keep: Keep::NOTHING,
            num_slots: 2,
            num_boundary_buffers: 6,
        };
        let built: Vec<String> = build(&inputs).iter().map(|action| format!("{action:?}")).collect();
        let documented =
            include_str!("schedule.md").split("```text\n").nth(1).and_then(|text| text.split("```").next());
        assert_eq!(documented.unwrap().lines().collect::<Vec<_>>(), built, "{}", built.join("\n"));
    }
}

//! Proves the rules of a schedule without performing it: [`check`] follows the state of every slot, boundary and
//! gradient through the list and names the first action that breaks a rule.

use anyhow::{Result, bail, ensure};

use super::schedule::{Action, Descriptor, Inputs, Mode};
use super::unit::{NumUnits, Unit};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Gathering(Unit),
    Unsharded(Unit),
}

/// The place of a boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boundary {
    Nowhere,
    Here,
    Putting,
    Away,
    Fetching,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grad {
    Free,
    /// The layer, and the number of micro-batches whose gradients have been added.
    Accumulating(usize, usize),
    Reducing(usize),
}

/// The state that a schedule has reached so far.
struct State<'a> {
    inputs: &'a Inputs,
    /// For each micro-batch, its place among those that have a backward pass, and the number of these.
    places: Vec<Option<usize>>,
    num_trained: usize,
    slots: Vec<Slot>,
    dense: Option<Unit>,
    /// Layers that each micro-batch has passed forward.
    forward: Vec<Option<usize>>,
    /// Head pieces that each micro-batch has seen.
    pieces: Vec<Option<usize>>,
    /// Number of layers whose backward is left for each micro-batch: it holds the output gradient of the last of
    /// them.
    backward: Vec<Option<usize>>,
    /// The layer and micro-batch whose values lie in the buffers that are shared by all layers that keep none, if they
    /// were left for backward, which uses them up.
    shared: Option<(usize, usize)>,
    /// All boundaries, by the layer whose input they are and by live micro-batch.
    boundaries: Vec<Boundary>,
    free_boundary_buffers: usize,
    grads: Vec<Grad>,
    reduced: Vec<bool>,
    updated: bool,
}

/// Fails at the first action that breaks a rule, or when something is left undone.
pub fn check(actions: &[Action], inputs: &Inputs) -> Result<()> {
    follow(actions, inputs)?.finish()
}

/// Fails at the first action that breaks a rule, or if something is under way after the last.
#[cfg(test)]
pub(super) fn check_unwound(actions: &[Action], inputs: &Inputs) -> Result<()> {
    let State { slots, grads, boundaries, .. } = follow(actions, inputs)?;
    ensure!(slots.iter().all(|slot| *slot == Slot::Free), "slots are {slots:?}");
    ensure!(!grads.iter().any(|grad| matches!(grad, Grad::Reducing(_))), "gradients are {grads:?}");
    let is_under_way = |boundary: &Boundary| [Boundary::Putting, Boundary::Fetching].contains(boundary);
    ensure!(!boundaries.iter().any(is_under_way), "boundaries are {boundaries:?}");
    Ok(())
}

/// Returns the state after these actions. Fails at the first that breaks a rule.
fn follow<'a>(actions: &[Action], inputs: &'a Inputs) -> Result<State<'a>> {
    let m = inputs.num_micro_batches();
    let (trains, trained) = (inputs.mode == Mode::Train, inputs.trained().count());
    ensure!(trains == (trained > 0), "{trained} micro-batches have a backward pass in {:?}", inputs.mode);
    ensure!(inputs.trained().all(|m| inputs.micro_batches[m].adapter), "a backward pass without the adapter");
    let mut state = State {
        inputs,
        places: inputs.places_of_trained(),
        num_trained: trained,
        slots: vec![Slot::Free; inputs.num_slots],
        dense: None,
        forward: vec![None; m],
        pieces: vec![None; m],
        backward: vec![None; m],
        shared: None,
        boundaries: vec![Boundary::Nowhere; (inputs.units.layers + 1) * inputs.num_live_micro_batches()],
        free_boundary_buffers: inputs.num_boundary_buffers,
        grads: vec![Grad::Free; inputs.num_grad_slots()],
        reduced: vec![false; inputs.units.layers],
        updated: false,
    };
    for (i, action) in actions.iter().enumerate() {
        state.apply(action).map_err(|e| e.context(format!("action {i}, {action:?}")))?;
    }
    Ok(state)
}

impl State<'_> {
    fn apply(&mut self, action: &Action) -> Result<()> {
        ensure!(!self.updated, "comes after the update");
        match *action {
            Action::Gather { unit, slot } => self.change(slot, Slot::Free, Slot::Gathering(unit)),
            Action::Wait { unit, slot } => self.change(slot, Slot::Gathering(unit), Slot::Unsharded(unit)),
            Action::Dequantize { unit, slot } => {
                self.dense = Some(unit);
                self.change(slot, Slot::Unsharded(unit), Slot::Unsharded(unit))
            }
            Action::Reshard { unit, slot } => {
                self.dense = None;
                self.change(slot, Slot::Unsharded(unit), Slot::Free)
            }
            Action::Embed { micro } => {
                self.new_boundary(0, micro)?;
                advance(&mut self.forward[micro], None, 0)
            }
            Action::Forward { layer, micro, saves } => {
                self.needs(Unit::Layer(layer))?;
                self.boundary(layer, micro, Boundary::Here, Boundary::Here)?;
                self.new_boundary(layer + 1, micro)?;
                if !self.inputs.micro_batches[micro].gradient {
                    self.free_boundary(layer, micro)?;
                }
                self.save(layer, saves.then_some(micro));
                advance(&mut self.forward[micro], Some(layer), layer + 1)
            }
            Action::HeadBegin { micro } => {
                let layers = self.inputs.units.layers;
                ensure!(self.forward[micro] == Some(layers), "the last layer has not been passed");
                advance(&mut self.pieces[micro], None, 0)
            }
            Action::HeadPiece { piece, micro } => {
                self.needs(Unit::HeadPiece(piece))?;
                advance(&mut self.pieces[micro], Some(piece), piece + 1)
            }
            Action::HeadScore { micro } => self.head_score(micro),
            Action::HeadBackward { micro } => self.head_backward(micro),
            Action::Recompute { layer, micro } => {
                self.needs(Unit::Layer(layer))?;
                self.save(layer, Some(micro));
                self.boundary(layer, micro, Boundary::Here, Boundary::Here)
            }
            Action::Put { layer, micro } => self.boundary(layer, micro, Boundary::Here, Boundary::Putting),
            Action::WaitPut { layer, micro } => self.wait_put(layer, micro),
            Action::Fetch { layer, micro } => self.fetch(layer, micro),
            Action::WaitFetch { layer, micro } => self.boundary(layer, micro, Boundary::Fetching, Boundary::Here),
            Action::Backward { layer, micro, grad_slot, first } => self.backward(layer, micro, grad_slot, first),
            Action::Reduce { layer, grad_slot } => {
                let all = Grad::Accumulating(layer, self.num_trained);
                ensure!(self.grads[grad_slot] == all, "the buffer is {:?}", self.grads[grad_slot]);
                self.grads[grad_slot] = Grad::Reducing(layer);
                Ok(())
            }
            Action::WaitReduce { layer, grad_slot } => {
                let grad = &mut self.grads[grad_slot];
                ensure!(*grad == Grad::Reducing(layer), "the buffer is {grad:?}");
                *grad = Grad::Free;
                self.reduced[layer] = true;
                Ok(())
            }
            Action::Optimizer => {
                ensure!(self.reduced.iter().all(|&r| r), "gradients are not reduced: {:?}", self.reduced);
                self.updated = true;
                Ok(())
            }
        }
    }

    fn change(&mut self, slot: usize, from: Slot, to: Slot) -> Result<()> {
        ensure!(self.slots[slot] == from, "the slot is {:?}, should be {from:?}", self.slots[slot]);
        self.slots[slot] = to;
        Ok(())
    }

    fn boundary(&mut self, layer: usize, micro: usize, from: Boundary, to: Boundary) -> Result<()> {
        let live = self.inputs.num_live_micro_batches();
        let at = &mut self.boundaries[layer * live + micro % live];
        ensure!(*at == from, "boundary {layer} of micro-batch {micro} is {at:?}, should be {from:?}");
        *at = to;
        Ok(())
    }

    fn take_buffer(&mut self) -> Result<()> {
        ensure!(self.free_boundary_buffers > 0, "no boundary buffer is free");
        self.free_boundary_buffers -= 1;
        Ok(())
    }

    fn new_boundary(&mut self, layer: usize, micro: usize) -> Result<()> {
        self.take_buffer()?;
        self.boundary(layer, micro, Boundary::Nowhere, Boundary::Here)
    }

    fn free_boundary(&mut self, layer: usize, micro: usize) -> Result<()> {
        self.free_boundary_buffers += 1;
        self.boundary(layer, micro, Boundary::Here, Boundary::Nowhere)
    }

    fn needs(&self, unit: Unit) -> Result<()> {
        ensure!(self.dense == Some(unit), "{unit} is not dequantized, but {:?}", self.dense);
        Ok(())
    }

    /// Returns whether a layer uses the buffers that all layers share which keep none.
    fn shares(&self, layer: usize) -> bool {
        !self.inputs.keep.of(layer, self.inputs.units.layers).all()
    }

    /// A forward pass of a layer, whole or again, leaves the values for the backward of a micro-batch, or of none.
    fn save(&mut self, layer: usize, micro: Option<usize>) {
        if self.shares(layer) {
            self.shared = micro.map(|micro| (layer, micro));
        }
    }

    fn head_score(&mut self, micro: usize) -> Result<()> {
        let NumUnits { layers, head_pieces } = self.inputs.units;
        ensure!(self.pieces[micro] == Some(head_pieces), "a head piece is missing");
        self.pieces[micro] = Some(head_pieces + 1);
        if self.inputs.micro_batches[micro].gradient {
            return Ok(());
        }
        self.free_boundary(layers, micro)?;
        advance(&mut self.backward[micro], None, layers)
    }

    fn head_backward(&mut self, micro: usize) -> Result<()> {
        let NumUnits { layers, head_pieces } = self.inputs.units;
        ensure!(self.pieces[micro] == Some(head_pieces + 1), "the micro-batch is not scored");
        self.boundary(layers, micro, Boundary::Here, Boundary::Here)?;
        advance(&mut self.backward[micro], None, layers)
    }

    fn wait_put(&mut self, layer: usize, micro: usize) -> Result<()> {
        self.free_boundary_buffers += 1;
        self.boundary(layer, micro, Boundary::Putting, Boundary::Away)
    }

    fn fetch(&mut self, layer: usize, micro: usize) -> Result<()> {
        self.take_buffer()?;
        self.boundary(layer, micro, Boundary::Away, Boundary::Fetching)
    }

    fn backward(&mut self, layer: usize, micro: usize, grad_slot: usize, first: bool) -> Result<()> {
        self.needs(Unit::Layer(layer))?;
        if self.shares(layer) {
            ensure!(
                self.shared == Some((layer, micro)),
                "its activations are not recomputed: the shared buffers hold those of (layer, micro-batch) {:?}",
                self.shared
            );
            self.shared = None;
        }
        advance(&mut self.backward[micro], Some(layer + 1), layer)?;
        // The gradient takes the place of the layer's input, and the buffer of its output.
        self.boundary(layer, micro, Boundary::Here, Boundary::Here)?;
        self.free_boundary(layer + 1, micro)?;
        if layer == 0 {
            self.free_boundary(0, micro)?;
        }
        let nth = self.places[micro];
        let grad = &mut self.grads[grad_slot];
        *grad = match (*grad, first) {
            (Grad::Free, true) => Grad::Accumulating(layer, 1),
            (Grad::Accumulating(l, n), false) if l == layer && Some(n) == nth => Grad::Accumulating(layer, n + 1),
            (other, _) => bail!("the gradient buffer is {other:?} before micro-batch {micro} (first: {first})"),
        };
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        ensure!(self.slots.iter().all(|s| *s == Slot::Free), "slots are left: {:?}", self.slots);
        ensure!(self.grads.iter().all(|g| *g == Grad::Free), "gradients are left: {:?}", self.grads);
        ensure!(self.boundaries.iter().all(|b| *b == Boundary::Nowhere), "boundaries are left: {:?}", self.boundaries);
        let left = |descriptor: &Descriptor| if descriptor.gradient { 0 } else { self.inputs.units.layers };
        let done = self.backward.iter().zip(&self.inputs.micro_batches).all(|(b, of)| *b == Some(left(of)));
        ensure!(done, "micro-batches are not done: {:?}", self.backward);
        ensure!(self.updated == (self.inputs.mode == Mode::Train), "the update is missing");
        Ok(())
    }
}

fn advance(at: &mut Option<usize>, from: Option<usize>, to: usize) -> Result<()> {
    ensure!(*at == from, "the micro-batch is at {at:?}, should be at {from:?}");
    *at = Some(to);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::schedule::{Accumulation, Keep, build};
    use super::super::unit::NumUnits;
    use super::super::unwind;
    use super::*;

    /// Returns the number of all-gathers of a schedule.
    fn num_gathers(actions: &[Action]) -> usize {
        actions.iter().filter(|a| matches!(a, Action::Gather { .. })).count()
    }

    /// Every kind of schedule of small models.
    fn all_small_inputs() -> Vec<Inputs> {
        let mut all = Vec::new();
        let keeps =
            [Keep::NOTHING, Keep::LORA, Keep::DEAREST, Keep { mlp: 1, rest: 1, ..Keep::NOTHING }, Keep::EVERYTHING];
        for (layers, head_pieces, m, num_slots) in
            [(1, 1, 1, 2), (2, 1, 1, 2), (3, 2, 2, 2), (5, 3, 3, 2), (2, 1, 8, 3)]
        {
            for (mode, micro_batches) in micro_batches(m) {
                for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
                    for keep in keeps {
                        let units = NumUnits { layers, head_pieces };
                        let micro_batches = micro_batches.clone();
                        let num_boundary_buffers = 0;
                        let mut inputs =
                            Inputs { units, mode, micro_batches, accumulation, keep, num_slots, num_boundary_buffers };
                        let (min, max) = (inputs.min_boundary_buffers(), inputs.max_boundary_buffers());
                        let mut numbers = vec![min, (min + max) / 2, max.saturating_sub(1).max(min), max];
                        numbers.dedup();
                        for num_boundary_buffers in numbers {
                            inputs.num_boundary_buffers = num_boundary_buffers;
                            all.push(inputs.clone());
                        }
                    }
                }
            }
        }
        all
    }

    /// Lists of M micro-batches: all alike, and in training some that are only scored, before, between and after the
    /// others.
    fn micro_batches(m: usize) -> Vec<(Mode, Vec<Descriptor>)> {
        let mut lists: Vec<_> =
            [Mode::Train, Mode::Score, Mode::Generate].map(|mode| (mode, vec![Descriptor::of(mode); m])).into();
        for scored in [0, m / 2, m - 1] {
            let mut list = vec![Descriptor::TRAINED; m];
            list[scored] = Descriptor::scored(scored > 0);
            if m > 1 {
                lists.push((Mode::Train, list));
            }
        }
        lists
    }

    #[test]
    fn every_schedule_keeps_the_rules() {
        for inputs in all_small_inputs() {
            check(&build(&inputs), &inputs).unwrap_or_else(|e| panic!("{inputs:?}: {e:#}"));
        }
    }

    #[test]
    fn a_run_that_is_abandoned_anywhere_leaves_nothing_under_way() {
        for inputs in all_small_inputs() {
            let actions = build(&inputs);
            for num_done in 0..actions.len() {
                let done = &actions[..num_done];
                let whole = [done, &unwind::actions(done)].concat();
                let checked = check_unwound(&whole, &inputs);
                checked.unwrap_or_else(|e| panic!("{inputs:?} abandoned after {num_done} actions: {e:#}"));
                let is_under_way = check_unwound(done, &inputs).is_err();
                assert_eq!(is_under_way, whole.len() > num_done, "{inputs:?}, {num_done} actions");
            }
        }
    }

    #[test]
    fn without_any_one_action_the_checker_fails() {
        for inputs in all_small_inputs() {
            let actions = build(&inputs);
            for i in 0..actions.len() {
                let mut fewer = actions.clone();
                let removed = fewer.remove(i);
                assert!(check(&fewer, &inputs).is_err(), "{inputs:?} without action {i}, {removed:?}");
            }
        }
    }

    #[test]
    fn the_last_layer_is_recomputed_unless_its_forward_came_just_before() {
        for inputs in all_small_inputs().into_iter().filter(|inputs| inputs.mode == Mode::Train) {
            let last = inputs.units.layers - 1;
            let actions = build(&inputs);
            let num_recomputes = |of: usize| {
                let is_one = |action: &&Action| matches!(action, Action::Recompute { layer, .. } if *layer == of);
                actions.iter().filter(is_one).count()
            };
            for layer in 0..=last {
                let is_kept = inputs.keep.of(layer, last + 1).all();
                let only_last = inputs.trained().eq([inputs.num_micro_batches() - 1]);
                let follows = inputs.accumulation == Accumulation::MicroBatch || only_last;
                let expected = if is_kept || layer == last && follows { 0 } else { inputs.trained().count() };
                assert_eq!(num_recomputes(layer), expected, "{inputs:?}, layer {layer}");
            }
        }
    }

    #[test]
    fn backward_finds_no_values_where_another_forward_has_written() {
        let of = |num: usize, accumulation| Inputs {
            units: NumUnits { layers: 2, head_pieces: 1 },
            mode: Mode::Train,
            micro_batches: vec![Descriptor::TRAINED; num],
            accumulation,
            keep: Keep::NOTHING,
            num_slots: 2,
            num_boundary_buffers: 3 * num,
        };
        let refuses = |actions: &[Action], inputs: &Inputs, holder: Option<(usize, usize)>| {
            let error = format!("{:#}", check(actions, inputs).unwrap_err());
            assert!(error.contains(&format!("hold those of (layer, micro-batch) {holder:?}")), "{error}");
        };
        // The other micro-batch's forward came last, with and without values for backward.
        let inputs = of(2, Accumulation::Layer);
        for saves in [false, true] {
            let mut actions = build(&inputs);
            actions.retain(|action| *action != Action::Recompute { layer: 1, micro: 0 });
            let forward = |saves| Action::Forward { layer: 1, micro: 1, saves };
            let last = actions.iter_mut().find(|action| **action == forward(false)).unwrap();
            *last = forward(saves);
            refuses(&actions, &inputs, saves.then_some((1, 1)));
        }
        // The micro-batch's own forward has left nothing.
        let inputs = of(1, Accumulation::Layer);
        let mut actions = build(&inputs);
        for action in &mut actions {
            if let Action::Forward { saves, .. } = action {
                *saves = false;
            }
        }
        refuses(&actions, &inputs, None);
        // The layer before is computed again while the last layer is on its way.
        for inputs in [of(1, Accumulation::Layer), of(2, Accumulation::MicroBatch)] {
            let (mut actions, unit) = (build(&inputs), Unit::Layer(0));
            check(&actions, &inputs).unwrap();
            let is_backward = |action: &Action| matches!(action, Action::Backward { layer: 1, micro: 0, .. });
            let before_wait = actions.iter().position(is_backward).unwrap() - 2;
            let again = [
                Action::Wait { unit, slot: 0 },
                Action::Dequantize { unit, slot: 0 },
                Action::Recompute { layer: 0, micro: 0 },
            ];
            actions.splice(before_wait..before_wait, again);
            refuses(&actions, &inputs, Some((0, 0)));
        }
    }

    #[test]
    fn layer_major_gathers_twice_whatever_the_number_of_micro_batches() {
        for inputs in all_small_inputs().into_iter().filter(|i| i.mode == Mode::Train) {
            let NumUnits { layers, head_pieces } = inputs.units;
            let (all, trained) = match inputs.accumulation {
                Accumulation::Layer => (1, 1),
                Accumulation::MicroBatch => (inputs.num_micro_batches(), inputs.trained().count()),
            };
            // Layer 0 stays between one micro-batch's backward and the next one's forward.
            let last_is_trained = inputs.micro_batches.last().is_some_and(|last| last.gradient);
            let stays = if all == 1 { 0 } else { trained - usize::from(last_is_trained) };
            assert_eq!(num_gathers(&build(&inputs)), all * (layers + head_pieces) + trained * layers - stays);
        }
    }
}

//! The rules of a schedule, proved by running it on nothing: [`check`] follows the state of every slot, boundary and
//! gradient and names the first action that breaks a rule.

use anyhow::{Result, bail, ensure};

use super::schedule::{Accumulation, Action, Inputs, Mode, Recompute};
use super::unit::Unit;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Gathering(Unit),
    Unsharded(Unit),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grad {
    Free,
    /// Layer and number of micro-batches added.
    Accumulating(usize, usize),
    Reducing(usize),
}

/// What a schedule has done so far.
struct State<'a> {
    inputs: &'a Inputs,
    slots: Vec<Slot>,
    dense: Option<Unit>,
    /// Layers that each micro-batch has passed forward.
    forward: Vec<Option<usize>>,
    /// Head pieces that each micro-batch has seen.
    pieces: Vec<Option<usize>>,
    /// The layer whose output gradient each micro-batch has, counted as the layers that are left.
    backward: Vec<Option<usize>>,
    recomputed: Vec<Option<usize>>,
    grads: Vec<Grad>,
    reduced: Vec<bool>,
    updated: bool,
}

/// Fails at the first action that breaks a rule, or when something is left undone.
pub fn check(actions: &[Action], inputs: &Inputs) -> Result<()> {
    let m = inputs.num_micro_batches;
    let mut state = State {
        inputs,
        slots: vec![Slot::Free; inputs.num_slots],
        dense: None,
        forward: vec![None; m],
        pieces: vec![None; m],
        backward: vec![None; m],
        recomputed: vec![None; m],
        grads: vec![Grad::Free; inputs.num_grad_slots()],
        reduced: vec![false; inputs.units.layers],
        updated: false,
    };
    for (i, action) in actions.iter().enumerate() {
        state.apply(action).map_err(|e| e.context(format!("action {i}, {action:?}")))?;
    }
    state.finish()
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
            Action::Embed { micro } => advance(&mut self.forward[micro], None, 0),
            Action::Forward { layer, micro } => {
                self.needs(Unit::Layer(layer))?;
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
            Action::HeadFinish { micro } => {
                let pieces = self.inputs.units.head_pieces;
                ensure!(self.pieces[micro] == Some(pieces), "a head piece is missing");
                advance(&mut self.backward[micro], None, self.inputs.units.layers)
            }
            Action::Recompute { layer, micro } => {
                self.needs(Unit::Layer(layer))?;
                self.recomputed[micro] = Some(layer);
                Ok(())
            }
            Action::Backward { layer, micro, grad_slot, first } => self.backward(layer, micro, grad_slot, first),
            Action::Reduce { layer, grad_slot } => {
                let all = Grad::Accumulating(layer, self.inputs.num_micro_batches);
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

    fn needs(&self, unit: Unit) -> Result<()> {
        ensure!(self.dense == Some(unit), "{unit} is not dequantized, but {:?}", self.dense);
        Ok(())
    }

    fn backward(&mut self, layer: usize, micro: usize, grad_slot: usize, first: bool) -> Result<()> {
        self.needs(Unit::Layer(layer))?;
        if self.inputs.recompute == Recompute::All {
            ensure!(self.recomputed[micro].take() == Some(layer), "its activations are not recomputed");
        }
        advance(&mut self.backward[micro], Some(layer + 1), layer)?;
        let grad = &mut self.grads[grad_slot];
        *grad = match (*grad, first) {
            (Grad::Free, true) => Grad::Accumulating(layer, 1),
            (Grad::Accumulating(l, n), false) if l == layer && n == micro => Grad::Accumulating(layer, n + 1),
            (other, _) => bail!("the gradient buffer is {other:?} before micro-batch {micro} (first: {first})"),
        };
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        ensure!(self.slots.iter().all(|s| *s == Slot::Free), "slots are left: {:?}", self.slots);
        ensure!(self.grads.iter().all(|g| *g == Grad::Free), "gradients are left: {:?}", self.grads);
        let left = if self.inputs.mode == Mode::Train { 0 } else { self.inputs.units.layers };
        ensure!(self.backward.iter().all(|b| *b == Some(left)), "micro-batches are not done: {:?}", self.backward);
        ensure!(self.updated == (self.inputs.mode == Mode::Train), "the update is missing");
        Ok(())
    }
}

fn advance(at: &mut Option<usize>, from: Option<usize>, to: usize) -> Result<()> {
    ensure!(*at == from, "the micro-batch is at {at:?}, should be at {from:?}");
    *at = Some(to);
    Ok(())
}

/// All-gathers of a schedule.
pub fn num_gathers(actions: &[Action]) -> usize {
    actions.iter().filter(|a| matches!(a, Action::Gather { .. })).count()
}

/// Every kind of schedule of small models, for tests of the schedule and of the executor.
pub fn all_small_inputs() -> Vec<Inputs> {
    let mut all = Vec::new();
    for (layers, head_pieces, num_micro_batches, num_slots) in
        [(1, 1, 1, 2), (2, 1, 1, 2), (3, 2, 2, 2), (5, 3, 3, 2), (2, 1, 8, 3)]
    {
        for mode in [Mode::Train, Mode::Score, Mode::Generate] {
            for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
                for recompute in [Recompute::All, Recompute::Nothing] {
                    let units = super::unit::NumUnits { layers, head_pieces };
                    all.push(Inputs { units, mode, num_micro_batches, accumulation, recompute, num_slots });
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::schedule::build;
    use super::*;

    #[test]
    fn every_schedule_keeps_the_rules() {
        for inputs in all_small_inputs() {
            check(&build(&inputs), &inputs).unwrap_or_else(|e| panic!("{inputs:?}: {e:#}"));
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
    fn layer_major_gathers_twice_whatever_the_number_of_micro_batches() {
        for inputs in all_small_inputs().into_iter().filter(|i| i.mode == Mode::Train) {
            let passes = match inputs.accumulation {
                Accumulation::Layer => 1,
                Accumulation::MicroBatch => inputs.num_micro_batches,
            };
            let once = 2 * inputs.units.layers + inputs.units.head_pieces;
            // Layer 0 stays between one micro-batch's backward and the next one's forward.
            assert_eq!(num_gathers(&build(&inputs)), passes * once - (passes - 1));
        }
    }
}

//! Slots, in which a unit is gathered from its shards, turned into dense weights, and given up again.

use anyhow::{Context, Result, bail, ensure};

use crate::comm::guarded::Guarded;
use crate::comm::{Queue, TrainableBuffers};
use crate::device::{Buffer, Dequantize, Element, Ops, Place, View, ViewMut};
use crate::model::spec::{ModuleId, TensorId};
use crate::model::weights::{LayerWeights, WeightBuffers};

use super::exec::Engine;
use super::layout::{UnitLayout, UnitTensor};
use super::memory::DenseLayer;
use super::unit::Unit;

/// State of a slot. A gathering slot's buffers are with the queue.
pub(super) enum Slot<D: Ops, Q: Queue<D>> {
    Free(Buffer<D, u8>, Buffer<D, f32>),
    Gathering(Unit, Part<Q::Pending<Buffer<D, u8>>, Buffer<D, u8>>, LoraPart<D, Q>),
    Unsharded(Unit, Buffer<D, u8>, Buffer<D, f32>),
    /// The slot is between two states, which shows only after an error.
    Moving,
}

/// The frozen bytes or the trainable values of a unit that is being gathered.
pub(super) enum Part<P, B> {
    Gathering(P),
    /// There is nothing to gather: the unit has no such part, or the whole of it lies on the device already. The
    /// slot's buffer is not used.
    Unused(B),
}

type LoraPart<D, Q> = Part<<Q as Queue<D>>::Pending<TrainableBuffers<D>>, Buffer<D, f32>>;

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    pub(super) fn gather(&mut self, unit: Unit, slot: usize, adapter: bool) -> Result<()> {
        let Slot::Free(flat, full) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} is not free");
        };
        let shard = &self.shards[self.units.idx(unit)];
        let frozen = match self.queue.whole(shard) {
            Some(_) => Part::Unused(flat),
            None => Part::Gathering(self.queue.gather_frozen(format!("gather of {unit}"), shard, flat)?),
        };
        let gathers_lora = adapter && self.trainables.is_some() && !self.has_whole_trainables();
        let lora = match unit {
            Unit::Layer(layer) if gathers_lora => {
                let shard = self.memory.trainables[layer].master.take().context("the LoRA shard is being gathered")?;
                let buffers = TrainableBuffers { shard, full };
                Part::Gathering(self.queue.gather_trainable(format!("gather of the LoRA of {unit}"), buffers)?)
            }
            _ => Part::Unused(full),
        };
        self.slots[slot] = Slot::Gathering(unit, frozen, lora);
        Ok(())
    }

    /// Returns whether this rank has all trainable values on its device.
    fn has_whole_trainables(&self) -> bool {
        self.sharded().is_some_and(|sharded| sharded.are_whole(&self.limits.residency))
    }

    pub(super) fn wait_gather(&mut self, unit: Unit, slot: usize) -> Result<()> {
        let Slot::Gathering(gathering, frozen, lora) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} is not being gathered");
        };
        ensure!(gathering == unit, "slot {slot} gathers {gathering}");
        let flat = match frozen {
            Part::Gathering(pending) => self.queue.wait(pending)?,
            Part::Unused(flat) => flat,
        };
        let full = match (lora, unit) {
            (Part::Gathering(pending), Unit::Layer(layer)) => {
                let TrainableBuffers { shard, full } = self.queue.wait(pending)?;
                self.memory.trainables[layer].master = Some(shard);
                full
            }
            (Part::Unused(full), _) => full,
            (Part::Gathering(_), Unit::HeadPiece(_)) => bail!("a head piece has no LoRA"),
        };
        self.slots[slot] = Slot::Unsharded(unit, flat, full);
        Ok(())
    }

    pub(super) fn dequantize(&mut self, unit: Unit, slot: usize, adapter: bool) -> Result<()> {
        let Slot::Unsharded(held, _, full) = &self.slots[slot] else {
            bail!("slot {slot} does not hold {unit}: its gather was not waited for");
        };
        ensure!(*held == unit, "slot {slot} holds {held}");
        let idx = self.units.idx(unit);
        let has_whole_lora = self.has_whole_trainables();
        let (device, layout, memory) = (&self.device, &self.base.layouts[idx], &mut self.memory);
        let flat = frozen(&self.queue, &self.shards[idx], &self.slots[slot])?;
        self.dequantized = Some((unit, slot));
        let place = |id: TensorId| layout.tensors().iter().position(|tensor| tensor.id == id);
        let made = |id: TensorId| place(id).filter(|&idx| layout.in_place(idx, D::ACT).is_none());
        let len = |idx: usize| layout.tensors()[idx].elements.len();
        let mut dense = Vec::new();
        let own = match unit {
            Unit::Layer(layer) => memory.dense.get_mut(layer),
            Unit::HeadPiece(_) => None,
        };
        let linears: Vec<(ModuleId, &mut Buffer<D, D::Act>)> = match own {
            Some(own) if own.is_made => Vec::new(),
            Some(own) => own.linears.iter_mut().map(|(module, weight)| (*module, weight)).collect(),
            None => memory.layer.linears_mut().collect(),
        };
        for (module, weight) in linears {
            let Some(idx) = made(TensorId::Weight(module)) else { continue };
            dense.extend(parts(layout, idx, flat, weight.first_mut(len(idx))));
        }
        if let Some(idx) = made(TensorId::Rows) {
            dense.extend(parts(layout, idx, flat, memory.head_piece.first_mut(len(idx))));
        }
        device.dequantize(dense)?;
        if let Unit::Layer(layer) = unit
            && let Some(own) = memory.dense.get_mut(layer)
        {
            own.is_made = true;
        }
        let mut vectors = Vec::new();
        for (id, vector) in memory.layer.vectors_mut() {
            let Some(idx) = place(id) else { continue };
            vectors.extend(parts(layout, idx, flat, vector.first_mut(len(idx))));
        }
        device.dequantize_f32(vectors)?;
        for (id, vector) in memory.layer.vectors_mut() {
            if let (Unit::Layer(layer), TensorId::Norm(norm), Some(idx)) = (unit, id, place(id))
                && let offset = self.base.spec.layers[layer].norm_offset(norm)
                && offset != 0.0
            {
                device.add_scalar(vector.first_mut(len(idx)), offset)?;
            }
        }
        match (unit, &self.trainables) {
            (Unit::Layer(layer), Some(trainables)) if adapter => {
                let len = trainables.layers[layer].len();
                let master = memory.trainables[layer].master.as_ref().filter(|_| has_whole_lora);
                let values = match master.map(Guarded::wait_on_host).transpose()? {
                    Some(Place::Device(master)) => master,
                    None if !has_whole_lora => full,
                    _ => bail!("the LoRA of layer {layer} is not on the device"),
                };
                device.cast(memory.layer.trainable.first_mut(len), values.first(len))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn reshard(&mut self, unit: Unit, slot: usize) -> Result<()> {
        let Slot::Unsharded(held, flat, full) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} holds nothing");
        };
        ensure!(held == unit, "slot {slot} holds {held}");
        self.dequantized = None;
        self.slots[slot] = Slot::Free(flat, full);
        Ok(())
    }
}

/// Returns the frozen bytes of a unit that was gathered into a slot, or that needs no gather.
pub(super) fn frozen<'a, D: Ops, Q: Queue<D>>(
    queue: &'a Q,
    shard: &'a Q::Shard,
    slot: &'a Slot<D, Q>,
) -> Result<View<'a, D, u8>> {
    match (queue.whole(shard), slot) {
        (Some(whole), _) => Ok(whole),
        (None, Slot::Unsharded(_, flat, _)) => Ok(flat.view()),
        _ => bail!("the slot holds no unit"),
    }
}

/// Returns the dense weights of a layer: those that lie in the gathered unit, those that the layer keeps, and the others in the buffers that
/// all layers share.
pub(super) fn weights<'a, D: Ops>(
    buffers: &'a WeightBuffers<D>,
    own: Option<&'a DenseLayer<D>>,
    layout: &UnitLayout,
    frozen: View<'a, D, u8>,
) -> LayerWeights<'a, D> {
    let in_place = |(idx, tensor): (usize, &UnitTensor)| match tensor.id {
        TensorId::Weight(module) => Some((module, frozen.range(layout.in_place(idx, D::ACT)?).reinterpret())),
        _ => None,
    };
    let in_place = layout.tensors().iter().enumerate().filter_map(in_place);
    let own = own.iter().flat_map(|own| own.linears.iter().map(|(module, weight)| (*module, weight.view())));
    LayerWeights { buffers, elsewhere: in_place.chain(own).collect() }
}

/// Returns the parts of tensor `idx` of a gathered unit, one for each shard that has some of it.
fn parts<'a, D: Ops, T: Element>(
    layout: &UnitLayout,
    idx: usize,
    flat: View<'a, D, u8>,
    mut weights: ViewMut<'a, D, T>,
) -> Vec<Dequantize<'a, D, T>> {
    let (encoding, mut parts) = (layout.tensors()[idx].encoding, Vec::new());
    for segment in layout.segments(idx) {
        let (part, rest) = weights.split_at(segment.weights.len());
        parts.push(Dequantize { weights: part, records: flat.range(segment.bytes), encoding });
        weights = rest;
    }
    parts
}

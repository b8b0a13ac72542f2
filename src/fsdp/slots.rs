//! Slots, in which a unit is gathered from its shards, turned into dense weights, and given up again.

use anyhow::{Context, Result, bail, ensure};

use crate::comm::{Queue, TrainableBuffers};
use crate::device::{Buffer, Dequantize, Ops, View, ViewMut};
use crate::model::spec::TensorId;
use crate::quant::record::Encoding;

use super::exec::Engine;
use super::unit::Unit;

/// State of a slot. A gathering slot's buffers are with the queue.
pub(super) enum Slot<D: Ops, Q: Queue<D>> {
    Free(Buffer<D, u8>, Buffer<D, f32>),
    Gathering(Unit, Q::Pending<Buffer<D, u8>>, LoraPart<D, Q>),
    Unsharded(Unit, Buffer<D, u8>, Buffer<D, f32>),
    /// The slot is between two states, which shows only after an error.
    Moving,
}

/// The trainable values of a unit that is being gathered, or the buffer that a unit without trainable values leaves
/// unused.
pub(super) enum LoraPart<D: Ops, Q: Queue<D>> {
    Gathering(Q::Pending<TrainableBuffers<D>>),
    Unused(Buffer<D, f32>),
}

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    pub(super) fn gather(&mut self, unit: Unit, slot: usize, adapter: bool) -> Result<()> {
        let Slot::Free(flat, full) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} is not free");
        };
        let shard = &self.shards[self.units.idx(unit)];
        let frozen = self.queue.gather_frozen(format!("gather of {unit}"), shard, flat)?;
        let lora = match unit {
            Unit::Layer(layer) if adapter && self.trainables().is_some() => {
                let shard = self.memory.trainables[layer].master.take().context("the LoRA shard is being gathered")?;
                let buffers = TrainableBuffers { shard, full };
                LoraPart::Gathering(self.queue.gather_trainable(format!("gather of the LoRA of {unit}"), buffers)?)
            }
            _ => LoraPart::Unused(full),
        };
        self.slots[slot] = Slot::Gathering(unit, frozen, lora);
        Ok(())
    }

    pub(super) fn wait_gather(&mut self, unit: Unit, slot: usize) -> Result<()> {
        let Slot::Gathering(gathering, frozen, lora) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} is not being gathered");
        };
        ensure!(gathering == unit, "slot {slot} gathers {gathering}");
        let flat = self.queue.wait(frozen)?;
        let full = match (lora, unit) {
            (LoraPart::Gathering(pending), Unit::Layer(layer)) => {
                let TrainableBuffers { shard, full } = self.queue.wait(pending)?;
                self.memory.trainables[layer].master = Some(shard);
                full
            }
            (LoraPart::Unused(full), _) => full,
            (LoraPart::Gathering(_), Unit::HeadPiece(_)) => bail!("a head piece has no LoRA"),
        };
        self.slots[slot] = Slot::Unsharded(unit, flat, full);
        Ok(())
    }

    pub(super) fn dequantize(&mut self, unit: Unit, slot: usize, adapter: bool) -> Result<()> {
        let Slot::Unsharded(held, flat, full) = &self.slots[slot] else {
            bail!("slot {slot} does not hold {unit}: its gather was not waited for");
        };
        ensure!(*held == unit, "slot {slot} holds {held}");
        let (device, layout, memory) = (&self.device, &self.base.layouts[self.units.idx(unit)], &mut self.memory);
        self.dense = Some(unit);
        for (idx, tensor) in layout.tensors().iter().enumerate() {
            let len = tensor.elements.len();
            let parts = layout.segments(idx).into_iter().map(|segment| {
                let records = flat.view().range(segment.bytes);
                (segment.weights, records, tensor.encoding)
            });
            match tensor.id {
                TensorId::Rows => to_act(device, memory.head_piece.first_mut(len), parts)?,
                TensorId::Weight(module) => to_act(device, memory.layer.linear_mut(module)?.first_mut(len), parts)?,
                id @ (TensorId::Norm(_) | TensorId::Bias(_)) => {
                    to_f32(device, memory.layer.vector_mut(id)?.first_mut(len), parts)?;
                    if let (Unit::Layer(layer), TensorId::Norm(norm)) = (unit, id)
                        && let offset = self.base.spec.layers[layer].norm_offset(norm)
                        && offset != 0.0
                    {
                        device.add_scalar(memory.layer.vector_mut(id)?.first_mut(len), offset)?;
                    }
                }
            }
        }
        match (unit, &self.trainables) {
            (Unit::Layer(layer), Some(trainables)) if adapter => {
                let len = trainables.layers[layer].len();
                device.cast(memory.layer.trainable.first_mut(len), full.first(len))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn reshard(&mut self, unit: Unit, slot: usize) -> Result<()> {
        let Slot::Unsharded(held, flat, full) = std::mem::replace(&mut self.slots[slot], Slot::Moving) else {
            bail!("slot {slot} holds nothing");
        };
        ensure!(held == unit, "slot {slot} holds {held}");
        self.dense = None;
        self.slots[slot] = Slot::Free(flat, full);
        Ok(())
    }
}

/// A run of records of one tensor: the place of its weights, its bytes, and their encoding.
type Part<'a, D> = (std::ops::Range<usize>, View<'a, D, u8>, Encoding);

fn to_act<'a, D: Ops>(
    device: &D,
    mut weights: ViewMut<'_, D, D::Act>,
    mut parts: impl Iterator<Item = Part<'a, D>>,
) -> Result<()> {
    parts.try_for_each(|(range, records, encoding)| {
        device.dequantize(Dequantize { weights: weights.range_mut(range), records, encoding })
    })
}

fn to_f32<'a, D: Ops>(
    device: &D,
    mut weights: ViewMut<'_, D, f32>,
    mut parts: impl Iterator<Item = Part<'a, D>>,
) -> Result<()> {
    parts.try_for_each(|(range, records, encoding)| {
        device.dequantize_f32(Dequantize { weights: weights.range_mut(range), records, encoding })
    })
}

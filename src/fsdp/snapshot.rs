//! Snapshots: copies, in the host memory of rank 0, of all that training changes. A file can be written from one while
//! the next steps are taken.

use anyhow::{Context, Result, ensure};

use crate::comm::Queue;
use crate::device::cpu::Cpu;
use crate::device::{Arena, Device, HostBuffer, Ops, Place};
use crate::progress;

use super::exec::Engine;
use super::grads::Values;
use super::layout::TrainableLayout;

/// The values of a snapshot, in their order there.
pub const KINDS: [Values; 3] = [Values::Master, Values::ExpAvg, Values::ExpAvgSq];

/// Values of all layers. It is carved from the engine's host memory, which is pinned for a GPU, and used again and again.
pub struct Snapshot {
    layers: Vec<(TrainableLayout, [HostBuffer<f32>; KINDS.len()])>,
}

impl Snapshot {
    /// The memory is that of the values of all ranks, with the padding of their shards.
    pub(super) fn carve(host: &mut Arena<Cpu>, layouts: impl Iterator<Item = TrainableLayout>) -> Result<Snapshot> {
        let mut carve = |(layer, layout): (usize, TrainableLayout)| {
            let mut buffer = |kind| host.carve(&format!("snapshot/{layer}/{kind:?}"), layout.padded_len());
            let [master, exp_avg, exp_avg_sq] = KINDS;
            Ok((layout, [buffer(master)?, buffer(exp_avg)?, buffer(exp_avg_sq)?]))
        };
        Ok(Snapshot { layers: layouts.enumerate().map(&mut carve).collect::<Result<_>>()? })
    }

    /// Returns the values of one of [`KINDS`], by layer, as the layout of trainables has them.
    pub fn values(&self, kind: usize) -> Vec<&[f32]> {
        self.layers.iter().map(|(layout, buffers)| buffers[kind].first(layout.len).host()).collect()
    }
}

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    /// Takes the memory for snapshots, which rank 0 has if the limits plan them.
    pub fn take_snapshot_memory(&mut self) -> Option<Snapshot> {
        self.memory.snapshot.take()
    }

    /// Copies all values; rank 0 has the snapshot. Collective.
    pub fn snapshot(&mut self, mut snapshot: Option<&mut Snapshot>) -> Result<()> {
        let mut own = Vec::new();
        for layer in 0..self.memory.trainables.len() {
            for (i, kind) in KINDS.into_iter().enumerate() {
                let whole = snapshot.as_deref_mut().map(|snapshot| snapshot.layers[layer].1[i].view_mut().host_mut());
                self.collect(layer, kind, whole, &mut own)?;
            }
        }
        Ok(())
    }

    /// Returns the trained values of each layer on rank 0, and nothing elsewhere. Collective.
    pub fn trained_values(&mut self) -> Result<Vec<Vec<f32>>> {
        let (is_first, mut own, mut layers) = (self.queue.rank() == 0, Vec::new(), Vec::new());
        let num_layers = self.memory.trainables.len();
        for layer in 0..num_layers {
            let layout = self.trainable_layout(layer)?;
            let mut whole = vec![0.0; if is_first { layout.padded_len() } else { 0 }];
            self.collect(layer, Values::Master, is_first.then_some(&mut whole[..]), &mut own)?;
            whole.truncate(layout.len);
            layers.extend(is_first.then_some(whole));
            progress::bar("collecting the adapter", layer + 1, num_layers, String::new);
        }
        progress::end();
        Ok(layers)
    }

    /// Brings a layer's values to rank 0, whose `whole` has room for the shards of all ranks. The others use `own`.
    /// Ranks that hold the same shards as those of the first base do nothing.
    fn collect(&mut self, layer: usize, kind: Values, whole: Option<&mut [f32]>, own: &mut Vec<f32>) -> Result<()> {
        let (position, layout) = (self.queue.position(), self.trainable_layout(layer)?);
        if position.replica > 0 {
            return Ok(());
        }
        let is_first = position.shard == 0;
        own.resize(if is_first { 0 } else { layout.shard_len() }, 0.0);
        let values = whole.unwrap_or(own);
        let expected = if is_first { layout.padded_len() } else { layout.shard_len() };
        ensure!(values.len() == expected, "a copy of layer {layer} has room for {} values of {expected}", values.len());
        let to = &mut values[..layout.shard_len()];
        match self.place_of(layer, kind)? {
            Place::Device(from) => self.device.download(to, from.view())?,
            Place::Host(from) => self.host.download(to, from.view())?,
        }
        if position.num_shards == 1 {
            return Ok(());
        }
        self.queue.collect_f32("trained values", values).with_context(|| format!("{kind:?} of layer {layer}"))
    }
}

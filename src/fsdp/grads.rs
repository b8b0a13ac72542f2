//! The trainable values of an engine: their gradients' reduce-scatter and global norm, their update, and their way to
//! and from the host. Gradients aside, they are the part of a run's state that the ranks hold together.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use xxhash_rust::xxh3::Xxh3;

use crate::comm::{Position, Queue, TrainableBuffers};
use crate::device::{AdamWOps, Buffer, Device, ElementwiseOps, Ops, Place};
use crate::model::trainable::{Kind, LayerTrainables};
use crate::optim::adamw::Update;
use crate::optim::clip;

use super::exec::{Engine, Grad};
use super::layout::TrainableLayout;
use super::memory::ShardedTrainables;

/// Names one of the values that a layer has for each trainable number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    Master,
    Grad,
    /// AdamW's mean of gradients and of their squares.
    ExpAvg,
    ExpAvgSq,
}

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    pub(super) fn reduce(&mut self, layer: usize, grad_slot: usize) -> Result<()> {
        let Grad::Here(full) = std::mem::replace(&mut self.grads[grad_slot], Grad::Moving) else {
            bail!("gradient buffer {grad_slot} is being reduced: that was not waited for");
        };
        let shard = self.memory.trainables[layer].grad.take().context("the gradient shard is being reduced")?;
        let pending = self.queue.reduce(format!("reduce of layer {layer}"), TrainableBuffers { shard, full })?;
        self.grads[grad_slot] = Grad::Reducing(layer, pending);
        Ok(())
    }

    pub(super) fn wait_reduce(&mut self, layer: usize, grad_slot: usize) -> Result<()> {
        let Grad::Reducing(reducing, pending) = std::mem::replace(&mut self.grads[grad_slot], Grad::Moving) else {
            bail!("gradient buffer {grad_slot} is not being reduced");
        };
        ensure!(reducing == layer, "gradient buffer {grad_slot} reduces layer {reducing}");
        let TrainableBuffers { shard, full } = self.queue.wait(pending)?;
        self.memory.trainables[layer].grad = Some(shard);
        self.grads[grad_slot] = Grad::Here(full);
        Ok(())
    }

    /// Clips by the global norm and updates. Returns the norm before clipping, and whether there was an update. No
    /// rank updates if the norm or any rank's sum of log-probabilities is not finite; all ranks see the same numbers.
    pub(super) fn update(&mut self, update: &Update, log_probability: f64) -> Result<(f64, bool)> {
        let (mut on_device, mut on_host) = (Vec::new(), Vec::new());
        for (layer, trainable) in self.memory.trainables.iter().enumerate() {
            let grad = trainable.grad.as_ref().with_context(|| not_waited_for(layer))?;
            // If several ranks hold the same values, each sums a part of its own.
            let own = self.trainable_layout(layer)?.replica_range(self.queue.position().replica);
            match grad.wait_on_host()? {
                Place::Device(grad) => on_device.push(grad.view().range(own)),
                Place::Host(grad) => on_host.push(grad.view().range(own)),
            }
        }
        let (on_device, on_host) = (self.device.sums_of_squares(&on_device)?, self.host.sums_of_squares(&on_host)?);
        let sum_of_squares = on_device.iter().chain(&on_host).sum();
        let loss_scale = f64::from(update.loss_scale);
        let sums = self.queue.all_reduce_f64("global gradient norm", &[sum_of_squares, log_probability])?;
        let norm = sums[0].sqrt() / loss_scale;
        if !norm.is_finite() || !sums[1].is_finite() {
            return Ok((norm, false));
        }
        let grad_scale = clip::coefficient(norm, update.max_grad_norm) / update.loss_scale;
        let trainables = self.trainables.as_ref().context("there is no adapter")?;
        let Position { num_shards, num_replicas, shard, .. } = self.queue.position();
        let sharded = ShardedTrainables { trainables, num_shards, num_replicas };
        for (layer, trainable) in self.memory.trainables.iter_mut().enumerate() {
            let master =
                trainable.master.as_mut().with_context(|| format!("the LoRA of layer {layer} is being gathered"))?;
            let grad = trainable.grad.as_ref().with_context(|| not_waited_for(layer))?;
            let (master, grad) = (master.wait_on_host_mut()?, grad.wait_on_host()?);
            let own = sharded.layout(layer).shard_range(shard);
            for (part, lr_ratio) in parts(&trainables.layers[layer], own, update.lr_ratio) {
                let scales = (lr_ratio, grad_scale);
                match (&mut *master, &mut trainable.exp_avg, &mut trainable.exp_avg_sq, grad) {
                    (Place::Device(master), Place::Device(mean), Place::Device(square), Place::Device(grad)) => {
                        adamw(&self.device, update, scales, [master, mean, square], grad, part)?;
                    }
                    (Place::Host(master), Place::Host(mean), Place::Host(square), Place::Host(grad)) => {
                        adamw(&self.host, update, scales, [master, mean, square], grad, part)?;
                    }
                    _ => bail!("the values of layer {layer} are in two places"),
                }
            }
        }
        Ok((norm, true))
    }

    /// Takes this rank's part of `values`, which are laid out as the layout says, as the layer's trainable values, and
    /// forgets what AdamW knew about them.
    pub fn load_trainable(&mut self, layer: usize, values: &[f32]) -> Result<()> {
        let trainable = &mut self.memory.trainables[layer];
        for state in [&mut trainable.exp_avg, &mut trainable.exp_avg_sq] {
            match state {
                Place::Device(state) => self.device.fill_bytes(state.view_mut(), 0)?,
                Place::Host(state) => self.host.fill_bytes(state.view_mut(), 0)?,
            }
        }
        self.load_values(layer, Values::Master, values)
    }

    /// Takes this rank's part of `values`, which are laid out as the layout says.
    pub fn load_values(&mut self, layer: usize, kind: Values, values: &[f32]) -> Result<()> {
        let layout = self.trainable_layout(layer)?;
        ensure!(values.len() == layout.len, "{} values, the layer has {}", values.len(), layout.len);
        let mut padded = values.to_vec();
        padded.resize(layout.padded_len(), 0.0);
        let own = &padded[layout.shard_range(self.queue.position().shard)];
        let trainable = &mut self.memory.trainables[layer];
        let under_way = || under_way(layer, kind);
        let place = match kind {
            Values::Master => trainable.master.as_mut().with_context(under_way)?.wait_on_host_mut()?,
            Values::Grad => trainable.grad.as_mut().with_context(under_way)?.wait_on_host_mut()?,
            Values::ExpAvg => &mut trainable.exp_avg,
            Values::ExpAvgSq => &mut trainable.exp_avg_sq,
        };
        match place {
            Place::Device(place) => self.device.upload(place.view_mut(), own),
            Place::Host(place) => self.host.upload(place.view_mut(), own),
        }
    }

    /// Returns all values of a layer on every rank, as the layout has them. Collective.
    pub fn gather_trainable_to_host(&mut self, layer: usize, kind: Values) -> Result<Vec<f32>> {
        let own = self.on_host(self.place_of(layer, kind)?)?;
        let mut all = self.queue.gather_shards_f32("trainable values", &own)?;
        all.truncate(self.trainable_layout(layer)?.len);
        Ok(all)
    }

    /// Returns this rank's part of a layer's values.
    pub(super) fn place_of(&self, layer: usize, kind: Values) -> Result<&Place<D, f32>> {
        let trainable = &self.memory.trainables[layer];
        let under_way = || under_way(layer, kind);
        match kind {
            Values::Master => trainable.master.as_ref().with_context(under_way)?.wait_on_host(),
            Values::Grad => trainable.grad.as_ref().with_context(under_way)?.wait_on_host(),
            Values::ExpAvg => Ok(&trainable.exp_avg),
            Values::ExpAvgSq => Ok(&trainable.exp_avg_sq),
        }
    }

    /// Gives every rank its part of the values that rank 0 has of a layer; those of the other ranks are overwritten.
    /// Collective.
    pub fn scatter_trainable(&mut self, layer: usize, kind: Values, values: &mut Vec<f32>) -> Result<()> {
        values.resize(self.trainable_layout(layer)?.len, 0.0);
        self.queue.broadcast_f32("trainable values", values)?;
        self.load_values(layer, kind, values)
    }

    pub(super) fn trainable_layout(&self, layer: usize) -> Result<TrainableLayout> {
        Ok(self.sharded().context("there is no adapter")?.layout(layer))
    }

    fn on_host(&self, values: &Place<D, f32>) -> Result<Vec<f32>> {
        let mut copy = vec![0f32; values.len()];
        match values {
            Place::Device(values) => self.device.download(&mut copy, values.view())?,
            Place::Host(values) => self.host.download(&mut copy, values.view())?,
        }
        Ok(copy)
    }

    /// Fails where ranks that hold the same shard of the adapter do not hold the same bytes. Collective.
    pub fn check_replicas(&mut self) -> Result<()> {
        let position = self.queue.position();
        if position.num_replicas == 1 {
            return Ok(());
        }
        let mut hash = Xxh3::new();
        for (layer, trainable) in self.memory.trainables.iter().enumerate() {
            let master =
                trainable.master.as_ref().with_context(|| format!("the LoRA of layer {layer} is being gathered"))?;
            hash.update(bytemuck::cast_slice(&self.on_host(master.wait_on_host()?)?));
        }
        let digest = hash.digest();
        // Each half of the hash is exact in f64.
        let halves = [(digest >> 32) as f64, (digest & u64::from(u32::MAX)) as f64];
        let all = self.queue.all_gather_f64("checksums of replicas", &halves)?;
        for (rank, other) in all.iter().enumerate().filter(|(rank, _)| rank % position.num_shards == position.shard) {
            ensure!(
                *other == halves,
                "ranks {rank} and {} should hold the same part of the adapter and do not: a rank has computed something else",
                position.rank
            );
        }
        Ok(())
    }
}

/// Updates a part of a shard: its values and AdamW's two, with the factors of the learning rate and of the gradient.
fn adamw<D: AdamWOps>(
    device: &D,
    update: &Update,
    (lr_ratio, grad_scale): (f64, f32),
    [master, exp_avg, exp_avg_sq]: [&mut Buffer<D, f32>; 3],
    grad: &Buffer<D, f32>,
    part: Range<usize>,
) -> Result<()> {
    let [master, exp_avg, exp_avg_sq] =
        [master, exp_avg, exp_avg_sq].map(|buffer| buffer.view_mut().into_range(part.clone()));
    device.adamw(update.args(lr_ratio, master, exp_avg, exp_avg_sq, grad.view().range(part), grad_scale))
}

/// Returns the parts of a shard, `own` of a layer's values, that have one learning rate, and its ratio to that of the
/// update: all of it, or the matrices. Padding stays as it is.
fn parts(layer: &LayerTrainables, own: Range<usize>, ratio: f64) -> impl Iterator<Item = (Range<usize>, f64)> {
    let (is_one, len) = (ratio == 1.0, own.len());
    let matrices = layer.list().iter().filter(move |_| !is_one).filter_map(move |matrix| {
        let (begin, end) = (matrix.range.start.max(own.start), matrix.range.end.min(own.end));
        let ratio = if matrix.kind == Kind::B { ratio } else { 1.0 };
        (begin < end).then(|| (begin - own.start..end - own.start, ratio))
    });
    is_one.then_some((0..len, 1.0)).into_iter().chain(matrices)
}

fn under_way(layer: usize, kind: Values) -> String {
    format!("{kind:?} of layer {layer} is under way")
}

fn not_waited_for(layer: usize) -> String {
    format!("the gradient of layer {layer} is being reduced: that was not waited for")
}

//! The computation of an engine: layers and head of one micro-batch at a time.

use anyhow::{Result, bail};

use crate::comm::Queue;
use crate::device::Ops;
use crate::model::batch::MicroBatch;
use crate::model::head::{self, Scores};
use crate::model::layer;
use crate::model::stage::{Saved, StageContext};

use super::exec::{Engine, Grad};
use super::memory::Memory;
use super::run::RunArgs;
use super::schedule::Mode;
use super::slots::{frozen, weights};
use super::unit::{HEAD_PIECE_ROWS, Unit, head_piece_rows};

/// A pass forward through a layer.
#[derive(Clone, Copy)]
pub(super) enum Pass {
    /// The pass goes from input to output. With `saves` it leaves all groups of saved values for backward, and else those that the layer
    /// keeps.
    Whole { saves: bool },
    /// The groups that the layer does not keep are computed again.
    Recompute,
}

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    /// The slot of a unit that is dequantized.
    fn slot_of(&self, unit: Unit) -> Result<usize> {
        match self.dequantized {
            Some((dequantized, slot)) if dequantized == unit => Ok(slot),
            _ => bail!("{unit} is not dequantized"),
        }
    }

    pub(super) fn forward(&mut self, layer_idx: usize, micro: usize, args: &RunArgs<'_>, pass: Pass) -> Result<()> {
        let slot = self.slot_of(Unit::Layer(layer_idx))?;
        let m = self.live(micro);
        let (len, x) = (self.boundary_len(micro), self.boundaries.take(layer_idx, m)?);
        let kept = self.limits.keep.of(layer_idx, self.units.layers);
        let descriptor = args.micro_batches[micro];
        let (saved, needed) = match pass {
            Pass::Whole { saves: true } => (Saved::NOTHING, Saved::EVERYTHING),
            Pass::Whole { saves: false } if descriptor.gradient => (Saved::NOTHING, kept),
            Pass::Whole { saves: false } => (Saved::NOTHING, Saved::NOTHING),
            Pass::Recompute => (kept, Saved::EVERYTHING),
        };
        let mut out = match pass {
            Pass::Whole { .. } => Some(self.boundaries.take_free()?),
            Pass::Recompute => None,
        };
        let trainables = self.trainables.as_ref().filter(|_| descriptor.adapter);
        let layout = &self.base.layouts[layer_idx];
        let frozen = frozen(&self.queue, &self.shards[layer_idx], &self.slots[slot])?;
        let Memory { layer, dense, activations, scratch, batches, .. } = &mut self.memory;
        let ctx = StageContext {
            ops: &self.device,
            spec: &self.base.spec,
            weights: weights(layer, dense.get(layer_idx), layout, frozen),
            batch: &batches[m],
            trainables: trainables.map(|trainables| trainables.of(layer_idx)),
            dropout: args.dropout.filter(|_| descriptor.gradient),
            needed,
        };
        let saves = activations.of(layer_idx, m);
        layer::forward(&ctx, &self.base.spec.layers[layer_idx], out.as_mut(), saves, saved, x.first(len), scratch)?;
        if let Some(out) = out {
            self.boundaries.insert(layer_idx + 1, m, out);
        }
        // Only backward needs the boundary again.
        match descriptor.gradient {
            true => self.boundaries.insert(layer_idx, m, x),
            false => self.boundaries.release(x),
        }
        Ok(())
    }

    pub(super) fn backward(
        &mut self,
        layer_idx: usize,
        micro: usize,
        args: &RunArgs<'_>,
        grad_slot: usize,
        first: bool,
    ) -> Result<()> {
        let slot = self.slot_of(Unit::Layer(layer_idx))?;
        let m = self.live(micro);
        let Grad::Here(grads) = &mut self.grads[grad_slot] else {
            bail!("gradient buffer {grad_slot} is being reduced: that was not waited for");
        };
        if first {
            self.device.fill_bytes(grads.view_mut(), 0)?;
        }
        let len = self.memory.batches[m].num_tokens * self.base.spec.hidden_size;
        let (x, mut d) = (self.boundaries.take(layer_idx, m)?, self.boundaries.take(layer_idx + 1, m)?);
        let layout = &self.base.layouts[layer_idx];
        let frozen = frozen(&self.queue, &self.shards[layer_idx], &self.slots[slot])?;
        let Memory { layer, dense, activations, scratch, batches, .. } = &mut self.memory;
        let ctx = StageContext {
            ops: &self.device,
            spec: &self.base.spec,
            weights: weights(layer, dense.get(layer_idx), layout, frozen),
            batch: &batches[m],
            trainables: self.trainables.as_ref().map(|trainables| trainables.of(layer_idx)),
            dropout: args.dropout,
            needed: Saved::NOTHING,
        };
        let (spec, saves) = (&self.base.spec.layers[layer_idx], activations.of(layer_idx, m));
        layer::backward(&ctx, spec, &mut d, grads, saves, x.first(len), scratch)?;
        // The gradient takes the place of the boundary that backward has consumed. Nobody needs the gradient of the
        // first layer's input.
        self.boundaries.release(x);
        match layer_idx {
            0 => self.boundaries.release(d),
            _ => self.boundaries.insert(layer_idx, m, d),
        }
        Ok(())
    }

    pub(super) fn head_begin(&mut self, micro: usize, batch: &MicroBatch) -> Result<()> {
        let m = self.live(micro);
        let boundary = self.boundaries.get_mut(self.units.layers, m)?;
        let Memory { heads, final_norm, .. } = &mut self.memory;
        heads[m].load(&self.device, batch)?;
        head::begin(&self.device, &self.base.spec, &mut heads[m], boundary, final_norm)
    }

    pub(super) fn head_piece(&mut self, piece: usize, micro: usize, args: &RunArgs<'_>) -> Result<()> {
        let (unit, slot) = (Unit::HeadPiece(piece), self.slot_of(Unit::HeadPiece(piece))?);
        let m = self.live(micro);
        let (first_id, hidden) = (piece * HEAD_PIECE_ROWS, self.base.spec.hidden_size);
        let rows = head_piece_rows(&self.base.spec, piece).len();
        let Memory { heads, head_piece, logits, .. } = &mut self.memory;
        let idx = self.units.idx(unit);
        let weight = match self.base.layouts[idx].in_place(0, D::ACT) {
            Some(bytes) => frozen(&self.queue, &self.shards[idx], &self.slots[slot])?.range(bytes).reinterpret(),
            None => head_piece.first(rows * hidden),
        };
        if args.mode == Mode::Generate {
            // A rank that has fewer texts than another runs empty micro-batches.
            if heads[m].num_targets == 0 {
                return Ok(());
            }
            let begin = m * self.base.spec.vocab_size + first_id;
            let logits = logits.view_mut().into_range(begin..begin + rows);
            return self.device.logits(logits, heads[m].normed.first(hidden), weight, hidden);
        }
        let backward = args.micro_batches[micro].gradient;
        head::piece(&self.device, &self.base.spec, &mut heads[m], logits, weight, first_id, backward)
    }

    pub(super) fn head_score(&mut self, micro: usize, args: &RunArgs<'_>) -> Result<Scores> {
        let (m, last) = (self.live(micro), self.units.layers);
        if !args.micro_batches[micro].gradient {
            let boundary = self.boundaries.take(last, m)?;
            self.boundaries.release(boundary);
        }
        match args.mode {
            Mode::Generate => Ok(Scores::default()),
            Mode::Train | Mode::Score => head::scores(&self.device, &self.memory.heads[m]),
        }
    }

    /// The gradient of Σ −coefficient · log p takes the place of the last boundary.
    pub(super) fn head_backward(&mut self, micro: usize, coefficients: &[f32]) -> Result<()> {
        let (m, last) = (self.live(micro), self.units.layers);
        let Memory { heads, final_norm, batches, .. } = &mut self.memory;
        let (d, tokens) = (self.boundaries.get_mut(last, m)?, batches[m].num_tokens);
        head::backward(&self.device, &self.base.spec, &mut heads[m], d, final_norm, tokens, coefficients)
    }

    /// Returns the logits of a micro-batch's last token after a run in [`Mode::Generate`], `[vocab_size]`.
    pub fn last_logits(&self, micro: usize) -> Result<Vec<f32>> {
        let vocab_size = self.base.spec.vocab_size;
        let begin = self.live(micro) * vocab_size;
        let mut logits = vec![0.0; vocab_size];
        self.device.download(&mut logits, self.memory.logits.view().range(begin..begin + vocab_size))?;
        if let Some(cap) = self.base.spec.head.softcap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        Ok(logits)
    }
}

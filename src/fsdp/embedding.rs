//! The embedding: the host looks up the rows of a micro-batch's tokens, and the device gets them as the first boundary.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use crate::comm::Queue;
use crate::comm::guarded::Guarded;
use crate::device::cpu::Cpu;
use crate::device::{Arena, HostBuffer, Ops};
use crate::model::batch::{CosSin, MicroBatch};
use crate::model::spec::Embedding;

use super::exec::Engine;

/// Number of tokens whose rows one thread copies at a time.
const TOKENS_OF_A_THREAD: usize = 16;

/// Host memory for the rows of a micro-batch on their way to the device.
pub(super) struct Rows<D: Ops> {
    /// `[max_tokens, hidden_size]`
    buffer: Guarded<HostBuffer<D::Act>>,
    /// The micro-batch of the next run whose rows are in the buffer already, with its cosines and sines.
    ahead: Option<(MicroBatch, Vec<CosSin>)>,
}

impl<D: Ops> Rows<D> {
    pub fn carve(host: &mut Arena<Cpu>, tokens: usize, hidden_size: usize) -> Result<Self> {
        Ok(Rows { buffer: Guarded::new(host.carve("embedding", tokens * hidden_size)?), ahead: None })
    }
}

impl<D: Ops, Q: Queue<D>> Engine<D, Q> {
    /// Makes the first boundary of a micro-batch.
    pub(super) fn embed(&mut self, micro: usize, batch: &MicroBatch) -> Result<()> {
        let (tokens, m) = (batch.num_tokens(), self.live(micro));
        ensure!(tokens <= self.limits.max_tokens, "{tokens} tokens, planned for {}", self.limits.max_tokens);
        let cos_sin = match self.memory.rows.ahead.take() {
            Some((ahead, cos_sin)) if ahead == *batch => cos_sin,
            _ => {
                self.look_up(&batch.input_ids)?;
                batch.cos_sin(&self.base.spec)
            }
        };
        self.memory.batches[m].load(&self.device, batch, &cos_sin)?;
        let mut boundary = self.boundaries.take_free()?;
        let rows = boundary.first_mut(tokens * self.base.spec.hidden_size);
        self.queue.upload(format!("embedding of micro-batch {micro}"), rows, &mut self.memory.rows.buffer)?;
        self.boundaries.insert(0, m, boundary);
        Ok(())
    }

    /// Prepares the micro-batch that comes first in the next run, while a GPU computes.
    pub(super) fn embed_ahead(&mut self, batch: &MicroBatch) -> Result<()> {
        if !D::IS_HOST && batch.num_tokens() <= self.limits.max_tokens {
            self.look_up(&batch.input_ids)?;
            self.memory.rows.ahead = Some((batch.clone(), batch.cos_sin(&self.base.spec)));
        }
        Ok(())
    }

    /// Copies the rows of some tokens to the buffer, once the device has read what is in it.
    fn look_up(&mut self, ids: &[u32]) -> Result<()> {
        self.memory.rows.ahead = None;
        let Embedding { scale, rounds_scale, .. } = self.base.spec.embedding;
        let scale = if rounds_scale { D::rounded(scale) } else { scale };
        let (hidden, embed) = (self.base.spec.hidden_size, &self.base.embed);
        let rows = self.memory.rows.buffer.wait_on_host_mut()?.first_mut(ids.len() * hidden);
        let parts = rows.host_mut().par_chunks_mut(TOKENS_OF_A_THREAD * hidden);
        parts.zip(ids.par_chunks(TOKENS_OF_A_THREAD)).try_for_each_init(Vec::new, |values, (rows, ids)| {
            values.resize(rows.len(), 0.0);
            embed(ids, values)?;
            values.iter_mut().for_each(|value| *value *= scale);
            D::round(rows, values);
            Ok(())
        })
    }
}

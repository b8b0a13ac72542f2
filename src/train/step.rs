//! One optimizer step.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::run::{Abandons, RunArgs};
use crate::fsdp::schedule::{Descriptor, Mode};
use crate::model::batch::MicroBatch;
use crate::optim::adamw::Update;

use super::objective::Sft;

/// The numbers of one step, over all ranks if not stated otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepRecord {
    /// Mean of −log p over target tokens.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// False if the loss or the gradient is not finite: then no rank has updated anything.
    pub updated: bool,
    pub num_target_tokens: u64,
    pub num_tokens: u64,
    pub step_ms: f64,
    /// Time of this rank's step less its waits.
    pub compute_ms: f64,
    pub gather_wait_ms: f64,
    pub copy_wait_ms: f64,
    /// Kernels and matrix products that this rank started on its GPU.
    pub launches: u64,
    /// Time of this rank's step less its host's waits for the GPU.
    pub host_ms: f64,
    /// Frozen bytes that this rank received.
    pub gathered_bytes: usize,
}

/// The arguments of a step, besides its micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct StepArgs<'a> {
    /// Number of the step, counted from 1.
    pub step: u32,
    /// Number of micro-batches on each rank.
    pub num_micro_batches: usize,
    /// The update that the step ends with. It holds its own number, counted from 1, and the scale of the loss.
    pub update: &'a Update,
    /// Seed of dropout.
    pub seed: u64,
    /// This rank's first micro-batch of the next step, if it is known.
    pub next: Option<&'a MicroBatch>,
}

/// Runs this rank's micro-batches of a step.
pub fn step<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    batches: &[MicroBatch],
    args: &StepArgs<'_>,
) -> Result<StepRecord> {
    step_unless(engine, batches, args, &mut |_| Ok(false))?.context("the step was abandoned")
}

/// Runs a step like [`step`], unless it is abandoned (`None`), see [`Engine::run_unless`].
pub fn step_unless<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    batches: &[MicroBatch],
    args: &StepArgs<'_>,
    abandons: &mut Abandons<'_>,
) -> Result<Option<StepRecord>> {
    let StepArgs { step, num_micro_batches, update, seed, next } = *args;
    let (start, before) = (Instant::now(), engine.device().asked());
    let targets: usize = batches.iter().map(MicroBatch::num_target_tokens).sum();
    let tokens: usize = batches.iter().map(MicroBatch::num_tokens).sum();
    let counts = engine.queue.all_reduce_f64("count of target tokens", &[targets as f64, tokens as f64])?;
    ensure!(counts[0] > 0.0, "step {step}: no token of the global batch counts in the loss");
    let objective = Sft { num_target_tokens: counts[0], loss_scale: update.loss_scale };
    let output = engine.run_unless(
        &RunArgs {
            mode: Mode::Train,
            micro_batches: &vec![Descriptor::TRAINED; num_micro_batches],
            objective: Some(&objective),
            dropout: Some((seed, step)),
            update: Some(update),
            next,
        },
        batches,
        abandons,
    )?;
    let Some(output) = output else { return Ok(None) };
    // Each micro-batch has its own sum, and these are added in the order of the global batch, so that any number of
    // ranks gives the same bits.
    let own: Vec<f64> = output.log_probabilities.iter().map(|micro| -micro.iter().sum::<f64>()).collect();
    let sums = engine.queue.all_gather_f64("losses", &own)?;
    let in_order = (0..num_micro_batches).flat_map(|m| sums.iter().map(move |of_rank| of_rank[m]));
    let loss = in_order.sum::<f64>() / counts[0];
    let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
    let (elapsed, asked) = (start.elapsed(), engine.device().asked());
    Ok(Some(StepRecord {
        loss,
        grad_norm: output.grad_norm,
        updated: output.updated,
        num_target_tokens: counts[0] as u64,
        num_tokens: counts[1] as u64,
        step_ms: ms(elapsed),
        compute_ms: ms(output.elapsed.saturating_sub(output.waits.gather + output.waits.copy)),
        gather_wait_ms: ms(output.waits.gather),
        copy_wait_ms: ms(output.waits.copy),
        launches: asked.launches - before.launches,
        host_ms: ms(elapsed.saturating_sub(asked.waited - before.waited)),
        gathered_bytes: output.gathered_bytes,
    }))
}

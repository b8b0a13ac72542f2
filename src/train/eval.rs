//! Computes the mean loss over the target tokens of a data set.

use anyhow::{Context, Result, ensure};

use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::run::{Abandons, RunArgs};
use crate::fsdp::schedule::{Descriptor, Mode};
use crate::fsdp::unit::NumUnits;
use crate::model::batch::MicroBatch;
use crate::progress;

use super::skipping::NotFinite;

/// A score over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Mean of −log p over target tokens.
    pub loss: f64,
    pub num_target_tokens: u64,
    /// Part of the target tokens that the model deems most likely.
    pub token_accuracy: f64,
}

/// Scores this rank's micro-batches; every rank has the same number of them. Collective.
pub fn score<D: Ops, Q: Queue<D>>(engine: &mut Engine<D, Q>, batches: &[MicroBatch], adapter: bool) -> Result<Score> {
    score_each(engine, batches.iter().cloned(), adapter, |_| ())
}

/// Scores like [`score`], and calls `each` with the log-probabilities of the target tokens of each micro-batch, in
/// order.
pub fn score_each<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    batches: impl ExactSizeIterator<Item = MicroBatch>,
    adapter: bool,
    each: impl FnMut(&[f64]),
) -> Result<Score> {
    score_unless(engine, batches, adapter, each, &mut |_| Ok(false))?.context("the evaluation was abandoned")
}

/// Scores like [`score_each`], unless it is abandoned (`None`). `abandons` gets the part that is done.
pub fn score_unless<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    mut batches: impl ExactSizeIterator<Item = MicroBatch>,
    adapter: bool,
    mut each: impl FnMut(&[f64]),
    abandons: &mut Abandons<'_>,
) -> Result<Option<Score>> {
    let (mut sum, mut num, mut most_likely) = (0.0, 0.0, 0.0);
    let (limits, descriptor) = (engine.limits(), Descriptor::scored(adapter));
    let at_once = limits.inputs(NumUnits::new(engine.spec()), Mode::Score, &vec![descriptor; limits.max_micro_batches]);
    let group_size = at_once.num_live_micro_batches();
    let num_groups = batches.len().div_ceil(group_size);
    for i in 0..num_groups {
        progress::bar("evaluating", i, num_groups, String::new);
        let group: Vec<MicroBatch> = batches.by_ref().take(group_size).collect();
        let (micro_batches, before) = (vec![descriptor; group.len()], i as f64);
        let args = RunArgs::forward(Mode::Score, &micro_batches);
        let output = engine.run_unless(&args, &group, &mut |done| abandons((before + done) / num_groups as f64))?;
        let Some(output) = output else { return Ok(None) };
        most_likely += output.num_most_likely as f64;
        for micro in output.log_probabilities {
            sum -= micro.iter().sum::<f64>();
            num += micro.len() as f64;
            each(&micro);
        }
    }
    let total = engine.queue.all_reduce_f64("sum of losses", &[sum, num, most_likely])?;
    ensure!(total[1] > 0.0, "no token counts in the loss");
    let (loss, num_target_tokens) = (total[0] / total[1], total[1] as u64);
    if !loss.is_finite() {
        let said = format!(
            "the loss over {num_target_tokens} target tokens is {loss}: the model or its adapter computes no finite numbers; \
             help: if training made them so, lower training.learning_rate"
        );
        return Err(NotFinite(said).into());
    }
    Ok(Some(Score { loss, num_target_tokens, token_accuracy: total[2] / total[1] }))
}

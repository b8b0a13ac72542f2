//! Computes the mean loss over the target tokens of a data set.

use anyhow::{Result, ensure};

use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::{Engine, RunArgs};
use crate::fsdp::schedule::{Descriptor, Mode};
use crate::fsdp::unit::NumUnits;
use crate::model::batch::MicroBatch;

/// A score over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Mean of −log p over target tokens.
    pub loss: f64,
    pub num_target_tokens: u64,
}

/// Scores this rank's micro-batches; every rank has the same number of them. Collective.
pub fn score<D: Ops, Q: Queue<D>>(engine: &mut Engine<D, Q>, batches: &[MicroBatch], adapter: bool) -> Result<Score> {
    score_each(engine, batches, adapter, |_| ())
}

/// Scores like [`score`], and calls `each` with the log-probabilities of the target tokens of each micro-batch, in
/// order.
pub fn score_each<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    batches: &[MicroBatch],
    adapter: bool,
    mut each: impl FnMut(&[f64]),
) -> Result<Score> {
    let (mut sum, mut num) = (0.0, 0.0);
    let (limits, descriptor) = (engine.limits(), Descriptor::scored(adapter));
    let at_once = limits.inputs(NumUnits::new(engine.spec()), Mode::Score, &vec![descriptor; limits.max_micro_batches]);
    for group in batches.chunks(at_once.num_live_micro_batches()) {
        let micro_batches = vec![descriptor; group.len()];
        for micro in engine.run(&RunArgs::forward(Mode::Score, &micro_batches), group)?.log_probabilities {
            sum -= micro.iter().sum::<f64>();
            num += micro.len() as f64;
            each(&micro);
        }
    }
    let total = engine.queue.all_reduce_f64("sum of losses", &[sum, num])?;
    ensure!(total[1] > 0.0, "no token counts in the loss");
    let (loss, num_target_tokens) = (total[0] / total[1], total[1] as u64);
    ensure!(
        loss.is_finite(),
        "the loss over {num_target_tokens} target tokens is {loss}: the model or its adapter computes no finite numbers; \
         help: if training made them so, lower training.learning_rate"
    );
    Ok(Score { loss, num_target_tokens })
}

//! Steps whose loss or gradient is not finite: they update nothing on any rank, and several in a row end the run, with
//! the last good adapter saved.

use anyhow::{Context, Result, anyhow};

use crate::checkpoint::state::Progress;
use crate::comm::Queue;
use crate::device::Ops;
use crate::optim::adamw::Update;

use super::run::Run;
use super::step::StepRecord;
use super::{eval, saving};

/// The reason of an end: the model or its adapter computes no finite numbers.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotFinite(pub String);

/// The outcome of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Updated,
    /// Gradients overflowed in fp16; the loss scale is lower now.
    Overflowed,
    /// The loss or a gradient is not finite, and no loss scale can help.
    Skipped,
}

const NOTHING_LEARNED: &str =
    "nothing was learned before, so the base model or the adapter that training starts from computes this";

/// Counts a step, and lowers or raises the loss scale.
pub fn note(progress: &mut Progress, record: &StepRecord) -> Fate {
    if record.updated {
        progress.loss_scaler.note(true);
        progress.skipped_in_a_row = 0;
        return Fate::Updated;
    }
    if record.loss.is_finite() && progress.loss_scaler.note(false) {
        return Fate::Overflowed;
    }
    progress.num_skipped += 1;
    progress.skipped_in_a_row += 1;
    Fate::Skipped
}

/// Returns the message about a step that was skipped. Fails if `most` in a row were; 0 and 1 mean that the first one ends
/// the run.
pub fn allow(progress: &Progress, record: &StepRecord, update: &Update, most: usize) -> Result<String> {
    let (StepRecord { loss, grad_norm, .. }, rate) = (record, update.learning_rate);
    let Progress { step, skipped_in_a_row, .. } = progress;
    let said = format!(
        "step {step}: loss {loss}, grad_norm {grad_norm}, learning rate {rate:e}: this is not finite, so the step updated nothing; \
         {skipped_in_a_row} in a row (training.max_skipped_steps: {most})"
    );
    if *skipped_in_a_row < most.max(1) {
        return Ok(said);
    }
    let cause = match progress.has_learned {
        true => "training diverged; help: lower training.learning_rate, or raise training.warmup_steps",
        false => NOTHING_LEARNED,
    };
    Err(NotFinite(format!("{said}; {cause}")).into())
}

/// Fails at the end of a run that updated nothing: in fp16, gradients may overflow in each of a few steps while the
/// loss scale falls.
pub fn has_updated(progress: &Progress) -> Result<()> {
    let why = match progress.num_skipped {
        0 => "help: train for more steps, or lower training.learning_rate",
        _ => NOTHING_LEARNED,
    };
    anyhow::ensure!(
        progress.num_updates > 0,
        "in none of the {} steps were the loss and its gradients finite, so nothing was learned and nothing was saved; {why}",
        progress.step
    );
    Ok(())
}

impl<D: Ops, Q: Queue<D>> Run<'_, D, Q> {
    /// Fails if the last steps of a run were skipped because the last update has spoilt the adapter. Collective.
    pub(super) fn check_last_steps(&mut self) -> Result<()> {
        let Progress { skipped_in_a_row, last_update, .. } = self.progress;
        if skipped_in_a_row == 0 || self.computes_finite_losses()? {
            return Ok(());
        }
        Err(NotFinite(format!(
            "training diverged: the last {skipped_in_a_row} step(s) updated nothing, and with the adapter after step {last_update} the \
             loss is not finite; help: lower training.learning_rate, or raise training.warmup_steps"
        ))
        .into())
    }

    /// Returns whether the adapter computes a finite loss from the sequences of the step that made the last update.
    /// Before that update it did. Collective.
    fn computes_finite_losses(&mut self) -> Result<bool> {
        let mut sampler = self.sampler();
        let batches = self.batches(&mut sampler, self.progress.last_update - 1);
        match eval::score(self.engine, &batches, true) {
            Ok(_) => Ok(true),
            Err(error) if error.is::<NotFinite>() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Saves the adapter that a run ends with which cannot go on, if that adapter is good, and returns the error with the
    /// place of the last good one. Collective.
    pub(super) fn keep_last_good(&mut self, error: anyhow::Error) -> Result<anyhow::Error> {
        let last_update = self.progress.last_update;
        if last_update == 0 {
            return Ok(error);
        }
        // After an update that an evaluation found to be bad, the engine has other values than at the last good step.
        let (progress, num_bytes) = self.last_good;
        let is_good = progress.last_update == last_update && self.computes_finite_losses()?;
        if is_good {
            let lines = self.metrics.as_ref().map_or(&[][..], |metrics| &metrics.lines()[..num_bytes]);
            saving::save(self.engine, self.writer.as_deref_mut(), progress, lines)?;
        }
        let error = match self.writer.as_deref_mut() {
            Some(writer) => {
                if let Err(error) = writer.settle().context("saving the last good adapter") {
                    writer.tell(&error);
                }
                let limit = if is_good { progress.step + 1 } else { last_update };
                with_last_good(error, writer, limit)
            }
            None => error,
        };
        // A rank that ends now would end rank 0, which writes.
        self.engine.queue.all_gather_f64("end of a run that cannot go on", &[0.0])?;
        Ok(error)
    }
}

/// Adds to an error about numbers that are not finite where the newest checkpoint is that was saved before step `limit`.
pub fn with_last_good(error: anyhow::Error, writer: &saving::Writer, limit: usize) -> anyhow::Error {
    if !error.is::<NotFinite>() {
        return error;
    }
    match writer.newest_before(limit) {
        Some((step, path)) => anyhow!(
            "{error:#}; the last good adapter, after step {step}, is in {}, and training can go on from it with lora.adapter",
            path.display()
        ),
        None => anyhow!("{error:#}; no good adapter was saved before"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::loss_scale::LossScaler;

    fn record(loss: f64, grad_norm: f64) -> StepRecord {
        StepRecord {
            loss,
            grad_norm,
            updated: loss.is_finite() && grad_norm.is_finite(),
            num_target_tokens: 1,
            num_tokens: 1,
            step_ms: 0.0,
            compute_ms: 0.0,
            gather_wait_ms: 0.0,
            copy_wait_ms: 0.0,
            launches: 0,
            host_ms: 0.0,
            gathered_bytes: 0,
        }
    }

    const INFINITE: f64 = f64::INFINITY;

    fn update() -> Update {
        let (learning_rate, lr_ratio, max_grad_norm) = (1e-3, 1.0, None);
        let (beta1, beta2, epsilon, weight_decay, loss_scale, step) = (0.9, 0.999, 1e-8, 0.0, 1.0, 1);
        Update { learning_rate, lr_ratio, beta1, beta2, epsilon, weight_decay, max_grad_norm, loss_scale, step }
    }

    #[test]
    fn an_update_ends_a_row_of_skipped_steps_and_an_overflow_does_not() {
        let mut progress = Progress { loss_scaler: LossScaler::new(true), ..Progress::default() };
        let mut fates = |records: &[(f64, f64)]| -> Vec<(Fate, usize)> {
            let mut note =
                |&(loss, norm): &(f64, f64)| (note(&mut progress, &record(loss, norm)), progress.skipped_in_a_row);
            records.iter().map(&mut note).collect()
        };
        use Fate::{Overflowed, Skipped, Updated};
        // A loss that is not finite has nothing to do with the loss scale.
        let steps = [(1.0, 1.0), (f64::NAN, INFINITE), (1.0, INFINITE), (INFINITE, 1.0), (1.0, 1.0), (1.0, INFINITE)];
        let expected = [(Updated, 0), (Skipped, 1), (Overflowed, 1), (Skipped, 2), (Updated, 0), (Overflowed, 0)];
        assert_eq!(fates(&steps), expected);
        // From 65,536 / 4 the scale falls to 1 in 14 steps; overflows at a scale of 1 count.
        let overflows = fates(&[(1.0, INFINITE); 16]);
        assert!(overflows[..14].iter().all(|fate| *fate == (Overflowed, 0)), "{overflows:?}");
        assert_eq!(overflows[14..], [(Skipped, 1), (Skipped, 2)]);
        assert_eq!((progress.num_skipped, progress.loss_scaler.scale()), (4, 1.0));
    }

    #[test]
    fn so_many_skipped_steps_in_a_row_end_the_run() {
        let record = record(f64::NAN, 2.0);
        let allows = |skipped_in_a_row, most, has_learned| {
            let progress = Progress { step: 7, skipped_in_a_row, has_learned, ..Progress::default() };
            allow(&progress, &record, &update(), most)
        };
        assert!(allows(2, 3, true).unwrap().starts_with("step 7: loss NaN, grad_norm 2"));
        for (skipped, most) in [(3, 3), (1, 1), (1, 0)] {
            let error = allows(skipped, most, true).unwrap_err();
            assert!(error.is::<NotFinite>() && error.to_string().contains("lower training.learning_rate"), "{error}");
        }
        let error = allows(5, 5, false).unwrap_err().to_string();
        assert!(error.contains("the adapter that training starts from") && !error.contains("lower"), "{error}");
    }

    #[test]
    fn a_run_whose_every_step_overflows_fails_at_its_end() {
        let mut progress = Progress { step: 5, loss_scaler: LossScaler::new(true), ..Progress::default() };
        // No step fails, as a smaller scale may help the next.
        assert!((0..5).all(|_| note(&mut progress, &record(1.0, INFINITE)) == Fate::Overflowed));
        let error = has_updated(&progress).unwrap_err().to_string();
        assert!(error.starts_with("in none of the 5 steps") && error.contains("help: train for more steps"), "{error}");
        progress.num_updates += 1;
        has_updated(&progress).unwrap();
    }
}

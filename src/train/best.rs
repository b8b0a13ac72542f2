//! The best adapter of a run by its held-out loss, and the end of a run that gets no better.

use std::path::Path;

use anyhow::Result;

use crate::checkpoint::adapter::{self, Adapter};
use crate::checkpoint::state::{self, Evaluations, Found, Progress, Scored};
use crate::comm::Queue;
use crate::device::Ops;
use crate::model::spec::ModelSpec;

use super::log::Log;
use super::metrics::{BestMetrics, MetricsFile};
use super::run::Run;

/// Takes note of an evaluation after a step. As transformers' EarlyStoppingCallback does, it counts as no better unless
/// it beats the best one before by more than the threshold.
fn note(evaluations: &mut Evaluations, scored: Scored, threshold: f64) {
    let Evaluations { best, num_no_better, .. } = evaluations;
    let gains = best.is_none_or(|best| best.eval_loss - scored.eval_loss > threshold);
    *num_no_better = if gains { 0 } else { *num_no_better + 1 };
    keep_lower(best, scored);
}

fn keep_lower(best: &mut Option<Scored>, scored: Scored) {
    if best.is_none_or(|best| scored.eval_loss < best.eval_loss) {
        *best = Some(scored);
    }
}

impl<D: Ops, Q: Queue<D>> Run<'_, D, Q> {
    /// Evaluates if that is due and there is something to evaluate on. Returns whether the run ends with this step: it
    /// does if it `is_last` anyway, or if patience has come to an end; or `None` if the evaluation was abandoned. The
    /// evaluation before the first step is written and not compared. Collective.
    pub(super) fn judge(&mut self, is_last: bool) -> Result<Option<bool>> {
        if let Some(dataset) = self.eval.filter(|_| self.progress.owes_evaluation) {
            let Some(eval_loss) = self.evaluate(dataset)? else { return Ok(None) };
            self.progress.owes_evaluation = false;
            let step = self.progress.step;
            return Ok(Some(step > 0 && self.compare(Scored { step, eval_loss }, is_last)));
        }
        self.progress.owes_evaluation = false;
        Ok(Some(is_last))
    }

    /// Compares an evaluation with those before, and returns whether the run ends with it.
    fn compare(&mut self, scored: Scored, is_last: bool) -> bool {
        let (job, saves) = (self.job, self.saves());
        let evaluations = &mut self.progress.evaluations;
        note(evaluations, scored, job.early_stopping_threshold);
        let num_no_better = evaluations.num_no_better;
        let stops = !is_last && job.early_stopping_patience.is_some_and(|patience| num_no_better >= patience);
        if job.load_best_model_at_end && (saves || is_last || stops) {
            self.bests.scored = Some(scored);
        }
        if let (true, Some(best)) = (stops, evaluations.best) {
            self.log.line(format!(
                "training ends early: {num_no_better} evaluation(s) in a row did not beat the best before by more than {} \
                 (training.early_stopping_patience, training.early_stopping_threshold); the lowest eval_loss is {:.4}, \
                 after step {}",
                job.early_stopping_threshold, best.eval_loss, best.step
            ));
        }
        is_last || stops
    }
}

/// The best checkpoint among those that were written: one that could not be written must not count.
#[derive(Clone, Copy)]
pub struct Bests {
    /// The best of the checkpoints that are known to be written.
    written: Option<Scored>,
    /// The checkpoint that is being written, if it was evaluated.
    writing: Option<Scored>,
    /// The adapter that is to be saved next, if it was evaluated.
    pub(super) scored: Option<Scored>,
}

impl Bests {
    /// Begins with the best checkpoint of a run so far.
    pub fn new(written: Option<Scored>) -> Bests {
        Bests { written, writing: None, scored: None }
    }

    /// Takes note of how the last write ended, before the adapter of a step is saved or the run ends with it. Returns the best of all,
    /// that adapter included.
    pub(super) fn next(&mut self, step: usize, has_failed: bool) -> Option<Scored> {
        match self.writing.take() {
            Some(writing) if !has_failed => keep_lower(&mut self.written, writing),
            // That adapter is saved once more.
            Some(writing) if writing.step == step => self.scored = Some(writing),
            _ => {}
        }
        self.writing = self.scored.take();
        let mut best = self.written;
        if let Some(scored) = self.writing {
            keep_lower(&mut best, scored);
        }
        best
    }
}

/// The adapter that is the result of a run.
pub struct Chosen {
    pub step: usize,
    pub adapter: Adapter,
    /// Reason why it is not the one that the recipe wants.
    pub doubt: Option<String>,
}

impl Chosen {
    /// Writes which adapter the result is, and a last line of the metrics, if the run has looked for the best one.
    pub fn tell(&self, progress: &Progress, epoch: f64, metrics: &mut MetricsFile, log: Log) -> Result<()> {
        let Some(best) = progress.evaluations.best_checkpoint.filter(|best| best.step == self.step) else {
            return Ok(());
        };
        let Scored { step: adapter_step, eval_loss: best_eval_loss } = best;
        log.line(format!(
            "the adapter is that after step {adapter_step}, whose eval_loss {best_eval_loss:.4} is the best"
        ));
        metrics.write(&BestMetrics { step: progress.step, epoch, adapter_step, best_eval_loss })
    }
}

/// Chooses between the adapter of the last step and that of the best checkpoint in the folder `output`.
pub fn choose(progress: &Progress, last: Adapter, output: &Path, spec: &ModelSpec) -> Chosen {
    let (step, best) = (progress.step, progress.evaluations.best_checkpoint);
    let Some(best) = best.filter(|best| best.step != step) else { return Chosen { step, adapter: last, doubt: None } };
    match read(output, best.step, spec) {
        Ok(adapter) => Chosen { step: best.step, adapter, doubt: None },
        Err(error) => {
            let doubt = format!(
                "the best adapter, after step {}, is lost ({error:#}), and that of the last step is the result",
                best.step
            );
            Chosen { step, adapter: last, doubt: Some(doubt) }
        }
    }
}

/// Reads the adapter of a checkpoint. Fails if a byte of the checkpoint has changed.
fn read(output: &Path, step: usize, spec: &ModelSpec) -> Result<Adapter> {
    adapter::load(&Found::open(&state::path_of(output, step))?.path, spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::adapter::AdapterSettings;
    use crate::model::shapes;

    /// The counts after each evaluation, and the best step at the end.
    fn noted(losses: &[f64], threshold: f64) -> (Vec<usize>, Option<Scored>) {
        let mut evaluations = Evaluations::default();
        let counts = losses.iter().enumerate().map(|(step, &eval_loss)| {
            note(&mut evaluations, Scored { step, eval_loss }, threshold);
            evaluations.num_no_better
        });
        (counts.collect(), evaluations.best)
    }

    #[test]
    fn evaluations_count_as_transformers_counts_them() {
        let losses = [3.0, 2.5, 2.5, 2.4375, 2.625, 2.0];
        // The threshold decides about patience alone: the best is the lowest, and the first of equal ones. A gain of just
        // the threshold is none.
        assert_eq!(noted(&losses, 0.0625), (vec![0, 0, 1, 2, 3, 0], Some(Scored { step: 5, eval_loss: 2.0 })));
        assert_eq!(noted(&losses[..5], 0.0625).1, Some(Scored { step: 3, eval_loss: 2.4375 }));
        assert_eq!(noted(&losses[..3], 0.0), (vec![0, 0, 1], Some(Scored { step: 1, eval_loss: 2.5 })));
        assert_eq!(noted(&losses, 0.0).0, [0, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn a_checkpoint_that_was_not_written_is_not_the_best() {
        let scored = |step, eval_loss| Some(Scored { step, eval_loss });
        let mut bests = Bests::new(scored(2, 3.0));
        bests.scored = scored(4, 1.0);
        assert_eq!(bests.next(4, false), scored(4, 1.0));
        // It could not be written, and the next one is better than the others, or not.
        let mut other = Bests { ..bests };
        bests.scored = scored(6, 2.0);
        other.scored = scored(6, 4.0);
        assert_eq!((bests.next(6, true), other.next(6, true)), (scored(6, 2.0), scored(2, 3.0)));
        // Saving the same adapter again is another try.
        assert_eq!(bests.next(6, true), scored(6, 2.0));
        assert_eq!(bests.next(8, false), scored(6, 2.0));
        assert_eq!(bests.next(10, true), scored(6, 2.0));
    }

    #[test]
    fn a_best_adapter_that_is_lost_is_a_doubt() {
        let (output, spec) = (tempfile::tempdir().unwrap(), shapes::named("llama-3.1-8b", Some(1)).unwrap());
        let settings = AdapterSettings::smallest(&spec);
        let last = adapter::fresh(settings, &spec, 1);
        for (step, is_lost) in [(9, false), (8, true)] {
            let mut progress = Progress { step: 9, ..Progress::default() };
            progress.evaluations.best_checkpoint = Some(Scored { step, eval_loss: 1.0 });
            let chosen = choose(&progress, last.clone(), output.path(), &spec);
            assert_eq!((chosen.step, &chosen.adapter, chosen.doubt.is_some()), (9, &last, is_lost));
        }
    }
}

//! Decides the number of steps and of warm-up steps of a run, and says them.

use serde::Serialize;

use super::RecipeError;
use super::job::{BatchSize, TrainingJob};
use super::keys::{self, MAX_MICRO_BATCHES, MAX_STEPS_OF_A_RUN};
use crate::data::Epochs;
use crate::files::counted;
use crate::optim::lr::LrScheduler;

/// Largest number of steps of a default warm-up.
const MOST_WARMUP_STEPS: usize = 10;
/// Number of steps of the run for each step of a default warm-up.
const STEPS_OF_A_WARMUP_STEP: usize = 10;

/// Times at which something is done in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Never,
    /// Every so many steps.
    Steps(usize),
    /// At the end of each epoch.
    Epochs,
}

impl When {
    /// Tells whether it is to be done after this step; steps are counted from 1.
    pub fn is_at(self, step: usize, epochs: Epochs) -> bool {
        match self {
            When::Never => false,
            When::Steps(every) => step.is_multiple_of(every),
            When::Epochs => epochs.end_with(step),
        }
    }
}

/// A warm-up as a recipe gives it. Transformers 5 takes a number below 1 for a fraction.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Warmup {
    Steps(usize),
    /// Fraction of all steps, from 0 to below 1.
    Ratio(f64),
}

impl Warmup {
    /// Returns the number of steps.
    pub(super) fn of(self, num_steps: usize) -> usize {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (num_steps as f64 * ratio).ceil() as usize,
        }
    }
}

/// The length of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps {
    pub num_steps: usize,
    pub epochs: Epochs,
    /// Number of steps in which the learning rate rises; fewer than `num_steps`.
    pub warmup_steps: usize,
    /// A sentence that says all of this, to be told before the first step.
    pub plan: String,
}

impl TrainingJob {
    /// Decides the length of a run over `num_sequences` sequences of training data.
    ///
    /// # Errors
    /// The ranks cannot share a step, there are too many steps, or the learning rate that was written would never be
    /// reached.
    pub fn steps(&self, num_sequences: usize, world_size: usize) -> Result<Steps, RecipeError> {
        self.check_batch(world_size)?;
        let global = self.global_batch_size(world_size);
        let epochs = Epochs::new(num_sequences, global, self.drop_last).ok_or_else(|| {
            let (drop_last, batch) = (keys::DROP_LAST.path, keys::GLOBAL_BATCH_SIZE.path);
            // A step of so few sequences would be refused where the ranks cannot share it.
            let can_be_shared = world_size <= num_sequences.div_ceil(self.per_device_train_batch_size);
            let lower = if can_be_shared { format!("lower {batch}, or ") } else { String::new() };
            RecipeError::one(format!(
                "{drop_last}: found true, but {} do not fill a step of {global}; help: {lower}remove {drop_last}",
                counted(num_sequences, "sequence")
            ))
        })?;
        let num_steps = self.max_steps.unwrap_or_else(|| self.steps_of_epochs(epochs));
        let run = self.said(num_sequences, global, epochs, num_steps);
        if num_steps > MAX_STEPS_OF_A_RUN {
            return Err(RecipeError::one(format!("{run}; at most {MAX_STEPS_OF_A_RUN} are possible")));
        }
        let (warmup_steps, why) = self.warmup(&run, num_steps)?;
        let plan = format!("{run}; the learning rate rises in {}{why}", counted(warmup_steps, "step"));
        Ok(Steps { num_steps, epochs, warmup_steps, plan })
    }

    /// Decides the number of steps of the warm-up; returns it with a remark on it. `run` says how long the run is.
    fn warmup(&self, run: &str, num_steps: usize) -> Result<(usize, String), RecipeError> {
        let (key, warmup) = match self.warmup_ratio {
            Some(ratio) => (keys::WARMUP_RATIO.path, Some(Warmup::Ratio(ratio))),
            None => (keys::WARMUP_STEPS.path, self.warmup_steps),
        };
        let (steps, found, remark) = match warmup {
            None => {
                let steps = MOST_WARMUP_STEPS.min(num_steps / STEPS_OF_A_WARMUP_STEP);
                (
                    steps,
                    String::new(),
                    format!(", a tenth of them and at most {MOST_WARMUP_STEPS}, as {key} is not written"),
                )
            }
            Some(Warmup::Steps(steps)) => (steps, steps.to_string(), String::new()),
            Some(warmup @ Warmup::Ratio(ratio)) => {
                let steps = warmup.of(num_steps);
                (steps, format!("{ratio}, which is {}", counted(steps, "step")), format!(" ({key}: {ratio})"))
            }
        };
        if steps > 0 && steps >= num_steps {
            return Err(RecipeError::one(format!(
                "{key}: found {found}, allowed: fewer than the run's steps, else {} is never reached; {run}; help: remove {key}, or \
                 make more steps with {}, {} or a smaller {}",
                keys::LEARNING_RATE.path,
                keys::MAX_STEPS.path,
                keys::NUM_TRAIN_EPOCHS.path,
                keys::GLOBAL_BATCH_SIZE.path
            )));
        }
        self.check_decay(run, steps, num_steps)?;
        Ok((steps, remark))
    }

    /// Fails if warm-up and decay have more steps than the run.
    fn check_decay(&self, run: &str, warmup_steps: usize, num_steps: usize) -> Result<(), RecipeError> {
        let LrScheduler::WarmupStableDecay { num_decay_steps, num_stable_steps: None, .. } = self.lr_scheduler else {
            return Ok(());
        };
        let most = num_steps - warmup_steps;
        if num_decay_steps <= most {
            return Ok(());
        }
        Err(RecipeError::one(format!(
            "{}.num_decay_steps: found {num_decay_steps}, allowed: at most {most}, the steps after the warm-up of {}; {run}",
            keys::LR_SCHEDULER_KWARGS.path,
            counted(warmup_steps, "step")
        )))
    }

    fn steps_of_epochs(&self, epochs: Epochs) -> usize {
        // A number of steps beyond usize becomes the largest usize, which is refused.
        (self.num_train_epochs * epochs.num_steps() as f64).ceil().max(1.0) as usize
    }

    /// Says how long a run is, and from which key that follows.
    fn said(&self, num_sequences: usize, global: usize, epochs: Epochs, num_steps: usize) -> String {
        let of_epoch = match (epochs.dropped(), epochs.last_step()) {
            (0, last) if last == global => String::new(),
            (0, last) => format!(" (the last of each epoch has {last})"),
            (dropped, _) => format!(", which leave {} out of each epoch", counted(dropped, "sequence")),
        };
        let key = match self.max_steps {
            Some(steps) => format!("{}: {steps}", keys::MAX_STEPS.path),
            None => format!("{}: {}", keys::NUM_TRAIN_EPOCHS.path, self.num_train_epochs),
        };
        // An infinite number of steps has no place among epochs.
        let gone = epochs.after(num_steps.min(MAX_STEPS_OF_A_RUN + 1));
        format!(
            "the run has {} of {}{of_epoch}; an epoch of {} has {}, so these are {gone:.2} epochs ({key})",
            counted(num_steps, "step"),
            counted(global, "sequence"),
            counted(num_sequences, "sequence"),
            counted(epochs.num_steps(), "step"),
        )
    }

    /// Fails if the ranks cannot share a step, or if a rank's part of it is too large.
    pub fn check_batch(&self, world_size: usize) -> Result<(), RecipeError> {
        let (global, per_device) = (self.global_batch_size(world_size), self.per_device_train_batch_size);
        let (key, value) = match self.batch {
            BatchSize::AccumulationSteps(steps) => (keys::ACCUMULATION_STEPS.path, steps),
            BatchSize::Global(sequences) => (keys::GLOBAL_BATCH_SIZE.path, sequences),
        };
        if world_size > global.div_ceil(per_device) {
            return Err(RecipeError::one(format!(
                "{key}: {world_size} ranks cannot share a global batch of {global} sequences in micro-batches of {per_device}: start \
                 fewer ranks or raise {}",
                keys::GLOBAL_BATCH_SIZE.path
            )));
        }
        let micro_batches = self.accumulation_steps(world_size);
        if micro_batches > MAX_MICRO_BATCHES {
            return Err(RecipeError::one(format!(
                "{key}: found {value}, which is {micro_batches} micro-batches a rank and step, allowed: {MAX_MICRO_BATCHES} of them"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::checkpoint::output::Resume;
    use crate::optim::lr::Curve;

    fn job() -> TrainingJob {
        TrainingJob {
            per_device_train_batch_size: 1,
            batch: BatchSize::Global(16),
            learning_rate: 1e-4,
            lr_scheduler: LrScheduler::Cosine { num_cycles: 0.5 },
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            warmup_steps: None,
            warmup_ratio: None,
            num_train_epochs: 1.0,
            drop_last: false,
            max_steps: None,
            max_grad_norm: None,
            weight_decay: 0.0,
            loraplus_lr_ratio: None,
            seed: 42,
            logging_steps: 1,
            save: When::Never,
            save_total_limit: None,
            max_skipped_steps: 5,
            grace: Duration::from_secs(10),
            max_time: None,
            resume: Resume::Auto,
            eval: When::Never,
            load_best_model_at_end: false,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
        }
    }

    #[test]
    fn a_warmup_that_is_not_written_is_a_tenth_and_said() {
        for (sequences, num_steps, warmup_steps) in [(5, 1, 0), (160, 10, 1), (16 * 25, 25, 2), (16 * 500, 500, 10)] {
            let steps = job().steps(sequences, 2).unwrap();
            assert_eq!((steps.num_steps, steps.warmup_steps), (num_steps, warmup_steps));
            let said = format!("; the learning rate rises in {}, a tenth of them", counted(warmup_steps, "step"));
            assert!(steps.plan.contains(&said), "{}", steps.plan);
        }
    }

    #[test]
    fn epochs_are_whole_and_said() {
        for (sequences, num_train_epochs, num_steps, said) in [
            (
                5,
                3.0,
                3,
                "3 steps of 16 sequences (the last of each epoch has 5); an epoch of 5 sequences has 1 step, so these are 3.00",
            ),
            (
                33,
                2.0,
                6,
                "6 steps of 16 sequences (the last of each epoch has 1); an epoch of 33 sequences has 3 steps",
            ),
            (32, 1.0, 2, "2 steps of 16 sequences; an epoch of 32 sequences has 2 steps, so these are 1.00 epochs"),
            (33, 0.5, 2, "so these are 0.97 epochs (training.num_train_epochs: 0.5)"),
            (5, 0.1, 1, "1 step of 16 sequences"),
        ] {
            let steps = TrainingJob { num_train_epochs, ..job() }.steps(sequences, 2).unwrap();
            assert_eq!(steps.num_steps, num_steps);
            assert!(steps.plan.contains(said), "{said} is not in {}", steps.plan);
        }
        let fixed =
            TrainingJob { max_steps: Some(7), warmup_steps: Some(Warmup::Steps(1)), ..job() }.steps(33, 2).unwrap();
        assert!(
            fixed.plan.ends_with("2.48 epochs (training.max_steps: 7); the learning rate rises in 1 step"),
            "{}",
            fixed.plan
        );
    }

    #[test]
    fn sequences_that_do_not_fill_a_step_are_dropped_where_that_is_asked_for() {
        let job = TrainingJob { drop_last: true, num_train_epochs: 2.0, ..job() };
        let steps = job.steps(35, 2).unwrap();
        assert_eq!(steps.num_steps, 4);
        assert!(steps.plan.contains("16 sequences, which leave 3 sequences out of each epoch"), "{}", steps.plan);
        let error = job.steps(5, 2).unwrap_err().to_string();
        assert!(error.contains("training.drop_last: found true, but 5 sequences do not fill a step of 16"), "{error}");
        assert!(error.contains("help: lower training.global_batch_size, or remove"), "{error}");
        let error = job.steps(5, 8).unwrap_err().to_string();
        assert!(error.ends_with("help: remove training.drop_last"), "8 ranks cannot share 5 sequences: {error}");
    }

    #[test]
    fn times_are_steps_or_ends_of_epochs() {
        let epochs = Epochs::new(5, 2, false).unwrap();
        let steps = |when: When| (1..=9).filter(|&step| when.is_at(step, epochs)).collect::<Vec<_>>();
        assert_eq!(steps(When::Never), [0; 0]);
        assert_eq!(steps(When::Steps(4)), [4, 8]);
        assert_eq!(steps(When::Epochs), [3, 6, 9]);
    }

    #[test]
    fn a_warmup_as_long_as_the_run_is_refused() {
        let job = TrainingJob { warmup_steps: Some(Warmup::Steps(3)), ..job() };
        assert_eq!(job.steps(16 * 4, 2).unwrap().warmup_steps, 3);
        for sequences in [16 * 3, 16] {
            let error = job.steps(sequences, 2).unwrap_err().to_string();
            for word in
                ["training.warmup_steps: found 3", "training.num_train_epochs: 1", "of 16 sequences", "max_steps"]
            {
                assert!(error.contains(word), "{word} is not in {error}");
            }
        }
    }

    #[test]
    fn a_fraction_of_the_steps_is_rounded_up() {
        let steps = |job: TrainingJob, sequences| job.steps(sequences, 2);
        let ratio = |warmup_ratio| TrainingJob { warmup_ratio: Some(warmup_ratio), ..job() };
        for (job, warmup_steps, said) in [
            (ratio(0.03), 1, "the learning rate rises in 1 step (training.warmup_ratio: 0.03)"),
            (ratio(0.0), 0, "rises in 0 steps"),
            (
                TrainingJob { warmup_steps: Some(Warmup::Ratio(0.21)), ..job() },
                3,
                "3 steps (training.warmup_steps: 0.21)",
            ),
        ] {
            let steps = steps(job, 160).unwrap();
            assert!(steps.warmup_steps == warmup_steps && steps.plan.contains(said), "{}", steps.plan);
        }
        let error = steps(ratio(0.1), 16).unwrap_err().to_string();
        assert!(error.contains("training.warmup_ratio: found 0.1, which is 1 step, allowed: fewer"), "{error}");
    }

    #[test]
    fn a_decay_longer_than_the_run_is_refused() {
        let decay = |num_decay_steps, num_stable_steps| LrScheduler::WarmupStableDecay {
            num_stable_steps,
            num_decay_steps,
            warmup_type: Curve::Linear,
            decay_type: Curve::Cosine,
            min_lr_ratio: 0.0,
            num_cycles: 0.5,
        };
        let steps = |lr_scheduler| TrainingJob { lr_scheduler, ..job() }.steps(160, 2);
        steps(decay(9, None)).unwrap();
        steps(decay(10, Some(2))).unwrap();
        let error = steps(decay(10, None)).unwrap_err().to_string();
        assert!(
            error.contains("num_decay_steps: found 10, allowed: at most 9, the steps after the warm-up of 1 step"),
            "{error}"
        );
    }

    #[test]
    fn numbers_beyond_all_bounds_are_refused() {
        let many = TrainingJob { num_train_epochs: 1e38, ..job() };
        let error = many.steps(1 << 40, 1).unwrap_err().to_string();
        assert!(error.contains("training.num_train_epochs: 1") && error.contains("at most 1073741824"), "{error}");
        let large = TrainingJob { batch: BatchSize::Global(1 << 30), ..job() };
        let error = large.check_batch(2).unwrap_err().to_string();
        assert!(
            error.contains("training.global_batch_size: found 1073741824, which is 536870912 micro-batches"),
            "{error}"
        );
        let few = TrainingJob { batch: BatchSize::Global(2), ..job() };
        assert!(few.check_batch(4).unwrap_err().to_string().contains("4 ranks cannot share a global batch of 2"));
    }
}

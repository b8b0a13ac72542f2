//! Decides the number of steps and of warm-up steps of a run, and remarks on lengths that may surprise.

use super::RecipeError;
use super::job::{BatchSize, TrainingJob};
use super::keys::{self, MAX_MICRO_BATCHES, MAX_STEPS_OF_A_RUN};

/// Largest number of steps of a default warm-up.
const MOST_WARMUP_STEPS: usize = 10;
/// Number of steps of the run for each step of a default warm-up.
const STEPS_OF_A_WARMUP_STEP: usize = 10;

/// The length of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps {
    pub num_steps: usize,
    /// Number of steps in which the learning rate rises; fewer than `num_steps`.
    pub warmup_steps: usize,
    /// Lines to print before the first step.
    pub remarks: Vec<String>,
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
        let num_steps = self.max_steps.unwrap_or_else(|| self.steps_of_epochs(num_sequences, global));
        let epochs = num_steps as f64 * global as f64 / num_sequences as f64;
        let run = format!(
            "the run has {num_steps} step(s) of {global} sequence(s), which go {epochs:.1} times through {num_sequences} sequence(s) \
             ({})",
            match self.max_steps {
                Some(steps) => format!("{}: {steps}", keys::MAX_STEPS.path),
                None => format!("{}: {}", keys::NUM_TRAIN_EPOCHS.path, self.num_train_epochs),
            }
        );
        if num_steps > MAX_STEPS_OF_A_RUN {
            return Err(RecipeError::one(format!("{run}; at most {MAX_STEPS_OF_A_RUN} are possible")));
        }
        let mut remarks = Vec::new();
        if num_sequences < global {
            remarks.push(format!(
                "an epoch is less than a step: {run}; help: set {} to {num_sequences} or less",
                keys::GLOBAL_BATCH_SIZE.path
            ));
        }
        let warmup = keys::WARMUP_STEPS.path;
        let warmup_steps = match self.warmup_steps {
            Some(steps) if steps > 0 && steps >= num_steps => {
                return Err(RecipeError::one(format!(
                    "{warmup}: found {steps}, allowed: fewer than the run's steps, else {} is never reached; {run}; help: remove {warmup}, \
                     or make more steps with {}, {} or a smaller {}",
                    keys::LEARNING_RATE.path,
                    keys::MAX_STEPS.path,
                    keys::NUM_TRAIN_EPOCHS.path,
                    keys::GLOBAL_BATCH_SIZE.path
                )));
            }
            Some(steps) => steps,
            None => {
                let steps = MOST_WARMUP_STEPS.min(num_steps / STEPS_OF_A_WARMUP_STEP);
                remarks.push(format!(
                    "{warmup}: {steps}, a tenth of the {num_steps} step(s) and at most {MOST_WARMUP_STEPS}, as it is not written"
                ));
                steps
            }
        };
        Ok(Steps { num_steps, warmup_steps, remarks })
    }

    fn steps_of_epochs(&self, num_sequences: usize, global: usize) -> usize {
        let samples = self.num_train_epochs * num_sequences as f64;
        // A number of steps beyond usize becomes the largest usize, which is refused.
        (samples / global as f64).ceil().max(1.0) as usize
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
    use crate::checkpoint::output::Resume;
    use crate::optim::lr::LrScheduler;

    fn job() -> TrainingJob {
        TrainingJob {
            per_device_train_batch_size: 1,
            batch: BatchSize::Global(16),
            learning_rate: 1e-4,
            lr_scheduler: LrScheduler::Cosine,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            warmup_steps: None,
            num_train_epochs: 1.0,
            max_steps: None,
            max_grad_norm: None,
            weight_decay: 0.0,
            seed: 42,
            logging_steps: 1,
            save_steps: None,
            save_total_limit: None,
            resume: Resume::Auto,
            eval_steps: None,
        }
    }

    #[test]
    fn a_warmup_that_is_not_written_is_a_tenth_and_said() {
        for (sequences, num_steps, warmup_steps) in [(5, 1, 0), (160, 10, 1), (16 * 25, 25, 2), (16 * 500, 500, 10)] {
            let steps = job().steps(sequences, 2).unwrap();
            assert_eq!((steps.num_steps, steps.warmup_steps), (num_steps, warmup_steps));
            let said = format!("training.warmup_steps: {warmup_steps}, a tenth of the {num_steps} step(s)");
            assert!(steps.remarks.last().unwrap().starts_with(&said), "{:?}", steps.remarks);
        }
    }

    #[test]
    fn an_epoch_of_less_than_a_step_is_said() {
        let remarks = job().steps(5, 2).unwrap().remarks;
        let expected = "an epoch is less than a step: the run has 1 step(s) of 16 sequence(s), which go 3.2 times through 5 sequence(s)";
        assert!(remarks[0].starts_with(expected), "{remarks:?}");
        let written = TrainingJob { warmup_steps: Some(0), ..job() };
        assert_eq!(written.steps(16, 2).unwrap().remarks, Vec::<String>::new());
    }

    #[test]
    fn a_warmup_as_long_as_the_run_is_refused() {
        let job = TrainingJob { warmup_steps: Some(3), ..job() };
        assert_eq!(job.steps(16 * 4, 2).unwrap().warmup_steps, 3);
        for sequences in [16 * 3, 16] {
            let error = job.steps(sequences, 2).unwrap_err().to_string();
            for word in ["training.warmup_steps: found 3", "training.num_train_epochs: 1", "step(s) of 16", "max_steps"]
            {
                assert!(error.contains(word), "{word} is not in {error}");
            }
        }
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

//! Divides the sequences of each epoch among steps.

use std::ops::Range;

/// The steps of epochs over a data set. An epoch's last step has the sequences that are left, unless they are dropped;
/// no step has sequences of two epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epochs {
    num_sequences: usize,
    global_batch: usize,
    drop_last: bool,
}

impl Epochs {
    /// Divides epochs of `num_sequences` among steps of `global_batch` sequences. Returns `None` if there is no
    /// step: `drop_last` drops all sequences that do not fill one.
    pub fn new(num_sequences: usize, global_batch: usize, drop_last: bool) -> Option<Epochs> {
        let epochs = Epochs { num_sequences, global_batch, drop_last };
        (epochs.num_steps() > 0).then_some(epochs)
    }

    /// Number of steps of one epoch.
    pub fn num_steps(self) -> usize {
        match self.drop_last {
            true => self.num_sequences / self.global_batch,
            false => self.num_sequences.div_ceil(self.global_batch),
        }
    }

    /// Number of sequences of the last step of each epoch.
    pub fn last_step(self) -> usize {
        self.trained() - (self.num_steps() - 1) * self.global_batch
    }

    /// Number of sequences that are left out of each epoch.
    pub fn dropped(self) -> usize {
        self.num_sequences - self.trained()
    }

    /// Number of sequences that are trained in each epoch.
    fn trained(self) -> usize {
        self.num_sequences.min(self.num_steps() * self.global_batch)
    }

    /// Returns the places of a step in the endless order of [`super::Sampler`]; steps are counted from 0.
    pub fn places(self, step_idx: usize) -> Range<u64> {
        let (epoch, step) = (step_idx / self.num_steps(), step_idx % self.num_steps());
        let first = (epoch * self.num_sequences) as u64;
        let (begin, end) = (step * self.global_batch, ((step + 1) * self.global_batch).min(self.num_sequences));
        first + begin as u64..first + end as u64
    }

    /// Returns how many epochs so many steps have gone through.
    pub fn after(self, num_steps: usize) -> f64 {
        let (epochs, steps) = (num_steps / self.num_steps(), num_steps % self.num_steps());
        (epochs * self.trained() + steps * self.global_batch) as f64 / self.trained() as f64
    }

    /// Tells whether an epoch ends with this step; steps are counted from 1.
    pub fn end_with(self, step: usize) -> bool {
        step.is_multiple_of(self.num_steps())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_every_sequence_once() {
        for (num_sequences, global_batch) in [(5, 16), (5, 8), (5, 5), (5, 2), (12, 4), (13, 4), (1, 1)] {
            let epochs = Epochs::new(num_sequences, global_batch, false).unwrap();
            let places: Vec<u64> = (0..3 * epochs.num_steps()).flat_map(|step| epochs.places(step)).collect();
            assert_eq!(places, Vec::from_iter(0..3 * num_sequences as u64), "{epochs:?}");
            for step in 0..3 * epochs.num_steps() {
                let Range { start, end } = epochs.places(step);
                assert_eq!(start / num_sequences as u64, (end - 1) / num_sequences as u64, "{epochs:?} step {step}");
                assert_eq!(epochs.after(step + 1), end as f64 / num_sequences as f64, "{epochs:?} step {step}");
                assert_eq!(epochs.end_with(step + 1), end.is_multiple_of(num_sequences as u64));
            }
            let last = epochs.places(epochs.num_steps() - 1);
            assert_eq!((epochs.last_step() as u64, epochs.dropped()), (last.end - last.start, 0));
        }
    }

    #[test]
    fn what_does_not_fill_a_step_can_be_dropped() {
        let epochs = Epochs::new(13, 4, true).unwrap();
        assert_eq!((epochs.num_steps(), epochs.last_step(), epochs.dropped()), (3, 4, 1));
        // The second epoch begins at its own first place.
        assert_eq!([2, 3, 5].map(|step| epochs.places(step)), [8..12, 13..17, 21..25]);
        assert_eq!([3, 4, 6].map(|step| epochs.after(step)), [1.0, 4.0 / 3.0, 2.0]);
        assert_eq!(Epochs::new(3, 4, true), None);
        assert_eq!(Epochs::new(12, 4, true).unwrap().dropped(), 0);
    }
}

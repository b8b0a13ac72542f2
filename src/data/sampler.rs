//! Deals sequences to steps and ranks. The global order is the same whatever the world size.

use crate::model::batch::MicroBatch;

use super::Dataset;

/// The order of the sequences in each epoch: a seeded permutation, or always that of the data set.
pub struct Sampler {
    /// `None` keeps the order of the data set.
    seed: Option<u64>,
    epoch: u64,
    order: Vec<usize>,
}

impl Sampler {
    /// Begins the first epoch of another order each epoch. Panics if there is no sequence.
    pub fn new(num_sequences: usize, seed: u64) -> Sampler {
        assert!(num_sequences > 0, "a sampler needs a sequence");
        Sampler { seed: Some(seed), epoch: 0, order: permutation(num_sequences, seed, 0) }
    }

    /// Begins the first epoch in the order of the data set, which all epochs have. Panics if there is no sequence.
    pub fn in_order(num_sequences: usize) -> Sampler {
        assert!(num_sequences > 0, "a sampler needs a sequence");
        Sampler { seed: None, epoch: 0, order: (0..num_sequences).collect() }
    }

    /// Returns the sequence at a place of the endless order; `cursor` counts sequences since the start of the run.
    pub fn sequence_at(&mut self, cursor: u64) -> usize {
        let num_sequences = self.order.len() as u64;
        let epoch = cursor / num_sequences;
        if let Some(seed) = self.seed.filter(|_| self.epoch != epoch) {
            self.epoch = epoch;
            self.order = permutation(self.order.len(), seed, epoch);
        }
        self.order[(cursor % num_sequences) as usize]
    }
}

/// Shuffles 0..n by Fisher–Yates with SplitMix64 (Steele, Lea, Flood 2014), seeded by seed and epoch.
fn permutation(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) ^ epoch.wrapping_mul(0xD6E8_FEB8_6659_FD93);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        // The high half of a 128-bit product: uniform to 2⁻⁶⁴, without a division.
        let j = ((u128::from(next()) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
    order
}

/// Returns a rank's micro-batches of the step that has `global_batch` sequences from `cursor` on. Micro-batch m of
/// rank r holds places (m · world_size + r) · per_device … of them; what lies past the end is left out, so that a
/// micro-batch may be empty. Every rank gets the same number of micro-batches.
pub fn step_micro_batches(
    dataset: &Dataset,
    sampler: &mut Sampler,
    cursor: u64,
    global_batch: usize,
    per_device: usize,
    world_size: usize,
    rank: usize,
) -> Vec<MicroBatch> {
    let num_micro_batches = global_batch.div_ceil(world_size * per_device);
    (0..num_micro_batches)
        .map(|m| {
            let first = (m * world_size + rank) * per_device;
            let places = first.min(global_batch)..(first + per_device).min(global_batch);
            let sequences = places.map(|place| sampler.sequence_at(cursor + place as u64)).collect::<Vec<_>>();
            micro_batch(dataset, &sequences)
        })
        .collect()
}

/// Returns a rank's micro-batches of a whole data set, each of which is made when it is asked for, because all of them
/// may not fit into memory. Every rank gets the same number of micro-batches; the last ones may be empty.
pub fn eval_micro_batches(
    dataset: &Dataset,
    max_tokens: usize,
    world_size: usize,
    rank: usize,
) -> impl ExactSizeIterator<Item = MicroBatch> {
    eval_sequences(dataset, max_tokens, world_size, rank).map(move |group| micro_batch(dataset, &group))
}

/// Returns the indices of the documents of a rank's [`eval_micro_batches`], in their order there.
pub fn eval_documents(
    dataset: &Dataset,
    max_tokens: usize,
    world_size: usize,
    rank: usize,
) -> impl Iterator<Item = usize> {
    let sequences = eval_sequences(dataset, max_tokens, world_size, rank).flatten();
    sequences.flat_map(|sequence| dataset.sequences.get(sequence))
}

/// Returns the sequences of each of a rank's micro-batches. A micro-batch takes as many of the next sequences as fit
/// into `max_tokens`, and ranks take turns. A sequence over `max_tokens` is a micro-batch of its own.
fn eval_sequences(
    dataset: &Dataset,
    max_tokens: usize,
    world_size: usize,
    rank: usize,
) -> impl ExactSizeIterator<Item = Vec<usize>> + use<> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (sequence, len) in dataset.sequence_lengths().enumerate() {
        if groups.is_empty() || len > room {
            groups.push(Vec::new());
            room = max_tokens;
        }
        room = room.saturating_sub(len);
        let last = groups.len() - 1;
        groups[last].push(sequence);
    }
    groups.resize(groups.len().next_multiple_of(world_size), Vec::new());
    groups.into_iter().skip(rank).step_by(world_size)
}

fn micro_batch(dataset: &Dataset, sequences: &[usize]) -> MicroBatch {
    let mut batch = MicroBatch::new();
    for document in sequences.iter().flat_map(|&s| dataset.sequences.get(s)) {
        let document = dataset.document(document);
        batch.push(document.sample_idx, &document.input_ids, &document.is_target);
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::super::counts::Counts;
    use super::super::pack::Piece;
    use super::super::store::Store;
    use super::*;

    fn dataset(n: usize) -> Dataset {
        let lens: Vec<usize> = (0..n).map(|i| 2 + i % 3).collect();
        let store = Store::in_memory(lens.iter().enumerate().map(|(i, &len)| vec![i as u32; len]));
        let documents = (0..n).map(|i| Piece::new(lens[..i].iter().sum(), lens[i])).collect();
        let sequences = (0..n as u32).map(|i| [i]).collect();
        Dataset::of_store(store, documents, sequences, Counts::default())
    }

    #[test]
    fn each_epoch_is_another_permutation() {
        let mut sampler = Sampler::new(11, 42);
        let epochs: Vec<Vec<usize>> =
            (0..3).map(|e| (0..11).map(|i| sampler.sequence_at(e * 11 + i)).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..11).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        assert_eq!(Sampler::new(11, 42).sequence_at(5), epochs[0][5], "the same seed, the same order");
    }

    #[test]
    fn an_order_that_is_kept_is_that_of_the_data_set() {
        let mut sampler = Sampler::in_order(3);
        assert_eq!((0..7).map(|cursor| sampler.sequence_at(cursor)).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn the_global_batch_does_not_depend_on_the_world() {
        let data = dataset(10);
        let samples = |world_size: usize, per_device: usize| {
            let mut all = Vec::new();
            for rank in 0..world_size {
                let batches = step_micro_batches(&data, &mut Sampler::new(10, 1), 7, 6, per_device, world_size, rank);
                assert_eq!(batches.len(), 6usize.div_ceil(world_size * per_device));
                all.extend(batches.iter().flat_map(|b| b.sample_idx.clone()));
            }
            all.sort_unstable();
            all
        };
        for world_size in 1..=5 {
            for per_device in 1..=3 {
                assert_eq!(samples(world_size, per_device), samples(1, 1));
            }
        }
    }

    #[test]
    fn places_past_the_global_batch_are_left_out() {
        let lens = |rank: usize| {
            let batches = step_micro_batches(&dataset(10), &mut Sampler::new(10, 1), 0, 3, 2, 2, rank);
            batches.iter().map(|b| b.sample_idx.len()).collect::<Vec<_>>()
        };
        assert_eq!((lens(0), lens(1)), (vec![2], vec![1]));
        let empty = step_micro_batches(&dataset(10), &mut Sampler::new(10, 1), 0, 1, 1, 2, 1);
        assert_eq!(empty, vec![MicroBatch::new()]);
    }

    #[test]
    fn evaluation_sees_each_sequence_once() {
        for world_size in 1..=4 {
            let data = dataset(10);
            let of_rank = |rank| eval_micro_batches(&data, 7, world_size, rank).collect::<Vec<_>>();
            let ranks: Vec<_> = (0..world_size).map(of_rank).collect();
            assert!(ranks.iter().all(|b| b.len() == ranks[0].len()));
            let mut all: Vec<u64> = ranks.iter().flatten().flat_map(|b| b.sample_idx.clone()).collect();
            all.sort_unstable();
            assert_eq!(all, (0..10).collect::<Vec<_>>());
            assert!(ranks.iter().flatten().all(|b| b.num_tokens() <= 7));
        }
    }
}

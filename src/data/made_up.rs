//! Rows of token ids that look random, for measurements.

use super::counts::Counts;
use super::dataset::Dataset;
use super::pack::Piece;
use super::store::Store;

/// Returns the token ids of a sample, which depend on its number alone.
pub fn input_ids(sample: u64, len: usize, vocab_size: usize) -> Vec<u32> {
    let mixed = |t: u64| sample.wrapping_mul(1_000_003).wrapping_add(t * 7919).wrapping_mul(2_654_435_761);
    (0..len as u64).map(|t| (mixed(t) % vocab_size as u64) as u32).collect()
}

/// Documents of a data set; its sequences take them in turn.
const NUM_DOCUMENTS: usize = 64;

impl Dataset {
    /// Makes sequences of one document each, of which every token counts.
    pub fn made_up(num_sequences: usize, len: usize, vocab_size: usize) -> Dataset {
        let num_documents = num_sequences.min(NUM_DOCUMENTS);
        let store = Store::in_memory((0..num_documents).map(|i| input_ids(i as u64, len, vocab_size)));
        let documents = (0..num_documents).map(|i| Piece::new(i * len, len)).collect();
        let sequences = (0..num_sequences).map(|i| [(i % NUM_DOCUMENTS) as u32]).collect();
        let counts = Counts {
            rows: num_documents,
            sequences: num_sequences,
            tokens: num_documents * len,
            target_tokens: num_documents * len.saturating_sub(1),
            max_length: len,
            ..Counts::default()
        };
        Dataset::of_store(store, documents, sequences, counts)
    }
}

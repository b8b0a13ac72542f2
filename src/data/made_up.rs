//! Rows of token ids that look random, for measurements.

use super::Document;
use super::counts::{Counts, Places};
use super::dataset::Dataset;

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
        let document = |i: usize| Document {
            sample_idx: i as u64,
            row_idx: i,
            first_position: 0,
            input_ids: input_ids(i as u64, len, vocab_size),
            is_target: vec![true; len],
        };
        let documents: Vec<Document> = (0..num_sequences.min(NUM_DOCUMENTS)).map(document).collect();
        let counts = Counts {
            rows: documents.len(),
            sequences: num_sequences,
            tokens: documents.len() * len,
            target_tokens: documents.iter().map(Document::num_target_tokens).sum(),
            max_length: len,
            ..Counts::default()
        };
        Dataset {
            documents,
            sequences: (0..num_sequences).map(|i| vec![i % NUM_DOCUMENTS]).collect(),
            counts,
            notes: Vec::new(),
            overlong: Places::default(),
            without_target: Places::default(),
            first_rows: Vec::new(),
        }
    }
}

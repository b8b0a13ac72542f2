//! A micro-batch: its tokens, where documents begin, and which tokens count in the loss.

/// Marks a position in [`MicroBatch::targets`] whose prediction does not count in the loss.
pub const NO_TARGET: u32 = u32::MAX;

/// Host-side descriptor of one micro-batch: documents laid end to end, without padding.
///
/// T is the number of tokens, D the number of documents. A micro-batch may be empty (T = 0): a rank gets an empty one
/// when the global batch does not divide evenly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids, `[T]`.
    pub input_ids: Vec<u32>,
    /// The id to be predicted *at* each position (already shifted), or [`NO_TARGET`], `[T]`.
    pub targets: Vec<u32>,
    /// Position of each token in its own document, `[T]`.
    pub positions: Vec<u32>,
    /// First token of each document and, last, T: `[D + 1]`, ascending from 0.
    pub documents: Vec<u32>,
    /// Global sample index of each document (it seeds dropout, so that packing does not), `[D]`.
    pub sample_idx: Vec<u64>,
}

impl MicroBatch {
    /// Makes an empty micro-batch; [`MicroBatch::push`] adds documents.
    pub fn new() -> Self {
        Self { documents: vec![0], ..Self::default() }
    }

    /// Appends one document. `is_target[i]` says whether token i counts in the loss when it is predicted;
    /// the first token of a document is never predicted.
    pub fn push(&mut self, sample_idx: u64, input_ids: &[u32], is_target: &[bool]) {
        assert_eq!(input_ids.len(), is_target.len(), "one mask entry a token");
        let len = input_ids.len();
        self.input_ids.extend_from_slice(input_ids);
        self.positions.extend(0..len as u32);
        self.targets.extend((1..=len).map(|next| match is_target.get(next) {
            Some(true) => input_ids[next],
            _ => NO_TARGET,
        }));
        self.documents.push(self.input_ids.len() as u32);
        self.sample_idx.push(sample_idx);
    }

    /// T.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Number of tokens that count in the loss.
    pub fn num_target_tokens(&self) -> usize {
        self.targets.iter().filter(|&&t| t != NO_TARGET).count()
    }
}

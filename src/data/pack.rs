//! Puts documents into sequences of at most max_length tokens.

use std::collections::BTreeSet;

use super::Packing;

/// A document as a range of the words of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, packed(4))]
pub struct Piece {
    begin: u64,
    len: u32,
}

impl Piece {
    pub fn new(begin: usize, len: usize) -> Piece {
        Piece { begin: begin as u64, len: len as u32 }
    }

    pub fn begin(self) -> usize {
        self.begin as usize
    }

    pub fn len(self) -> usize {
        self.len as usize
    }

    pub fn range(self) -> std::ops::Range<usize> {
        self.begin()..self.begin() + self.len()
    }
}

/// The indices of the documents of each sequence, one sequence after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequences {
    documents: Vec<u32>,
    /// End of each sequence in `documents`.
    ends: Vec<u32>,
}

impl Sequences {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the documents of a sequence.
    pub fn get(&self, sequence: usize) -> impl ExactSizeIterator<Item = usize> + '_ {
        let begin = if sequence == 0 { 0 } else { self.ends[sequence - 1] };
        self.documents[begin as usize..self.ends[sequence] as usize].iter().map(|&document| document as usize)
    }

    /// Returns the documents of each sequence.
    pub fn iter(&self) -> impl Iterator<Item = impl ExactSizeIterator<Item = usize> + '_> + '_ {
        (0..self.len()).map(|sequence| self.get(sequence))
    }

    pub fn host_bytes(&self) -> usize {
        (self.documents.capacity() + self.ends.capacity()) * size_of::<u32>()
    }

    fn push(&mut self, documents: impl IntoIterator<Item = u32>) {
        self.documents.extend(documents);
        self.ends.push(self.documents.len() as u32);
    }
}

impl<S: IntoIterator<Item = u32>> FromIterator<S> for Sequences {
    fn from_iter<I: IntoIterator<Item = S>>(sequences: I) -> Sequences {
        let mut all = Sequences::default();
        sequences.into_iter().for_each(|sequence| all.push(sequence));
        all
    }
}

/// Returns the documents of each sequence. `wrapped` cuts documents at the ends of sequences: the pieces replace them.
/// `counts` tells whether a token of a piece counts in the loss.
pub fn pack(
    documents: &mut Vec<Piece>,
    packing: Packing,
    max_length: usize,
    counts: impl Fn(Piece) -> bool,
) -> Sequences {
    match packing {
        Packing::None => (0..documents.len() as u32).map(|document| [document]).collect(),
        Packing::BestFit => best_fit(documents, max_length),
        Packing::Wrapped => {
            let (pieces, sequences) = wrap(documents, max_length, counts);
            *documents = pieces;
            sequences
        }
    }
}

/// Packs by best fit, decreasing: the longest document comes first, and each goes into the fullest sequence that
/// still has room. Sequences are in the order of their first documents.
fn best_fit(documents: &[Piece], max_length: usize) -> Sequences {
    let len = |document: u32| documents[document as usize].len;
    let mut order: Vec<u32> = (0..documents.len() as u32).collect();
    order.sort_unstable_by_key(|&document| (std::cmp::Reverse(len(document)), document));
    let shortest = order.last().map_or(0, |&document| len(document));
    let (mut sequence_of, mut num_sequences) = (vec![0; documents.len()], 0);
    // (room, sequence), so that the first entry at or after (len, 0) is the fullest that takes len tokens. Sequences
    // that take no document any more are left out.
    let mut rooms: BTreeSet<(u32, u32)> = BTreeSet::new();
    for document in order {
        let len = len(document);
        let found = rooms.range((len, 0)..).next().copied();
        let (room, sequence) = found.unwrap_or((max_length as u32, num_sequences));
        match found {
            Some(found) => drop(rooms.remove(&found)),
            None => num_sequences += 1,
        }
        if room - len >= shortest {
            rooms.insert((room - len, sequence));
        }
        sequence_of[document as usize] = sequence;
    }
    in_order_of_documents(sequence_of, num_sequences)
}

/// Returns the documents of each sequence in ascending order, given the sequence of each document; the sequences are
/// in the order of their first documents.
fn in_order_of_documents(mut sequence_of: Vec<u32>, num_sequences: u32) -> Sequences {
    let mut places = vec![u32::MAX; num_sequences as usize];
    let mut ends: Vec<u32> = Vec::with_capacity(num_sequences as usize);
    for sequence in &mut sequence_of {
        let place = &mut places[*sequence as usize];
        if *place == u32::MAX {
            *place = ends.len() as u32;
            ends.push(0);
        }
        *sequence = *place;
        ends[*place as usize] += 1;
    }
    let mut next = places;
    let mut end = 0;
    for (len, begin) in ends.iter_mut().zip(&mut next) {
        *begin = end;
        end += *len;
        *len = end;
    }
    let mut documents = vec![0; sequence_of.len()];
    for (document, sequence) in (0..).zip(sequence_of) {
        documents[next[sequence as usize] as usize] = document;
        next[sequence as usize] += 1;
    }
    Sequences { documents, ends }
}

/// Puts documents end to end and cuts them where a sequence is full. Sequences in which no token counts are left out:
/// a step of them would have no loss.
fn wrap(documents: &[Piece], max_length: usize, counts: impl Fn(Piece) -> bool) -> (Vec<Piece>, Sequences) {
    let (mut pieces, mut sequences) = (Vec::new(), Sequences::default());
    let (mut first, mut room) = (0, max_length);
    let mut close = |pieces: &mut Vec<Piece>| {
        match pieces[first..].iter().any(|&piece| counts(piece)) {
            true => sequences.push(first as u32..pieces.len() as u32),
            false => pieces.truncate(first),
        }
        first = pieces.len();
    };
    for document in documents {
        let mut left = document.range();
        while !left.is_empty() {
            let piece = Piece::new(left.start, left.len().min(room));
            pieces.push(piece);
            left.start += piece.len();
            room -= piece.len();
            if room == 0 {
                close(&mut pieces);
                room = max_length;
            }
        }
    }
    close(&mut pieces);
    (pieces, sequences)
}

#[cfg(test)]
mod tests {
    use super::super::{DataOptions, Dataset, LossOn, Overlong, Source};
    use super::*;

    /// Documents of these lengths, one after the other.
    fn documents(lengths: &[usize]) -> Vec<Piece> {
        let mut begin = 0;
        let document = |&len: &usize| {
            let document = Piece::new(begin, len);
            begin += len;
            document
        };
        lengths.iter().map(document).collect()
    }

    fn lists(sequences: &Sequences) -> Vec<Vec<usize>> {
        sequences.iter().map(Iterator::collect).collect()
    }

    fn ranges(pieces: &[Piece]) -> Vec<std::ops::Range<usize>> {
        pieces.iter().map(|piece| piece.range()).collect()
    }

    #[test]
    fn best_fit_fills_sequences_with_whole_documents() {
        let mut docs = documents(&[3, 7, 5, 2, 10, 3]);
        let sequences = pack(&mut docs, Packing::BestFit, 10, |_| true);
        assert_eq!(lists(&sequences), vec![vec![0, 1], vec![2, 3, 5], vec![4]]);
    }

    #[test]
    fn every_document_is_packed_once_into_the_fullest_sequence() {
        for seed in 0..50usize {
            let lengths: Vec<usize> = (0..40).map(|i| 1 + (i * 37 + seed * 101) % 64).collect();
            let sequences = lists(&pack(&mut documents(&lengths), Packing::BestFit, 64, |_| true));
            let mut all: Vec<usize> = sequences.concat();
            all.sort_unstable();
            assert_eq!(all, (0..40).collect::<Vec<_>>());
            assert!(sequences.iter().all(|s| s.iter().map(|&d| lengths[d]).sum::<usize>() <= 64));
            // The plain form: sequences in the order in which they were begun.
            let mut order: Vec<usize> = (0..40).collect();
            order.sort_by_key(|&d| (std::cmp::Reverse(lengths[d]), d));
            let mut plain: Vec<(usize, Vec<usize>)> = Vec::new();
            for d in order {
                let fits = (0..plain.len()).filter(|&s| plain[s].0 >= lengths[d]);
                let fullest = fits.min_by_key(|&s| (plain[s].0, s)).unwrap_or(plain.len());
                if fullest == plain.len() {
                    plain.push((64, Vec::new()));
                }
                plain[fullest].0 -= lengths[d];
                plain[fullest].1.push(d);
            }
            let mut plain: Vec<Vec<usize>> = plain.into_iter().map(|(_, documents)| documents).collect();
            plain.iter_mut().for_each(|documents| documents.sort_unstable());
            plain.sort();
            assert_eq!(sequences, plain);
        }
    }

    #[test]
    fn wrapped_cuts_at_the_ends_of_sequences() {
        let mut docs = documents(&[3, 9]);
        let sequences = pack(&mut docs, Packing::Wrapped, 5, |_| true);
        assert_eq!(lists(&sequences), vec![vec![0, 1], vec![2], vec![3]]);
        assert_eq!(ranges(&docs), [0..3, 3..5, 5..10, 10..12]);
        let mut full = documents(&[10]);
        assert_eq!(lists(&pack(&mut full, Packing::Wrapped, 5, |_| true)), vec![vec![0], vec![1]]);
    }

    #[test]
    fn wrapped_leaves_out_sequences_without_a_target() {
        let mut docs = documents(&[9, 4]);
        let sequences = pack(&mut docs, Packing::Wrapped, 5, |piece| piece.begin() < 5 || piece.begin() > 9);
        assert_eq!(lists(&sequences), vec![vec![0], vec![1]]);
        assert_eq!(ranges(&docs), [0..5, 10..13]);
    }

    #[test]
    fn held_out_rows_are_never_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let row = |i: usize| format!(r#"{{"input_ids": [{i}, 1, 2]}}"#);
        std::fs::write(&path, (0..50).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let options = DataOptions {
            max_length: 4,
            packing: Packing::Wrapped,
            overlong: Overlong::Truncate,
            loss_on: LossOn::Auto,
        };
        let (train, held_out) = Dataset::load_with_held_out(&[Source::new(path)], None, 100, &options, 0.5).unwrap();
        let whole = |dataset: &Dataset| dataset.documents().all(|d| d.input_ids.len() == 3);
        assert!(whole(&held_out) && !whole(&train));
    }
}

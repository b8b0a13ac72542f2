//! Puts documents into sequences of at most max_length tokens.

use std::collections::BTreeSet;

use super::{Document, Packing};

/// Returns the indices of each sequence's documents. `wrapped` cuts documents at the ends of sequences: the pieces
/// replace them.
pub fn pack(documents: &mut Vec<Document>, packing: Packing, max_length: usize) -> Vec<Vec<usize>> {
    match packing {
        Packing::None => (0..documents.len()).map(|i| vec![i]).collect(),
        Packing::BestFit => best_fit(documents, max_length),
        Packing::Wrapped => {
            let (pieces, sequences) = wrap(std::mem::take(documents), max_length);
            *documents = pieces;
            sequences
        }
    }
}

/// Packs by best fit, decreasing: the longest document comes first, and each goes into the fullest sequence that
/// still has room. Sequences are in the order of their first documents.
fn best_fit(documents: &[Document], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(documents[i].input_ids.len()), i));
    let mut sequences: Vec<Vec<usize>> = Vec::new();
    // (room, sequence), so that the first entry at or after (len, 0) is the fullest that takes len tokens.
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for document in order {
        let len = documents[document].input_ids.len();
        let found = rooms.range((len, 0)..).next().copied();
        let (room, sequence) = found.unwrap_or((max_length, sequences.len()));
        if found.is_none() {
            sequences.push(Vec::new());
        }
        rooms.remove(&(room, sequence));
        rooms.insert((room - len, sequence));
        sequences[sequence].push(document);
    }
    for sequence in &mut sequences {
        sequence.sort_unstable();
    }
    sequences.sort_by_key(|s| s[0]);
    sequences
}

/// Puts documents end to end and cuts them where a sequence is full. Sequences in which no token counts are left out:
/// a step of them would have no loss.
fn wrap(documents: Vec<Document>, max_length: usize) -> (Vec<Document>, Vec<Vec<usize>>) {
    let (mut sequences, mut room): (Vec<Vec<Document>>, usize) = (Vec::new(), 0);
    for document in documents {
        let mut at = 0;
        while at < document.input_ids.len() {
            if room == 0 {
                sequences.push(Vec::new());
                room = max_length;
            }
            let end = (at + room).min(document.input_ids.len());
            let last = sequences.len() - 1;
            sequences[last].push(Document {
                sample_idx: 0,
                row_idx: document.row_idx,
                first_position: document.first_position + at,
                input_ids: document.input_ids[at..end].to_vec(),
                is_target: document.is_target[at..end].to_vec(),
            });
            room -= end - at;
            at = end;
        }
    }
    sequences.retain(|pieces| pieces.iter().any(|piece| piece.num_target_tokens() > 0));
    let mut idx = 0..;
    let numbered = sequences.iter().map(|pieces| idx.by_ref().take(pieces.len()).collect()).collect();
    let numbered_pieces = sequences.into_iter().flatten().zip(0..);
    let pieces = numbered_pieces.map(|(piece, idx)| Document { sample_idx: idx, ..piece }).collect();
    (pieces, numbered)
}

#[cfg(test)]
mod tests {
    use super::super::{DataOptions, Dataset, LossOn, Overlong, Source};
    use super::*;

    fn documents(lengths: &[usize]) -> Vec<Document> {
        let document = |(i, &n): (usize, &usize)| {
            Document::of_row(i, (0..n as u32).map(|t| t + 100 * i as u32).collect(), vec![true; n])
        };
        lengths.iter().enumerate().map(document).collect()
    }

    #[test]
    fn best_fit_fills_sequences_with_whole_documents() {
        let mut docs = documents(&[3, 7, 5, 2, 10, 3]);
        let sequences = pack(&mut docs, Packing::BestFit, 10);
        assert_eq!(sequences, vec![vec![0, 1], vec![2, 3, 5], vec![4]]);
    }

    #[test]
    fn every_document_is_packed_once() {
        for seed in 0..50usize {
            let lengths: Vec<usize> = (0..40).map(|i| 1 + (i * 37 + seed * 101) % 64).collect();
            let mut docs = documents(&lengths);
            let sequences = pack(&mut docs, Packing::BestFit, 64);
            let mut all: Vec<usize> = sequences.concat();
            all.sort_unstable();
            assert_eq!(all, (0..40).collect::<Vec<_>>());
            assert!(sequences.iter().all(|s| s.iter().map(|&d| lengths[d]).sum::<usize>() <= 64));
        }
    }

    #[test]
    fn wrapped_cuts_at_the_ends_of_sequences() {
        let mut docs = documents(&[3, 9]);
        let sequences = pack(&mut docs, Packing::Wrapped, 5);
        assert_eq!(sequences, vec![vec![0, 1], vec![2], vec![3]]);
        assert_eq!(docs.iter().map(|d| d.input_ids.len()).collect::<Vec<_>>(), [3, 2, 5, 2]);
        assert_eq!(docs[2].input_ids[0], 102);
        let places: Vec<_> = docs.iter().map(|d| (d.row_idx, d.first_position)).collect();
        assert_eq!(places, [(0, 0), (1, 0), (1, 2), (1, 7)]);
    }

    #[test]
    fn wrapped_leaves_out_sequences_without_a_target() {
        let mut docs = documents(&[9, 4]);
        // Tokens 5 to 8 are the second sequence's own; its fifth is a document's first token, which is never
        // predicted.
        docs[0].is_target[5..].fill(false);
        let sequences = pack(&mut docs, Packing::Wrapped, 5);
        assert_eq!(sequences, vec![vec![0], vec![1]]);
        assert_eq!(docs.iter().map(|d| (d.sample_idx, d.input_ids[0])).collect::<Vec<_>>(), [(0, 0), (1, 101)]);
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
        let whole = |dataset: &Dataset| dataset.documents.iter().all(|d| d.input_ids.len() == 3);
        assert!(whole(&held_out) && !whole(&train));
    }
}

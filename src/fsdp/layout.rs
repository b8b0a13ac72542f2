//! The place of each tensor in its unit, and the part of each rank: pure arithmetic.
//!
//! A unit's *flat* is the records of its tensors, back to back. It is cut between records into one contiguous part
//! per shard. Every shard is padded to the length of the longest part, so that one all-gather moves a unit. Trainable
//! values are a flat of f32 that may be cut anywhere into equal parts.

use std::ops::Range;

use crate::device::arena::ALIGN_BYTES;
use crate::model::spec::TensorId;
use crate::quant::record::{Dtype, Encoding, RECORD_WEIGHTS};

/// Version of the layout in shard files.
pub const LAYOUT_VERSION: u32 = 2;

/// One tensor of a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitTensor {
    pub id: TensorId,
    /// Name in the base checkpoint.
    pub name: String,
    /// The elements of that tensor that belong to this unit: a head piece has some rows of the head.
    pub elements: Range<usize>,
    pub encoding: Encoding,
}

/// A run of records of one tensor that lie together in the gathered unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Weights of the tensor, counted from its first element in this unit.
    pub weights: Range<usize>,
    /// Where their records lie in the gathered unit.
    pub bytes: Range<usize>,
}

/// The layout of a unit over some number of shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitLayout {
    tensors: Vec<UnitTensor>,
    /// Byte in the flat where each tensor's records begin, and the flat's end.
    begins: Vec<usize>,
    /// Byte in the flat where each shard begins, and the flat's end.
    cuts: Vec<usize>,
    shard_bytes: usize,
}

impl UnitLayout {
    /// Cuts the flat at the first record boundary at or after each even share.
    pub fn new(tensors: Vec<UnitTensor>, num_shards: usize) -> UnitLayout {
        let mut begins = vec![0];
        for tensor in &tensors {
            begins.push(begins[begins.len() - 1] + tensor.encoding.tensor_bytes(tensor.elements.len()));
        }
        let total = begins[tensors.len()];
        let cuts: Vec<usize> = (0..=num_shards)
            .map(|shard| boundary_at_or_after(&tensors, &begins, (total * shard).div_ceil(num_shards)))
            .collect();
        let shard_bytes = cuts.windows(2).map(|c| c[1] - c[0]).max().unwrap_or(0);
        UnitLayout { tensors, begins, cuts, shard_bytes }
    }

    pub fn tensors(&self) -> &[UnitTensor] {
        &self.tensors
    }

    pub fn num_shards(&self) -> usize {
        self.cuts.len() - 1
    }

    /// Bytes of the unit without padding.
    pub fn flat_bytes(&self) -> usize {
        self.cuts[self.num_shards()]
    }

    /// Bytes of each shard, padding included.
    pub fn shard_bytes(&self) -> usize {
        self.shard_bytes
    }

    /// Bytes of the gathered unit.
    pub fn gathered_bytes(&self) -> usize {
        self.shard_bytes * self.num_shards()
    }

    /// Returns the part of the flat that a shard holds.
    pub fn shard_range(&self, shard: usize) -> Range<usize> {
        self.cuts[shard]..self.cuts[shard + 1]
    }

    /// Returns the part of the flat that the records of a tensor take.
    pub fn tensor_range(&self, tensor_idx: usize) -> Range<usize> {
        self.begins[tensor_idx]..self.begins[tensor_idx + 1]
    }

    /// Returns what a shard holds of a tensor: a range of weights, counted from the tensor's first element in this
    /// unit, and the bytes of the shard that hold their records.
    pub fn part(&self, tensor_idx: usize, shard: usize) -> Option<(Range<usize>, Range<usize>)> {
        let tensor = &self.tensors[tensor_idx];
        let (range, shard) = (self.tensor_range(tensor_idx), self.shard_range(shard));
        let record_bytes = tensor.encoding.parts(RECORD_WEIGHTS).bytes;
        // Converts a byte at a record boundary of this tensor to a number of weights; the last record may be shorter.
        let weights_before = |byte: usize| match byte == range.end {
            true => tensor.elements.len(),
            false => (byte - range.start) / record_bytes * RECORD_WEIGHTS,
        };
        let (begin, end) = (shard.start.max(range.start), shard.end.min(range.end));
        (begin < end).then(|| (weights_before(begin)..weights_before(end), begin - shard.start..end - shard.start))
    }

    /// Returns where the tensor lies in the gathered unit: one segment for each shard that holds some of it, in the order
    /// of the weights.
    pub fn segments(&self, tensor_idx: usize) -> Vec<Segment> {
        let segment = |shard: usize| {
            let (weights, bytes) = self.part(tensor_idx, shard)?;
            let at = shard * self.shard_bytes;
            Some(Segment { weights, bytes: at + bytes.start..at + bytes.end })
        };
        (0..self.num_shards()).filter_map(segment).collect()
    }

    /// Returns the bytes of the gathered unit that are the tensor's weights, one after the other, in the type that a device
    /// computes with; `None` where they must be made. Norms and biases are computed with in f32, and always made. Weights in
    /// place begin where a buffer might, so that a library that goes by alignment gives the same bits for both.
    pub fn in_place(&self, tensor_idx: usize, act: Dtype) -> Option<Range<usize>> {
        let UnitTensor { id, encoding, ref elements, .. } = self.tensors[tensor_idx];
        let Segment { weights, bytes } = self.segments(tensor_idx).into_iter().next()?;
        let is_matrix = matches!(id, TensorId::Weight(_) | TensorId::Rows);
        let is_whole = weights.len() == elements.len() && bytes.start.is_multiple_of(ALIGN_BYTES);
        (is_matrix && is_whole && encoding == Encoding::Plain(act))
            .then(|| bytes.start..bytes.start + weights.len() * act.size_bytes())
    }
}

fn boundary_at_or_after(tensors: &[UnitTensor], begins: &[usize], byte: usize) -> usize {
    let Some(idx) = begins[1..].iter().position(|&end| byte <= end) else { return *begins.last().unwrap_or(&0) };
    let record_bytes = tensors[idx].encoding.parts(RECORD_WEIGHTS).bytes;
    begins[idx + 1].min(begins[idx] + (byte - begins[idx]).next_multiple_of(record_bytes))
}

/// Trainable values of a unit: `len` f32, padded to equal shards. Each shard divides into equal parts for the ranks
/// that hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainableLayout {
    pub len: usize,
    pub num_shards: usize,
    pub num_replicas: usize,
}

impl TrainableLayout {
    /// Values of one shard, padding included. There are some without trainable values too, so that no collective is
    /// empty.
    pub fn shard_len(&self) -> usize {
        self.len.max(1).div_ceil(self.num_shards).next_multiple_of(4 * self.num_replicas)
    }

    /// Values of all shards.
    pub fn padded_len(&self) -> usize {
        self.shard_len() * self.num_shards
    }

    /// Returns the padded values that a shard holds.
    pub fn shard_range(&self, shard: usize) -> Range<usize> {
        shard * self.shard_len()..(shard + 1) * self.shard_len()
    }

    /// Returns the part of a shard for which one replica answers, where exactly one rank must.
    pub fn replica_range(&self, replica: usize) -> Range<usize> {
        let len = self.shard_len() / self.num_replicas;
        replica * len..(replica + 1) * len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Awkward sizes: one weight, an odd count, exactly a record, one past it, many.
    fn units() -> Vec<Vec<UnitTensor>> {
        let encodings = [
            Encoding::Nf4 { double_quant: true },
            Encoding::Nf4 { double_quant: false },
            Encoding::Plain(Dtype::Bf16),
            Encoding::Plain(Dtype::F32),
        ];
        let sizes = [1, 65, RECORD_WEIGHTS - 1, RECORD_WEIGHTS, RECORD_WEIGHTS + 1, 7 * RECORD_WEIGHTS + 64];
        let tensor = |(i, size): (usize, &usize)| UnitTensor {
            id: TensorId::Rows,
            name: format!("t{i}"),
            elements: 0..*size,
            encoding: encodings[i % encodings.len()],
        };
        (1..=sizes.len()).map(|n| sizes[..n].iter().cycle().take(2 * n).enumerate().map(tensor).collect()).collect()
    }

    #[test]
    fn shards_cover_the_flat_once_and_never_cut_a_record() {
        for tensors in units() {
            for num_shards in 1..=9 {
                let layout = UnitLayout::new(tensors.clone(), num_shards);
                assert_eq!(layout.shard_range(0).start, 0);
                for shard in 0..num_shards {
                    let range = layout.shard_range(shard);
                    assert!(range.len() <= layout.shard_bytes());
                    if shard > 0 {
                        assert_eq!(layout.shard_range(shard - 1).end, range.start);
                    }
                }
                assert_eq!(layout.shard_range(num_shards - 1).end, layout.flat_bytes());
                for (idx, tensor) in tensors.iter().enumerate() {
                    let mut next = 0;
                    for segment in layout.segments(idx) {
                        assert_eq!(segment.weights.start, next);
                        assert!(
                            segment.weights.end == tensor.elements.len() || segment.weights.end % RECORD_WEIGHTS == 0
                        );
                        assert_eq!(tensor.encoding.tensor_bytes(segment.weights.len()), segment.bytes.len());
                        next = segment.weights.end;
                    }
                    assert_eq!(next, tensor.elements.len(), "every weight is somewhere");
                }
            }
        }
    }

    #[test]
    fn a_shard_is_at_most_one_record_longer_than_even() {
        for tensors in units() {
            for num_shards in 1..=9 {
                let layout = UnitLayout::new(tensors.clone(), num_shards);
                let record = tensors.iter().map(|t| t.encoding.parts(RECORD_WEIGHTS).bytes).max().unwrap();
                assert!(layout.shard_bytes() <= layout.flat_bytes().div_ceil(num_shards) + record);
            }
        }
    }

    #[test]
    fn the_gathered_unit_holds_each_record_where_its_segment_says() {
        for tensors in units() {
            for num_shards in 1..=9 {
                let layout = UnitLayout::new(tensors.clone(), num_shards);
                let flat: Vec<u32> = (0..layout.flat_bytes() as u32).collect();
                let mut gathered = vec![u32::MAX; layout.gathered_bytes()];
                for shard in 0..num_shards {
                    let range = layout.shard_range(shard);
                    gathered[shard * layout.shard_bytes()..][..range.len()].copy_from_slice(&flat[range]);
                }
                for idx in 0..tensors.len() {
                    let found: Vec<u32> =
                        layout.segments(idx).into_iter().flat_map(|s| gathered[s.bytes].to_vec()).collect();
                    assert_eq!(found, flat[layout.tensor_range(idx)]);
                }
            }
        }
    }

    #[test]
    fn plain_weights_that_no_shard_cuts_are_in_place() {
        for tensors in units() {
            for num_shards in 1..=9 {
                let layout = UnitLayout::new(tensors.clone(), num_shards);
                for (idx, tensor) in tensors.iter().enumerate() {
                    let (in_place, segments) = (layout.in_place(idx, Dtype::Bf16), layout.segments(idx));
                    let is_whole = segments.len() == 1 && segments[0].bytes.start % ALIGN_BYTES == 0;
                    assert_eq!(in_place.is_some(), is_whole && tensor.encoding == Encoding::Plain(Dtype::Bf16));
                    let Some(range) = in_place else { continue };
                    assert_eq!((range.start, range.len()), (segments[0].bytes.start, 2 * tensor.elements.len()));
                    assert!(range.end <= segments[0].bytes.end);
                }
            }
        }
    }

    #[test]
    fn trainable_shards_are_equal_and_cover_everything() {
        for len in [1, 3, 4, 17, 1000] {
            for (num_shards, num_replicas) in (1..=9).flat_map(|shards| [1, 2, 3].map(|replicas| (shards, replicas))) {
                let layout = TrainableLayout { len, num_shards, num_replicas };
                assert!(layout.padded_len() >= len && layout.shard_range(num_shards - 1).end == layout.padded_len());
                assert_eq!(layout.replica_range(num_replicas - 1).end, layout.shard_len());
            }
        }
    }
}

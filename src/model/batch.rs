//! A micro-batch: its tokens, where documents begin, and which tokens count in the loss.

use anyhow::Result;

use crate::device::{Arena, Buffer, Device, Documents, View};

use super::rope::RopeConfig;
use super::spec::ModelSpec;

/// Marks a position in [`MicroBatch::targets`] whose prediction does not count in the loss.
pub const NO_TARGET: u32 = u32::MAX;

/// Cosines and sines of the tokens' angles, `[T, half]`; twice as many dimensions are rotated.
pub type CosSin = (Vec<f32>, Vec<f32>);

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
    /// Tokens of its only document whose keys and values are there from earlier calls (generation).
    pub num_past_tokens: usize,
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

    /// Number of tokens, T.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Computes the cosines and sines of each of the model's rotations.
    pub fn cos_sin(&self, spec: &ModelSpec) -> Vec<CosSin> {
        spec.ropes.iter().map(|rope| rope.cos_sin(&self.positions, &self.documents)).collect()
    }

    /// Number of tokens that count in the loss.
    pub fn num_target_tokens(&self) -> usize {
        self.targets.iter().filter(|&&t| t != NO_TARGET).count()
    }
}

/// A micro-batch as the device sees it.
pub struct BatchBuffers<D: Device> {
    /// Cosines and sines of each of the model's rotations.
    rotations: Vec<Rotation<D>>,
    /// The documents of the micro-batch. Past tokens are those whose keys and values are kept from earlier calls
    /// (generation).
    pub documents: Documents<D>,
    /// Global sample index of each token's document, `[T]`.
    pub sample_idx: Buffer<D, u64>,
    pub num_tokens: usize,
}

/// A [`CosSin`] on the device.
struct Rotation<D: Device> {
    cos: Buffer<D, f32>,
    sin: Buffer<D, f32>,
    half: usize,
}

impl<D: Device> BatchBuffers<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, spec: &ModelSpec, tokens: usize) -> Result<Self> {
        let rotation = |(i, rope): (usize, &RopeConfig)| {
            let half = rope.rotary_dim / 2;
            Ok(Rotation {
                cos: arena.carve(&format!("{name}/cos{i}"), tokens * half)?,
                sin: arena.carve(&format!("{name}/sin{i}"), tokens * half)?,
                half,
            })
        };
        Ok(Self {
            rotations: spec.ropes.iter().enumerate().map(rotation).collect::<Result<_>>()?,
            documents: Documents::carve(arena, &format!("{name}/positions"), tokens)?,
            sample_idx: arena.carve(&format!("{name}/sample_idx"), tokens)?,
            num_tokens: 0,
        })
    }

    /// Cosines and sines of one of the model's rotations, `[T, half]`.
    pub fn rotation(&self, idx: usize) -> (View<'_, D, f32>, View<'_, D, f32>) {
        let Rotation { cos, sin, half } = &self.rotations[idx];
        (cos.first(self.num_tokens * half), sin.first(self.num_tokens * half))
    }

    /// Uploads a micro-batch with its cosines and sines. In generation its first position is the number of past tokens.
    pub fn load(&mut self, device: &D, batch: &MicroBatch, cos_sin: &[CosSin]) -> Result<()> {
        let tokens = batch.num_tokens();
        for (rotation, (cos, sin)) in self.rotations.iter_mut().zip(cos_sin) {
            device.upload(rotation.cos.first_mut(cos.len()), cos)?;
            device.upload(rotation.sin.first_mut(sin.len()), sin)?;
        }
        self.documents.put(device, &batch.documents, batch.num_past_tokens)?;
        let mut sample_idx = Vec::with_capacity(tokens);
        for (document, &sample) in batch.documents.windows(2).zip(&batch.sample_idx) {
            sample_idx.resize(sample_idx.len() + (document[1] - document[0]) as usize, sample);
        }
        device.upload(self.sample_idx.first_mut(tokens), &sample_idx)?;
        self.num_tokens = tokens;
        Ok(())
    }
}

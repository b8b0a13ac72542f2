//! Causal grouped-query attention over packed documents.

use anyhow::{Result, ensure};

use super::{Arena, Buffer, Device, View, ViewMut};

/// The documents of a micro-batch of T tokens: a token sees itself and what is before it in its own document. The host looks at where
/// documents begin, a device at the positions of tokens; both are put there together, so that no token sees what is not there.
pub struct Documents<D: Device> {
    /// First token of each document and, last, T.
    begins: Vec<u32>,
    /// Position of each token in its document, past ones counted; the first T count.
    positions: Buffer<D, u32>,
    num_past_tokens: usize,
}

impl<D: Device> Documents<D> {
    /// Carves room for the positions of `capacity` tokens; no document is there yet.
    pub fn carve(arena: &mut Arena<D>, name: &str, capacity: usize) -> Result<Self> {
        Ok(Self { begins: vec![0], positions: arena.carve(name, capacity)?, num_past_tokens: 0 })
    }

    /// Replaces all documents. `begins` holds the first token of each and, last, T. `num_past_tokens` is the number of keys and values
    /// before the first query (generation, one document); 0 in training. After an error there are no documents.
    pub fn put(&mut self, device: &D, begins: &[u32], num_past_tokens: usize) -> Result<()> {
        (self.begins, self.num_past_tokens) = (vec![0], 0);
        let (past, capacity) = (num_past_tokens, self.positions.len());
        ensure!(
            begins.first() == Some(&0) && begins.is_sorted(),
            "documents begin at tokens {begins:?}, allowed: ascending from 0"
        );
        ensure!(past == 0 || begins.len() == 2, "{past} past tokens before {} documents, allowed: 1", begins.len() - 1);
        let tokens = begins[begins.len() - 1] as usize;
        ensure!(tokens <= capacity, "{tokens} tokens, allowed: at most {capacity}");
        ensure!(u32::try_from(past.saturating_add(tokens)).is_ok(), "{past} past tokens and {tokens} new ones");
        let of_document = |document: &[u32]| (0..document[1] - document[0]).map(|i| past as u32 + i);
        let positions: Vec<u32> = begins.windows(2).flat_map(of_document).collect();
        device.upload(self.positions.first_mut(tokens), &positions)?;
        (self.begins, self.num_past_tokens) = (begins.to_vec(), past);
        Ok(())
    }

    /// T.
    pub fn num_tokens(&self) -> usize {
        self.begins.last().map_or(0, |&end| end as usize)
    }

    /// Number of keys and values before the first query.
    pub fn num_past_tokens(&self) -> usize {
        self.num_past_tokens
    }

    /// First token of each document and, last, T.
    pub fn begins(&self) -> &[u32] {
        &self.begins
    }

    /// Position of each token in its document, past ones counted, `[T]`.
    pub fn positions(&self) -> View<'_, D, u32> {
        self.positions.first(self.num_tokens())
    }
}

/// Heads, scores and documents of an attention.
pub struct AttentionShape<'a, D: Device> {
    pub num_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Factor of q·k; 1 / sqrt(head_dim) in most models.
    pub scale: f32,
    /// Each score z becomes c · tanh(z / c) for this c, before the softmax; c is positive.
    pub softcap: Option<f32>,
    /// A token sees this many keys at most, itself among them: key k of query q iff 0 ≤ q − k < window. `None` is no limit.
    pub window: Option<usize>,
    pub documents: &'a Documents<D>,
}

impl<D: Device> Clone for AttentionShape<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for AttentionShape<'_, D> {}

/// out = softmax(cap(scale · q·kᵀ), causal, per document, in a window) · v, and the log-sum-exp of each row.
/// q, out `[T, heads · head_dim]`; k, v `[past + T, kv_heads · head_dim]`; lse `[T, heads]`.
pub struct AttentionForward<'a, D: Device> {
    pub out: ViewMut<'a, D, D::Act>,
    pub lse: ViewMut<'a, D, f32>,
    pub q: View<'a, D, D::Act>,
    pub k: View<'a, D, D::Act>,
    pub v: View<'a, D, D::Act>,
    pub shape: AttentionShape<'a, D>,
}

/// Gradients of [`AttentionForward`] (no past): d_q like q, d_k and d_v like k; all are overwritten. Scratch: delta `[T, heads]` for
/// Σ d_out · out; head_d_k and head_d_v, like q, for the parts of heads that share keys and values.
pub struct AttentionBackward<'a, D: Device> {
    pub d_q: ViewMut<'a, D, D::Act>,
    pub d_k: ViewMut<'a, D, D::Act>,
    pub d_v: ViewMut<'a, D, D::Act>,
    pub delta: ViewMut<'a, D, f32>,
    pub head_d_k: ViewMut<'a, D, D::Act>,
    pub head_d_v: ViewMut<'a, D, D::Act>,
    pub d_out: View<'a, D, D::Act>,
    pub out: View<'a, D, D::Act>,
    pub lse: View<'a, D, f32>,
    pub q: View<'a, D, D::Act>,
    pub k: View<'a, D, D::Act>,
    pub v: View<'a, D, D::Act>,
    pub shape: AttentionShape<'a, D>,
}

/// Attention and its backward.
pub trait AttentionOps: Device {
    /// See [`AttentionForward`].
    fn attention_forward(&self, args: AttentionForward<'_, Self>) -> Result<()>;
    /// See [`AttentionBackward`].
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> Result<()>;
}

impl<D: Device> AttentionShape<'_, D> {
    /// Checks the numbers of the scores, and the lengths that both directions have; returns T.
    fn num_tokens(&self, q: usize, k: usize, lse: usize) -> Result<usize> {
        ensure!(self.scale.is_finite(), "attention: scale is {}; it must be finite", self.scale);
        ensure!(self.window != Some(0), "attention: window is 0; it must be at least 1, or None");
        let is_cap = |c: f32| c > 0.0 && c.is_finite();
        ensure!(
            self.softcap.is_none_or(is_cap),
            "attention: softcap is {:?}; it must be positive and finite, or None",
            self.softcap
        );
        let AttentionShape { num_heads, num_key_value_heads: kv_heads, head_dim, documents, .. } = *self;
        let (tokens, past) = (documents.num_tokens(), documents.num_past_tokens());
        ensure!(kv_heads > 0 && num_heads.is_multiple_of(kv_heads), "attention: {num_heads} heads share {kv_heads}");
        ensure!(q == tokens * num_heads * head_dim, "attention: q {q} for {tokens} tokens");
        ensure!(k == (past + tokens) * kv_heads * head_dim, "attention: k {k} for {past} past and {tokens} tokens");
        ensure!(lse == tokens * num_heads, "attention: lse {lse} for {tokens} tokens");
        Ok(tokens)
    }
}

impl<D: Device> AttentionForward<'_, D> {
    /// Checks all lengths; returns T.
    pub(super) fn num_tokens(&self) -> Result<usize> {
        let [out, q, k, v] = [self.out.len(), self.q.len(), self.k.len(), self.v.len()];
        ensure!(out == q && v == k, "attention: out {out} q {q}, v {v} k {k}");
        self.shape.num_tokens(q, k, self.lse.len())
    }
}

impl<D: Device> AttentionBackward<'_, D> {
    /// Checks all lengths; returns T.
    pub(super) fn num_tokens(&self) -> Result<usize> {
        let (q, k, lse, past) = (self.q.len(), self.k.len(), self.lse.len(), self.shape.documents.num_past_tokens());
        let like_q = [self.d_q.len(), self.out.len(), self.d_out.len(), self.head_d_k.len(), self.head_d_v.len()];
        let like_k = [self.v.len(), self.d_k.len(), self.d_v.len()];
        ensure!(
            like_q == [q; 5] && like_k == [k; 3],
            "attention backward: q {q}, like it {like_q:?}; k {k}, like it {like_k:?}"
        );
        ensure!(
            self.delta.len() == lse && past == 0,
            "attention backward: delta {}, {past} past tokens",
            self.delta.len()
        );
        self.shape.num_tokens(q, k, lse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn positions_follow_from_documents_and_wrong_ones_are_refused() {
        let cpu = Cpu::new(1);
        let mut documents = Arena::carved(&cpu, |arena| Documents::carve(arena, "positions", 6)).unwrap();
        documents.put(&cpu, &[0, 3, 3, 5], 0).unwrap();
        assert_eq!((documents.positions().host(), documents.num_tokens()), (&[0, 1, 2, 0, 1][..], 5));
        documents.put(&cpu, &[0, 2], 7).unwrap();
        assert_eq!((documents.positions().host(), documents.num_past_tokens()), (&[7, 8][..], 7));
        for (begins, past, error) in [
            (&[][..], 0, "documents begin at tokens [], allowed: ascending from 0"),
            (&[1, 2], 0, "documents begin at tokens [1, 2], allowed: ascending from 0"),
            (&[0, 4, 2], 0, "documents begin at tokens [0, 4, 2], allowed: ascending from 0"),
            (&[0, 1, 2], 7, "7 past tokens before 2 documents, allowed: 1"),
            (&[0, 7], 0, "7 tokens, allowed: at most 6"),
            (&[0, 2], u32::MAX as usize, "4294967295 past tokens and 2 new ones"),
        ] {
            assert_eq!(documents.put(&cpu, begins, past).unwrap_err().to_string(), error);
            assert_eq!(
                (documents.num_tokens(), documents.num_past_tokens()),
                (0, 0),
                "none are left of the time before"
            );
        }
    }
}

//! Causal grouped-query attention over packed documents.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// Heads, scores and documents of an attention.
pub struct AttentionShape<'a, D> {
    pub num_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Factor of q·k; 1 / sqrt(head_dim) in most models.
    pub scale: f32,
    /// Each score z becomes c · tanh(z / c) for this c, before the softmax; c is positive.
    pub softcap: Option<f32>,
    /// A token sees this many keys at most, itself among them: key k of query q iff 0 ≤ q − k < window. `None` is no limit.
    pub window: Option<usize>,
    /// First token of each document and, last, T: a token sees itself and what is before it in its own document.
    pub documents: &'a [u32],
    /// The same for a device that looks at tokens: position of each in its document, past ones counted, `[T]`.
    pub positions: View<'a, D, u32>,
    /// Keys and values before the first query (generation, one document); 0 in training.
    pub num_past_tokens: usize,
}

impl<D> Clone for AttentionShape<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D> Copy for AttentionShape<'_, D> {}

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
        let AttentionShape { num_heads, num_key_value_heads: kv_heads, head_dim, num_past_tokens: past, .. } = *self;
        let tokens = self.positions.len();
        ensure!(
            self.documents.first() == Some(&0) && self.documents.last().is_some_and(|&end| end as usize == tokens),
            "attention: documents {:?} for {tokens} tokens",
            self.documents
        );
        ensure!(past == 0 || self.documents.len() == 2, "attention: {past} past tokens need one document");
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
        let (q, k, lse, past) = (self.q.len(), self.k.len(), self.lse.len(), self.shape.num_past_tokens);
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

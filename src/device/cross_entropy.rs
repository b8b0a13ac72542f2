//! Cross-entropy over pieces of the vocabulary, with a running maximum and sum as in flash attention.

use anyhow::{Result, ensure};

use super::{Device, View, ViewMut};

/// One piece of the vocabulary of a streaming cross-entropy, in the manner of flash attention. With logits = x · Wᵀ of
/// this piece: the running maximum and sum of exponentials are updated; acc = acc · exp(old max − new max) + exp(logits
/// − new max) · W; target_logit is set where the target lies in the piece. With a cap c, logits = c·tanh(x · Wᵀ / c),
/// and what is added to acc has the factor 1 − (logits / c)², the derivative. x `[N, H]`, W `[rows, H]`, acc `[N, H]`
/// f32; max, sum, target_logit, target_ids `[N]`; `logits` is scratch `[N, rows]`. Before the first piece max = −∞, sum
/// = 0, acc = 0. Without `acc` only the log-probability is wanted.
pub struct CrossEntropyPiece<'a, D: Device> {
    pub max: ViewMut<'a, D, f32>,
    pub sum: ViewMut<'a, D, f32>,
    pub target_logit: ViewMut<'a, D, f32>,
    pub acc: Option<ViewMut<'a, D, f32>>,
    pub logits: ViewMut<'a, D, f32>,
    pub x: View<'a, D, D::Act>,
    pub weight: View<'a, D, D::Act>,
    pub target_ids: View<'a, D, u32>,
    /// Vocabulary id of the piece's first row.
    pub first_id: usize,
    /// The cap; `None` bounds nothing.
    pub softcap: Option<f32>,
}

/// `target_rows[i] = W[target]` where the target of row i lies in this piece, `[N, H]`; other rows are left as they
/// are. The rows are kept apart from `acc`, which is rescaled until the last piece.
pub struct GatherTargetRows<'a, D: Device> {
    pub target_rows: ViewMut<'a, D, D::Act>,
    pub weight: View<'a, D, D::Act>,
    pub target_ids: View<'a, D, u32>,
    pub first_id: usize,
}

/// `d_x = coefficient · (acc / sum − W[target])` per row, `[N, H]`: the gradient of −coefficient · log p(target). With
/// a cap c, `W[target]` has the factor 1 − (target_logit / c)².
pub struct CrossEntropyFinish<'a, D: Device> {
    pub d_x: ViewMut<'a, D, D::Act>,
    pub acc: View<'a, D, f32>,
    pub sum: View<'a, D, f32>,
    pub target_logit: View<'a, D, f32>,
    pub target_rows: View<'a, D, D::Act>,
    pub coefficients: View<'a, D, f32>,
    pub softcap: Option<f32>,
}

/// Cross-entropy over pieces of the vocabulary.
pub trait CrossEntropyOps: Device {
    /// See [`CrossEntropyPiece`].
    fn cross_entropy_piece(&self, args: CrossEntropyPiece<'_, Self>) -> Result<()>;
    /// See [`GatherTargetRows`].
    fn gather_target_rows(&self, args: GatherTargetRows<'_, Self>) -> Result<()>;
    /// See [`CrossEntropyFinish`].
    fn cross_entropy_finish(&self, args: CrossEntropyFinish<'_, Self>) -> Result<()>;
}

impl<D: Device> CrossEntropyPiece<'_, D> {
    /// Checks all lengths; returns N, H and the rows of the piece. Without target tokens all three are 0.
    pub(super) fn sizes(&self) -> Result<[usize; 3]> {
        let n = self.target_ids.len();
        let [hidden, rows] = piece_sizes(n, self.x.len(), self.weight.len(), self.first_id)?;
        let running = [self.max.len(), self.sum.len(), self.target_logit.len()];
        ensure!(running == [n; 3], "cross_entropy: max, sum and target_logit {running:?} for {n} tokens");
        let logits = self.logits.len();
        ensure!(logits == n * rows, "cross_entropy: logits {logits} for {n} tokens and {rows} rows");
        let acc = self.acc.as_ref().map_or(n * hidden, |acc| acc.len());
        ensure!(acc == n * hidden, "cross_entropy: acc {acc} for {n} tokens of {hidden}");
        Ok([n, hidden, rows])
    }
}

impl<D: Device> GatherTargetRows<'_, D> {
    /// Checks all lengths; returns N, H and the rows of the piece. Without target tokens all three are 0.
    pub(super) fn sizes(&self) -> Result<[usize; 3]> {
        let n = self.target_ids.len();
        let [hidden, rows] = piece_sizes(n, self.target_rows.len(), self.weight.len(), self.first_id)?;
        Ok([n, hidden, rows])
    }
}

/// H and the rows of a piece, from the lengths of a matrix `[N, H]` and of the piece's weight.
fn piece_sizes(n: usize, x: usize, weight: usize, first_id: usize) -> Result<[usize; 2]> {
    let Some(hidden) = x.checked_div(n) else {
        ensure!(x == 0, "cross_entropy: {x} elements for 0 tokens");
        return Ok([0; 2]);
    };
    ensure!(
        hidden > 0 && x == n * hidden && weight.is_multiple_of(hidden),
        "cross_entropy: {x} elements for {n} tokens, {weight} weights"
    );
    let rows = weight / hidden;
    ensure!(u32::try_from(first_id + rows).is_ok(), "cross_entropy: {rows} rows from id {first_id} on");
    Ok([hidden, rows])
}

impl<D: Device> CrossEntropyFinish<'_, D> {
    /// Checks all lengths; returns N and H. Without target tokens both are 0.
    pub(super) fn sizes(&self) -> Result<[usize; 2]> {
        let (n, len) = (self.sum.len(), self.d_x.len());
        let hidden = len.checked_div(n).unwrap_or(0);
        let found = [len, self.acc.len(), self.target_rows.len()];
        ensure!(found == [n * hidden; 3], "cross_entropy finish: d_x, acc, target_rows {found:?} for {n} tokens");
        let of_tokens = [self.coefficients.len(), self.target_logit.len()];
        ensure!(of_tokens == [n; 2], "cross_entropy finish: coefficients, target_logit {of_tokens:?} for {n} sums");
        Ok([n, hidden])
    }
}

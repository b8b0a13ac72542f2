//! Cross-entropy over pieces of the vocabulary, with a running maximum and sum.

use anyhow::{Result, ensure};

use crate::device::ops::{CrossEntropyFinish, CrossEntropyPiece, GatherTargetRows, Ops, Transpose};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

/// Vocabulary rows of a piece that the kernel holds in registers.
const MAX_PIECE_ROWS: usize = 4096;

impl<A: HalfType> Cuda<A> {
    pub(super) fn cross_entropy_piece_act(&self, args: CrossEntropyPiece<'_, Cuda<A>>) -> Result<()> {
        let CrossEntropyPiece { max, sum, target_logit, acc, mut logits, x, weight, target_ids, first_id } = args;
        let n = target_ids.len();
        if n == 0 {
            return Ok(());
        }
        let hidden = x.len() / n;
        let rows = weight.len() / hidden;
        ensure!(logits.len() == n * rows && [sum.len(), max.len()] == [n; 2], "cross_entropy: {n} tokens, {rows} rows");
        ensure!(rows <= MAX_PIECE_ROWS, "cross_entropy: {rows} rows in a piece, at most {MAX_PIECE_ROWS}");
        self.logits(logits.range_mut(0..n * rows), x, weight, hidden)?;
        ensure!(
            target_logit.len() == n && acc.as_ref().is_none_or(|acc| acc.len() == n * hidden) && x.len() == n * hidden,
            "cross_entropy: {n} tokens of {hidden}"
        );
        let acc_hidden = acc.as_ref().map_or(0, |_| hidden as u32);
        let (num_rows, first_id) = (rows as u32, first_id as u32);
        let args = args![
            max,
            sum,
            target_logit,
            acc.as_ref().map(|acc| acc.view()),
            logits.view(),
            target_ids,
            num_rows,
            first_id,
            acc_hidden
        ];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("cross_entropy_piece", Grid::rows(n), args) }?;
        let Some(acc) = acc else { return Ok(()) };
        // Each row of logits now begins with its probabilities in half the bytes: rows are 2 · rows elements apart.
        self.gemm_strided(
            acc,
            (logits.view().reinterpret(), 2 * rows, Transpose::No),
            (weight, hidden, Transpose::No),
            [n, hidden, rows],
            1.0,
            1.0,
        )
    }

    pub(super) fn gather_target_rows_act(&self, args: GatherTargetRows<'_, Cuda<A>>) -> Result<()> {
        let GatherTargetRows { target_rows, weight, target_ids, first_id } = args;
        let n = target_ids.len();
        let Some(hidden) = target_rows.len().checked_div(n) else { return Ok(()) };
        ensure!(hidden.is_multiple_of(8) && target_rows.len() == n * hidden, "gather_target_rows: hidden {hidden}");
        let rows = (weight.len() / hidden) as u32;
        let args = args![target_rows, weight, target_ids, rows, first_id as u32, (hidden / 8) as u32];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("gather_target_rows", Grid::rows(n), args) }
    }

    pub(super) fn cross_entropy_finish_act(&self, args: CrossEntropyFinish<'_, Cuda<A>>) -> Result<()> {
        let CrossEntropyFinish { d_x, acc, sum, target_rows, coefficients } = args;
        let (len, n) = (d_x.len(), sum.len());
        ensure!(
            [acc.len(), target_rows.len()] == [len; 2] && coefficients.len() == n,
            "cross_entropy finish: d_x {len}"
        );
        let Some(hidden) = len.checked_div(n) else { return Ok(()) };
        ensure!(hidden.is_multiple_of(8) && len == n * hidden, "cross_entropy finish: hidden {hidden}");
        let args = args![d_x, acc, sum, target_rows, coefficients, (hidden / 8) as u32];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("cross_entropy_finish", Grid::rows(n), args) }
    }
}

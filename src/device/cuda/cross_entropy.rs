//! Cross-entropy over pieces of the vocabulary, with a running maximum and sum.

use anyhow::{Result, ensure};

use crate::device::{CrossEntropyFinish, CrossEntropyOps, CrossEntropyPiece, GatherTargetRows, GemmOps, Transpose};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

/// Vocabulary rows of a piece that the kernel holds in registers.
const MAX_PIECE_ROWS: usize = 4096;
/// Tells the kernels that logits have no cap.
const NO_CAP: f32 = 0.0;

impl<A: HalfType> CrossEntropyOps for Cuda<A> {
    fn cross_entropy_piece(&self, args: CrossEntropyPiece<'_, Cuda<A>>) -> Result<()> {
        let [n, hidden, rows] = args.sizes()?;
        if n == 0 {
            return Ok(());
        }
        ensure!(rows <= MAX_PIECE_ROWS, "cross_entropy: {rows} rows in a piece, at most {MAX_PIECE_ROWS}");
        let CrossEntropyPiece { max, sum, target_logit, acc, mut logits, x, weight, target_ids, first_id, softcap } =
            args;
        self.logits(logits.range_mut(0..n * rows), x, weight, hidden)?;
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
            acc_hidden,
            softcap.unwrap_or(NO_CAP)
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

    fn gather_target_rows(&self, args: GatherTargetRows<'_, Cuda<A>>) -> Result<()> {
        let [n, hidden, rows] = args.sizes()?;
        ensure!(hidden.is_multiple_of(8), "gather_target_rows: rows of {hidden}, allowed: a multiple of 8");
        let GatherTargetRows { target_rows, weight, target_ids, first_id } = args;
        let args = args![target_rows, weight, target_ids, rows as u32, first_id as u32, (hidden / 8) as u32];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("gather_target_rows", Grid::rows(n), args) }
    }

    fn cross_entropy_finish(&self, args: CrossEntropyFinish<'_, Cuda<A>>) -> Result<()> {
        let [n, hidden] = args.sizes()?;
        ensure!(hidden.is_multiple_of(8), "cross_entropy finish: rows of {hidden}, allowed: a multiple of 8");
        let CrossEntropyFinish { d_x, acc, sum, target_logit, target_rows, coefficients, softcap } = args;
        let (hidden, softcap) = ((hidden / 8) as u32, softcap.unwrap_or(NO_CAP));
        let args = args![d_x, acc, sum, target_logit, target_rows, coefficients, hidden, softcap];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("cross_entropy_finish", Grid::rows(n), args) }
    }
}

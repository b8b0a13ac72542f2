//! Cross-entropy over pieces of the vocabulary, with a running maximum and sum as in flash attention.

use anyhow::Result;
use rayon::prelude::*;

use crate::device::{
    CrossEntropyFinish, CrossEntropyOps, CrossEntropyPiece, GatherTargetRows, Gemm, GemmOps, Transpose,
};

use super::{Cpu, math};

impl CrossEntropyOps for Cpu {
    fn cross_entropy_piece(&self, args: CrossEntropyPiece<'_, Cpu>) -> Result<()> {
        let [n, hidden, rows] = args.sizes()?;
        if n == 0 {
            return Ok(());
        }
        let CrossEntropyPiece { max, sum, target_logit, acc, mut logits, x, weight, target_ids, first_id, softcap } =
            args;
        self.logits(logits.range_mut(0..n * rows), x, weight, hidden)?;
        let (max, sum, target_logit) = (max.host_mut(), sum.host_mut(), target_logit.host_mut());
        let mut no_acc = [];
        let (mut acc, acc_width) = match acc {
            Some(acc) => (Some(acc), hidden),
            None => (None, 0),
        };
        {
            let acc_rows: &mut [f32] = match &mut acc {
                Some(acc) => acc.range_mut(0..n * hidden).host_mut(),
                None => &mut no_acc,
            };
            let mut acc_rows: Vec<&mut [f32]> = match acc_width {
                0 => (0..n).map(|_| [].as_mut_slice()).collect(),
                width => acc_rows.chunks_exact_mut(width).collect(),
            };
            let logits = logits.range_mut(0..n * rows).host_mut();
            (logits.par_chunks_exact_mut(rows), max.par_iter_mut(), sum.par_iter_mut(), target_logit.par_iter_mut())
                .into_par_iter()
                .zip(acc_rows.par_iter_mut().zip(target_ids.host()))
                .with_min_len(16)
                .for_each(|((logits, max, sum, target_logit), (acc, &target))| {
                    if let Some(cap) = softcap {
                        cap_row(logits, cap);
                    }
                    if let Some(&logit) = (target as usize).checked_sub(first_id).and_then(|i| logits.get(i)) {
                        *target_logit = logit;
                    }
                    update_row(logits, max, sum, acc, softcap);
                });
        }
        let Some(acc) = acc else { return Ok(()) };
        let (transpose_a, transpose_b) = (Transpose::No, Transpose::No);
        let (m, n, k) = (n, hidden, rows);
        self.gemm(Gemm {
            c: acc,
            a: logits.view(),
            b: weight,
            transpose_a,
            transpose_b,
            m,
            n,
            k,
            alpha: 1.0,
            beta: 1.0,
        })
    }

    fn gather_target_rows(&self, args: GatherTargetRows<'_, Cpu>) -> Result<()> {
        let [n, hidden, rows] = args.sizes()?;
        if n == 0 {
            return Ok(());
        }
        let GatherTargetRows { target_rows, weight, target_ids, first_id } = args;
        let (target_rows, weight, target_ids) = (target_rows.host_mut(), weight.host(), target_ids.host());
        for (row, &target) in target_rows.chunks_exact_mut(hidden).zip(target_ids) {
            if let Some(i) = (target as usize).checked_sub(first_id).filter(|&i| i < rows) {
                row.copy_from_slice(&weight[i * hidden..][..hidden]);
            }
        }
        Ok(())
    }

    fn cross_entropy_finish(&self, args: CrossEntropyFinish<'_, Cpu>) -> Result<()> {
        let [n, hidden] = args.sizes()?;
        if n == 0 {
            return Ok(());
        }
        let CrossEntropyFinish { d_x, acc, sum, target_logit, target_rows, coefficients, softcap } = args;
        let (d_x, acc, target_rows) = (d_x.host_mut(), acc.host(), target_rows.host());
        let (sum, target_logit, coefficients) = (sum.host(), target_logit.host(), coefficients.host());
        for (i, d_x) in d_x.chunks_exact_mut(hidden).enumerate() {
            let row = i * hidden..(i + 1) * hidden;
            let (coefficient, reciprocal) = (coefficients[i], 1.0 / sum[i]);
            let slope = softcap.map_or(1.0, |cap| slope(target_logit[i], cap));
            for ((d, a), w) in d_x.iter_mut().zip(&acc[row.clone()]).zip(&target_rows[row]) {
                *d = coefficient * (a * reciprocal - slope * w);
            }
        }
        Ok(())
    }
}

/// Logits become c·tanh(logit / c).
fn cap_row(logits: &mut [f32], cap: f32) {
    crate::simd::vectorize(
        #[inline(always)]
        || logits.iter_mut().for_each(|logit| *logit = cap * math::tanh(*logit / cap)),
    );
}

/// The derivative of a capped logit.
#[inline(always)]
fn slope(logit: f32, cap: f32) -> f32 {
    1.0 - (logit / cap) * (logit / cap)
}

/// Logits become exp(logit − new max), with the factor [`slope`] where there is a cap; the running values and the row
/// of acc are rescaled to the new maximum.
fn update_row(logits: &mut [f32], max: &mut f32, sum: &mut f32, acc: &mut [f32], softcap: Option<f32>) {
    crate::simd::vectorize(
        #[inline(always)]
        || {
            let new_max = max.max(math::max(logits));
            let rescale = math::exp(*max - new_max);
            let total = match softcap {
                None => {
                    logits.iter_mut().for_each(|logit| *logit = math::exp(*logit - new_max));
                    math::sum(logits)
                }
                Some(cap) => exponentials_with_slopes(logits, new_max, cap),
            };
            *sum = *sum * rescale + total;
            *max = new_max;
            if rescale != 1.0 {
                acc.iter_mut().for_each(|a| *a *= rescale);
            }
        },
    );
}

/// Logits become exp(logit − max) · [`slope`]. Returns the sum of the exponentials.
#[inline(always)]
fn exponentials_with_slopes(logits: &mut [f32], max: f32, cap: f32) -> f32 {
    let (mut total, mut exponentials) = (0.0, [0f32; 256]);
    for logits in logits.chunks_mut(256) {
        let exponentials = &mut exponentials[..logits.len()];
        for (e, logit) in exponentials.iter_mut().zip(logits) {
            *e = math::exp(*logit - max);
            *logit = *e * slope(*logit, cap);
        }
        total += math::sum(exponentials);
    }
    total
}

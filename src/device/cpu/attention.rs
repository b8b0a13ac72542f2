//! Causal grouped-query attention over packed documents, one strip of [`QUERY_ROWS`] queries at a time: the scores of
//! a strip exist, those of a head never do.

use std::ops::Range;

use anyhow::Result;
use rayon::prelude::*;

use crate::device::{AttentionBackward, AttentionForward, AttentionOps, AttentionShape};

use super::gemm::gemm_strided;
use super::{Cpu, math};

/// Queries of one strip.
const QUERY_ROWS: usize = 64;

/// Queries `first..first + len` of one document, and the keys that they see: `window` of them up to themselves.
#[derive(Clone, Copy)]
struct Strip {
    first: usize,
    len: usize,
    /// The first key that the first query sees.
    keys: usize,
    /// Keys from there to the last query.
    num_keys: usize,
    window: usize,
}

impl Strip {
    /// Columns of the strip's scores that query `i` of it sees.
    fn visible(&self, i: usize) -> Range<usize> {
        let end = self.num_keys - self.len + i + 1;
        end.saturating_sub(self.window)..end
    }
}

fn strips(shape: &AttentionShape<'_, Cpu>) -> Vec<Strip> {
    let (past, window) = (shape.documents.num_past_tokens(), shape.window.unwrap_or(usize::MAX));
    let mut strips = Vec::new();
    for document in shape.documents.begins().windows(2) {
        let (begin, end) = (document[0] as usize, document[1] as usize);
        for first in (begin..end).step_by(QUERY_ROWS) {
            let len = QUERY_ROWS.min(end - first);
            let keys = begin.max((past + first + 1).saturating_sub(window));
            strips.push(Strip { first, len, keys, num_keys: past + first + len - keys, window });
        }
    }
    strips
}

/// S = scale · Q · Kᵀ of one head and strip, in `scores` `[len, num_keys]`; not capped yet.
fn scores(scores: &mut [f32], strip: &Strip, q: (&[f32], usize), k: (&[f32], usize), head_dim: usize, scale: f32) {
    let sizes = [strip.len, strip.num_keys, head_dim];
    let none = gemm::Parallelism::None;
    gemm_strided(scores, strip.num_keys, (q.0, (q.1, 1)), (k.0, (1, k.1)), sizes, scale, 0.0, none);
}

impl AttentionOps for Cpu {
    fn attention_forward(&self, args: AttentionForward<'_, Cpu>) -> Result<()> {
        args.num_tokens()?;
        let AttentionForward { out, lse, q, k, v, shape } = args;
        let (out, lse, q, k, v) = (out.host_mut(), lse.host_mut(), q.host(), k.host(), v.host());
        let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, softcap, .. } = shape;
        let (width, kv_width) = (num_heads * head_dim, num_key_value_heads * head_dim);
        let mut parts = Vec::new();
        let (mut out, mut lse) = (out, lse);
        for strip in strips(&shape) {
            let (out_part, out_rest) = out.split_at_mut(strip.len * width);
            let (lse_part, lse_rest) = lse.split_at_mut(strip.len * num_heads);
            parts.push((strip, out_part, lse_part));
            (out, lse) = (out_rest, lse_rest);
        }
        let one = |s: &mut Vec<f32>, (strip, out, lse): (Strip, &mut [f32], &mut [f32])| {
            for head in 0..num_heads {
                let kv_at = strip.keys * kv_width + head / (num_heads / num_key_value_heads) * head_dim;
                s.resize(strip.len * strip.num_keys, 0.0);
                let q = (&q[strip.first * width + head * head_dim..], width);
                scores(s, &strip, q, (&k[kv_at..], kv_width), head_dim, scale);
                for (i, row) in s.chunks_exact_mut(strip.num_keys).enumerate() {
                    lse[i * num_heads + head] = softmax_row(row, strip.visible(i), softcap);
                }
                let sizes = [strip.len, head_dim, strip.num_keys];
                let operands = ((&s[..], (strip.num_keys, 1)), (&v[kv_at..], (kv_width, 1)));
                let none = gemm::Parallelism::None;
                gemm_strided(&mut out[head * head_dim..], width, operands.0, operands.1, sizes, 1.0, 0.0, none);
            }
        };
        parts.into_par_iter().for_each_init(Vec::new, one);
        Ok(())
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Cpu>) -> Result<()> {
        args.num_tokens()?;
        let AttentionBackward { d_q, d_k, d_v, d_out, out, lse, q, k, v, shape, .. } = args;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, .. } = shape;
        let (width, kv_width) = (num_heads * head_dim, num_key_value_heads * head_dim);
        let saved =
            Saved { d_out: d_out.host(), out: out.host(), lse: lse.host(), q: q.host(), k: k.host(), v: v.host() };
        let group = num_heads / num_key_value_heads;
        let (d_q, d_k, d_v) = (d_q.host_mut(), d_k.host_mut(), d_v.host_mut());
        let gradients: Vec<HeadGradients> =
            (0..num_key_value_heads).into_par_iter().map(|kv| head_backward(&saved, &shape, kv)).collect();
        for (kv, gradients) in gradients.iter().enumerate() {
            put_columns(d_k, &gradients.d_k, kv * head_dim, head_dim, kv_width);
            put_columns(d_v, &gradients.d_v, kv * head_dim, head_dim, kv_width);
            put_columns(d_q, &gradients.d_q, kv * group * head_dim, group * head_dim, width);
        }
        Ok(())
    }
}

/// The tensors that backward reads.
struct Saved<'a> {
    d_out: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// Gradients of one key-value head and of the query heads that share it.
struct HeadGradients {
    /// `[T, group · head_dim]`
    d_q: Vec<f32>,
    /// `[T, head_dim]`
    d_k: Vec<f32>,
    d_v: Vec<f32>,
}

fn head_backward(saved: &Saved<'_>, shape: &AttentionShape<'_, Cpu>, kv: usize) -> HeadGradients {
    let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, softcap, .. } = *shape;
    let (width, kv_width, group) =
        (num_heads * head_dim, num_key_value_heads * head_dim, num_heads / num_key_value_heads);
    let tokens = saved.q.len() / width;
    let mut d_q = vec![0.0; tokens * group * head_dim];
    let (mut d_k, mut d_v) = (vec![0.0; tokens * head_dim], vec![0.0; tokens * head_dim]);
    let (mut p, mut d_p) = (Vec::new(), Vec::new());
    let none = || gemm::Parallelism::None;
    for strip in strips(shape) {
        let kv_at = strip.keys * kv_width + kv * head_dim;
        let keys_at = strip.keys * head_dim;
        for member in 0..group {
            let head = kv * group + member;
            let at = strip.first * width + head * head_dim;
            let (q, d_out, out) = (&saved.q[at..], &saved.d_out[at..], &saved.out[at..]);
            let (keys, head_keys) = (strip.num_keys, [strip.len, strip.num_keys, head_dim]);
            p.resize(strip.len * keys, 0.0);
            d_p.resize(strip.len * keys, 0.0);
            scores(&mut p, &strip, (q, width), (&saved.k[kv_at..], kv_width), head_dim, scale);
            gemm_strided(
                &mut d_p,
                keys,
                (d_out, (width, 1)),
                (&saved.v[kv_at..], (1, kv_width)),
                head_keys,
                1.0,
                0.0,
                none(),
            );
            for i in 0..strip.len {
                let row = i * keys..(i + 1) * keys;
                let lse = saved.lse[(strip.first + i) * num_heads + head];
                let delta = math::dot(&d_out[i * width..][..head_dim], &out[i * width..][..head_dim]);
                softmax_row_backward(&mut p[row.clone()], &mut d_p[row], strip.visible(i), softcap, (lse, delta));
            }
            let transposed = (1, keys);
            let to_keys = [keys, head_dim, strip.len];
            gemm_strided(
                &mut d_v[keys_at..],
                head_dim,
                (&p, transposed),
                (d_out, (width, 1)),
                to_keys,
                1.0,
                1.0,
                none(),
            );
            gemm_strided(
                &mut d_k[keys_at..],
                head_dim,
                (&d_p, transposed),
                (q, (width, 1)),
                to_keys,
                scale,
                1.0,
                none(),
            );
            let d_q = &mut d_q[strip.first * group * head_dim + member * head_dim..];
            let to_queries = [strip.len, head_dim, keys];
            let k = (&saved.k[kv_at..], (kv_width, 1));
            gemm_strided(d_q, group * head_dim, (&d_p, (keys, 1)), k, to_queries, scale, 0.0, none());
        }
    }
    HeadGradients { d_q, d_k, d_v }
}

/// Softmax of the capped scores that are visible, in place, the others 0; returns the log-sum-exp.
fn softmax_row(row: &mut [f32], visible: Range<usize>, softcap: Option<f32>) -> f32 {
    crate::simd::vectorize(
        #[inline(always)]
        || {
            let row = only_visible(row, visible.clone());
            if let Some(cap) = softcap {
                row.iter_mut().for_each(|s| *s = cap * math::tanh(*s / cap));
            }
            let max = math::max(row);
            for s in row.iter_mut() {
                *s = math::exp(*s - max);
            }
            let sum = math::sum(row);
            let reciprocal = 1.0 / sum;
            row.iter_mut().for_each(|s| *s *= reciprocal);
            max + sum.ln()
        },
    )
}

/// p: scores → probabilities; d_p → d_scores = p · (d_p − delta) · the cap's slope; both 0 where nothing is seen.
fn softmax_row_backward(
    p: &mut [f32],
    d_p: &mut [f32],
    visible: Range<usize>,
    softcap: Option<f32>,
    (lse, delta): (f32, f32),
) {
    crate::simd::vectorize(
        #[inline(always)]
        || {
            let pairs = only_visible(p, visible.clone()).iter_mut().zip(only_visible(d_p, visible.clone()));
            match softcap {
                None => pairs.for_each(|(p, d)| {
                    *p = math::exp(*p - lse);
                    *d = *p * (*d - delta);
                }),
                Some(cap) => pairs.for_each(|(p, d)| {
                    let tanh = math::tanh(*p / cap);
                    *p = math::exp(cap * tanh - lse);
                    *d = *p * (*d - delta) * (1.0 - tanh * tanh);
                }),
            }
        },
    );
}

/// Returns the visible part of a row; the others become 0.
#[inline(always)]
fn only_visible(row: &mut [f32], visible: Range<usize>) -> &mut [f32] {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    &mut row[visible]
}

/// Copies `[T, columns]` into columns `at..at + columns` of rows of `width`.
fn put_columns(dst: &mut [f32], src: &[f32], at: usize, columns: usize, width: usize) {
    for (dst, src) in dst.chunks_exact_mut(width).zip(src.chunks_exact(columns)) {
        dst[at..at + columns].copy_from_slice(src);
    }
}

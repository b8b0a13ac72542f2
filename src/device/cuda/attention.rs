//! Causal grouped-query attention over packed documents.

use anyhow::{Result, ensure};

use crate::device::ops::{AttentionBackward, AttentionForward, AttentionShape};

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

/// Widths of a head that the kernels are made for.
pub const HEAD_DIMS: [usize; 3] = [64, 96, 128];
/// The kernels that have a block for so many queries (or keys) of a head, and its threads.
const TILED_KERNELS: [&str; 3] = ["attention_forward", "attention_backward_queries", "attention_backward_keys"];
const ROWS: usize = 128;
const THREADS: u32 = 256;

/// Dynamic shared memory of a tiled kernel: two stages of two tiles of 64 rows.
fn shared_bytes(head_dim: usize) -> u32 {
    (2 * 2 * 64 * head_dim * size_of::<u16>()) as u32
}

fn grid(tokens: usize, heads: usize, head_dim: usize) -> Grid {
    Grid { blocks: (tokens.div_ceil(ROWS), heads), threads: THREADS, shared_bytes: shared_bytes(head_dim) }
}

/// Checks what both directions share; returns the number of tokens.
fn check<A: HalfType>(shape: &AttentionShape<'_, Cuda<A>>, q: usize, k: usize, lse: usize) -> Result<usize> {
    let AttentionShape { num_heads, num_key_value_heads, head_dim, num_past_tokens, .. } = *shape;
    let tokens = shape.positions.len();
    ensure!(HEAD_DIMS.contains(&head_dim), "attention: head_dim is {head_dim}; on a GPU it may be 64, 96 or 128");
    ensure!(q == tokens * num_heads * head_dim, "attention: q {q} for {tokens} tokens");
    ensure!(k == (num_past_tokens + tokens) * num_key_value_heads * head_dim, "attention: k {k} for {tokens} tokens");
    ensure!(lse == tokens * num_heads, "attention: lse {lse} for {tokens} tokens");
    Ok(tokens)
}

impl<A: HalfType> Cuda<A> {
    pub(super) fn attention_forward_act(&self, args: AttentionForward<'_, Cuda<A>>) -> Result<()> {
        let AttentionForward { out, lse, q, k, v, shape } = args;
        let tokens = check(&shape, q.len(), k.len(), lse.len())?;
        ensure!(out.len() == q.len() && v.len() == k.len(), "attention: out {} v {}", out.len(), v.len());
        let AttentionShape { num_heads, num_key_value_heads, head_dim, num_past_tokens, positions, .. } = shape;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (heads, kv_heads, past) = (num_heads as i32, num_key_value_heads as i32, num_past_tokens as i32);
        let args = args![out, lse, q, k, v, positions, tokens as i32, heads, kv_heads, past, scale];
        self.launch(&format!("attention_forward_{head_dim}"), grid(tokens, num_heads, head_dim), args)
    }

    pub(super) fn attention_backward_act(&self, args: AttentionBackward<'_, Cuda<A>>) -> Result<()> {
        let AttentionBackward { d_q, d_k, d_v, delta, head_d_k, head_d_v, d_out, out, lse, q, k, v, shape } = args;
        let tokens = check(&shape, q.len(), k.len(), lse.len())?;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, positions, .. } = shape;
        ensure!(
            [d_q.len(), out.len(), d_out.len(), head_d_k.len(), head_d_v.len()] == [q.len(); 5]
                && [v.len(), d_k.len(), d_v.len()] == [k.len(); 3],
            "attention backward: q {} k {}",
            q.len(),
            k.len()
        );
        ensure!(delta.len() == lse.len() && shape.num_past_tokens == 0, "attention backward: delta {}", delta.len());
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (t, heads, kv_heads) = (tokens as i32, num_heads as i32, num_key_value_heads as i32);
        let rows = tokens * num_heads;
        let delta_args = args![delta.view(), d_out, out, rows as u64, head_dim as u32];
        self.launch(
            "attention_delta",
            Grid { blocks: (rows.div_ceil(8), 1), threads: 256, shared_bytes: 0 },
            delta_args,
        )?;
        let delta = delta.view();
        let args = args![d_q, d_out, lse, delta, q, k, v, positions, t, heads, kv_heads, scale];
        let grid = grid(tokens, num_heads, head_dim);
        self.launch(&format!("attention_backward_queries_{head_dim}"), grid, args)?;
        let kernel = format!("attention_backward_keys_{head_dim}");
        let group = num_heads / num_key_value_heads;
        if group == 1 {
            let args = args![d_k, d_v, d_out, lse, delta, q, k, v, positions, t, heads, kv_heads, scale];
            return self.launch(&kernel, grid, args);
        }
        let (mut k_parts, mut v_parts, all) = (head_d_k, head_d_v, 0..q.len());
        let (part_k, part_v) = (k_parts.range_mut(all.clone()), v_parts.range_mut(all));
        let args = args![part_k, part_v, d_out, lse, delta, q, k, v, positions, t, heads, kv_heads, scale];
        self.launch(&kernel, grid, args)?;
        for (sum, parts) in [(d_k, k_parts.view()), (d_v, v_parts.view())] {
            let eights = sum.len() / 8;
            let args = args![sum, parts, eights as u64, group as u32, (head_dim / 8) as u32];
            self.launch("attention_sum_heads", Grid::elements(eights), args)?;
        }
        Ok(())
    }

    pub(super) fn allow_attention_memory(&self) -> Result<()> {
        let mut all = HEAD_DIMS.into_iter().flat_map(|head_dim| TILED_KERNELS.map(|kernel| (kernel, head_dim)));
        all.try_for_each(|(kernel, head_dim)| {
            self.allow_shared_bytes(&format!("{kernel}_{head_dim}"), shared_bytes(head_dim))
        })
    }
}

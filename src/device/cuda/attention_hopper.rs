//! Attention's kernels for Hopper: `kernels/attention_hopper_*.cu`.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use cudarc::driver::{CudaContext, sys};

use crate::device::{AttentionBackward, AttentionForward, AttentionShape};

use super::attention::{Parts, max_reach};
use super::compile::AttentionVariant;
use super::launch::{Grid, args, tile_map};
use super::{Cuda, HalfType};

pub(super) const KERNELS: [&str; 3] =
    ["attention_hopper_forward", "attention_hopper_backward_queries", "attention_hopper_backward_keys"];
/// Queries, or keys, of a piece of work.
const ROWS: usize = 128;
/// A block has a multiprocessor for itself.
const THREADS: u32 = 384;
pub(super) const SHARED_BYTES: u32 = 226 << 10;

/// The GPU's sizes on which the number of blocks depends.
#[derive(Clone, Copy)]
pub struct Hopper {
    pub(super) multiprocessors: usize,
}

impl Hopper {
    pub fn new(context: &Arc<CudaContext>) -> Result<Hopper> {
        let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(|e| anyhow!("multiprocessors of the GPU: {e}"))?;
        Ok(Hopper { multiprocessors: multiprocessors as usize })
    }

    fn grid(self, work: usize) -> Grid {
        Grid { blocks: (work.min(self.multiprocessors), 1), threads: THREADS, shared_bytes: SHARED_BYTES }
    }

    /// Returns how many of the heads that share keys are one piece of work, their gradients added where they arise: the most that leave
    /// 1.9 pieces for each multiprocessor, so that long ones (the first keys of a document) and short ones even out.
    fn heads_of_a_piece(self, tokens: usize, kv_heads: usize, group: usize) -> usize {
        let pieces = |heads: usize| tokens.div_ceil(ROWS) * kv_heads * group / heads;
        let enough = |heads: &usize| group.is_multiple_of(*heads) && pieces(*heads) * 10 >= self.multiprocessors * 19;
        (1..=group).rev().find(enough).unwrap_or(1)
    }
}

impl<A: HalfType> Cuda<A> {
    pub(super) fn hopper_attention_forward(
        &self,
        hopper: Hopper,
        variant: AttentionVariant,
        args: AttentionForward<'_, Cuda<A>>,
    ) -> Result<()> {
        let AttentionForward { out, lse, q, k, v, shape } = args;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, documents, .. } = shape;
        let (tokens, positions) = (documents.num_tokens(), documents.positions());
        if tokens == 0 {
            return Ok(());
        }
        let (width, kv_width) = (num_heads * head_dim, num_key_value_heads * head_dim);
        let [q, k, v] = [(q, width), (k, kv_width), (v, kv_width)].map(|(x, width)| tile_map(x, width, head_dim));
        let (heads, kv_heads, past) =
            (num_heads as i32, num_key_value_heads as i32, documents.num_past_tokens() as i32);
        let max_reach = max_reach(shape.window);
        let args = args![out, lse, q?, k?, v?, positions, tokens as i32, heads, kv_heads, past, max_reach, scale];
        let grid = hopper.grid(tokens.div_ceil(ROWS) * num_heads);
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch_attention(variant, "attention_hopper_forward", grid, args) }
    }

    pub(super) fn hopper_attention_backward(
        &self,
        hopper: Hopper,
        variant: AttentionVariant,
        args: AttentionBackward<'_, Cuda<A>>,
    ) -> Result<()> {
        let AttentionBackward { d_q, d_k, d_v, delta, head_d_k, head_d_v, d_out, out, lse, q, k, v, shape } = args;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, documents, .. } = shape;
        let (tokens, positions) = (documents.num_tokens(), documents.positions());
        if tokens == 0 {
            return Ok(());
        }
        let (width, kv_width) = (num_heads * head_dim, num_key_value_heads * head_dim);
        let d_out_map = tile_map(d_out, width, head_dim)?;
        let (q, k, v) =
            (tile_map(q, width, head_dim)?, tile_map(k, kv_width, head_dim)?, tile_map(v, kv_width, head_dim)?);
        let (t, heads, kv_heads, blocks) =
            (tokens as i32, num_heads as i32, num_key_value_heads as i32, tokens.div_ceil(ROWS));
        let (delta, reach) = (delta.view(), max_reach(shape.window));
        let args = args![d_q, delta, d_out_map, q, k, v, d_out, out, lse, positions, t, heads, kv_heads, reach, scale];
        let grid = hopper.grid(blocks * num_heads);
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch_attention(variant, "attention_hopper_backward_queries", grid, args) }?;
        let group = num_heads / num_key_value_heads;
        let of_a_piece = hopper.heads_of_a_piece(tokens, num_key_value_heads, group);
        let parts = group / of_a_piece;
        self.sum_over_heads(variant, Parts { d_k, d_v, head_d_k, head_d_v, parts }, |d_k, d_v| {
            let of_a_piece = of_a_piece as i32;
            let args = args![
                d_k, d_v, d_out_map, q, k, v, lse, delta, positions, t, heads, kv_heads, of_a_piece, reach, scale
            ];
            let grid = hopper.grid(blocks * num_key_value_heads * parts);
            // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
            unsafe { self.launch_attention(variant, "attention_hopper_backward_keys", grid, args) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pieces_of_keys_take_all_heads_that_share_them() {
        let h100 = Hopper { multiprocessors: 132 };
        for (tokens, kv_heads, group, heads) in
            [(4096, 8, 4, 4), (2048, 8, 4, 2), (1024, 8, 4, 1), (1, 8, 4, 1), (8192, 8, 1, 1), (8192, 3, 3, 1)]
        {
            assert_eq!(h100.heads_of_a_piece(tokens, kv_heads, group), heads, "{tokens} {kv_heads} {group}");
        }
    }
}

//! Causal grouped-query attention over packed documents.

use anyhow::{Result, ensure};

use crate::device::{AttentionBackward, AttentionForward, AttentionOps, AttentionShape, Device, ViewMut};

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

fn check_served<D: Device>(shape: &AttentionShape<'_, D>) -> Result<()> {
    let AttentionShape { head_dim, window, softcap, .. } = *shape;
    ensure!(HEAD_DIMS.contains(&head_dim), "attention: head_dim is {head_dim}; on a GPU it may be 64, 96 or 128");
    ensure!(window.is_none() && softcap.is_none(), "attention: a GPU has no window and no soft cap");
    Ok(())
}

impl<A: HalfType> AttentionOps for Cuda<A> {
    fn attention_forward(&self, args: AttentionForward<'_, Cuda<A>>) -> Result<()> {
        let tokens = args.num_tokens()?;
        check_served(&args.shape)?;
        if let Some(hopper) = self.hopper {
            return self.hopper_attention_forward(hopper, args);
        }
        let AttentionForward { out, lse, q, k, v, shape } = args;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, documents, .. } = shape;
        let (heads, kv_heads, past) =
            (num_heads as i32, num_key_value_heads as i32, documents.num_past_tokens() as i32);
        let args = args![out, lse, q, k, v, documents.positions(), tokens as i32, heads, kv_heads, past, scale];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch(&format!("attention_forward_{head_dim}"), grid(tokens, num_heads, head_dim), args) }
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Cuda<A>>) -> Result<()> {
        let tokens = args.num_tokens()?;
        check_served(&args.shape)?;
        if let Some(hopper) = self.hopper {
            return self.hopper_attention_backward(hopper, args);
        }
        let AttentionBackward { d_q, d_k, d_v, delta, head_d_k, head_d_v, d_out, out, lse, q, k, v, shape } = args;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, documents, .. } = shape;
        let (t, heads, kv_heads) = (tokens as i32, num_heads as i32, num_key_value_heads as i32);
        let rows = tokens * num_heads;
        let delta_args = args![delta.view(), d_out, out, rows as u64, head_dim as u32];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe {
            self.launch(
                "attention_delta",
                Grid { blocks: (rows.div_ceil(8), 1), threads: 256, shared_bytes: 0 },
                delta_args,
            )
        }?;
        let delta = delta.view();
        let args = args![d_q, d_out, lse, delta, q, k, v, documents.positions(), t, heads, kv_heads, scale];
        let grid = grid(tokens, num_heads, head_dim);
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch(&format!("attention_backward_queries_{head_dim}"), grid, args) }?;
        let kernel = format!("attention_backward_keys_{head_dim}");
        let group = num_heads / num_key_value_heads;
        self.sum_over_heads(Parts { d_k, d_v, head_d_k, head_d_v, parts: group, head_dim }, |d_k, d_v| {
            let args = args![d_k, d_v, d_out, lse, delta, q, k, v, documents.positions(), t, heads, kv_heads, scale];
            // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
            unsafe { self.launch(&kernel, grid, args) }
        })
    }
}

impl<A: HalfType> Cuda<A> {
    /// Runs a kernel that writes the gradients of keys and values in so many parts, and adds these.
    pub(super) fn sum_over_heads(
        &self,
        to: Parts<'_, A>,
        kernel: impl Fn(ViewMut<'_, Cuda<A>, A>, ViewMut<'_, Cuda<A>, A>) -> Result<()>,
    ) -> Result<()> {
        let Parts { d_k, d_v, mut head_d_k, mut head_d_v, parts, head_dim } = to;
        if parts == 1 {
            return kernel(d_k, d_v);
        }
        let all = 0..d_k.len() * parts;
        kernel(head_d_k.range_mut(all.clone()), head_d_v.range_mut(all.clone()))?;
        for (sum, parts_of_it) in [(d_k, head_d_k.view()), (d_v, head_d_v.view())] {
            let eights = sum.len() / 8;
            let args = args![sum, parts_of_it, eights as u64, parts as u32, (head_dim / 8) as u32];
            // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
            unsafe { self.launch("attention_sum_heads", Grid::elements(eights), args) }?;
        }
        Ok(())
    }

    pub(super) fn allow_attention_memory(&self) -> Result<()> {
        if self.hopper.is_some() {
            return self.allow_hopper_attention_memory(&HEAD_DIMS);
        }
        let mut all = HEAD_DIMS.into_iter().flat_map(|head_dim| TILED_KERNELS.map(|kernel| (kernel, head_dim)));
        all.try_for_each(|(kernel, head_dim)| {
            self.allow_shared_bytes(&format!("{kernel}_{head_dim}"), shared_bytes(head_dim))
        })
    }
}

/// Destinations of the gradients of keys and values, and room for `parts` parts of each.
pub(super) struct Parts<'a, A: HalfType> {
    pub d_k: ViewMut<'a, Cuda<A>, A>,
    pub d_v: ViewMut<'a, Cuda<A>, A>,
    pub head_d_k: ViewMut<'a, Cuda<A>, A>,
    pub head_d_v: ViewMut<'a, Cuda<A>, A>,
    pub parts: usize,
    pub head_dim: usize,
}

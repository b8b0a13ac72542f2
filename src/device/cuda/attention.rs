//! Causal grouped-query attention over packed documents.

use std::sync::{Arc, PoisonError};

use anyhow::{Context, Result, ensure};

use crate::device::{AttentionBackward, AttentionForward, AttentionOps, AttentionShape, ViewMut};

use super::compile::{AttentionVariant, HEAD_DIMS};
use super::launch::{Arg, Grid, allow_shared_bytes, args, launch_kernel};
use super::{Cuda, HalfType, Loaded, attention_hopper};

/// The kernels that have a block for so many queries (or keys) of a head, and its threads.
const TILED_KERNELS: [&str; 3] = ["attention_forward", "attention_backward_queries", "attention_backward_keys"];
const ROWS: usize = 128;
const THREADS: u32 = 256;

/// Dynamic shared memory of a tiled kernel: two stages of two tiles of 64 rows. Wide heads have smaller tiles, and rows that stay.
fn shared_bytes(head_dim: usize) -> u32 {
    if is_wide(head_dim) { 96 << 10 } else { (2 * 2 * 64 * head_dim * size_of::<u16>()) as u32 }
}

/// Returns true if different blocks make the gradients of keys and of values.
fn is_wide(head_dim: usize) -> bool {
    head_dim > 128
}

fn grid(tokens: usize, heads: usize, head_dim: usize) -> Grid {
    Grid { blocks: (tokens.div_ceil(ROWS), heads), threads: THREADS, shared_bytes: shared_bytes(head_dim) }
}

/// Number of keys before itself that a token sees at most, as the kernels take it.
pub(super) fn max_reach(window: Option<usize>) -> i32 {
    window.map_or(i32::MAX, |window| i32::try_from(window - 1).unwrap_or(i32::MAX))
}

impl AttentionVariant {
    /// The kernels that an attention needs.
    ///
    /// # Errors
    /// There are none for this width.
    fn of(head_dim: usize, softcap: Option<f32>) -> Result<AttentionVariant> {
        ensure!(HEAD_DIMS.contains(&head_dim), "attention: head_dim is {head_dim}; on a GPU it may be {HEAD_DIMS:?}");
        Ok(AttentionVariant { head_dim, capped: softcap.is_some() })
    }
}

impl<A: HalfType> AttentionOps for Cuda<A> {
    fn attention_forward(&self, args: AttentionForward<'_, Cuda<A>>) -> Result<()> {
        let tokens = args.num_tokens()?;
        let variant = AttentionVariant::of(args.shape.head_dim, args.shape.softcap)?;
        if let Some(hopper) = self.hopper.filter(|_| variant.has_hopper_kernels()) {
            return self.hopper_attention_forward(hopper, variant, args);
        }
        let AttentionForward { out, lse, q, k, v, shape } = args;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, documents, .. } = shape;
        let (heads, kv_heads, past) =
            (num_heads as i32, num_key_value_heads as i32, documents.num_past_tokens() as i32);
        let (positions, max_reach, cap) =
            (documents.positions(), max_reach(shape.window), shape.softcap.unwrap_or(0.0));
        let args = args![out, lse, q, k, v, positions, tokens as i32, heads, kv_heads, past, max_reach, scale, cap];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch_attention(variant, "attention_forward", grid(tokens, num_heads, head_dim), args) }
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Cuda<A>>) -> Result<()> {
        let tokens = args.num_tokens()?;
        let variant = AttentionVariant::of(args.shape.head_dim, args.shape.softcap)?;
        if let Some(hopper) = self.hopper.filter(|_| variant.has_hopper_kernels()) {
            return self.hopper_attention_backward(hopper, variant, args);
        }
        let AttentionBackward { d_q, d_k, d_v, delta, head_d_k, head_d_v, d_out, out, lse, q, k, v, shape } = args;
        let AttentionShape { num_heads, num_key_value_heads, head_dim, scale, documents, .. } = shape;
        let (t, heads, kv_heads) = (tokens as i32, num_heads as i32, num_key_value_heads as i32);
        let (positions, max_reach, cap) =
            (documents.positions(), max_reach(shape.window), shape.softcap.unwrap_or(0.0));
        let rows = tokens * num_heads;
        let delta_args = args![delta.view(), d_out, out, rows as u64, head_dim as u32];
        let delta_grid = Grid { blocks: (rows.div_ceil(8), 1), threads: 256, shared_bytes: 0 };
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch_attention(variant, "attention_delta", delta_grid, delta_args) }?;
        let delta = delta.view();
        let args = args![d_q, d_out, lse, delta, q, k, v, positions, t, heads, kv_heads, max_reach, scale, cap];
        let mut grid = grid(tokens, num_heads, head_dim);
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch_attention(variant, "attention_backward_queries", grid, args) }?;
        if is_wide(head_dim) {
            grid.blocks.1 *= 2;
        }
        let group = num_heads / num_key_value_heads;
        self.sum_over_heads(variant, Parts { d_k, d_v, head_d_k, head_d_v, parts: group }, |d_k, d_v| {
            let args =
                args![d_k, d_v, d_out, lse, delta, q, k, v, positions, t, heads, kv_heads, max_reach, scale, cap];
            // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
            unsafe { self.launch_attention(variant, "attention_backward_keys", grid, args) }
        })
    }
}

impl<A: HalfType> Cuda<A> {
    /// Loads the kernels for heads of a width, with capped scores or without, and compiles them where the cache does not have them.
    /// Attention does so when it first needs them, which then takes seconds and memory.
    pub fn load_attention(&self, head_dim: usize, softcap: Option<f32>) -> Result<()> {
        self.attention_kernels(AttentionVariant::of(head_dim, softcap)?).map(drop)
    }

    fn attention_kernels(&self, variant: AttentionVariant) -> Result<Arc<Loaded>> {
        let mut all = self.kernels.attention.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = all.get(&variant) {
            return Ok(kernels.clone());
        }
        let sources = variant.sources(self.kernels.arch);
        let kernels = Arc::new(self.kernels.compiled(&self.context, sources, &variant.options())?);
        for (name, kernel) in kernels.iter() {
            if TILED_KERNELS.contains(name) {
                allow_shared_bytes(kernel, name, shared_bytes(variant.head_dim))?;
            } else if attention_hopper::KERNELS.contains(name) {
                allow_shared_bytes(kernel, name, attention_hopper::SHARED_BYTES)?;
            }
        }
        all.insert(variant, kernels.clone());
        Ok(kernels)
    }

    /// Starts a kernel of a variant on the compute stream; none for a grid without blocks.
    ///
    /// # Safety
    /// As for [`Cuda::launch`].
    pub(super) unsafe fn launch_attention<const N: usize>(
        &self,
        variant: AttentionVariant,
        name: &str,
        grid: Grid,
        args: [Arg; N],
    ) -> Result<()> {
        let kernels = self.attention_kernels(variant)?;
        let kernel = kernels.get(name).with_context(|| format!("no kernel is named {name}"))?;
        // SAFETY: the caller's duty.
        unsafe { launch_kernel(&self.compute, kernel, name, grid, args) }
    }

    /// Runs a kernel that writes the gradients of keys and values in so many parts, and adds these.
    pub(super) fn sum_over_heads(
        &self,
        variant: AttentionVariant,
        to: Parts<'_, A>,
        kernel: impl Fn(ViewMut<'_, Cuda<A>, A>, ViewMut<'_, Cuda<A>, A>) -> Result<()>,
    ) -> Result<()> {
        let Parts { d_k, d_v, mut head_d_k, mut head_d_v, parts } = to;
        if parts == 1 {
            return kernel(d_k, d_v);
        }
        let all = 0..d_k.len() * parts;
        kernel(head_d_k.range_mut(all.clone()), head_d_v.range_mut(all.clone()))?;
        for (sum, parts_of_it) in [(d_k, head_d_k.view()), (d_v, head_d_v.view())] {
            let eights = sum.len() / 8;
            let args = args![sum, parts_of_it, eights as u64, parts as u32, (variant.head_dim / 8) as u32];
            // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
            unsafe { self.launch_attention(variant, "attention_sum_heads", Grid::elements(eights), args) }?;
        }
        Ok(())
    }
}

/// Destinations of the gradients of keys and values, and room for `parts` parts of each.
pub(super) struct Parts<'a, A: HalfType> {
    pub d_k: ViewMut<'a, Cuda<A>, A>,
    pub d_v: ViewMut<'a, Cuda<A>, A>,
    pub head_d_k: ViewMut<'a, Cuda<A>, A>,
    pub head_d_v: ViewMut<'a, Cuda<A>, A>,
    pub parts: usize,
}

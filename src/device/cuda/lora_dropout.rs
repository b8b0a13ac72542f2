//! LoRA dropout: the masks of `cpu/lora_dropout.rs`.

use anyhow::{Result, ensure};

use crate::device::ops::LoraDropout;

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn lora_dropout_act(&self, args: LoraDropout<'_, Cuda<A>>) -> Result<()> {
        let LoraDropout { y, x, mask, accumulate } = args;
        let (len, tokens) = (x.len(), mask.positions.len());
        ensure!(y.len() == len && mask.sample_idx.len() == tokens, "lora_dropout: y {} x {len}", y.len());
        let Some(features) = len.checked_div(tokens) else { return Ok(()) };
        ensure!(features.is_multiple_of(8), "lora_dropout: {features} features, allowed: a multiple of 8");
        ensure!(
            features < 8 << 20 && mask.module < 1 << 12,
            "lora_dropout: {features} features, module {}",
            mask.module
        );
        let (threshold, scale) = mask.threshold_and_scale();
        let args = args![
            y,
            x,
            mask.sample_idx,
            mask.positions,
            (len / 8) as u64,
            (features / 8) as u32,
            mask.module,
            mask.step,
            mask.seed,
            threshold,
            scale,
            u32::from(accumulate)
        ];
        // SAFETY: the lengths were checked above, and the kernel declares these arguments in this order.
        unsafe { self.launch("lora_dropout", Grid::elements(len / 8), args) }
    }
}

//! A decoder layer, forward and backward: its stages, one after the other.

use anyhow::Result;

use crate::device::{Buffer, Ops, View};

use super::spec::LayerSpec;
use super::stage::attention::{self, AttentionSaves};
use super::stage::mlp::{self, MlpSaves};
use super::stage::{Saved, Scratch, StageContext};

/// The values that a layer's backward needs besides its input.
pub struct LayerSaves<'a, D: Ops> {
    pub attention: AttentionSaves<'a, D>,
    pub mlp: MlpSaves<'a, D>,
}

/// out = layer(x); x, out `[T, hidden]`. Groups that are `saved` are left as they are. `out: None` makes it a
/// recompute, which stops before the last module, because backward does not need its output.
pub fn forward<D: Ops>(
    ctx: &StageContext<'_, D>,
    layer: &LayerSpec,
    out: Option<&mut Buffer<D, D::Act>>,
    mut saves: LayerSaves<'_, D>,
    saved: Saved,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    let branch = &mut saves.mlp.products.input;
    attention::forward(ctx, &layer.attention, branch, &mut saves.attention, saved, x, scratch)?;
    mlp::forward(ctx, &layer.mlp, out, &mut saves.mlp, saved, x, scratch)
}

/// `d` `[T, hidden]` is the gradient of the layer's output and becomes the gradient of its input x. Gradients of
/// trainable values are added to `grads`. `saves` are those of [`forward`], and are used up.
pub fn backward<D: Ops>(
    ctx: &StageContext<'_, D>,
    layer: &LayerSpec,
    d: &mut Buffer<D, D::Act>,
    grads: &mut Buffer<D, f32>,
    saves: LayerSaves<'_, D>,
    x: View<'_, D, D::Act>,
    scratch: &mut Scratch<D>,
) -> Result<()> {
    mlp::backward(ctx, &layer.mlp, d, grads, saves.mlp, scratch)?;
    attention::backward(ctx, &layer.attention, d, grads, &saves.attention, x, scratch)
}

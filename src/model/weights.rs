//! Dense weights of the unit that is being computed with.

use anyhow::Result;

use crate::device::{Arena, Buffer, Device, View};

use super::config::ModelConfig;
use super::lora::LoraLayout;
use super::names::Projection;

/// A linear map y = W·x + bias.
pub struct LinearWeights<D: Device> {
    /// `[out_features, in_features]`
    pub weight: Buffer<D, D::Act>,
    /// `[out_features]`
    pub bias: Option<Buffer<D, f32>>,
    pub out_features: usize,
    pub in_features: usize,
}

/// A decoder layer, and its LoRA matrices.
pub struct LayerWeights<D: Device> {
    /// `[hidden_size]`
    pub input_norm: Buffer<D, f32>,
    pub post_attention_norm: Buffer<D, f32>,
    /// In the order of [`Projection::ALL`].
    pub linears: Vec<LinearWeights<D>>,
    /// Laid out by [`LoraLayout`].
    pub lora: Buffer<D, D::Act>,
}

impl<D: Device> LayerWeights<D> {
    pub fn carve(arena: &mut Arena<D>, config: &ModelConfig, lora: Option<&LoraLayout>) -> Result<Self> {
        let input_norm = arena.carve("weights/input_norm", config.hidden_size)?;
        let post_attention_norm = arena.carve("weights/post_attention_norm", config.hidden_size)?;
        let mut linears = Vec::new();
        for projection in Projection::ALL {
            let [out_features, in_features] = projection.shape(config);
            let weight = arena.carve(&format!("weights/{projection}"), out_features * in_features)?;
            let bias = match projection.has_bias(config) {
                true => Some(arena.carve(&format!("weights/{projection}.bias"), out_features)?),
                false => None,
            };
            linears.push(LinearWeights { weight, bias, out_features, in_features });
        }
        let lora = arena.carve("weights/lora", lora.map_or(0, |l| l.len))?;
        Ok(Self { input_norm, post_attention_norm, linears, lora })
    }

    /// Returns a linear map with its LoRA matrices; `layout` is `None` when the adapter is off.
    pub fn linear<'a>(&'a self, projection: Projection, layout: Option<&LoraLayout>) -> Linear<'a, D> {
        let linear = &self.linears[projection as usize];
        let lora = layout.and_then(|l| l.get(projection)).map(|entry| LoraMatrices {
            a: self.lora.view().range(entry.a.clone()),
            b: self.lora.view().range(entry.b.clone()),
        });
        Linear { base: linear, projection, lora }
    }
}

/// A linear map as the math sees it.
pub struct Linear<'a, D: Device> {
    pub base: &'a LinearWeights<D>,
    pub projection: Projection,
    pub lora: Option<LoraMatrices<'a, D>>,
}

/// A `[r, in_features]`, B `[out_features, r]`.
pub struct LoraMatrices<'a, D: Device> {
    pub a: View<'a, D, D::Act>,
    pub b: View<'a, D, D::Act>,
}

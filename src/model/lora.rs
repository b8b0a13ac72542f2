//! LoRA as PEFT defines it: y = W·x + scale · B · A · dropout(x).

use std::ops::Range;

use super::config::ModelConfig;
use super::names::Projection;

/// The numbers of an adapter that the math needs.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// PEFT's r.
    pub lora_rank: usize,
    /// alpha / r, or alpha / √r with rsLoRA.
    pub scale: f32,
    pub dropout: f32,
    /// In the order of [`Projection::ALL`].
    pub targets: Vec<Projection>,
}

/// Where a layer's LoRA matrices lie in the layer's trainable values: A `[r, in]`, then B `[out, r]`, by target.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLayout {
    entries: Vec<LoraEntry>,
    pub len: usize,
}

/// One target of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraEntry {
    pub projection: Projection,
    pub a: Range<usize>,
    pub b: Range<usize>,
    /// Shapes of A and B.
    pub a_shape: [usize; 2],
    pub b_shape: [usize; 2],
}

impl LoraLayout {
    /// Lays out one layer; all layers are alike.
    pub fn new(config: &ModelConfig, lora: &LoraConfig) -> LoraLayout {
        let (mut entries, mut len) = (Vec::new(), 0);
        for projection in Projection::ALL.into_iter().filter(|p| lora.targets.contains(p)) {
            let [out_features, in_features] = projection.shape(config);
            let r = lora.lora_rank;
            let (a_shape, b_shape) = ([r, in_features], [out_features, r]);
            let a = len..len + r * in_features;
            let b = a.end..a.end + out_features * r;
            len = b.end;
            entries.push(LoraEntry { projection, a, b, a_shape, b_shape });
        }
        LoraLayout { entries, len }
    }

    pub fn entries(&self) -> &[LoraEntry] {
        &self.entries
    }

    /// The entry of a projection, if it is a target.
    pub fn get(&self, projection: Projection) -> Option<&LoraEntry> {
        self.entries.iter().find(|e| e.projection == projection)
    }
}

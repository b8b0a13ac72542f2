//! Dense weights of the unit that is being computed with, found by id.

use anyhow::{Context, Result};

use crate::device::{Arena, Buffer, Device, View};

use super::spec::{ModelSpec, ModuleId, NormId, TensorId};
use super::trainable::{Kind, LayerTrainables, Trainables};

/// Dense tensors of a layer, and its trainable values. The buffers are as large as the largest layer's.
pub struct LayerWeights<D: Device> {
    /// Weights of linear modules, `[out_features, in_features]`.
    linears: Vec<(ModuleId, Buffer<D, D::Act>)>,
    /// Norms and biases.
    vectors: Vec<(TensorId, Buffer<D, f32>)>,
    /// Laid out by [`LayerTrainables`].
    pub trainable: Buffer<D, D::Act>,
}

impl<D: Device> LayerWeights<D> {
    pub fn carve(arena: &mut Arena<D>, spec: &ModelSpec, trainables: Option<&Trainables>) -> Result<Self> {
        let (mut linears, mut vectors) = (Vec::new(), Vec::new());
        for (id, len) in spec.largest_tensors() {
            let name = format!("weights/{}", name(id));
            match id {
                TensorId::Weight(module) => linears.push((module, arena.carve(&name, len)?)),
                other => vectors.push((other, arena.carve(&name, len)?)),
            }
        }
        let trainable = arena.carve("weights/lora", trainables.map_or(0, Trainables::longest))?;
        Ok(Self { linears, vectors, trainable })
    }

    /// A norm or a bias, of `len` elements.
    pub fn vector(&self, id: TensorId, len: usize) -> Result<View<'_, D, f32>> {
        let found = self.vectors.iter().find(|(of, _)| *of == id);
        found.map(|(_, buffer)| buffer.first(len)).with_context(|| format!("the layer has no {}", name(id)))
    }

    /// The buffers of all norms and biases.
    pub fn vectors_mut(&mut self) -> impl Iterator<Item = (TensorId, &mut Buffer<D, f32>)> {
        self.vectors.iter_mut().map(|(id, buffer)| (*id, buffer))
    }

    /// The weight of a module, of `len` elements.
    pub fn linear(&self, id: ModuleId, len: usize) -> Result<View<'_, D, D::Act>> {
        let found = self.linears.iter().find(|(of, _)| *of == id);
        found.map(|(_, buffer)| buffer.first(len)).with_context(|| format!("the layer has no {id}"))
    }

    /// The buffers of all modules' weights.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (ModuleId, &mut Buffer<D, D::Act>)> {
        self.linears.iter_mut().map(|(module, buffer)| (*module, buffer))
    }

    /// A and B of a module, if it is a target.
    pub fn lora(&self, id: ModuleId, layout: &LayerTrainables) -> Option<LoraMatrices<'_, D>> {
        let matrix = |kind| layout.get(id, kind).map(|trainable| self.trainable.view().range(trainable.range.clone()));
        Some(LoraMatrices { a: matrix(Kind::A)?, b: matrix(Kind::B)? })
    }
}

/// A `[r, in_features]`, B `[out_features, r]`.
pub struct LoraMatrices<'a, D: Device> {
    pub a: View<'a, D, D::Act>,
    pub b: View<'a, D, D::Act>,
}

fn name(id: TensorId) -> String {
    match id {
        TensorId::Norm(norm) => match norm {
            NormId::Attention => "input_norm",
            NormId::AttentionOutput => "attention_output_norm",
            NormId::Q => "q_norm",
            NormId::K => "k_norm",
            NormId::Mlp => "post_attention_norm",
            NormId::MlpOutput => "mlp_output_norm",
            NormId::Final => "final_norm",
        }
        .into(),
        TensorId::Weight(module) => module.to_string(),
        TensorId::Bias(module) => format!("{module}.bias"),
        TensorId::Rows => "rows".into(),
    }
}

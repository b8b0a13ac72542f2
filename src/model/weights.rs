//! Dense weights of the layer that is being computed with, found by id.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::device::{Arena, Buffer, Device, View};

use super::spec::{ModuleId, NormId, TensorId};
use super::trainable::{Kind, LayerTrainables, Trainables};

/// Buffers for dense tensors of a layer, and for its trainable values, that all layers share.
pub struct WeightBuffers<D: Device> {
    /// Weights of linear modules, `[out_features, in_features]`.
    linears: Vec<(ModuleId, Buffer<D, D::Act>)>,
    /// Norms and biases.
    vectors: Vec<(TensorId, Buffer<D, f32>)>,
    /// Laid out by [`LayerTrainables`].
    pub trainable: Buffer<D, D::Act>,
}

impl<D: Device> WeightBuffers<D> {
    /// Takes a buffer for each tensor, of as many elements as the map says.
    pub fn carve(
        arena: &mut Arena<D>,
        tensors: &BTreeMap<TensorId, usize>,
        trainables: Option<&Trainables>,
    ) -> Result<Self> {
        let (mut linears, mut vectors) = (Vec::new(), Vec::new());
        for (&id, &len) in tensors {
            let name = format!("weights/{}", name(id));
            match id {
                TensorId::Weight(module) => linears.push((module, arena.carve(&name, len)?)),
                other => vectors.push((other, arena.carve(&name, len)?)),
            }
        }
        let trainable = arena.carve("weights/lora", trainables.map_or(0, Trainables::longest))?;
        Ok(Self { linears, vectors, trainable })
    }

    /// The buffers of all norms and biases.
    pub fn vectors_mut(&mut self) -> impl Iterator<Item = (TensorId, &mut Buffer<D, f32>)> {
        self.vectors.iter_mut().map(|(id, buffer)| (*id, buffer))
    }

    /// The buffers of all modules' weights.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (ModuleId, &mut Buffer<D, D::Act>)> {
        self.linears.iter_mut().map(|(module, buffer)| (*module, buffer))
    }
}

/// Dense tensors of a layer, and its trainable values.
pub struct LayerWeights<'a, D: Device> {
    pub buffers: &'a WeightBuffers<D>,
    /// Weights of linear modules that are not in the buffers: those in the gathered unit, and those that the layer keeps.
    pub elsewhere: Vec<(ModuleId, View<'a, D, D::Act>)>,
}

impl<'a, D: Device> LayerWeights<'a, D> {
    /// A norm or a bias, of `len` elements.
    pub fn vector(&self, id: TensorId, len: usize) -> Result<View<'a, D, f32>> {
        let found = self.buffers.vectors.iter().find(|(of, _)| *of == id);
        found.map(|(_, buffer)| buffer.first(len)).with_context(|| format!("the layer has no {}", name(id)))
    }

    /// The weight of a module, of `len` elements.
    pub fn linear(&self, id: ModuleId, len: usize) -> Result<View<'a, D, D::Act>> {
        let elsewhere = self.elsewhere.iter().find(|(of, _)| *of == id).map(|(_, weight)| weight.range(0..len));
        let in_buffer = || self.buffers.linears.iter().find(|(of, _)| *of == id).map(|(_, buffer)| buffer.first(len));
        elsewhere.or_else(in_buffer).with_context(|| format!("the layer has no {id}"))
    }

    /// A and B of a module, if it is a target.
    pub fn lora(&self, id: ModuleId, layout: &LayerTrainables) -> Option<LoraMatrices<'a, D>> {
        let trainable = self.buffers.trainable.view();
        let matrix = |kind| layout.get(id, kind).map(|found| trainable.range(found.range.clone()));
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

//! The values that have a gradient: each layer has a list of matrices. Today they are LoRA's, as PEFT defines it: y =
//! W·x + scale · B · A · dropout(x).

use std::collections::BTreeSet;
use std::ops::Range;

use super::spec::{LayerSpec, ModelSpec, ModuleId};

/// A module with LoRA.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraModule {
    pub id: ModuleId,
    /// PEFT's r.
    pub lora_rank: usize,
    /// alpha / r, or alpha / √r with rsLoRA.
    pub scale: f32,
}

/// The numbers of an adapter that the math needs.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    pub dropout: f32,
    /// The modules of each layer that have LoRA, in the order of use.
    pub layers: Vec<Vec<LoraModule>>,
}

impl LoraConfig {
    /// All modules with LoRA.
    pub fn modules(&self) -> impl Iterator<Item = &LoraModule> {
        self.layers.iter().flatten()
    }

    /// The smallest and the largest of a number of the modules.
    pub fn extremes<T: PartialOrd + Copy + Default>(&self, number: impl Fn(&LoraModule) -> T) -> [T; 2] {
        let numbers = || self.modules().map(&number);
        let smallest = numbers().reduce(|a, b| if b < a { b } else { a });
        let largest = numbers().reduce(|a, b| if b > a { b } else { a });
        [smallest, largest].map(Option::unwrap_or_default)
    }

    /// The ids of modules that have LoRA in some layer, in the order of use.
    pub fn targets(&self) -> Vec<ModuleId> {
        self.modules().map(|module| module.id).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// The role of a matrix in LoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `[r, in_features]`
    A,
    /// `[out_features, r]`
    B,
}

impl Kind {
    /// The letter in the names of tensors.
    pub fn letter(self) -> &'static str {
        match self {
            Kind::A => "A",
            Kind::B => "B",
        }
    }
}

/// One trainable matrix of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Trainable {
    pub module: ModuleId,
    pub kind: Kind,
    pub shape: [usize; 2],
    /// Its values among the layer's.
    pub range: Range<usize>,
}

/// The trainable matrices of one layer, back to back: for each target A, then B.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerTrainables {
    modules: Vec<LoraModule>,
    list: Vec<Trainable>,
    len: usize,
}

impl LayerTrainables {
    /// The matrices of those modules of a layer that have LoRA.
    pub fn new(layer: &LayerSpec, modules: &[LoraModule]) -> LayerTrainables {
        let mut trainables = LayerTrainables { modules: modules.to_vec(), ..LayerTrainables::default() };
        for LoraModule { id, lora_rank, .. } in modules {
            let Some(module) = layer.module(*id) else { continue };
            trainables.push(*id, Kind::A, [*lora_rank, module.in_features]);
            trainables.push(*id, Kind::B, [module.out_features, *lora_rank]);
        }
        trainables
    }

    fn push(&mut self, module: ModuleId, kind: Kind, shape: [usize; 2]) {
        let range = self.len..self.len + shape[0] * shape[1];
        self.len = range.end;
        self.list.push(Trainable { module, kind, shape, range });
    }

    /// All matrices, in the order in which they lie.
    pub fn list(&self) -> &[Trainable] {
        &self.list
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The rank and scale of a module, if it has LoRA.
    pub fn module(&self, id: ModuleId) -> Option<&LoraModule> {
        self.modules.iter().find(|module| module.id == id)
    }

    /// The matrix of a module, if it has LoRA.
    pub fn get(&self, module: ModuleId, kind: Kind) -> Option<&Trainable> {
        self.list.iter().find(|trainable| trainable.module == module && trainable.kind == kind)
    }
}

/// The trainable values of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Trainables {
    pub lora: LoraConfig,
    /// Matrices of each layer; layers may have different ones.
    pub layers: Vec<LayerTrainables>,
}

impl Trainables {
    pub fn new(spec: &ModelSpec, lora: LoraConfig) -> Trainables {
        let layers = spec.layers.iter().zip(&lora.layers);
        Trainables { layers: layers.map(|(layer, modules)| LayerTrainables::new(layer, modules)).collect(), lora }
    }

    /// The adapter's numbers and a layer's matrices.
    pub fn of(&self, layer: usize) -> (&LoraConfig, &LayerTrainables) {
        (&self.lora, &self.layers[layer])
    }

    /// Values of the layer that has most.
    pub fn longest(&self) -> usize {
        self.layers.iter().map(LayerTrainables::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    #[test]
    fn layers_may_have_different_matrices() {
        let mut spec = shapes::named("llama-3.1-8b", Some(2)).unwrap();
        spec.layers[1].mlp.modules.retain(|module| module.id != ModuleId::Up);
        let module = |id, lora_rank| LoraModule { id, lora_rank, scale: 1.0 };
        let layers = vec![vec![module(ModuleId::Q, 8), module(ModuleId::Up, 3)], vec![module(ModuleId::Q, 5)]];
        let trainables = Trainables::new(&spec, LoraConfig { dropout: 0.0, layers });
        let kinds = |layer: usize| -> Vec<_> {
            trainables.layers[layer].list().iter().map(|t| (t.module, t.kind, t.shape)).collect()
        };
        let q = |r| [(ModuleId::Q, Kind::A, [r, 4096]), (ModuleId::Q, Kind::B, [4096, r])];
        let up = [(ModuleId::Up, Kind::A, [3, 4096]), (ModuleId::Up, Kind::B, [14_336, 3])];
        assert_eq!((kinds(0), kinds(1)), ([q(8), up].concat(), q(5).to_vec()));
        assert_eq!(trainables.longest(), trainables.layers[0].len());
        assert_eq!(trainables.layers[1].len(), 5 * 2 * 4096);
        assert_eq!(trainables.lora.extremes(|module| module.lora_rank), [3, 8]);
        assert_eq!(trainables.lora.targets(), [ModuleId::Q, ModuleId::Up]);
    }
}

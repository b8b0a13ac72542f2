//! The values that have a gradient: each layer has a list of matrices. Today they are LoRA's, as PEFT defines it: y =
//! W·x + scale · B · A · dropout(x).

use std::ops::Range;

use anyhow::ensure;
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::spec::{LayerSpec, ModelSpec, ModuleId};

/// The modules that a recipe puts LoRA on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every linear module of the layers.
    AllLinear,
    /// Some modules, each once, in the order of use.
    Named(Vec<ModuleId>),
}

impl Targets {
    /// Reads `"all-linear"`, a name, or a list of names.
    pub fn read(value: &Value) -> Option<Targets> {
        if value.as_str() == Some("all-linear") {
            return Some(Targets::AllLinear);
        }
        let one = |value: &Value| ModuleId::from_name(value.as_str()?);
        let mut modules: Vec<_> = match value {
            Value::Array(list) => list.iter().map(one).collect::<Option<_>>()?,
            value => vec![one(value)?],
        };
        modules.sort_unstable();
        modules.dedup();
        (!modules.is_empty()).then_some(Targets::Named(modules))
    }

    /// The modules of this model.
    ///
    /// # Errors
    /// A named module is in no layer of the model.
    pub fn of(&self, spec: &ModelSpec) -> anyhow::Result<Vec<ModuleId>> {
        let mut all: Vec<ModuleId> = spec.modules().map(|module| module.id).collect();
        all.sort_unstable();
        all.dedup();
        let Targets::Named(named) = self else { return Ok(all) };
        for id in named {
            let names = || all.iter().map(|id| id.name()).collect::<Vec<_>>().join(", ");
            ensure!(all.contains(id), "lora.target_modules: this model has no {id}; allowed: all-linear, {}", names());
        }
        Ok(named.clone())
    }
}

/// `all-linear`, or a list of names.
impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Targets::AllLinear => serializer.serialize_str("all-linear"),
            Targets::Named(modules) => modules.serialize(serializer),
        }
    }
}

/// The numbers of an adapter that the math needs.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// PEFT's r.
    pub lora_rank: usize,
    /// alpha / r, or alpha / √r with rsLoRA.
    pub scale: f32,
    pub dropout: f32,
    /// Modules with LoRA, in the order of use.
    pub targets: Vec<ModuleId>,
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
    list: Vec<Trainable>,
    len: usize,
}

impl LayerTrainables {
    pub fn new(layer: &LayerSpec, lora: &LoraConfig) -> LayerTrainables {
        let mut trainables = LayerTrainables::default();
        for module in layer.modules().filter(|module| lora.targets.contains(&module.id)) {
            trainables.push(module.id, Kind::A, [lora.lora_rank, module.in_features]);
            trainables.push(module.id, Kind::B, [module.out_features, lora.lora_rank]);
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

    /// The matrix of a module, if it is a target.
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
        Trainables { layers: spec.layers.iter().map(|layer| LayerTrainables::new(layer, &lora)).collect(), lora }
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
    use serde_json::json;

    #[test]
    fn targets_are_a_name_a_list_or_all() {
        use ModuleId::{Down, Q};
        assert_eq!(Targets::read(&json!("all-linear")), Some(Targets::AllLinear));
        assert_eq!(Targets::read(&json!("q_proj")), Some(Targets::Named(vec![Q])));
        assert_eq!(Targets::read(&json!(["down_proj", "q_proj", "q_proj"])), Some(Targets::Named(vec![Q, Down])));
        assert_eq!(
            [json!([]), json!(["lm_head"]), json!("x"), json!(1)].map(|v| Targets::read(&v)),
            [const { None }; 4]
        );
    }

    #[test]
    fn targets_are_modules_of_the_model() {
        let spec = shapes::named("llama-3.1-8b", Some(2)).unwrap();
        assert_eq!(Targets::AllLinear.of(&spec).unwrap().len(), 7);
        let error = Targets::Named(vec![ModuleId::Q, ModuleId::Qkv]).of(&spec).unwrap_err().to_string();
        assert!(error.contains("this model has no qkv_proj; allowed: all-linear, q_proj, k_proj"), "{error}");
    }

    #[test]
    fn layers_may_have_different_matrices() {
        let mut spec = shapes::named("llama-3.1-8b", Some(2)).unwrap();
        spec.layers[1].mlp.modules.retain(|module| module.id != ModuleId::Up);
        let targets = vec![ModuleId::Q, ModuleId::Up];
        let lora = LoraConfig { lora_rank: 8, scale: 1.0, dropout: 0.0, targets };
        let trainables = Trainables::new(&spec, lora);
        let kinds = |layer: usize| -> Vec<_> {
            trainables.layers[layer].list().iter().map(|t| (t.module, t.kind, t.shape)).collect()
        };
        let q = [(ModuleId::Q, Kind::A, [8, 4096]), (ModuleId::Q, Kind::B, [4096, 8])];
        let up = [(ModuleId::Up, Kind::A, [8, 4096]), (ModuleId::Up, Kind::B, [14_336, 8])];
        assert_eq!((kinds(0), kinds(1)), ([q, up].concat(), q.to_vec()));
        assert_eq!(trainables.longest(), trainables.layers[0].len());
        assert_eq!(trainables.layers[1].len(), 8 * 2 * 4096);
    }
}

//! The model as a value: the tensors of each layer, what its stages compute with them, and what stands before and after
//! the layers. Loading, sharding, memory, the planner and the names in an adapter are derived from it.
//! [`super::family`] makes it from a config.json.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use serde::{Serialize, Serializer};

use crate::files;

use super::family::{self, BnbConfig};
use super::rope::RopeConfig;
use super::stage::{Attention, Mlp};

/// Path of the text tower in a model that also sees, as transformers 5 has it in memory.
pub const TEXT_TOWER: &str = "model.language_model";

/// Beginnings of the names of tensors beside the text tower.
const BESIDE_TEXT: [&str; 2] = ["model.vision_tower.", "model.multi_modal_projector."];

/// A model: sizes under the names of Hugging Face, tensors, and what is computed with them.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of config.json.
    pub family: &'static str,
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    /// Activations outgrow fp16 (65,504).
    pub overflows_fp16: bool,
    /// ε of every norm.
    pub norm_eps: f32,
    pub embedding: Embedding,
    /// The rotations that attention stages choose from, by [`Attention::rope`].
    pub ropes: Vec<RopeConfig>,
    pub layers: Vec<LayerSpec>,
    pub head: Head,
    /// Tokens that end a text; generation_config.json may say otherwise.
    pub eos_token_ids: Vec<u32>,
    /// `Some` for a checkpoint that bitsandbytes has quantized to NF4 already.
    pub quantization: Option<BnbConfig>,
    /// True for the text tower of a model that also sees: the names of its tensors are those of the whole model.
    pub is_text_tower: bool,
    /// Differences from training with transformers that the user should know of.
    pub remarks: Vec<String>,
}

/// The table of token embeddings, `[vocab_size, hidden_size]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Name in the checkpoint.
    pub name: String,
    /// Factor of each row.
    pub scale: f32,
    /// The factor is rounded to the activation type before rows are multiplied by it.
    pub rounds_scale: bool,
}

/// The final norm and the rows that give the logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    pub norm: Norm,
    /// Name in the checkpoint of the rows, `[vocab_size, hidden_size]`: the embedding's where the head is tied.
    pub name: String,
    /// Name of a tensor that a checkpoint with a tied head may hold besides, if it equals the embedding.
    pub untied_name: String,
    pub is_tied: bool,
    /// Factor of the logits.
    pub scale: f32,
    /// Bound of the logits after that: c·tanh(logit / c).
    pub softcap: Option<f32>,
}

/// A decoder layer: attention, then an MLP, each a residual branch. Layers may differ from each other.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    pub attention: Attention,
    pub mlp: Mlp,
}

/// Identifies a linear module in its layer. The order is that in which a layer uses them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ModuleId {
    Q,
    K,
    V,
    /// Queries, keys and values in one module.
    Qkv,
    O,
    Gate,
    Up,
    /// Gate and up in one module.
    GateUp,
    Down,
}

impl ModuleId {
    /// Every module that some family has, by Hugging Face's name.
    const NAMES: [(Self, &'static str); 9] = [
        (Self::Q, "q_proj"),
        (Self::K, "k_proj"),
        (Self::V, "v_proj"),
        (Self::Qkv, "qkv_proj"),
        (Self::O, "o_proj"),
        (Self::Gate, "gate_proj"),
        (Self::Up, "up_proj"),
        (Self::GateUp, "gate_up_proj"),
        (Self::Down, "down_proj"),
    ];

    /// Hugging Face's name, e.g. `q_proj`.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(id, _)| *id == self).map_or("", |(_, name)| name)
    }

    /// Returns the module with this Hugging Face name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, n)| *n == name).map(|(id, _)| *id)
    }
}

/// Hugging Face's name.
impl fmt::Display for ModuleId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Hugging Face's name.
impl Serialize for ModuleId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A linear module as Hugging Face has it: it is quantized as a whole, and LoRA can be put on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    pub id: ModuleId,
    /// Path in the checkpoint, e.g. `model.layers.3.mlp.up_proj`.
    pub name: String,
    /// Number among all modules of the model, which dropout masks and the first values of LoRA depend on.
    pub number: u32,
    pub out_features: usize,
    pub in_features: usize,
    pub has_bias: bool,
    /// Factor of the output, bias and LoRA included.
    pub output_scale: f32,
}

/// Rows of a module that give one quantity: all of `q_proj`, or the first rows of `qkv_proj`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    pub module: ModuleId,
    pub rows: Range<usize>,
}

impl Rows {
    /// All rows of a module.
    pub fn all(module: &Module) -> Rows {
        Rows { module: module.id, rows: 0..module.out_features }
    }
}

/// Identifies a norm in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormId {
    /// Before attention.
    Attention,
    /// Norm of attention's output, before it is added to the residual stream.
    AttentionOutput,
    /// Norms of queries and of keys.
    Q,
    K,
    /// Before the MLP.
    Mlp,
    /// Norm of the MLP's output, before it is added to the residual stream.
    MlpOutput,
    /// After the last layer.
    Final,
}

/// An RMSNorm: y = x̂ · (weight + offset).
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    pub id: NormId,
    /// Name of the weight in the checkpoint.
    pub name: String,
    /// Length of the weight: each run of so many elements is normed by itself.
    pub width: usize,
    /// 1 in families that store weight − 1.
    pub offset: f32,
}

/// Identifies a tensor in its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorId {
    Norm(NormId),
    Weight(ModuleId),
    Bias(ModuleId),
    /// Rows of the vocabulary: the embedding, or a piece of the head.
    Rows,
}

/// A tensor of the base checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub id: TensorId,
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// True for the weight of a linear module, which may be stored in 4 bit.
    pub fn is_linear(&self) -> bool {
        matches!(self.id, TensorId::Weight(_))
    }

    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn of_norm(norm: &Norm) -> TensorSpec {
        TensorSpec { id: TensorId::Norm(norm.id), name: norm.name.clone(), shape: vec![norm.width] }
    }
}

impl LayerSpec {
    /// Linear modules, in the order of use.
    pub fn modules(&self) -> impl Iterator<Item = &Module> {
        self.attention.modules.iter().chain(&self.mlp.modules)
    }

    /// The module with this id, if the layer has it.
    pub fn module(&self, id: ModuleId) -> Option<&Module> {
        self.modules().find(|module| module.id == id)
    }

    /// The modules of the branch that has this one: a gradient of one passes through the others.
    pub fn branch(&self, id: ModuleId) -> &[Module] {
        let attention = &self.attention.modules;
        if attention.iter().any(|module| module.id == id) { attention } else { &self.mlp.modules }
    }

    /// Norms, in the order of use.
    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        self.attention.norms().chain(self.mlp.norms())
    }

    /// The number that is added to the stored weight of a norm.
    pub fn norm_offset(&self, id: NormId) -> f32 {
        self.norms().find(|norm| norm.id == id).map_or(0.0, |norm| norm.offset)
    }

    /// All tensors: norms, weights of modules, biases of modules. Shard files have them in this order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let weight = |module: &Module| TensorSpec {
            id: TensorId::Weight(module.id),
            name: format!("{}.weight", module.name),
            shape: vec![module.out_features, module.in_features],
        };
        let bias = |module: &Module| TensorSpec {
            id: TensorId::Bias(module.id),
            name: format!("{}.bias", module.name),
            shape: vec![module.out_features],
        };
        let norms = self.norms().map(TensorSpec::of_norm);
        let biases = self.modules().filter(|module| module.has_bias).map(bias);
        norms.chain(self.modules().map(weight)).chain(biases).collect()
    }
}

impl ModelSpec {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// The file cannot be read, or has keys that cannot be honoured: each is named, with its value and what is allowed.
    pub fn load(dir: &Path) -> Result<Self> {
        family::load(dir)
    }

    /// Reads the text of a config.json that came from `source`, see [`Self::load`].
    pub fn parse(text: &[u8], source: &str) -> Result<Self> {
        family::from_map(files::parse_json(Path::new(source), text)?, source)
    }

    /// Makes the model the text tower of one that also sees.
    pub(super) fn into_text_tower(mut self) -> Self {
        let rename = |name: &mut String| {
            if let Some(rest) = name.strip_prefix("model.") {
                *name = format!("{TEXT_TOWER}.{rest}");
            }
        };
        [&mut self.embedding.name, &mut self.head.name, &mut self.head.norm.name].into_iter().for_each(rename);
        for LayerSpec { attention, mlp } in &mut self.layers {
            attention.modules.iter_mut().chain(&mut mlp.modules).for_each(|module| rename(&mut module.name));
            let of_attention =
                [&mut attention.norm, &mut attention.q_norm, &mut attention.k_norm, &mut attention.output_norm];
            let norms = of_attention.into_iter().chain([&mut mlp.norm, &mut mlp.output_norm]).flatten();
            norms.for_each(|norm| rename(&mut norm.name));
        }
        self.is_text_tower = true;
        self
    }

    /// True for a tensor of the whole model that its text tower leaves alone.
    pub fn is_beside_text(&self, tensor: &str) -> bool {
        self.is_text_tower && BESIDE_TEXT.iter().any(|tower| tensor.starts_with(tower))
    }

    /// Modules that PEFT puts LoRA on where `target_modules` is absent. The list is empty where PEFT has no default for
    /// the family.
    pub fn default_targets(&self) -> &'static [ModuleId] {
        family::default_targets(self.family)
    }

    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// The table of embeddings and the head's rows, of which a tied head has the first alone.
    pub fn embedding_tensor(&self) -> TensorSpec {
        self.rows_tensor(&self.embedding.name)
    }

    /// The tensor that holds the head's rows.
    pub fn head_tensor(&self) -> TensorSpec {
        self.rows_tensor(&self.head.name)
    }

    fn rows_tensor(&self, name: &str) -> TensorSpec {
        TensorSpec { id: TensorId::Rows, name: name.into(), shape: vec![self.vocab_size, self.hidden_size] }
    }

    /// Every tensor of the checkpoint. A tied head is not a tensor of its own.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = vec![self.embedding_tensor()];
        tensors.extend(self.layers.iter().flat_map(LayerSpec::tensors));
        tensors.push(TensorSpec::of_norm(&self.head.norm));
        tensors.extend((!self.head.is_tied).then(|| self.head_tensor()));
        tensors
    }

    /// Linear modules of all layers.
    pub fn modules(&self) -> impl Iterator<Item = &Module> {
        self.layers.iter().flat_map(LayerSpec::modules)
    }

    /// Widest of a size over all layers.
    pub fn widest(&self, size: impl Fn(&LayerSpec) -> usize) -> usize {
        self.layers.iter().map(size).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_by_name() {
        for (id, name) in ModuleId::NAMES {
            assert_eq!((id.name(), ModuleId::from_name(name)), (name, Some(id)));
        }
        assert_eq!(ModuleId::from_name("lm_head"), None);
    }

    #[test]
    fn tensors_of_a_layer_are_norms_weights_biases() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-bias");
        let spec = ModelSpec::load(&tiny).unwrap();
        let tensors = spec.layers[0].tensors();
        let kind = |tensor: &TensorSpec| match tensor.id {
            TensorId::Norm(_) => 0,
            TensorId::Weight(_) => 1,
            TensorId::Bias(_) => 2,
            TensorId::Rows => 3,
        };
        assert!(tensors.is_sorted_by_key(kind));
        assert_eq!(tensors[0].name, "model.layers.0.input_layernorm.weight");
        assert_eq!(tensors[2].name, "model.layers.0.self_attn.q_proj.weight");
        assert!(tensors.iter().any(|tensor| tensor.name == "model.layers.0.self_attn.o_proj.bias"));
    }
}

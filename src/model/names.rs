//! The tensors of a Llama model: their names in Hugging Face checkpoints and their shapes.

use std::fmt;

use serde::{Serialize, Serializer};

use super::config::ModelConfig;

pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
pub const NORM: &str = "model.norm.weight";
pub const LM_HEAD: &str = "lm_head.weight";

/// The linear maps of a layer. They are quantized, and LoRA can be put on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// All seven, in the order in which a layer uses them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Hugging Face's name, e.g. `q_proj`.
    pub fn name(self) -> &'static str {
        &self.path()[self.path().find('.').map_or(0, |dot| dot + 1)..]
    }

    /// Path of the module in its layer, e.g. `self_attn.q_proj`.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Returns the projection with this Hugging Face name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|projection| projection.name() == name)
    }

    /// Shape of the weight: `[out_features, in_features]`.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let hidden_size = config.hidden_size;
        let q_size = config.num_attention_heads * config.head_dim;
        let kv_size = config.num_key_value_heads * config.head_dim;
        match self {
            Self::Q => [q_size, hidden_size],
            Self::K | Self::V => [kv_size, hidden_size],
            Self::O => [hidden_size, q_size],
            Self::Gate | Self::Up => [config.intermediate_size, hidden_size],
            Self::Down => [hidden_size, config.intermediate_size],
        }
    }

    /// Returns whether the model gives the projection a bias `[out_features]`.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V | Self::O => config.attention_bias,
            Self::Gate | Self::Up | Self::Down => config.mlp_bias,
        }
    }
}

/// Hugging Face's name.
impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Hugging Face's name.
impl Serialize for Projection {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Full path of a projection's module, e.g. `model.layers.3.mlp.up_proj`.
pub fn module(layer_idx: usize, projection: Projection) -> String {
    format!("model.layers.{layer_idx}.{}", projection.path())
}

/// `model.layers.3.mlp.up_proj.weight`
pub fn weight(layer_idx: usize, projection: Projection) -> String {
    format!("{}.weight", module(layer_idx, projection))
}

/// `model.layers.3.self_attn.q_proj.bias`
pub fn bias(layer_idx: usize, projection: Projection) -> String {
    format!("{}.bias", module(layer_idx, projection))
}

/// The norm before attention, `[hidden_size]`.
pub fn input_layernorm(layer_idx: usize) -> String {
    format!("model.layers.{layer_idx}.input_layernorm.weight")
}

/// The norm before the MLP, `[hidden_size]`.
pub fn post_attention_layernorm(layer_idx: usize) -> String {
    format!("model.layers.{layer_idx}.post_attention_layernorm.weight")
}

/// A tensor that a checkpoint of the architecture has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
    /// True for the weight of a projection, which may be stored in 4 bit.
    pub is_projection: bool,
}

/// Lists every tensor of the architecture. A tied head is not a tensor of its own.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let plain = |name: String, shape: &[usize]| TensorSpec { name, shape: shape.to_vec(), is_projection: false };
    let hidden_size = config.hidden_size;
    let mut tensors = vec![plain(EMBED_TOKENS.into(), &[config.vocab_size, hidden_size])];
    for layer_idx in 0..config.num_hidden_layers {
        tensors.push(plain(input_layernorm(layer_idx), &[hidden_size]));
        tensors.push(plain(post_attention_layernorm(layer_idx), &[hidden_size]));
        for projection in Projection::ALL {
            let shape = projection.shape(config);
            let name = weight(layer_idx, projection);
            tensors.push(TensorSpec { name, shape: shape.to_vec(), is_projection: true });
            if projection.has_bias(config) {
                tensors.push(plain(bias(layer_idx, projection), &shape[..1]));
            }
        }
    }
    tensors.push(plain(NORM.into(), &[hidden_size]));
    if !config.tie_word_embeddings {
        tensors.push(plain(LM_HEAD.into(), &[config.vocab_size, hidden_size]));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_last_part_of_paths() {
        let names: Vec<_> = Projection::ALL.into_iter().map(Projection::name).collect();
        assert_eq!(names, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
        assert!(Projection::ALL.into_iter().all(|p| Projection::from_name(p.name()) == Some(p)));
        assert_eq!(Projection::from_name("lm_head"), None);
        assert_eq!(weight(3, Projection::Up), "model.layers.3.mlp.up_proj.weight");
    }
}

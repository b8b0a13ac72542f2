//! The decoder that families are variants of: Llama's. A family reads its sizes with [`Decoder::read`], sets what
//! differs, and makes the model with [`Decoder::spec`], whose layers it may change.

use serde_json::Value;

use super::json_fields::Fields;
use super::{eos_token_ids, quantization};
use crate::device::Activation;
use crate::model::rope::RopeConfig;
use crate::model::spec::{Embedding, Head, LayerSpec, ModelSpec, Module, ModuleId, Norm, NormId, Rows};
use crate::model::stage::{Attention, Mlp};

/// Weights of a model, at most: two hundred times as many as the largest model there is has, and few enough for every
/// product of sizes to fit in 64 bits.
const MAX_WEIGHTS: u128 = 100_000_000_000_000;

/// Values of keys that a config.json does not have.
pub(super) struct Defaults {
    /// `None`: as many as heads.
    pub num_key_value_heads: Option<usize>,
    /// `None`: hidden_size / heads.
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
}

/// Sizes and variants, under the names of Hugging Face.
pub(super) struct Decoder {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Even.
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f32,
    pub tie_word_embeddings: bool,
    pub max_position_embeddings: usize,
    /// Biases on queries, keys and values.
    pub qkv_bias: bool,
    /// Bias on attention's output.
    pub o_bias: bool,
    /// Biases on the gate, up and down projections.
    pub mlp_bias: bool,
    /// One module gives queries, keys and values, and one gives gate and up.
    pub is_fused: bool,
    /// Norms of each head's queries and keys.
    pub head_norms: bool,
}

/// The windows of attention, as the keys of a config.json give them.
pub(super) struct Windows {
    /// `None`: no layer has a window.
    size: Option<usize>,
    /// `layer_types`: for each layer, true where it has a window.
    is_sliding: Option<Vec<bool>>,
}

impl Windows {
    /// The window of a layer. `by_rule` says whether it has one where `layer_types` is absent.
    pub fn of(&self, layer: usize, by_rule: bool) -> Option<usize> {
        self.size.filter(|_| self.is_sliding.as_ref().map_or(by_rule, |list| list[layer]))
    }
}

impl Decoder {
    /// Takes the keys of sizes; biases are off, and each quantity has a module of its own.
    pub fn read(fields: &mut Fields, defaults: &Defaults) -> Decoder {
        let hidden_size = fields.size("hidden_size", None);
        let num_attention_heads = fields.size("num_attention_heads", None);
        let default = match fields.is_null("num_key_value_heads") {
            true => num_attention_heads,
            false => defaults.num_key_value_heads.unwrap_or(num_attention_heads),
        };
        let num_key_value_heads = fields.size("num_key_value_heads", Some(default));
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let allowed = format!("a multiple of num_key_value_heads {num_key_value_heads}");
            fields.refuse("num_attention_heads", num_attention_heads, allowed);
        }
        let derived = !fields.has("head_dim") && (defaults.head_dim.is_none() || fields.is_null("head_dim"));
        if derived && !hidden_size.is_multiple_of(num_attention_heads) {
            let allowed = format!("a multiple of num_attention_heads {num_attention_heads}");
            fields.refuse("hidden_size", hidden_size, allowed);
        }
        // Null asks for the derived width even where the class has a default.
        let default = defaults
            .head_dim
            .filter(|_| !fields.is_null("head_dim"))
            .unwrap_or((hidden_size / num_attention_heads).max(1));
        let head_dim = fields.size("head_dim", Some(default));
        if !head_dim.is_multiple_of(2) {
            fields.refuse("head_dim", head_dim, "an even number, half of it is rotated against the other");
        }
        Decoder {
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None),
            num_hidden_layers: fields.size("num_hidden_layers", None),
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", None),
            rms_norm_eps: fields.float("rms_norm_eps", Some(defaults.rms_norm_eps)) as f32,
            tie_word_embeddings: fields.flag("tie_word_embeddings", defaults.tie_word_embeddings),
            max_position_embeddings: fields.size("max_position_embeddings", Some(defaults.max_position_embeddings)),
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            is_fused: false,
            head_norms: false,
        }
    }

    /// Takes `layer_types`: for each layer, true where attention has a window.
    pub fn layer_types(&self, fields: &mut Fields) -> Option<Vec<bool>> {
        let allowed = format!(
            "a list with \"full_attention\" or \"sliding_attention\" for each of {} layers",
            self.num_hidden_layers
        );
        let is_sliding = |value: &Value| match value.as_str()? {
            "full_attention" => Some(false),
            "sliding_attention" => Some(true),
            _ => None,
        };
        fields.parse("layer_types", Some(None), None, &allowed, |value| {
            let list: Vec<bool> = value.as_array()?.iter().map(is_sliding).collect::<Option<_>>()?;
            (list.len() == self.num_hidden_layers).then_some(Some(list))
        })
    }

    /// Takes `use_sliding_window`, which is off where it is absent, `sliding_window`, in whose place `absent` stands,
    /// and `layer_types`.
    pub fn windows(&self, fields: &mut Fields, absent: Option<usize>) -> Windows {
        let is_used = fields.flag("use_sliding_window", false);
        let size = fields.size_or_null("sliding_window", absent).filter(|_| is_used);
        let is_sliding = self.layer_types(fields);
        if size.is_none() && is_sliding.iter().flatten().any(|is_sliding| *is_sliding) {
            let allowed = "\"full_attention\" alone, unless use_sliding_window is true and sliding_window a number";
            fields.refuse("layer_types", "sliding_attention", allowed);
        }
        Windows { size, is_sliding }
    }

    /// Makes the model, in which every layer rotates by the first of `ropes`. With problems it has no layers.
    pub fn spec(self, family: &'static str, ropes: Vec<RopeConfig>, fields: &mut Fields) -> ModelSpec {
        self.check(&ropes, fields);
        let num_layers = if fields.problems.is_empty() { self.num_hidden_layers } else { 0 };
        let mut number = 0;
        ModelSpec {
            family,
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_position_embeddings: self.max_position_embeddings,
            overflows_fp16: false,
            norm_eps: self.rms_norm_eps,
            embedding: Embedding { name: "model.embed_tokens.weight".into(), scale: 1.0, rounds_scale: false },
            ropes,
            layers: (0..num_layers).map(|layer| self.layer(layer, &mut number)).collect(),
            head: Head {
                norm: self.norm(NormId::Final, "model.norm"),
                name: if self.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" }.into(),
                untied_name: "lm_head.weight".into(),
                is_tied: self.tie_word_embeddings,
                scale: 1.0,
                softcap: None,
            },
            eos_token_ids: eos_token_ids(fields),
            quantization: quantization::read(fields),
            is_text_tower: false,
            remarks: Vec::new(),
        }
    }

    fn norm(&self, id: NormId, module: &str) -> Norm {
        Norm { id, name: format!("{module}.weight"), width: self.hidden_size, offset: 0.0 }
    }

    /// `number` counts the modules of the model.
    fn layer(&self, layer: usize, number: &mut u32) -> LayerSpec {
        let prefix = format!("model.layers.{layer}");
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let head_norm = |id: NormId, name: &str| {
            let name = format!("{prefix}.self_attn.{name}.weight");
            self.head_norms.then_some(Norm { id, name, width: self.head_dim, offset: 0.0 })
        };
        let mut module = |id: ModuleId, part: &str, out_features: usize, in_features: usize, has_bias: bool| {
            let name = format!("{prefix}.{part}.{id}");
            *number += 1;
            Module { id, name, number: *number - 1, out_features, in_features, has_bias, output_scale: 1.0 }
        };
        let [qkv, gate_up] = [ModuleId::Qkv, ModuleId::GateUp].map(|id| self.is_fused.then_some(id));
        let parts = [(ModuleId::Q, q), (ModuleId::K, kv), (ModuleId::V, kv)];
        let (mut attention, [q_rows, k_rows, v_rows]) =
            inputs(qkv, parts, |id, width| module(id, "self_attn", width, hidden, self.qkv_bias));
        attention.push(module(ModuleId::O, "self_attn", hidden, q, self.o_bias));
        let parts = [(ModuleId::Gate, inner), (ModuleId::Up, inner)];
        let (mut mlp, [gate, up]) = inputs(gate_up, parts, |id, width| module(id, "mlp", width, hidden, self.mlp_bias));
        mlp.push(module(ModuleId::Down, "mlp", hidden, inner, self.mlp_bias));
        LayerSpec {
            attention: Attention {
                norm: Some(self.norm(NormId::Attention, &format!("{prefix}.input_layernorm"))),
                output_norm: None,
                q_norm: head_norm(NormId::Q, "q_norm"),
                k_norm: head_norm(NormId::K, "k_norm"),
                q: q_rows,
                k: k_rows,
                v: v_rows,
                modules: attention,
                num_heads: self.num_attention_heads,
                num_key_value_heads: self.num_key_value_heads,
                head_dim: self.head_dim,
                scale: 1.0 / (self.head_dim as f32).sqrt(),
                softcap: None,
                window: None,
                rope: Some(0),
                q_rope: None,
            },
            mlp: Mlp {
                norm: Some(self.norm(NormId::Mlp, &format!("{prefix}.post_attention_layernorm"))),
                output_norm: None,
                gate,
                up,
                modules: mlp,
                activation: Activation::Silu,
                intermediate_size: inner,
            },
        }
    }

    /// Refuses sizes whose products would overflow somewhere, and rotations that are no numbers.
    fn check(&self, ropes: &[RopeConfig], fields: &mut Fields) {
        // Far more than any model has. Lists are made of as many layers, pieces of the vocabulary and frequencies.
        for (key, found, most) in [
            ("num_hidden_layers", self.num_hidden_layers, 1000),
            ("vocab_size", self.vocab_size, 100_000_000),
            ("head_dim", self.head_dim, 65_536),
        ] {
            if found > most {
                fields.refuse(key, found, format!("at most {most}"));
            }
        }
        let product = |a: usize, b: usize| a as u128 * b as u128;
        let heads = product(self.num_attention_heads + self.num_key_value_heads, self.head_dim);
        let layer = self.hidden_size as u128 * (2 * heads + 3 * self.intermediate_size as u128);
        let layers = layer.saturating_mul(self.num_hidden_layers as u128);
        if layers.saturating_add(2 * product(self.vocab_size, self.hidden_size)) > MAX_WEIGHTS {
            fields.problems.push(format!(
                "hidden_size {}, intermediate_size {}, num_hidden_layers {}, vocab_size {}, num_attention_heads {}, head_dim {}: \
                 together more than 10^14 weights",
                self.hidden_size,
                self.intermediate_size,
                self.num_hidden_layers,
                self.vocab_size,
                self.num_attention_heads,
                self.head_dim
            ));
        } else if fields.problems.is_empty() {
            for rope in ropes.iter().filter(|rope| !rope.is_finite()) {
                let problem = format!("rope_parameters: they give rotations that are no finite numbers ({rope:?})");
                fields.problems.push(problem);
            }
        }
    }
}

/// The modules that read a stage's input, and the rows that give each of `parts`, an id and a width: of a module of its
/// own, or of the one that all share.
fn inputs<const N: usize>(
    shared: Option<ModuleId>,
    parts: [(ModuleId, usize); N],
    mut module: impl FnMut(ModuleId, usize) -> Module,
) -> (Vec<Module>, [Rows; N]) {
    let Some(shared) = shared else {
        let modules = parts.map(|(id, width)| module(id, width));
        let rows = modules.each_ref().map(Rows::all);
        return (modules.into(), rows);
    };
    let mut end = 0;
    let rows = parts.map(|(_, width)| {
        end += width;
        Rows { module: shared, rows: end - width..end }
    });
    (vec![module(shared, end)], rows)
}

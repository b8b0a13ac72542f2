//! config.json of a Llama model, as transformers 4 and 5 write it. A key that is not understood is refused.

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::json_fields::Fields;
use super::names::Projection;
use super::quantization::{self, BnbConfig};
use super::rope::{Llama3, RopeConfig, RopeScaling, Yarn};
use crate::files::{self, MAX_SETTINGS_BYTES, listed};

/// Keys that do not change what the model computes: generation defaults, tokens, file keeping.
#[rustfmt::skip]
const HARMLESS: &[&str] = &[
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path",
    "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty", "max_length",
    "max_sequence_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
];

/// Keys that would change what the model computes, with the one value besides null that does not.
fn neutral_values() -> [(&'static str, Value); 16] {
    [
        ("hidden_act", json!("silu")),
        ("attention_dropout", json!(0.0)),
        ("pretraining_tp", json!(1.0)),
        ("sliding_window", json!(null)),
        ("use_sliding_window", json!(false)),
        ("partial_rotary_factor", json!(1.0)),
        ("rope_interleaved", json!(false)),
        ("qk_norm", json!(false)),
        ("use_qk_norm", json!(false)),
        ("is_encoder_decoder", json!(false)),
        ("add_cross_attention", json!(false)),
        ("cross_attention_hidden_size", json!(null)),
        ("tie_encoder_decoder", json!(false)),
        ("chunk_size_feed_forward", json!(0.0)),
        ("pruned_heads", json!({})),
        ("model_type", json!("llama")),
    ]
}

/// Weights of a model, at most: two hundred times as many as the largest model there is has, and few enough for every product of
/// sizes to fit in 64 bits.
const MAX_WEIGHTS: u128 = 100_000_000_000_000;

/// Sizes and variants of a Llama model, under the names of Hugging Face.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
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
    /// Biases on the q, k, v and o projections.
    pub attention_bias: bool,
    /// Biases on the gate, up and down projections.
    pub mlp_bias: bool,
    pub max_position_embeddings: usize,
    pub rope: RopeConfig,
    /// Tokens that end a text; generation_config.json may say otherwise.
    pub eos_token_ids: Vec<u32>,
    /// Set: the checkpoint is quantized already, by bitsandbytes in NF4.
    pub quantization: Option<BnbConfig>,
}

impl ModelConfig {
    /// Reads `dir/config.json`. The error names every key that cannot be honoured, what it is and what is allowed.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        Self::from_map(files::read_json(&path, MAX_SETTINGS_BYTES)?, &files::shown_path(&path))
    }

    /// Reads the text of a config.json that came from `source`.
    pub fn parse(text: &[u8], source: &str) -> Result<Self> {
        Self::from_map(files::parse_json(Path::new(source), text)?, source)
    }

    fn from_map(map: Map<String, Value>, source: &str) -> Result<Self> {
        let mut fields = Fields { map, prefix: "", problems: Vec::new() };
        let config = Self::read(&mut fields);
        if fields.problems.is_empty() {
            return Ok(config);
        }
        bail!("{source}: this model cannot be used:{}", listed(&fields.problems))
    }

    /// Reads all keys; what is wrong is in `fields.problems`, and then the value means nothing.
    fn read(fields: &mut Fields) -> Self {
        check_architecture(fields);
        let hidden_size = fields.size("hidden_size", None);
        let num_attention_heads = fields.size("num_attention_heads", None);
        let num_key_value_heads = fields.size("num_key_value_heads", Some(num_attention_heads));
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            fields.refuse(
                "num_attention_heads",
                num_attention_heads,
                format!("a multiple of num_key_value_heads {num_key_value_heads}"),
            );
        }
        if !fields.has("head_dim") && !hidden_size.is_multiple_of(num_attention_heads) {
            fields.refuse(
                "hidden_size",
                hidden_size,
                format!("a multiple of num_attention_heads {num_attention_heads}"),
            );
        }
        let head_dim = fields.size("head_dim", Some((hidden_size / num_attention_heads).max(1)));
        if !head_dim.is_multiple_of(2) {
            fields.refuse("head_dim", head_dim, "an even number, half of it is rotated against the other");
        }
        let max_position_embeddings = fields.size("max_position_embeddings", Some(2048));
        let config = Self {
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None),
            num_hidden_layers: fields.size("num_hidden_layers", None),
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", None),
            rms_norm_eps: fields.float("rms_norm_eps", Some(1e-6)) as f32,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false),
            attention_bias: fields.flag("attention_bias", false),
            mlp_bias: fields.flag("mlp_bias", false),
            max_position_embeddings,
            rope: read_rope(fields, head_dim, max_position_embeddings),
            eos_token_ids: read_eos_token_ids(fields),
            quantization: quantization::read(fields),
        };
        config.check_sizes(fields);
        fields.check_neutral(neutral_values());
        fields.map.retain(|key, _| !HARMLESS.contains(&key.as_str()));
        fields.check_rest();
        config
    }

    /// Refuses sizes whose products would overflow somewhere, and rotations that are no numbers.
    fn check_sizes(&self, fields: &mut Fields) {
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
        let weights: u128 =
            Projection::ALL.iter().map(|p| p.shape(self).iter().map(|&n| n as u128).product::<u128>()).sum();
        let layers = weights.saturating_mul(self.num_hidden_layers as u128);
        let embedding = self.vocab_size as u128 * self.hidden_size as u128;
        if layers.saturating_add(2 * embedding) > MAX_WEIGHTS {
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
        } else if fields.problems.is_empty() && !self.rope.is_finite() {
            fields
                .problems
                .push(format!("rope_parameters: they give rotations that are no finite numbers ({:?})", self.rope));
        }
    }
}

/// Both forms: `rope_theta` beside `rope_scaling` (transformers 4), or all in `rope_parameters` (5).
fn read_rope(fields: &mut Fields, head_dim: usize, max_position_embeddings: usize) -> RopeConfig {
    if fields.has("rope_scaling") && fields.has("rope_parameters") {
        fields.problems.push("rope_scaling and rope_parameters: both are there, keep the one that is meant".into());
    }
    let outer_theta = fields.float("rope_theta", Some(10_000.0));
    let mut rope = fields.object(if fields.has("rope_scaling") { "rope_scaling" } else { "rope_parameters" });
    let rope_theta = rope.float("rope_theta", Some(outer_theta));
    let kinds = [rope.take("rope_type"), rope.take("type")];
    let kind = kinds.into_iter().flatten().next().unwrap_or(json!("default"));
    let length = Some(max_position_embeddings);
    let scaling = match kind.as_str().unwrap_or_default() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: rope.float("factor", None) },
        "dynamic" => RopeScaling::Dynamic { factor: rope.float("factor", None) },
        "yarn" => RopeScaling::Yarn(read_yarn(&mut rope, max_position_embeddings)),
        "llama3" => RopeScaling::Llama3(Llama3 {
            factor: rope.float("factor", None),
            low_freq_factor: rope.float("low_freq_factor", None),
            high_freq_factor: rope.float("high_freq_factor", None),
            original_max_position_embeddings: rope.size("original_max_position_embeddings", length),
        }),
        _ => {
            rope.refuse("rope_type", kind, "default, linear, dynamic, yarn or llama3");
            rope.map.clear();
            RopeScaling::Default
        }
    };
    rope.check_neutral([("partial_rotary_factor", json!(1.0))]);
    rope.check_rest();
    fields.problems.append(&mut rope.problems);
    RopeConfig { rope_theta, head_dim, max_position_embeddings, scaling }
}

fn read_yarn(rope: &mut Fields, max_position_embeddings: usize) -> Yarn {
    let original = rope.size("original_max_position_embeddings", Some(max_position_embeddings));
    let factor = rope.float("factor", Some(max_position_embeddings as f64 / original as f64));
    let (mscale, mscale_all_dim) = (rope.float("mscale", Some(0.0)), rope.float("mscale_all_dim", Some(0.0)));
    let attention_factor = Yarn::default_attention_factor(factor, mscale, mscale_all_dim);
    Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor: rope.float("attention_factor", Some(attention_factor)),
        beta_fast: rope.float("beta_fast", Some(32.0)),
        beta_slow: rope.float("beta_slow", Some(1.0)),
        truncate: rope.flag("truncate", true),
    }
}

fn read_eos_token_ids(fields: &mut Fields) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    fields.parse("eos_token_id", Some(Vec::new()), Vec::new(), "a token id or a list of them", |value| match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    })
}

fn check_architecture(fields: &mut Fields) {
    const SUPPORTED: &str = "LlamaForCausalLM";
    match fields.take("architectures") {
        Some(found) if found != json!([SUPPORTED]) => fields.refuse("architectures", found, SUPPORTED),
        _ => {}
    }
    if !fields.has("model_type") {
        fields.problems.push("model_type: missing, allowed: llama".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use tempfile::TempDir;

    fn smollm() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
            "max_position_embeddings": 8192, "rope_theta": 100000, "rope_scaling": null, "hidden_act": "silu",
            "attention_dropout": 0.0, "pretraining_tp": 1, "eos_token_id": 2, "rope_interleaved": false,
            "torch_dtype": "bfloat16", "use_cache": true, "is_llama_config": true})
    }

    fn with(changes: Value) -> Value {
        let mut config = smollm();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    }

    fn load(config: &Value) -> Result<ModelConfig> {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        ModelConfig::load(dir.path())
    }

    fn error(changes: Value) -> String {
        load(&with(changes)).expect_err("must be refused").to_string()
    }

    #[test]
    fn sizes_are_read_or_derived() {
        let config = load(&smollm()).unwrap();
        assert_eq!((config.hidden_size, config.head_dim, config.num_key_value_heads), (576, 64, 3));
        assert_eq!((config.rms_norm_eps, config.tie_word_embeddings, config.attention_bias), (1e-5, true, false));
        assert_eq!((config.eos_token_ids, config.quantization), (vec![2], None));
        assert_eq!(config.rope.rope_theta, 100_000.0);
        let config = load(&with(json!({"head_dim": 32, "num_key_value_heads": null, "eos_token_id": [1, 7]}))).unwrap();
        assert_eq!((config.head_dim, config.num_key_value_heads, config.eos_token_ids), (32, 9, vec![1, 7]));
    }

    #[test]
    fn both_rope_forms_are_read() {
        let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024, "rope_type": "llama3"});
        let old = load(&with(json!({"rope_scaling": scaling}))).unwrap();
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(100000.0);
        let new = load(&with(json!({"rope_parameters": parameters, "rope_theta": null, "dtype": "float32"}))).unwrap();
        assert_eq!(old, new);
        let RopeScaling::Llama3(llama3) = new.rope.scaling else { panic!("{:?}", new.rope) };
        assert_eq!((llama3.factor, llama3.original_max_position_embeddings), (8.0, 1024));

        let linear = load(&with(json!({"rope_scaling": {"type": "linear", "factor": 2}}))).unwrap();
        assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
        let yarn = json!({"type": "yarn", "original_max_position_embeddings": 2048, "factor": null, "beta_fast": 16});
        let RopeScaling::Yarn(yarn) = load(&with(json!({"rope_scaling": yarn}))).unwrap().rope.scaling else {
            panic!()
        };
        assert_eq!((yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.truncate), (4.0, 16.0, 1.0, true));
        assert_eq!(yarn.attention_factor, 0.1 * 4.0_f64.ln() + 1.0);
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            (json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}), "model_type: found \"qwen2\""),
            (json!({"architectures": ["LlamaForSequenceClassification"]}), "allowed: LlamaForCausalLM"),
            (
                json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}),
                "rope_scaling.rope_type: found \"longrope\"",
            ),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "rope_scaling.factor: missing"),
            (
                json!({"rope_parameters": {"rope_type": "linear", "factor": 2, "beta": 1}}),
                "rope_parameters.beta: found 1, not a key",
            ),
            (json!({"hidden_act": "gelu"}), "hidden_act: found \"gelu\", allowed: \"silu\""),
            (json!({"attention_dropout": 0.1}), "attention_dropout: found 0.1"),
            (json!({"sliding_window": 4096}), "sliding_window: found 4096"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor: found 0.5"),
            (json!({"logit_softcap": 30}), "logit_softcap: found 30, not a key"),
            (json!({"hidden_size": 578}), "hidden_size: found 578, allowed: a multiple of num_attention_heads 9"),
            (
                json!({"num_key_value_heads": 2}),
                "num_attention_heads: found 9, allowed: a multiple of num_key_value_heads 2",
            ),
            (json!({"head_dim": 63}), "head_dim: found 63, allowed: an even number"),
            (json!({"vocab_size": 0}), "vocab_size: found 0"),
            (json!({"intermediate_size": null}), "intermediate_size: missing"),
            (
                json!({"quantization_config": {"quant_method": "gptq"}}),
                "quantization_config.quant_method: found \"gptq\"",
            ),
            (
                json!({"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}}),
                "found \"fp4\"",
            ),
            (
                json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}),
                "load_in_8bit: found true",
            ),
        ];
        for (changes, expected) in cases {
            let found = error(changes);
            assert!(found.contains(expected), "{expected} is not in {found}");
        }
    }

    #[test]
    fn all_problems_come_at_once() {
        let found = error(json!({"hidden_act": "gelu", "vocab_size": "many", "mlp_bias": 1}));
        assert_eq!(found.lines().count(), 4, "{found}");
    }

    #[test]
    fn a_bitsandbytes_config_is_read() {
        let config = json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true,
            "load_in_8bit": false, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true,
            "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}});
        let bnb = load(&with(config)).unwrap().quantization.unwrap();
        assert_eq!(bnb.skip_modules, ["lm_head", "model.layers.1.mlp"]);
        assert_eq!(bnb.skips("model.layers.1.mlp.up_proj"), Some("model.layers.1.mlp"));
        assert_eq!(bnb.skips("model.layers.11.mlp.up_proj"), None);
    }

    #[test]
    fn a_quantization_is_understood_wholly_or_refused() {
        for (changes, expected) in [
            (json!({"llm_int8_skip_modules": "lm_head"}), "llm_int8_skip_modules: found \"lm_head\", allowed: a list"),
            (json!({"llm_int8_skip_modules": [1]}), "llm_int8_skip_modules: found [1]"),
            (json!({"bnb_4bit_blocksize": 32}), "quantization_config.bnb_4bit_blocksize: found 32, not a key"),
            (json!({"quant_method": "gptq", "bits": 4}), "quant_method: found \"gptq\", allowed: \"bitsandbytes\""),
            (json!({"quant_method": null}), "quant_method: missing"),
            (json!({"bnb_4bit_quant_type": null}), "bnb_4bit_quant_type: missing"),
        ] {
            let mut quantization = json!({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"});
            quantization.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            let found = error(json!({"quantization_config": quantization}));
            assert!(found.contains(expected) && found.lines().count() == 2, "{expected} is not all of {found}");
        }
    }

    #[test]
    fn odd_numbers_are_refused_by_key_and_none_panics() {
        const WORDS: [&str; 13] = [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "eos_token_id",
            "tie_word_embeddings",
            "rope_scaling",
        ];
        let odd = [
            json!(-1),
            json!(0),
            json!(1e308),
            json!(-1e308),
            json!(1e-320),
            json!(2.5),
            json!("9"),
            json!([]),
            json!([[1]]),
            json!({}),
            json!({"rope_type": 1}),
            json!(u64::MAX),
            json!(4_294_967_295_u32),
            json!(1_000_000_000),
            json!(1),
            json!(true),
            json!("\u{1b}[2J"),
            json!("x".repeat(100_000)),
        ];
        for key in WORDS {
            for value in &odd {
                if let Err(error) = load(&with(json!({key: value}))) {
                    let text = error.to_string();
                    assert!(
                        text.contains(key) || key == "num_key_value_heads" || key.starts_with("rope"),
                        "{key}: {text}"
                    );
                    assert!(text.len() < 1000 && !text.contains('\x1b'), "{key}: {} bytes", text.len());
                }
            }
        }
        for rope in [
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 1}),
            json!({"rope_type": "linear", "factor": 1e300}),
            json!({"rope_type": "yarn", "factor": 1e-308}),
            json!({"rope_type": "yarn", "factor": 2, "beta_fast": 1e308, "beta_slow": 1e308}),
        ] {
            let found = load(&with(json!({"rope_scaling": rope.clone()})));
            assert!(found.as_ref().is_ok_and(|config| config.rope.is_finite()) || found.is_err(), "{rope}: {found:?}");
        }
        let huge = error(json!({"num_hidden_layers": 1_000_000_000}));
        assert!(huge.contains("num_hidden_layers: found 1000000000, allowed: at most 1000"), "{huge}");
        let huge = error(json!({"hidden_size": 9_000_000, "intermediate_size": 4_000_000_000_u32}));
        assert!(huge.contains("hidden_size 9000000") && huge.contains("together more than 10^14 weights"), "{huge}");
    }
}

//! Makes a [`ModelSpec`] of a config.json of Hugging Face. A family is one architecture: a file that says which keys it
//! has, what each means, and how its layers differ from those of `decoder`. A key that is not understood is refused.

mod decoder;
mod gemma2;
mod gemma3;
mod granite;
mod json_fields;
mod llama;
mod ministral3;
mod mistral;
mod mistral3;
mod olmo;
mod phi3;
mod quantization;
mod qwen2;
mod qwen3;
mod rope;
mod seed_oss;
mod smollm3;

pub use quantization::BnbConfig;

use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use crate::files::{self, MAX_SETTINGS_BYTES, listed};

use super::spec::{ModelSpec, ModuleId};
use json_fields::Fields;

/// One architecture.
struct Family {
    model_type: &'static str,
    architecture: &'static str,
    /// Modules that PEFT puts LoRA on where `target_modules` is absent; empty: PEFT has no default for this family.
    default_targets: &'static [ModuleId],
    /// Takes the keys that mean something. With problems in `Fields`, the value means nothing.
    read: fn(&mut Fields) -> ModelSpec,
}

/// PEFT's `default_targets` of the families for which it has some.
const QV: &[ModuleId] = &[ModuleId::Q, ModuleId::V];

const FAMILIES: &[Family] = &[
    llama::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    mistral::FAMILY,
    mistral::MINISTRAL,
    ministral3::FAMILY,
    mistral3::FAMILY,
    smollm3::FAMILY,
    seed_oss::FAMILY,
    olmo::OLMO2,
    olmo::OLMO3,
    gemma2::FAMILY,
    gemma3::FAMILY,
    gemma3::MULTIMODAL,
    phi3::FAMILY,
    granite::FAMILY,
];

/// Keys of a model that also sees which do not concern its text tower.
const SIGHT: &[&str] = &[
    "boi_token_index",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "spatial_merge_size",
    "vision_config",
    "vision_feature_layer",
];

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

/// Keys that would change what a model computes in any family, with the one value besides null that does not.
fn neutral_values() -> [(&'static str, Value); 8] {
    [
        ("pretraining_tp", json!(1.0)),
        ("is_encoder_decoder", json!(false)),
        ("add_cross_attention", json!(false)),
        ("cross_attention_hidden_size", json!(null)),
        ("tie_encoder_decoder", json!(false)),
        ("chunk_size_feed_forward", json!(0.0)),
        ("pruned_heads", json!({})),
        ("attention_dropout", json!(0.0)),
    ]
}

/// Reads `dir/config.json`, see [`ModelSpec::load`].
pub(super) fn load(dir: &Path) -> Result<ModelSpec> {
    let path = dir.join("config.json");
    from_map(files::read_json(&path, MAX_SETTINGS_BYTES)?, &files::shown_path(&path))
}

/// Reads a config.json that came from `source`.
pub(super) fn from_map(map: Map<String, Value>, source: &str) -> Result<ModelSpec> {
    let mut fields = Fields { map, prefix: String::new(), problems: Vec::new() };
    let spec = read_as_one_of(FAMILIES, &mut fields);
    match fields.problems.is_empty() {
        true => Ok(spec),
        false => bail!("{source}: this model cannot be used:{}", listed(&fields.problems)),
    }
}

/// Takes all keys.
fn read_as_one_of(families: &'static [Family], fields: &mut Fields) -> ModelSpec {
    let spec = (family(families, fields).read)(fields);
    fields.check_neutral(neutral_values());
    fields.map.retain(|key, _| !HARMLESS.contains(&key.as_str()));
    fields.check_rest();
    spec
}

/// Reads the text tower of a model that also sees: `text_config`, which is one of `families`. The head is tied where
/// the outer `tie_word_embeddings` is true or absent, whatever the inner one says.
fn text_tower(fields: &mut Fields, family: &'static str, families: &'static [Family]) -> ModelSpec {
    SIGHT.iter().for_each(|key| drop(fields.take(key)));
    let is_tied = fields.flag("tie_word_embeddings", true);
    let mut text = fields.object("text_config");
    text.map.insert("tie_word_embeddings".into(), is_tied.into());
    text.map.remove("architectures");
    let mut spec = read_as_one_of(families, &mut text).into_text_tower();
    fields.problems.append(&mut text.problems);
    spec.family = family;
    spec.quantization = quantization::read(fields).or(spec.quantization);
    if fields.has("eos_token_id") {
        spec.eos_token_ids = eos_token_ids(fields);
    }
    spec
}

/// Returns the `default_targets` of a family, by its `model_type`.
pub(super) fn default_targets(model_type: &str) -> &'static [ModuleId] {
    FAMILIES.iter().find(|family| family.model_type == model_type).map_or(&[], |family| family.default_targets)
}

/// Takes the keys that name the family. The keys of an unknown one are read as those of the first, so that one error
/// names all that is wrong.
fn family(families: &'static [Family], fields: &mut Fields) -> &'static Family {
    let (architectures, model_type) = (fields.take("architectures"), fields.take("model_type"));
    let by_type = families.iter().find(|family| model_type.as_ref().is_some_and(|found| found == family.model_type));
    let words = |word: fn(&Family) -> &'static str| families.iter().map(word).collect::<Vec<_>>().join(", ");
    match (model_type, by_type) {
        (None, _) => {
            let allowed = words(|family| family.model_type);
            let problem = format!("{}model_type: missing, allowed: {allowed}", fields.prefix);
            fields.problems.push(problem);
        }
        (Some(found), None) => fields.refuse("model_type", found, words(|family| family.model_type)),
        (Some(_), Some(_)) => {}
    }
    let allowed = by_type.map_or_else(|| words(|family| family.architecture), |family| family.architecture.into());
    if let Some(found) =
        architectures.filter(|found| by_type.is_none_or(|family| *found != json!([family.architecture])))
    {
        fields.refuse("architectures", found, allowed);
    }
    by_type.unwrap_or(&families[0])
}

fn eos_token_ids(fields: &mut Fields) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    fields.parse("eos_token_id", Some(Vec::new()), Vec::new(), "a token id or a list of them", |value| match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use tempfile::TempDir;

    use crate::model::rope::RopeScaling;

    fn smollm() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
            "max_position_embeddings": 8192, "rope_theta": 100000, "rope_scaling": null, "hidden_act": "silu",
            "attention_dropout": 0.0, "pretraining_tp": 1, "eos_token_id": 2, "rope_interleaved": false,
            "torch_dtype": "bfloat16", "use_cache": true, "is_llama_config": true})
    }

    fn with(changes: Value) -> Value {
        changed(smollm(), &changes)
    }

    /// The model of a config.json that must be right.
    pub fn spec_of(config: Value) -> ModelSpec {
        load(&config).unwrap()
    }

    /// A config.json with keys that are added or have other values.
    pub fn changed(mut config: Value, changes: &Value) -> Value {
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    }

    /// The error of a config.json that must be refused.
    pub fn error_of(config: Value) -> String {
        load(&config).unwrap_err().to_string()
    }

    fn load(config: &Value) -> Result<ModelSpec> {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        ModelSpec::load(dir.path())
    }

    fn error(changes: Value) -> String {
        load(&with(changes)).expect_err("must be refused").to_string()
    }

    #[test]
    fn sizes_are_read_or_derived() {
        let config = load(&smollm()).unwrap();
        let heads = |config: &ModelSpec| {
            let attention = &config.layers[29].attention;
            (attention.num_heads, attention.num_key_value_heads, attention.head_dim)
        };
        assert_eq!((config.hidden_size, heads(&config), config.num_layers()), (576, (9, 3, 64), 30));
        assert_eq!(
            (config.norm_eps, config.head.is_tied, config.head.name.as_str()),
            (1e-5, true, "model.embed_tokens.weight")
        );
        assert!(config.modules().all(|module| !module.has_bias));
        assert_eq!((&config.eos_token_ids, &config.quantization), (&vec![2], &None));
        assert_eq!(config.ropes[0].rope_theta, 100_000.0);
        let config = load(&with(json!({"head_dim": 32, "num_key_value_heads": null, "eos_token_id": [1, 7]}))).unwrap();
        assert_eq!((heads(&config), config.eos_token_ids), ((9, 9, 32), vec![1, 7]));
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
        let RopeScaling::Llama3(llama3) = &new.ropes[0].scaling else { panic!("{:?}", new.ropes) };
        assert_eq!((llama3.factor, llama3.original_max_position_embeddings), (8.0, 1024));

        let linear = load(&with(json!({"rope_scaling": {"type": "linear", "factor": 2}}))).unwrap();
        assert_eq!(linear.ropes[0].scaling, RopeScaling::Linear { factor: 2.0 });
        let yarn = json!({"type": "yarn", "original_max_position_embeddings": 2048, "factor": null, "beta_fast": 16});
        let RopeScaling::Yarn(yarn) = load(&with(json!({"rope_scaling": yarn}))).unwrap().ropes.remove(0).scaling
        else {
            panic!()
        };
        assert_eq!((yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.truncate), (4.0, 16.0, 1.0, true));
        assert_eq!(yarn.attention_factor, 0.1 * 4.0_f64.ln() + 1.0);
    }

    #[test]
    fn the_original_length_beside_the_rope_wins_over_that_in_it() {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0});
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        for scaling in [yarn, llama3] {
            for (beside, inside, expected) in [
                (Some(512), None, 512),
                (Some(512), Some(1024), 512),
                (None, Some(1024), 1024),
                // Without either it is max_position_embeddings.
                (None, None, 8192),
            ] {
                let mut scaling = scaling.clone();
                if let Some(inside) = inside {
                    scaling["original_max_position_embeddings"] = json!(inside);
                }
                for form in ["rope_scaling", "rope_parameters"] {
                    let spec = load(&with(json!({form: scaling, "original_max_position_embeddings": beside}))).unwrap();
                    let found = match &spec.ropes[0].scaling {
                        RopeScaling::Yarn(yarn) => yarn.original_max_position_embeddings,
                        RopeScaling::Llama3(llama3) => llama3.original_max_position_embeddings,
                        other => panic!("{other:?}"),
                    };
                    assert_eq!(found, expected, "{form}: {scaling}, beside it {beside:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let cases = [
            (json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}), "model_type: found \"gpt2\""),
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
            assert!(
                found.as_ref().is_ok_and(|config| config.ropes[0].is_finite()) || found.is_err(),
                "{rope}: {found:?}"
            );
        }
        let huge = error(json!({"num_hidden_layers": 1_000_000_000}));
        assert!(huge.contains("num_hidden_layers: found 1000000000, allowed: at most 1000"), "{huge}");
        let huge = error(json!({"hidden_size": 9_000_000, "intermediate_size": 4_000_000_000_u32}));
        assert!(huge.contains("hidden_size 9000000") && huge.contains("together more than 10^14 weights"), "{huge}");
    }
}

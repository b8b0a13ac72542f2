//! Qwen2, Qwen2.5 and the R1 distills made from them: Llama with biases on queries, keys and values, and windows on the
//! upper layers.

use serde_json::{Value, json};

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, QV, rope};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "qwen2", architecture: "Qwen2ForCausalLM", default_targets: QV, read };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(32),
    head_dim: None,
    max_position_embeddings: 32_768,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
};

fn read(fields: &mut Fields) -> ModelSpec {
    let mut decoder = Decoder::read(fields, &DEFAULTS);
    // The biases are part of the class, which does not read this key.
    fields.take("attention_bias");
    decoder.qkv_bias = true;
    qwen("qwen2", decoder, fields)
}

/// Takes the keys that Qwen2 and Qwen3 share: windows, which are off in all releases, and RoPE.
pub(super) fn qwen(family: &'static str, decoder: Decoder, fields: &mut Fields) -> ModelSpec {
    let windows = decoder.windows(fields, Some(4096));
    let first = fields.parse("max_window_layers", Some(28), 28, "an integer from 0", Value::as_u64);
    let rope = rope::read(fields, &decoder, 10_000.0);
    fields.check_neutral([
        ("hidden_act", json!("silu")),
        ("use_mrope", json!(false)),
        // Attention in chunks of the models for a million tokens.
        ("dual_chunk_attention_config", json!(null)),
    ]);
    let mut spec = decoder.spec(family, vec![rope], fields);
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        layer.attention.window = windows.of(i, i as u64 >= first);
    }
    spec
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::{changed, error_of, spec_of};
    use super::*;

    /// A small model whose config.json has only the keys that must be there, with changes.
    fn qwen2(changes: Value) -> Value {
        changed(
            json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 32, "vocab_size": 100}),
            &changes,
        )
    }

    pub fn windows(config: Value) -> Vec<Option<usize>> {
        spec_of(config).layers.iter().map(|layer| layer.attention.window).collect()
    }

    pub fn biases(spec: &ModelSpec) -> Vec<&'static str> {
        spec.layers[0].modules().filter(|module| module.has_bias).map(|module| module.id.name()).collect()
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(qwen2(json!({"head_dim": null})));
        let attention = &spec.layers[0].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.window), (32, 4, None));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (32_768, 1e-6, false));
        assert_eq!(
            (spec.ropes[0].rope_theta, &spec.ropes[0].scaling),
            (1e4, &crate::model::rope::RopeScaling::Default)
        );
        assert_eq!(biases(&spec), ["q_proj", "k_proj", "v_proj"]);
        let spec = spec_of(qwen2(json!({"num_attention_heads": 64, "num_key_value_heads": null, "head_dim": 8})));
        assert_eq!((spec.layers[0].attention.num_key_value_heads, spec.layers[0].attention.q_width()), (64, 512));
        assert_eq!(biases(&spec_of(qwen2(json!({"attention_bias": false})))).len(), 3, "the class does not read it");
    }

    #[test]
    fn upper_layers_have_windows_if_they_are_used() {
        let used = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1});
        let with = |key: &str, value: Value| {
            let mut config = qwen2(used.clone());
            config[key] = value;
            config
        };
        assert_eq!(windows(qwen2(used.clone())), [None, Some(9), Some(9)]);
        assert_eq!(windows(with("max_window_layers", json!(0))), [Some(9); 3]);
        assert_eq!(windows(with("max_window_layers", json!(null))), [None; 3], "28 layers are full");
        assert_eq!(windows(with("use_sliding_window", json!(null))), [None; 3], "it is off where it is absent");
        assert_eq!(windows(with("sliding_window", json!(null))), [None; 3]);
        let absent = json!({"use_sliding_window": true, "max_window_layers": 2});
        assert_eq!(windows(qwen2(absent)), [None, None, Some(4096)]);
        let types = json!(["sliding_attention", "full_attention", "full_attention"]);
        assert_eq!(windows(with("layer_types", types.clone())), [Some(9), None, None], "the list wins");
        let error = error_of(qwen2(json!({"layer_types": types})));
        assert!(
            error.contains("layer_types: found \"sliding_attention\", allowed: \"full_attention\" alone"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (changes, expected) in [
            (json!({"dual_chunk_attention_config": {"chunk_size": 1}}), "dual_chunk_attention_config: found {"),
            (json!({"use_mrope": true}), "use_mrope: found true, allowed: false"),
            (
                json!({"rope_scaling": {"type": "default", "mrope_section": [1]}}),
                "rope_scaling.mrope_section: found [1]",
            ),
            (json!({"max_window_layers": -1}), "max_window_layers: found -1, allowed: an integer from 0"),
            (json!({"sliding_window": "all"}), "sliding_window: found \"all\""),
            (json!({"attention_dropout": 0.1}), "attention_dropout: found 0.1"),
            (json!({"hidden_act": "gelu"}), "hidden_act: found \"gelu\""),
            (json!({"qk_norm": true}), "qk_norm: found true, not a key"),
        ] {
            let error = error_of(qwen2(changes));
            assert!(error.contains(expected) && error.lines().count() == 2, "{expected} is not all of {error}");
        }
    }
}

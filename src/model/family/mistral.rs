//! Mistral: Llama with a window on all layers, or on those that `layer_types` names (Ministral of 2024).

use serde_json::json;

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, QV, rope};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "mistral", architecture: "MistralForCausalLM", default_targets: QV, read: mistral };

pub(super) const MINISTRAL: Family =
    Family { model_type: "ministral", architecture: "MinistralForCausalLM", default_targets: &[], read: ministral };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(8),
    head_dim: None,
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
};

fn mistral(fields: &mut Fields) -> ModelSpec {
    // The class of transformers ignores it, with a warning.
    fields.take("layer_types");
    read("mistral", fields)
}

fn ministral(fields: &mut Fields) -> ModelSpec {
    read("ministral", fields)
}

fn read(family: &'static str, fields: &mut Fields) -> ModelSpec {
    let decoder = Decoder::read(fields, &DEFAULTS);
    let window = fields.size_or_null("sliding_window", Some(4096));
    let is_sliding = decoder.layer_types(fields);
    if window.is_none() && is_sliding.as_ref().is_some_and(|list| list.contains(&true)) {
        fields.refuse(
            "sliding_window",
            json!(null),
            "an integer above 0, because layer_types has \"sliding_attention\"",
        );
    }
    let rope = rope::read(fields, &decoder, 10_000.0);
    fields.check_neutral([("hidden_act", json!("silu"))]);
    let mut spec = decoder.spec(family, vec![rope], fields);
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        layer.attention.window = window.filter(|_| is_sliding.as_ref().is_none_or(|list| list[i]));
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::super::tests::{changed, error_of, spec_of};
    use super::*;
    use serde_json::Value;

    fn mistral(changes: Value) -> Value {
        changed(
            json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 100}),
            &changes,
        )
    }

    fn windows(config: Value) -> Vec<Option<usize>> {
        spec_of(config).layers.iter().map(|layer| layer.attention.window).collect()
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(mistral(json!({"head_dim": null})));
        let attention = &spec.layers[0].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.window), (8, 4, Some(4096)));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (131_072, 1e-6, false));
        assert_eq!(spec.ropes[0].rope_theta, 10_000.0);
        let spec = spec_of(mistral(json!({"head_dim": 128, "num_key_value_heads": null})));
        assert_eq!((spec.layers[0].attention.num_key_value_heads, spec.layers[0].attention.q_width()), (16, 2048));
    }

    #[test]
    fn a_window_is_on_all_layers_or_off() {
        assert_eq!(windows(mistral(json!({"sliding_window": null}))), [None, None]);
        let types = json!(["sliding_attention", "full_attention"]);
        let config = mistral(json!({"sliding_window": 9, "layer_types": types}));
        assert_eq!(windows(config.clone()), [Some(9), Some(9)]);
        let mut ministral = config;
        ministral["model_type"] = json!("ministral");
        ministral["architectures"] = json!(["MinistralForCausalLM"]);
        assert_eq!(windows(ministral.clone()), [Some(9), None]);
        let mut no_size = ministral.clone();
        no_size["sliding_window"] = json!(null);
        let error = error_of(no_size.clone());
        assert!(error.contains("sliding_window: found null, allowed: an integer above 0"), "{error}");
        no_size["layer_types"] = json!(["full_attention", "full_attention"]);
        assert_eq!(windows(no_size), [None, None]);
        ministral["layer_types"] = json!(null);
        assert_eq!(windows(ministral.clone()), [Some(9), Some(9)]);
        for wrong in
            [json!(["full_attention"]), json!(["full_attention", "chunked_attention"]), json!("full_attention")]
        {
            ministral["layer_types"] = wrong;
            let error = error_of(ministral.clone());
            assert!(error.contains("layer_types: found ") && error.contains("for each of 2 layers"), "{error}");
        }
    }

    #[test]
    fn keys_that_the_class_does_not_have_are_refused() {
        for (changes, expected) in [
            (json!({"attention_bias": true}), "attention_bias: found true, not a key"),
            (json!({"sliding_window": 0}), "sliding_window: found 0, allowed: an integer above 0"),
            (json!({"hidden_act": "gelu"}), "hidden_act: found \"gelu\""),
            (json!({"quantization_config": {"quant_method": "fp8"}}), "quant_method: found \"fp8\""),
        ] {
            let error = error_of(mistral(changes));
            assert!(error.contains(expected), "{error}");
        }
    }
}

//! Ministral 3 (Devstral 2): Mistral with YaRN, and queries that grow with their position (`llama_4_scaling_beta`).

use serde_json::{Map, Value, json};

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, rope};
use crate::model::rope::{Growth, RopeConfig, RopeScaling};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "ministral3", architecture: "Ministral3ForCausalLM", default_targets: &[], read };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(8),
    head_dim: Some(128),
    max_position_embeddings: 262_144,
    rms_norm_eps: 1e-5,
    tie_word_embeddings: false,
};

fn read(fields: &mut Fields) -> ModelSpec {
    // The class of transformers ignores it, with a warning.
    fields.take("layer_types");
    let decoder = Decoder::read(fields, &DEFAULTS);
    let window = fields.size_or_null("sliding_window", None);
    let ropes = read_ropes(fields, &decoder);
    fields.check_neutral([("hidden_act", json!("silu"))]);
    let mut spec = decoder.spec("ministral3", ropes, fields);
    for layer in &mut spec.layers {
        (layer.attention.window, layer.attention.q_rope) = (window, Some(1));
    }
    spec
}

/// The rotation of keys, and that of queries, which is the same but for its growth.
fn read_ropes(fields: &mut Fields, decoder: &Decoder) -> Vec<RopeConfig> {
    let theta = fields.float("rope_theta", Some(10_000.0));
    let is_written = fields.has("rope_scaling") || fields.has("rope_parameters");
    let mut parameters = rope::parameters(fields);
    if !is_written {
        parameters.map = default_parameters();
    }
    parameters.take("max_position_embeddings");
    if !parameters.has("llama_4_scaling_beta") {
        // The class has no default for it.
        let problem = format!("{}llama_4_scaling_beta: missing, a number; 0 switches it off", parameters.prefix);
        parameters.problems.push(problem);
    }
    let beta = parameters.float_or_zero("llama_4_scaling_beta", 0.0);
    let keys = rope::config(&mut parameters, decoder, theta);
    let length = match &keys.scaling {
        RopeScaling::Yarn(yarn) => yarn.original_max_position_embeddings,
        other => {
            parameters.refuse("rope_type", format!("{other:?}"), "yarn");
            1
        }
    };
    fields.problems.append(&mut parameters.problems);
    vec![keys.clone(), RopeConfig { growth: Some(Growth { beta, length }), ..keys }]
}

/// The parameters of a config.json without any.
fn default_parameters() -> Map<String, Value> {
    let parameters = json!({
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    });
    parameters.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{error_of, spec_of};
    use super::*;

    fn with_rope(parameters: Value) -> Value {
        json!({"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 100,
            "rope_parameters": parameters})
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(with_rope(json!(null)));
        let attention = &spec.layers[1].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.window), (8, 128, None));
        assert_eq!((attention.rope, attention.q_rope), (Some(0), Some(1)));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (262_144, 1e-5, false));
        assert_eq!((&spec.ropes[0].growth, spec.ropes[0].rope_theta), (&None, 1e6));
        assert_eq!(spec.ropes[1].growth, Some(Growth { beta: 0.1, length: 16_384 }));
        assert_eq!(spec.ropes[1].attention_scaling(), 1.0);
    }

    #[test]
    fn zeros_are_numbers() {
        // Devstral 2.
        let spec = spec_of(with_rope(json!({"type": "yarn", "factor": 64, "original_max_position_embeddings": 4096,
            "beta_fast": 4, "beta_slow": 0, "mscale": 1, "mscale_all_dim": 0, "llama_4_scaling_beta": 0,
            "max_position_embeddings": 262_144})));
        let RopeScaling::Yarn(yarn) = &spec.ropes[1].scaling else { panic!("{:?}", spec.ropes) };
        assert_eq!((yarn.beta_fast, yarn.beta_slow, yarn.attention_factor), (4.0, 1.0, 0.1 * 64_f64.ln() + 1.0));
        assert_eq!(spec.ropes[1].growth, Some(Growth { beta: 0.0, length: 4096 }));
    }

    #[test]
    fn a_growth_that_is_not_written_whole_is_refused() {
        let yarn = json!({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64});
        let error = error_of(with_rope(yarn));
        assert!(error.contains("rope_parameters.llama_4_scaling_beta: missing, a number"), "{error}");
        let error = error_of(with_rope(json!({"rope_type": "linear", "factor": 2, "llama_4_scaling_beta": 0.1})));
        assert!(
            error.contains("rope_parameters.rope_type: found \"Linear") && error.contains("allowed: yarn"),
            "{error}"
        );
    }
}

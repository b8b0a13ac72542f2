//! Granite: Llama with four factors, of embeddings, scores, branches and logits.

use serde_json::json;

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, rope};
use crate::model::spec::{ModelSpec, ModuleId};

pub(super) const FAMILY: Family =
    Family { model_type: "granite", architecture: "GraniteForCausalLM", default_targets: &[], read };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
};

fn read(fields: &mut Fields) -> ModelSpec {
    let mut decoder = Decoder::read(fields, &DEFAULTS);
    let attention_bias = fields.flag("attention_bias", false);
    (decoder.qkv_bias, decoder.o_bias) = (attention_bias, attention_bias);
    decoder.mlp_bias = fields.flag("mlp_bias", false);
    let rope = rope::read(fields, &decoder, 10_000.0);
    let mut factor = |key: &str| fields.float(key, Some(1.0)) as f32;
    let (embedding, attention) = (factor("embedding_multiplier"), factor("attention_multiplier"));
    let (branch, divisor) = (factor("residual_multiplier"), factor("logits_scaling"));
    fields.check_neutral([("hidden_act", json!("silu")), ("partial_rotary_factor", json!(1.0))]);
    let mut spec = decoder.spec("granite", vec![rope], fields);
    (spec.embedding.scale, spec.head.scale) = (embedding, 1.0 / divisor);
    for layer in &mut spec.layers {
        layer.attention.scale = attention;
        for module in layer.attention.modules.iter_mut().chain(&mut layer.mlp.modules) {
            if matches!(module.id, ModuleId::O | ModuleId::Down) {
                module.output_scale = branch;
            }
        }
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::super::tests::{changed, error_of, spec_of};
    use super::*;
    use serde_json::Value;

    fn granite(changes: Value) -> Value {
        changed(
            json!({"architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}),
            &changes,
        )
    }

    #[test]
    fn each_factor_is_where_it_belongs() {
        let spec = spec_of(granite(json!({"embedding_multiplier": 12, "attention_multiplier": 0.0078125,
            "residual_multiplier": 0.22, "logits_scaling": 16})));
        assert_eq!((spec.embedding.scale, spec.head.scale), (12.0, 0.0625));
        for layer in &spec.layers {
            assert_eq!(layer.attention.scale, 0.0078125);
            let scales: Vec<f32> = layer.modules().map(|module| module.output_scale).collect();
            assert_eq!(scales, [1.0, 1.0, 1.0, 0.22, 1.0, 1.0, 0.22]);
        }
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(granite(json!({})));
        let attention = &spec.layers[0].attention;
        // Scores are not divided by the root of head_dim.
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.scale), (4, 16, 1.0));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (2048, 1e-6, false));
        assert!(spec.modules().all(|module| !module.has_bias && module.output_scale == 1.0));
        assert_eq!((spec.embedding.scale, spec.head.scale, spec.ropes[0].rope_theta), (1.0, 1.0, 10_000.0));
    }

    #[test]
    fn factors_are_numbers_above_0() {
        for key in ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"] {
            for wrong in [json!(0), json!(-1.5), json!("12")] {
                let error = error_of(granite(json!({key: wrong})));
                assert!(error.contains(&format!("{key}: found {wrong}, allowed: a number above 0")), "{error}");
            }
        }
        let error = error_of(granite(json!({"num_local_experts": 8})));
        assert!(error.contains("num_local_experts: found 8, not a key"), "{error}");
    }
}

//! Seed-OSS: Llama with biases on queries, keys and values, and heads of a width of their own.

use serde_json::json;

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, rope};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "seed_oss", architecture: "SeedOssForCausalLM", default_targets: &[], read };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(8),
    head_dim: Some(128),
    max_position_embeddings: 524_288,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
};

fn read(fields: &mut Fields) -> ModelSpec {
    let mut decoder = Decoder::read(fields, &DEFAULTS);
    decoder.qkv_bias = fields.flag("attention_bias", true);
    decoder.o_bias = fields.flag("attention_out_bias", false);
    decoder.mlp_bias = fields.flag("mlp_bias", false);
    let dropouts = ["attention_dropout", "residual_dropout"].map(|key| (key, dropout(fields, key)));
    let rope = rope::read(fields, &decoder, 10_000.0);
    fields.check_neutral([("hidden_act", json!("silu"))]);
    let mut spec = decoder.spec("seed_oss", vec![rope], fields);
    let applied: Vec<String> =
        dropouts.iter().filter(|(_, rate)| *rate > 0.0).map(|(key, rate)| format!("{key} {rate}")).collect();
    if !applied.is_empty() {
        let keys = applied.join(" and ");
        spec.remarks.push(format!(
            "config.json: {keys}, with which transformers trains, are not applied; lora.lora_dropout is"
        ));
    }
    spec
}

/// The class drops out a tenth where the file does not say otherwise.
fn dropout(fields: &mut Fields, key: &str) -> f64 {
    fields.parse(key, Some(0.1), 0.0, "a number from 0 to below 1", |value| {
        value.as_f64().filter(|rate| (0.0..1.0).contains(rate))
    })
}

#[cfg(test)]
mod tests {
    use super::super::qwen2::tests::biases;
    use super::super::tests::{changed, error_of, spec_of};
    use super::*;
    use serde_json::Value;

    fn seed_oss(changes: Value) -> Value {
        changed(
            json!({"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 100}),
            &changes,
        )
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(seed_oss(json!({"rope_scaling": {"rope_type": "default"}, "pretraining_tp": 1})));
        let attention = &spec.layers[0].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.q_width()), (8, 128, 2048));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (524_288, 1e-6, false));
        assert_eq!(biases(&spec), ["q_proj", "k_proj", "v_proj"]);
        let flags = json!({"attention_bias": false, "attention_out_bias": true, "mlp_bias": true, "head_dim": null});
        let spec = spec_of(seed_oss(flags));
        assert_eq!(biases(&spec), ["o_proj", "gate_proj", "up_proj", "down_proj"]);
        assert_eq!(spec.layers[0].attention.head_dim, 4, "null is hidden_size / num_attention_heads");
    }

    #[test]
    fn dropouts_that_are_not_applied_are_said() {
        let said = |changes: Value| spec_of(seed_oss(changes)).remarks.join("; ");
        assert!(said(json!({})).contains("attention_dropout 0.1 and residual_dropout 0.1, with which"));
        let one = said(json!({"attention_dropout": 0, "residual_dropout": 0.25}));
        assert!(one.contains("residual_dropout 0.25, with which") && !one.contains("attention_dropout"), "{one}");
        assert_eq!(said(json!({"attention_dropout": 0.0, "residual_dropout": 0})), "");
        let error = error_of(seed_oss(json!({"residual_dropout": 1})));
        assert!(error.contains("residual_dropout: found 1, allowed: a number from 0 to below 1"), "{error}");
    }
}

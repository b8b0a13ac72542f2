//! OLMo 2 and 3: norms of what attention and the MLP give in place of norms of what they take, and norms of all queries
//! and all keys together. Three of four layers of OLMo 3 have a window, and a rotation that nothing scales.

use serde_json::json;

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, rope};
use crate::model::rope::RopeConfig;
use crate::model::spec::{ModelSpec, Norm, NormId};

pub(super) const OLMO2: Family =
    Family { model_type: "olmo2", architecture: "Olmo2ForCausalLM", default_targets: &[], read: olmo2 };

pub(super) const OLMO3: Family =
    Family { model_type: "olmo3", architecture: "Olmo3ForCausalLM", default_targets: &[], read: olmo3 };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-5,
    tie_word_embeddings: false,
};

fn olmo2(fields: &mut Fields) -> ModelSpec {
    let decoder = Decoder::read(fields, &DEFAULTS);
    let rope = rope::read(fields, &decoder, 10_000.0);
    spec("olmo2", decoder, vec![rope], fields)
}

fn olmo3(fields: &mut Fields) -> ModelSpec {
    let decoder = Decoder::read(fields, &DEFAULTS);
    let window = fields.size_or_null("sliding_window", Some(4096));
    let is_sliding = decoder.layer_types(fields);
    let ropes = rope::read_two(fields, &decoder, [500_000.0; 2]);
    let mut spec = spec("olmo3", decoder, ropes.into(), fields);
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        if is_sliding.as_ref().map_or((i + 1) % 4 != 0, |list| list[i]) {
            (layer.attention.window, layer.attention.rope) = (window, Some(1));
        }
    }
    spec
}

fn spec(family: &'static str, mut decoder: Decoder, ropes: Vec<RopeConfig>, fields: &mut Fields) -> ModelSpec {
    let attention_bias = fields.flag("attention_bias", false);
    (decoder.qkv_bias, decoder.o_bias) = (attention_bias, attention_bias);
    fields.check_neutral([("hidden_act", json!("silu"))]);
    let mut spec = decoder.spec(family, ropes, fields);
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        let norm = |id: NormId, part: &str, width: usize| {
            Some(Norm { id, name: format!("model.layers.{i}.{part}.weight"), width, offset: 0.0 })
        };
        let (attention, mlp) = (&mut layer.attention, &mut layer.mlp);
        attention.norm = None;
        attention.q_norm = norm(NormId::Q, "self_attn.q_norm", attention.q_width());
        attention.k_norm = norm(NormId::K, "self_attn.k_norm", attention.kv_width());
        attention.output_norm = norm(NormId::AttentionOutput, "post_attention_layernorm", spec.hidden_size);
        mlp.norm = None;
        mlp.output_norm = norm(NormId::MlpOutput, "post_feedforward_layernorm", spec.hidden_size);
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::super::tests::{changed, error_of, spec_of};
    use super::*;
    use crate::model::rope::RopeScaling;
    use serde_json::Value;

    fn olmo(model_type: &str, changes: Value) -> Value {
        changed(
            json!({"model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
            "num_attention_heads": 4, "vocab_size": 100}),
            &changes,
        )
    }

    /// Window and base of the rotation of each layer.
    fn layers(config: Value) -> Vec<(Option<usize>, f64)> {
        let spec = spec_of(config);
        let theta = |rope: Option<usize>| spec.ropes[rope.unwrap()].rope_theta;
        spec.layers.iter().map(|layer| (layer.attention.window, theta(layer.attention.rope))).collect()
    }

    #[test]
    fn norms_stand_behind_and_over_all_heads() {
        let spec = spec_of(olmo("olmo2", json!({"num_key_value_heads": 2})));
        let norms: Vec<_> = spec.layers[1].norms().map(|norm| (norm.id, norm.name.as_str(), norm.width)).collect();
        let expected = [
            (NormId::Q, "model.layers.1.self_attn.q_norm.weight", 64),
            (NormId::K, "model.layers.1.self_attn.k_norm.weight", 32),
            (NormId::AttentionOutput, "model.layers.1.post_attention_layernorm.weight", 64),
            (NormId::MlpOutput, "model.layers.1.post_feedforward_layernorm.weight", 64),
        ];
        assert_eq!(norms, expected);
        assert_eq!((spec.norm_eps, spec.max_position_embeddings, spec.head.is_tied), (1e-5, 2048, false));
        assert_eq!(layers(olmo("olmo2", json!({}))), [(None, 10_000.0); 5]);
    }

    #[test]
    fn three_of_four_layers_have_a_window_and_a_rotation_of_their_own() {
        let (sliding, full) = ((Some(4096), 500_000.0), (None, 1e6));
        let config = olmo("olmo3", json!({"rope_theta": 1e6}));
        assert_eq!(layers(config), [sliding, sliding, sliding, full, sliding]);
        let types = json!([vec!["full_attention"], vec!["sliding_attention"; 4]].concat());
        let yarn = json!({"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 256});
        let config = olmo("olmo3", json!({"layer_types": types, "sliding_window": 9, "rope_scaling": yarn}));
        assert_eq!(layers(config.clone())[..2], [(None, 500_000.0), (Some(9), 500_000.0)]);
        let ropes = spec_of(config).ropes;
        assert!(matches!(ropes[0].scaling, RopeScaling::Yarn(_)) && ropes[1].scaling == RopeScaling::Default);
        let both = json!({"full_attention": {"rope_type": "linear", "factor": 2, "rope_theta": 3e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 4e3}});
        let config = olmo("olmo3", json!({"rope_parameters": both}));
        assert_eq!(layers(config)[2..4], [(Some(4096), 4e3), (None, 3e3)]);
    }

    #[test]
    fn one_rotation_for_two_kinds_of_layers_is_refused() {
        let yarn = json!({"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 256});
        let error = error_of(olmo("olmo3", json!({"rope_parameters": yarn})));
        assert!(error.contains("rope_parameters.factor: found 8, not a key"), "{error}");
        let inside = json!({"full_attention": {"rope_type": "yarn", "factor": 8, "truncate": false}});
        let error = error_of(olmo("olmo3", json!({"rope_parameters": inside})));
        assert!(error.contains("rope_parameters.full_attention.truncate: found false, allowed: true"), "{error}");
        let error = error_of(olmo("olmo2", json!({"clip_qkv": 8.0})));
        assert!(error.contains("clip_qkv: found 8.0, not a key"), "{error}");
    }
}

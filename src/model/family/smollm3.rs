//! SmolLM3: Llama whose every fourth layer rotates nothing (NoPE).

use serde_json::{Value, json};

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, rope};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "smollm3", architecture: "SmolLM3ForCausalLM", default_targets: &[], read };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(4),
    head_dim: None,
    max_position_embeddings: 32_768,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: true,
};

fn read(fields: &mut Fields) -> ModelSpec {
    let mut decoder = Decoder::read(fields, &DEFAULTS);
    let attention_bias = fields.flag("attention_bias", false);
    (decoder.qkv_bias, decoder.o_bias) = (attention_bias, attention_bias);
    decoder.mlp_bias = fields.flag("mlp_bias", false);
    let has_rope = rotated_layers(fields, decoder.num_hidden_layers);
    let windows = decoder.windows(fields, None);
    let rope = rope::read(fields, &decoder, 2e6);
    // The released file has these, and the class reads neither.
    for key in ["max_window_layers", "pretraining_tp"] {
        fields.take(key);
    }
    fields.check_neutral([("hidden_act", json!("silu"))]);
    let mut spec = decoder.spec("smollm3", vec![rope], fields);
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        let has_rope = has_rope(i);
        layer.attention.rope = has_rope.then_some(0);
        layer.attention.window = windows.of(i, !has_rope);
    }
    spec
}

/// Takes `no_rope_layers`, a list in which 1 stands for a layer *with* RoPE, and the interval that stands in for the
/// list.
fn rotated_layers(fields: &mut Fields, num_layers: usize) -> impl Fn(usize) -> bool + use<> {
    let interval = fields.size("no_rope_layer_interval", Some(4));
    let allowed = format!("a list with 1 (RoPE) or 0 (none) for each of {num_layers} layers");
    let has_rope = |value: &Value| value.as_u64().filter(|&flag| flag < 2).map(|flag| flag == 1);
    let listed: Option<Vec<bool>> = fields.parse("no_rope_layers", Some(None), None, &allowed, |value| {
        let list: Vec<bool> = value.as_array()?.iter().map(has_rope).collect::<Option<_>>()?;
        (list.len() >= num_layers).then_some(Some(list))
    });
    move |layer| listed.as_ref().map_or(!(layer + 1).is_multiple_of(interval), |list| list[layer])
}

#[cfg(test)]
mod tests {
    use super::super::qwen2::tests::{biases, windows};
    use super::super::tests::{changed, error_of, spec_of};
    use super::*;

    fn smollm3(changes: Value) -> Value {
        changed(
            json!({"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 16, "vocab_size": 100}),
            &changes,
        )
    }

    fn rotates(config: Value) -> Vec<bool> {
        spec_of(config).layers.iter().map(|layer| layer.attention.rope.is_some()).collect()
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(smollm3(json!({"pretraining_tp": 2, "max_window_layers": 28})));
        let attention = &spec.layers[0].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.window), (4, 4, None));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (32_768, 1e-6, true));
        assert_eq!(spec.ropes[0].rope_theta, 2e6);
        assert!(biases(&spec).is_empty());
        assert_eq!(biases(&spec_of(smollm3(json!({"attention_bias": true, "mlp_bias": true})))).len(), 7);
    }

    #[test]
    fn layers_without_rope_are_listed_or_every_fourth() {
        assert_eq!(rotates(smollm3(json!({}))), [true, true, true, false, true]);
        assert_eq!(rotates(smollm3(json!({"no_rope_layer_interval": 2}))), [true, false, true, false, true]);
        let list = json!({"no_rope_layers": [0, 1, 1, 1, 0, 0], "no_rope_layer_interval": 2});
        assert_eq!(rotates(smollm3(list)), [false, true, true, true, false]);
        for wrong in [json!([1, 1, 1, 0]), json!([1, 1, 1, 0, 2]), json!("none"), json!([true, true, true, true, true])]
        {
            let error = error_of(smollm3(json!({"no_rope_layers": wrong})));
            assert!(error.contains("no_rope_layers: found ") && error.contains("for each of 5 layers"), "{error}");
        }
    }

    #[test]
    fn layers_without_rope_alone_have_windows() {
        let used = json!({"use_sliding_window": true, "sliding_window": 9});
        assert_eq!(windows(smollm3(used.clone())), [None, None, None, Some(9), None]);
        assert_eq!(windows(smollm3(json!({"sliding_window": 9}))), [None; 5]);
        assert_eq!(windows(smollm3(json!({"use_sliding_window": true}))), [None; 5], "there is no default");
        let mut listed = smollm3(used);
        listed["layer_types"] = json!(vec!["sliding_attention"; 5]);
        assert_eq!(windows(listed), [Some(9); 5]);
    }
}

//! Qwen3, dense: Qwen2 without biases, with heads of a width of their own and a norm of each head's queries and keys.

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, QV, qwen2};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", default_targets: QV, read };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(32),
    head_dim: Some(128),
    max_position_embeddings: 32_768,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: false,
};

fn read(fields: &mut Fields) -> ModelSpec {
    let mut decoder = Decoder::read(fields, &DEFAULTS);
    let attention_bias = fields.flag("attention_bias", false);
    (decoder.qkv_bias, decoder.o_bias) = (attention_bias, attention_bias);
    decoder.head_norms = true;
    qwen2::qwen("qwen3", decoder, fields)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::qwen2::tests::{biases, windows};
    use super::super::tests::{changed, error_of, spec_of};
    use crate::model::rope::RopeScaling;
    use crate::model::spec::NormId;

    fn qwen3(changes: Value) -> Value {
        changed(
            json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 100}),
            &changes,
        )
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(qwen3(json!({})));
        let attention = &spec.layers[0].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.q_width()), (32, 128, 4096));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.head.is_tied), (32_768, 1e-6, false));
        assert!(biases(&spec).is_empty());
        let spec = spec_of(qwen3(json!({"attention_bias": true, "head_dim": 8, "num_key_value_heads": 4})));
        assert_eq!(biases(&spec), ["q_proj", "k_proj", "v_proj", "o_proj"]);
        assert_eq!((spec.layers[0].attention.head_dim, spec.layers[0].attention.kv_width()), (8, 32));
    }

    #[test]
    fn queries_and_keys_of_a_head_are_normed() {
        let spec = spec_of(qwen3(json!({})));
        let attention = &spec.layers[1].attention;
        let norms: Vec<_> = attention.norms().map(|norm| (norm.id, norm.name.as_str(), norm.width)).collect();
        let expected = [
            (NormId::Attention, "model.layers.1.input_layernorm.weight", 64),
            (NormId::Q, "model.layers.1.self_attn.q_norm.weight", 128),
            (NormId::K, "model.layers.1.self_attn.k_norm.weight", 128),
        ];
        assert_eq!(norms, expected);
    }

    #[test]
    fn windows_are_those_of_qwen2() {
        let used = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1});
        assert_eq!(windows(qwen3(used)), [None, Some(9)]);
        let error = error_of(qwen3(json!({"num_experts": 8})));
        assert!(error.contains("num_experts: found 8, not a key this program knows"), "{error}");
    }

    /// DeepSeek-R1-0528-Qwen3-8B has a key that is spelled like the attention factor, and is not that.
    #[test]
    fn attn_factor_is_not_attention_factor() {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
            "attn_factor": 0.8782488562869419});
        let spec = spec_of(qwen3(json!({"rope_scaling": yarn, "max_position_embeddings": 131_072})));
        let RopeScaling::Yarn(yarn) = &spec.ropes[0].scaling else { panic!("{:?}", spec.ropes) };
        assert_eq!(yarn.attention_factor, 0.1 * 4.0_f64.ln() + 1.0);
    }
}

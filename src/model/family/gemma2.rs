//! Gemma 2: four norms a layer whose files have weight − 1, GELU by tanh, embeddings scaled by √hidden_size, bounded
//! scores and logits, and a window on every other layer. Gemma 3 has most of it.

use serde_json::json;

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, QV, rope};
use crate::device::Activation;
use crate::model::rope::RopeConfig;
use crate::model::spec::{ModelSpec, Norm, NormId};

pub(super) const FAMILY: Family =
    Family { model_type: "gemma2", architecture: "Gemma2ForCausalLM", default_targets: QV, read };

fn read(fields: &mut Fields) -> ModelSpec {
    let gemma = Gemma::read(fields, 256_000, 8192);
    let scores_cap = softcap(fields, "attn_logit_softcapping", Some(50.0));
    let logits_cap = softcap(fields, "final_logit_softcapping", Some(30.0));
    let rope = rope::read(fields, &gemma.decoder, 10_000.0);
    let mut spec = gemma.spec("gemma2", vec![rope], fields, |layer| layer % 2 == 0);
    spec.head.softcap = logits_cap;
    spec.layers.iter_mut().for_each(|layer| layer.attention.softcap = scores_cap);
    spec
}

/// Takes a bound, which null switches off.
pub(super) fn softcap(fields: &mut Fields, key: &str, absent: Option<f64>) -> Option<f32> {
    let is_off = fields.is_null(key) || absent.is_none() && !fields.has(key);
    (!is_off).then(|| fields.float(key, absent) as f32)
}

/// The keys that all Gemmas share, read.
pub(super) struct Gemma {
    pub decoder: Decoder,
    query_pre_attn_scalar: f64,
    window: usize,
    is_sliding: Option<Vec<bool>>,
}

impl Gemma {
    /// Text models in multimodal files leave out the sizes that the class has too; `vocab_size` and `positions` are its
    /// values.
    pub fn read(fields: &mut Fields, vocab_size: usize, positions: usize) -> Gemma {
        for (key, size) in [
            ("vocab_size", vocab_size),
            ("hidden_size", 2304),
            ("intermediate_size", 9216),
            ("num_hidden_layers", 26),
            ("num_attention_heads", 8),
        ] {
            fields.map.entry(key).or_insert(json!(size));
        }
        let defaults = Defaults {
            num_key_value_heads: Some(4),
            head_dim: Some(256),
            max_position_embeddings: positions,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
        };
        let mut decoder = Decoder::read(fields, &defaults);
        let attention_bias = fields.flag("attention_bias", false);
        (decoder.qkv_bias, decoder.o_bias) = (attention_bias, attention_bias);
        // Files have these, and the classes read none of them.
        for key in ["hidden_act", "cache_implementation", "sliding_window_size"] {
            fields.take(key);
        }
        fields.check_neutral([
            ("hidden_activation", json!("gelu_pytorch_tanh")),
            ("use_bidirectional_attention", json!(false)),
        ]);
        if fields.is_null("sliding_window") {
            fields.refuse("sliding_window", json!(null), "an integer above 0");
        }
        Gemma {
            query_pre_attn_scalar: fields.float("query_pre_attn_scalar", Some(256.0)),
            window: fields.size("sliding_window", Some(4096)),
            is_sliding: decoder.layer_types(fields),
            decoder,
        }
    }

    /// Makes the model. `slides` says which layers have a window where `layer_types` is absent. They rotate by the last
    /// of `ropes`.
    pub fn spec(
        self,
        family: &'static str,
        ropes: Vec<RopeConfig>,
        fields: &mut Fields,
        slides: impl Fn(usize) -> bool,
    ) -> ModelSpec {
        let (sliding_rope, scale) = (ropes.len() - 1, (1.0 / self.query_pre_attn_scalar.sqrt()) as f32);
        let mut spec = self.decoder.spec(family, ropes, fields);
        spec.overflows_fp16 = true;
        (spec.embedding.scale, spec.embedding.rounds_scale) = ((spec.hidden_size as f32).sqrt(), true);
        spec.head.norm.offset = 1.0;
        for (i, layer) in spec.layers.iter_mut().enumerate() {
            let norm = |id, name| Some(norm(i, id, name, spec.hidden_size));
            let (attention, mlp) = (&mut layer.attention, &mut layer.mlp);
            let is_sliding = self.is_sliding.as_ref().map_or_else(|| slides(i), |list| list[i]);
            attention.window = is_sliding.then_some(self.window);
            attention.rope = Some(if is_sliding { sliding_rope } else { 0 });
            attention.scale = scale;
            attention.norm = norm(NormId::Attention, "input_layernorm");
            attention.output_norm = norm(NormId::AttentionOutput, "post_attention_layernorm");
            mlp.norm = norm(NormId::Mlp, "pre_feedforward_layernorm");
            mlp.output_norm = norm(NormId::MlpOutput, "post_feedforward_layernorm");
            mlp.activation = Activation::GeluTanh;
        }
        spec
    }
}

/// A norm of a layer, whose file has weight − 1.
pub(super) fn norm(layer: usize, id: NormId, name: &str, width: usize) -> Norm {
    Norm { id, name: format!("model.layers.{layer}.{name}.weight"), width, offset: 1.0 }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::Value;

    use super::super::tests::{changed, error_of, spec_of};
    use super::*;
    use crate::model::spec::LayerSpec;

    fn gemma2(changes: Value) -> Value {
        changed(
            json!({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 100,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
            &changes,
        )
    }

    /// The window and the rotation of each layer.
    pub fn windows(spec: &ModelSpec) -> Vec<(Option<usize>, Option<usize>)> {
        spec.layers.iter().map(|LayerSpec { attention, .. }| (attention.window, attention.rope)).collect()
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(gemma2(json!({})));
        let attention = &spec.layers[0].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.scale), (4, 256, 1.0 / 16.0));
        assert_eq!((attention.softcap, spec.head.softcap, spec.head.is_tied), (Some(50.0), Some(30.0), true));
        assert_eq!((spec.max_position_embeddings, spec.norm_eps, spec.overflows_fp16), (8192, 1e-6, true));
        assert_eq!((spec.embedding.scale, spec.embedding.rounds_scale), (8.0, true));
        assert_eq!(spec.layers[0].mlp.activation, Activation::GeluTanh);
        let of_class = spec_of(json!({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}));
        assert_eq!((of_class.vocab_size, of_class.hidden_size, of_class.num_layers()), (256_000, 2304, 26));
        let off =
            json!({"attn_logit_softcapping": null, "final_logit_softcapping": null, "query_pre_attn_scalar": 144});
        let spec = spec_of(gemma2(off));
        assert_eq!((spec.layers[3].attention.softcap, spec.head.softcap), (None, None));
        assert_eq!(spec.layers[3].attention.scale, 1.0 / 12.0);
    }

    #[test]
    fn a_layer_has_four_norms_of_one_plus_weight() {
        let spec = spec_of(gemma2(json!({})));
        let norms: Vec<_> = spec.layers[1].norms().map(|norm| (norm.id, norm.name.as_str(), norm.offset)).collect();
        let expected = [
            (NormId::Attention, "model.layers.1.input_layernorm.weight", 1.0),
            (NormId::AttentionOutput, "model.layers.1.post_attention_layernorm.weight", 1.0),
            (NormId::Mlp, "model.layers.1.pre_feedforward_layernorm.weight", 1.0),
            (NormId::MlpOutput, "model.layers.1.post_feedforward_layernorm.weight", 1.0),
        ];
        assert_eq!(norms, expected);
        assert_eq!(spec.head.norm.offset, 1.0);
    }

    #[test]
    fn even_layers_have_windows_unless_they_are_listed() {
        let rule = spec_of(gemma2(json!({"sliding_window": 9})));
        assert_eq!(windows(&rule), [(Some(9), Some(0)), (None, Some(0)), (Some(9), Some(0)), (None, Some(0))]);
        let types = ["full_attention", "full_attention", "sliding_attention", "full_attention"];
        let listed = spec_of(gemma2(json!({"layer_types": types})));
        assert_eq!(windows(&listed), [(None, Some(0)), (None, Some(0)), (Some(4096), Some(0)), (None, Some(0))]);
    }

    #[test]
    fn meanings_that_are_not_implemented_are_refused() {
        for (changes, expected) in [
            (json!({"hidden_activation": "gelu"}), "hidden_activation: found \"gelu\", allowed: \"gelu_pytorch_tanh\""),
            (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention: found true"),
            (json!({"sliding_window": null}), "sliding_window: found null, allowed: an integer above 0"),
            (json!({"final_logit_softcapping": 0}), "final_logit_softcapping: found 0, allowed: a number above 0"),
            (json!({"layer_types": ["full_attention"]}), "layer_types: found "),
            (json!({"rope_parameters": {"full_attention": {}}}), "rope_parameters.full_attention: found"),
        ] {
            let error = error_of(gemma2(changes));
            assert!(error.contains(expected), "{expected} is not in {error}");
        }
    }
}

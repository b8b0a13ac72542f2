//! Gemma 3's text model: Gemma 2 with norms of each head's queries and keys in place of bounded scores, and five layers
//! with a window, and a rotation of their own, before each with full attention. Checkpoints that also see are read as
//! their text tower.

use super::gemma2::{Gemma, norm, softcap};
use super::json_fields::Fields;
use super::{Family, QV, rope, text_tower};
use crate::model::spec::{ModelSpec, NormId};

pub(super) const FAMILY: Family =
    Family { model_type: "gemma3_text", architecture: "Gemma3ForCausalLM", default_targets: QV, read };

/// A model that also sees, of which the text tower is read.
pub(super) const MULTIMODAL: Family = Family {
    model_type: "gemma3",
    architecture: "Gemma3ForConditionalGeneration",
    default_targets: &[],
    read: |fields| text_tower(fields, "gemma3", &[TOWER]),
};

const TOWER: Family = Family { read: read_tower, ..FAMILY };

fn read(fields: &mut Fields) -> ModelSpec {
    let logits_cap = softcap(fields, "final_logit_softcapping", None);
    let mut spec = read_text(fields, "gemma3_text");
    spec.head.softcap = logits_cap;
    spec
}

/// The class of models that also see keeps a bound of logits and does not apply it.
fn read_tower(fields: &mut Fields) -> ModelSpec {
    fields.take("final_logit_softcapping");
    read_text(fields, "gemma3")
}

/// Takes the keys that mean the same in a text model and in the text tower of a multimodal one.
fn read_text(fields: &mut Fields, family: &'static str) -> ModelSpec {
    let gemma = Gemma::read(fields, 262_208, 131_072);
    let pattern = fields.size("sliding_window_pattern", Some(6));
    // The class keeps a bound of scores and does not apply it; transformers writes the pattern under both names.
    for key in ["attn_logit_softcapping", "_sliding_window_pattern"] {
        fields.take(key);
    }
    let local = fields.float("rope_local_base_freq", Some(10_000.0));
    let ropes = rope::read_two(fields, &gemma.decoder, [1e6, local]);
    let mut spec = gemma.spec(family, ropes.into(), fields, |layer| !(layer + 1).is_multiple_of(pattern));
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        let attention = &mut layer.attention;
        attention.q_norm = Some(norm(i, NormId::Q, "self_attn.q_norm", attention.head_dim));
        attention.k_norm = Some(norm(i, NormId::K, "self_attn.k_norm", attention.head_dim));
    }
    spec
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::gemma2::tests::windows;
    use super::super::tests::{changed, error_of, spec_of};
    use crate::model::rope::RopeScaling;
    use crate::model::spec::NormId;

    fn gemma3(changes: Value) -> Value {
        changed(
            json!({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 8, "vocab_size": 100}),
            &changes,
        )
    }

    #[test]
    fn absent_keys_are_the_defaults_of_the_class() {
        let spec = spec_of(gemma3(json!({})));
        let attention = &spec.layers[0].attention;
        assert_eq!((attention.num_key_value_heads, attention.head_dim, attention.scale), (4, 256, 1.0 / 16.0));
        assert_eq!((attention.softcap, spec.head.softcap, spec.head.is_tied), (None, None, true));
        assert_eq!(spec.max_position_embeddings, 131_072);
        let norms: Vec<_> = attention.norms().map(|norm| (norm.id, norm.width, norm.offset)).collect();
        let expected = [(NormId::Attention, 64), (NormId::Q, 256), (NormId::K, 256), (NormId::AttentionOutput, 64)];
        assert_eq!(norms, expected.map(|(id, width)| (id, width, 1.0)));
        let of_class = spec_of(json!({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}));
        assert_eq!((of_class.vocab_size, of_class.layers[0].attention.num_heads), (262_208, 8));
    }

    #[test]
    fn a_bound_of_logits_counts_and_one_of_scores_does_not() {
        let spec = spec_of(gemma3(json!({"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0})));
        assert_eq!((spec.head.softcap, spec.layers[0].attention.softcap), (Some(3.0), None));
    }

    #[test]
    fn every_sixth_layer_is_full_and_rotates_by_its_own_rope() {
        let (sliding, full) = ((Some(4096), Some(1)), (None, Some(0)));
        let spec = spec_of(gemma3(json!({"rope_theta": 2e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})));
        assert_eq!(windows(&spec), [sliding, sliding, sliding, sliding, sliding, full, sliding]);
        assert_eq!(spec.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(spec.ropes[1].scaling, RopeScaling::Default);
        assert_eq!([spec.ropes[0].rope_theta, spec.ropes[1].rope_theta], [2e6, 1e4]);
        let pattern = spec_of(gemma3(json!({"sliding_window_pattern": 2, "rope_local_base_freq": 500})));
        assert_eq!(windows(&pattern), [sliding, full, sliding, full, sliding, full, sliding]);
        assert_eq!([pattern.ropes[0].rope_theta, pattern.ropes[1].rope_theta], [1e6, 500.0]);
    }

    #[test]
    fn both_spellings_are_one_model() {
        let mut types = vec!["sliding_attention"; 7];
        types[5] = "full_attention";
        let new = json!({"layer_types": types, "_sliding_window_pattern": 3, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
        let old = json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6});
        assert_eq!(spec_of(gemma3(new)), spec_of(gemma3(old)));
        let error = error_of(gemma3(json!({"rope_parameters": {"rope_type": "linear", "factor": 8.0}})));
        assert!(error.contains("rope_parameters.factor: found 8.0, not a key"), "{error}");
    }

    /// The released files of 4B, 12B and 27B leave out what the class has too.
    #[test]
    fn a_model_that_also_sees_is_its_text_tower() {
        let spec = spec_of(json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144, "eos_token_id": [1, 106],
            "mm_tokens_per_image": 256, "vision_config": {"model_type": "siglip_vision_model"},
            "text_config": {"hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text",
                "num_hidden_layers": 6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
                "final_logit_softcapping": 3.0}}));
        assert_eq!(
            (spec.family, spec.vocab_size, spec.head.is_tied, spec.head.softcap),
            ("gemma3", 262_208, true, None)
        );
        assert_eq!(spec.layers[0].norms().count(), 6);
        let name = "model.language_model.layers.5.self_attn.q_norm.weight";
        assert!(spec.layers[5].norms().any(|norm| norm.name == name && norm.offset == 1.0));
        assert_eq!((spec.layers[0].attention.window, spec.overflows_fp16), (Some(1024), true));
    }
}

//! Models of Mistral that also see (Small 3.1, Ministral 3 as released): their text tower is a Mistral or a Ministral
//! 3.

use super::json_fields::Fields;
use super::{Family, ministral3, mistral, text_tower};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "mistral3", architecture: "Mistral3ForConditionalGeneration", default_targets: &[], read };

fn read(fields: &mut Fields) -> ModelSpec {
    text_tower(fields, "mistral3", &[mistral::FAMILY, ministral3::FAMILY])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{changed, error_of, spec_of};

    fn mistral3(changes: Value, text: Value) -> Value {
        let mut config = changed(
            json!({"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
            "image_token_index": 10, "spatial_merge_size": 2, "vision_feature_layer": -1, "projector_hidden_act": "gelu",
            "multimodal_projector_bias": false, "vision_config": {"model_type": "pixtral"}, "torch_dtype": "bfloat16",
            "text_config": {"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                "num_attention_heads": 16, "vocab_size": 100, "tie_word_embeddings": false, "eos_token_id": 7}}),
            &changes,
        );
        config["text_config"].as_object_mut().unwrap().extend(text.as_object().unwrap().clone());
        config
    }

    #[test]
    fn tensors_have_the_names_of_the_whole_model() {
        let spec = spec_of(mistral3(json!({"tie_word_embeddings": false}), json!({})));
        let names: Vec<String> = spec.tensors().into_iter().map(|tensor| tensor.name).collect();
        assert_eq!(names[0], "model.language_model.embed_tokens.weight");
        assert_eq!(names[1], "model.language_model.layers.0.input_layernorm.weight");
        assert_eq!(names[names.len() - 2..], ["model.language_model.norm.weight", "lm_head.weight"]);
        assert_eq!((spec.family, spec.eos_token_ids), ("mistral3", vec![7]));
    }

    #[test]
    fn the_outer_keys_decide_about_the_head_and_the_quantization() {
        let bnb = json!({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"});
        let spec = spec_of(mistral3(json!({"quantization_config": bnb, "eos_token_id": [1, 2]}), json!({})));
        assert_eq!((spec.head.is_tied, &*spec.head.name), (true, "model.language_model.embed_tokens.weight"));
        assert_eq!((spec.quantization.is_some(), spec.eos_token_ids), (true, vec![1, 2]));
    }

    #[test]
    fn problems_of_the_text_model_are_named_with_their_place() {
        for (changes, text, expected) in [
            (json!({}), json!({"hidden_act": "gelu"}), "text_config.hidden_act: found \"gelu\""),
            (json!({}), json!({"rope_scaling": {"factor": 2}}), "text_config.rope_scaling.factor: found 2, not a key"),
            (
                json!({}),
                json!({"model_type": "llama"}),
                "text_config.model_type: found \"llama\", allowed: mistral, ministral3",
            ),
            (json!({}), json!({"model_type": null}), "text_config.model_type: missing, allowed: mistral, ministral3"),
            (json!({"router": 1}), json!({}), "router: found 1, not a key"),
        ] {
            let error = error_of(mistral3(changes, text));
            assert!(error.contains(expected) && error.lines().count() == 2, "{expected} is not all of {error}");
        }
    }
}

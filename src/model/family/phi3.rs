//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama with fused modules, and a rotation of a part of each head, by LongRoPE
//! in long models.

use serde_json::{Value, json};

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, rope};
use crate::model::rope::{LongRope, RopeConfig, RopeScaling};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "phi3", architecture: "Phi3ForCausalLM", default_targets: &[], read };

const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    tie_word_embeddings: false,
};

const ORIGINAL_LENGTH: &str = "original_max_position_embeddings";

fn read(fields: &mut Fields) -> ModelSpec {
    let mut decoder = Decoder::read(fields, &DEFAULTS);
    decoder.is_fused = true;
    let window = fields.size_or_null("sliding_window", None);
    let rope = read_rope(fields, &decoder);
    // It names code of the model's own, which released files carry beside the class that transformers has.
    fields.take("auto_map");
    fields.check_neutral([
        ("hidden_act", json!("silu")),
        ("resid_pdrop", json!(0.0)),
        ("embd_pdrop", json!(0.0)),
        // Keys of Phi-4-mini, which the class does not read.
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("lm_head_bias", json!(false)),
        ("full_attn_mod", json!(1)),
        ("interpolate_factor", json!(1)),
    ]);
    let mut spec = decoder.spec("phi3", vec![rope], fields);
    spec.layers.iter_mut().for_each(|layer| layer.attention.window = window);
    spec
}

/// Takes the keys of the rotation.
fn read_rope(fields: &mut Fields, decoder: &Decoder) -> RopeConfig {
    let (theta, part) = (fields.float("rope_theta", Some(10_000.0)), fields.float("partial_rotary_factor", Some(1.0)));
    let original = fields.size(ORIGINAL_LENGTH, Some(4096));
    let mut rope = rope::parameters(fields);
    let (rope_theta, part) = (rope.float("rope_theta", Some(theta)), rope.float("partial_rotary_factor", Some(part)));
    let rotary_dim = (decoder.head_dim as f64 * part) as usize;
    if part > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let allowed = format!("at most 1, and an even part of head_dim {}", decoder.head_dim);
        rope.problems.push(format!("partial_rotary_factor: found {part}, allowed: {allowed}"));
    }
    // The class reads the key beside the object, whatever is in it.
    if rope.take(ORIGINAL_LENGTH).is_some_and(|inner| inner != original) {
        rope.problems.push(format!("{}{ORIGINAL_LENGTH}: it must be the one beside it, {original}", rope.prefix));
    }
    let kind = rope::kind(&mut rope);
    let max_position_embeddings = decoder.max_position_embeddings;
    let scaling = match kind.as_str().unwrap_or_default() {
        "default" => RopeScaling::Default,
        // Older files have the other names.
        "longrope" | "su" | "yarn" => {
            let ratio = max_position_embeddings as f64 / original as f64;
            let factor = rope.float("factor", Some(ratio));
            let attention_factor = LongRope::default_attention_factor(factor, original);
            RopeScaling::LongRope(LongRope {
                short_factor: read_factors(&mut rope, "short_factor", rotary_dim / 2),
                long_factor: read_factors(&mut rope, "long_factor", rotary_dim / 2),
                original_max_position_embeddings: original,
                attention_factor: rope.float("attention_factor", Some(attention_factor)),
            })
        }
        _ => {
            rope.refuse("rope_type", kind, "default or longrope");
            rope.map.clear();
            RopeScaling::Default
        }
    };
    rope.check_rest();
    fields.problems.append(&mut rope.problems);
    RopeConfig { rope_theta, rotary_dim, max_position_embeddings, scaling, growth: None }
}

/// Takes the factors of `len` wavelengths.
fn read_factors(rope: &mut Fields, key: &str, len: usize) -> Vec<f64> {
    let one = |value: &Value| value.as_f64().filter(|x| (1e-30..=1e30).contains(x));
    rope.parse(key, None, Vec::new(), &format!("a list of {len} numbers above 0"), |value| {
        let list: Vec<f64> = value.as_array()?.iter().map(one).collect::<Option<_>>()?;
        (list.len() == len).then_some(list)
    })
}

#[cfg(test)]
mod tests;

//! RoPE's keys, in both forms: `rope_theta` beside `rope_scaling` (transformers 4), or all in `rope_parameters` (5).

use serde_json::json;

use super::json_fields::Fields;
use crate::model::rope::{Llama3, RopeConfig, RopeScaling, Yarn};

/// Takes the keys of a rotation of all of `head_dim`.
pub(super) fn read(fields: &mut Fields, head_dim: usize, max_position_embeddings: usize) -> RopeConfig {
    if fields.has("rope_scaling") && fields.has("rope_parameters") {
        fields.problems.push("rope_scaling and rope_parameters: both are there, keep the one that is meant".into());
    }
    let outer_theta = fields.float("rope_theta", Some(10_000.0));
    let mut rope = fields.object(if fields.has("rope_scaling") { "rope_scaling" } else { "rope_parameters" });
    let rope_theta = rope.float("rope_theta", Some(outer_theta));
    let kinds = [rope.take("rope_type"), rope.take("type")];
    let kind = kinds.into_iter().flatten().next().unwrap_or(json!("default"));
    let length = Some(max_position_embeddings);
    let scaling = match kind.as_str().unwrap_or_default() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: rope.float("factor", None) },
        "dynamic" => RopeScaling::Dynamic { factor: rope.float("factor", None) },
        "yarn" => RopeScaling::Yarn(read_yarn(&mut rope, max_position_embeddings)),
        "llama3" => RopeScaling::Llama3(Llama3 {
            factor: rope.float("factor", None),
            low_freq_factor: rope.float("low_freq_factor", None),
            high_freq_factor: rope.float("high_freq_factor", None),
            original_max_position_embeddings: rope.size("original_max_position_embeddings", length),
        }),
        _ => {
            rope.refuse("rope_type", kind, "default, linear, dynamic, yarn or llama3");
            rope.map.clear();
            RopeScaling::Default
        }
    };
    rope.check_neutral([("partial_rotary_factor", json!(1.0))]);
    rope.check_rest();
    fields.problems.append(&mut rope.problems);
    RopeConfig { rope_theta, head_dim, max_position_embeddings, scaling }
}

fn read_yarn(rope: &mut Fields, max_position_embeddings: usize) -> Yarn {
    let original = rope.size("original_max_position_embeddings", Some(max_position_embeddings));
    let factor = rope.float("factor", Some(max_position_embeddings as f64 / original as f64));
    let (mscale, mscale_all_dim) = (rope.float("mscale", Some(0.0)), rope.float("mscale_all_dim", Some(0.0)));
    let attention_factor = Yarn::default_attention_factor(factor, mscale, mscale_all_dim);
    Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor: rope.float("attention_factor", Some(attention_factor)),
        beta_fast: rope.float("beta_fast", Some(32.0)),
        beta_slow: rope.float("beta_slow", Some(1.0)),
        truncate: rope.flag("truncate", true),
    }
}

//! RoPE's keys, in both forms: `rope_theta` beside `rope_scaling` (transformers 4), or all in `rope_parameters` (5).

use serde_json::{Value, json};

use super::decoder::Decoder;
use super::json_fields::Fields;
use crate::model::rope::{Llama3, RopeConfig, RopeScaling, Yarn};

const ORIGINAL_LENGTH: &str = "original_max_position_embeddings";

/// Keys that other projects read and transformers ignores, with a warning: `attn_factor` is not `attention_factor`.
const IGNORED: [&str; 2] = ["attn_factor", "finetuned"];

/// Takes the keys of a rotation of all of `head_dim`. `theta` is the base where config.json gives none.
pub(super) fn read(fields: &mut Fields, decoder: &Decoder, theta: f64) -> RopeConfig {
    let theta = fields.float("rope_theta", Some(theta));
    let mut rope = parameters(fields);
    let config = config(&mut rope, decoder, theta);
    fields.problems.append(&mut rope.problems);
    config
}

/// Takes the keys of two rotations: of layers with full attention, and of layers with a window. `thetas` are their
/// bases where config.json gives none. `rope_theta` and `rope_scaling` mean the first alone; `rope_parameters` names
/// both.
pub(super) fn read_two(fields: &mut Fields, decoder: &Decoder, thetas: [f64; 2]) -> [RopeConfig; 2] {
    let thetas = [fields.float("rope_theta", Some(thetas[0])), thetas[1]];
    let mut both = parameters(fields);
    let full = match both.prefix.ends_with("rope_scaling.") {
        true => Fields { map: std::mem::take(&mut both.map), prefix: both.prefix.clone(), problems: Vec::new() },
        false => both.object("full_attention"),
    };
    let mut ropes = [full, both.object("sliding_attention")];
    both.check_rest();
    fields.problems.append(&mut both.problems);
    let configs = std::array::from_fn(|i| {
        // transformers reads `truncate` beside the two, so that one inside does nothing.
        ropes[i].check_neutral([("truncate", json!(true))]);
        config(&mut ropes[i], decoder, thetas[i])
    });
    ropes.iter_mut().for_each(|rope| fields.problems.append(&mut rope.problems));
    configs
}

/// Takes the object of parameters, in whichever of the two forms. It is empty where there is none.
pub(super) fn parameters(fields: &mut Fields) -> Fields {
    if fields.has("rope_scaling") && fields.has("rope_parameters") {
        fields.problems.push("rope_scaling and rope_parameters: both are there, keep the one that is meant".into());
    }
    let outer_length = fields.take(ORIGINAL_LENGTH);
    let mut rope = fields.object(if fields.has("rope_scaling") { "rope_scaling" } else { "rope_parameters" });
    // The length beside the object wins over that in it.
    rope.map.extend(outer_length.map(|length| (ORIGINAL_LENGTH.to_string(), length)));
    rope
}

/// Takes the type. `type` counts where `rope_type` is absent.
pub(super) fn kind(rope: &mut Fields) -> Value {
    let kinds = [rope.take("rope_type"), rope.take("type")];
    kinds.into_iter().flatten().next().unwrap_or(json!("default"))
}

/// Takes the parameters of one rotation. `theta` is the base where they have none.
pub(super) fn config(rope: &mut Fields, decoder: &Decoder, theta: f64) -> RopeConfig {
    let max_position_embeddings = decoder.max_position_embeddings;
    let rope_theta = rope.float("rope_theta", Some(theta));
    let kind = kind(rope);
    let length = rope.size(ORIGINAL_LENGTH, Some(max_position_embeddings));
    let scaling = match kind.as_str().unwrap_or_default() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: rope.float("factor", None) },
        "dynamic" => RopeScaling::Dynamic { factor: rope.float("factor", None) },
        "yarn" => RopeScaling::Yarn(read_yarn(rope, max_position_embeddings, length)),
        "llama3" => RopeScaling::Llama3(Llama3 {
            factor: rope.float("factor", None),
            low_freq_factor: rope.float("low_freq_factor", None),
            high_freq_factor: rope.float("high_freq_factor", None),
            original_max_position_embeddings: length,
        }),
        _ => {
            rope.refuse("rope_type", kind, "default, linear, dynamic, yarn or llama3");
            rope.map.clear();
            RopeScaling::Default
        }
    };
    rope.map.retain(|key, _| !IGNORED.contains(&key.as_str()));
    rope.check_neutral([("partial_rotary_factor", json!(1.0))]);
    rope.check_rest();
    RopeConfig { rope_theta, rotary_dim: decoder.head_dim, max_position_embeddings, scaling, growth: None }
}

fn read_yarn(rope: &mut Fields, max_position_embeddings: usize, original: usize) -> Yarn {
    let factor = rope.float("factor", Some(max_position_embeddings as f64 / original as f64));
    let (mscale, mscale_all_dim) = (rope.float_or_zero("mscale", 0.0), rope.float_or_zero("mscale_all_dim", 0.0));
    let attention_factor = Yarn::default_attention_factor(factor, mscale, mscale_all_dim);
    // 0 is as good as absent.
    let mut beta = |key, default| Some(rope.float_or_zero(key, default)).filter(|x| *x > 0.0).unwrap_or(default);
    Yarn {
        factor,
        original_max_position_embeddings: original,
        beta_fast: beta("beta_fast", 32.0),
        beta_slow: beta("beta_slow", 1.0),
        attention_factor: rope.float("attention_factor", Some(attention_factor)),
        truncate: rope.flag("truncate", true),
    }
}

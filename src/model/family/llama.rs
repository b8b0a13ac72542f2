//! Llama: RMSNorm before attention and MLP, grouped-query attention with RoPE, SwiGLU.

use serde_json::json;

use super::decoder::{Decoder, Defaults};
use super::json_fields::Fields;
use super::{Family, QV, rope};
use crate::model::spec::ModelSpec;

pub(super) const FAMILY: Family =
    Family { model_type: "llama", architecture: "LlamaForCausalLM", default_targets: QV, read };

fn read(fields: &mut Fields) -> ModelSpec {
    let defaults = Defaults {
        num_key_value_heads: None,
        head_dim: None,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
    };
    let mut decoder = Decoder::read(fields, &defaults);
    let attention_bias = fields.flag("attention_bias", false);
    (decoder.qkv_bias, decoder.o_bias) = (attention_bias, attention_bias);
    decoder.mlp_bias = fields.flag("mlp_bias", false);
    let rope = rope::read(fields, &decoder, 10_000.0);
    fields.check_neutral([
        ("hidden_act", json!("silu")),
        ("sliding_window", json!(null)),
        ("use_sliding_window", json!(false)),
        ("partial_rotary_factor", json!(1.0)),
        ("rope_interleaved", json!(false)),
        ("qk_norm", json!(false)),
        ("use_qk_norm", json!(false)),
    ]);
    decoder.spec("llama", vec![rope], fields)
}

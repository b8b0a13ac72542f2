//! Shapes of well-known models, for benchmarks on made-up weights.

use anyhow::{Context, Result};
use serde_json::json;

use super::spec::ModelSpec;

/// Each shape: name, layers, hidden size, intermediate size, heads, key-value heads, from the model's own
/// config.json.
const SHAPES: [(&str, [usize; 5]); 3] = [
    ("llama-3.1-8b", [32, 4096, 14_336, 32, 8]),
    ("llama-3.1-70b", [80, 8192, 28_672, 64, 8]),
    ("llama-3.1-405b", [126, 16_384, 53_248, 128, 8]),
];

/// Returns the configuration of a named shape, with `layers` layers if that is set.
pub fn named(name: &str, layers: Option<usize>) -> Result<ModelSpec> {
    let names: Vec<&str> = SHAPES.iter().map(|(name, _)| *name).collect();
    let found = SHAPES.iter().find(|(n, _)| *n == name);
    let (_, [num_layers, hidden, intermediate, heads, kv_heads]) =
        found.with_context(|| format!("--shape: found {name}; allowed: {}", names.join(", ")))?;
    let text = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers.unwrap_or(*num_layers),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": false,
    });
    ModelSpec::parse(text.to_string().as_bytes(), name)
}

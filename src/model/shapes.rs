//! Shapes of well-known models, for plans and for benchmarks on made-up weights.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::spec::ModelSpec;

/// Layers, hidden size, intermediate size, heads, key-value heads, width of a head.
type Sizes = [usize; 6];

const TIED: bool = true;
const UNTIED: bool = false;

/// A shape, from the model's own config.json: name, family, sizes, vocabulary, whether the head is tied to the
/// embedding, RoPE's base, positions, and the other keys that the family's defaults do not give.
type Shape = (&'static str, &'static str, Sizes, usize, bool, f64, usize, &'static str);

/// The further keys of Ministral 3 and of OLMo 3.
const MINISTRAL_3: &str = r#"{"rms_norm_eps": 1e-5, "rope_scaling": {"rope_type": "yarn", "factor": 16.0,
    "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1}}"#;
const OLMO_3: &str = r#"{"rms_norm_eps": 1e-6, "sliding_window": 4096, "rope_scaling": {"rope_type": "yarn", "factor": 8.0,
    "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0}}"#;

#[rustfmt::skip]
const SHAPES: &[Shape] = &[
    ("llama-3.1-8b", "llama", [32, 4096, 14_336, 32, 8, 128], 128_256, UNTIED, 5e5, 131_072, r#"{"rms_norm_eps": 1e-5}"#),
    ("llama-3.1-70b", "llama", [80, 8192, 28_672, 64, 8, 128], 128_256, UNTIED, 5e5, 131_072, r#"{"rms_norm_eps": 1e-5}"#),
    ("llama-3.1-405b", "llama", [126, 16_384, 53_248, 128, 8, 128], 128_256, UNTIED, 5e5, 131_072, r#"{"rms_norm_eps": 1e-5}"#),
    ("qwen2.5-0.5b", "qwen2", [24, 896, 4864, 14, 2, 64], 151_936, TIED, 1e6, 32_768, "{}"),
    ("qwen2.5-1.5b", "qwen2", [28, 1536, 8960, 12, 2, 128], 151_936, TIED, 1e6, 32_768, "{}"),
    ("qwen2.5-3b", "qwen2", [36, 2048, 11_008, 16, 2, 128], 151_936, TIED, 1e6, 32_768, "{}"),
    ("qwen2.5-7b", "qwen2", [28, 3584, 18_944, 28, 4, 128], 152_064, UNTIED, 1e6, 32_768, "{}"),
    ("qwen2.5-14b", "qwen2", [48, 5120, 13_824, 40, 8, 128], 152_064, UNTIED, 1e6, 32_768, "{}"),
    ("qwen2.5-32b", "qwen2", [64, 5120, 27_648, 40, 8, 128], 152_064, UNTIED, 1e6, 32_768, "{}"),
    ("qwen2.5-72b", "qwen2", [80, 8192, 29_568, 64, 8, 128], 152_064, UNTIED, 1e6, 32_768, "{}"),
    ("qwen3-0.6b", "qwen3", [28, 1024, 3072, 16, 8, 128], 151_936, TIED, 1e6, 40_960, "{}"),
    ("qwen3-1.7b", "qwen3", [28, 2048, 6144, 16, 8, 128], 151_936, TIED, 1e6, 40_960, "{}"),
    ("qwen3-4b", "qwen3", [36, 2560, 9728, 32, 8, 128], 151_936, TIED, 1e6, 40_960, "{}"),
    ("qwen3-8b", "qwen3", [36, 4096, 12_288, 32, 8, 128], 151_936, UNTIED, 1e6, 40_960, "{}"),
    ("qwen3-14b", "qwen3", [40, 5120, 17_408, 40, 8, 128], 151_936, UNTIED, 1e6, 40_960, "{}"),
    ("qwen3-32b", "qwen3", [64, 5120, 25_600, 64, 8, 128], 151_936, UNTIED, 1e6, 40_960, "{}"),
    ("smollm3-3b", "smollm3", [36, 2048, 11_008, 16, 4, 128], 128_256, TIED, 5e6, 65_536, "{}"),
    ("seed-oss-36b", "seed_oss", [64, 5120, 27_648, 80, 8, 128], 155_136, UNTIED, 1e7, 524_288, "{}"),
    ("mistral-7b-v0.3", "mistral", [32, 4096, 14_336, 32, 8, 128], 32_768, UNTIED, 1e6, 32_768,
        r#"{"rms_norm_eps": 1e-5, "sliding_window": null}"#),
    ("mistral-nemo-12b", "mistral", [40, 5120, 14_336, 32, 8, 128], 131_072, UNTIED, 1e6, 1_024_000,
        r#"{"rms_norm_eps": 1e-5, "sliding_window": null}"#),
    ("ministral-3-3b", "ministral3", [26, 3072, 9216, 32, 8, 128], 131_072, TIED, 1e6, 262_144, MINISTRAL_3),
    ("ministral-3-8b", "ministral3", [34, 4096, 14_336, 32, 8, 128], 131_072, UNTIED, 1e6, 262_144, MINISTRAL_3),
    ("ministral-3-14b", "ministral3", [40, 5120, 16_384, 32, 8, 128], 131_072, UNTIED, 1e9, 262_144, MINISTRAL_3),
    ("mistral-small-24b", "mistral", [40, 5120, 32_768, 32, 8, 128], 131_072, UNTIED, 1e8, 32_768,
        r#"{"rms_norm_eps": 1e-5, "sliding_window": null}"#),
    ("phi-4", "phi3", [40, 5120, 17_920, 40, 10, 128], 100_352, UNTIED, 2.5e5, 16_384,
        r#"{"rms_norm_eps": 1e-5, "sliding_window": null, "original_max_position_embeddings": 16384}"#),
    ("granite-3.3-8b", "granite", [40, 4096, 12_800, 32, 8, 128], 49_159, TIED, 1e7, 131_072,
        r#"{"rms_norm_eps": 1e-5, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125,
        "logits_scaling": 16.0}"#),
    ("olmo-2-7b", "olmo2", [32, 4096, 11_008, 32, 32, 128], 100_352, UNTIED, 5e5, 4096, r#"{"rms_norm_eps": 1e-6}"#),
    ("olmo-2-13b", "olmo2", [40, 5120, 13_824, 40, 40, 128], 100_352, UNTIED, 5e5, 4096, r#"{"rms_norm_eps": 1e-6}"#),
    ("olmo-2-32b", "olmo2", [64, 5120, 27_648, 40, 8, 128], 100_352, UNTIED, 5e5, 4096, r#"{"rms_norm_eps": 1e-6}"#),
    ("olmo-3-7b", "olmo3", [32, 4096, 11_008, 32, 32, 128], 100_278, UNTIED, 5e5, 65_536, OLMO_3),
    ("olmo-3-32b", "olmo3", [64, 5120, 27_648, 40, 8, 128], 100_278, UNTIED, 5e5, 65_536, OLMO_3),
    ("gemma-2-2b", "gemma2", [26, 2304, 9216, 8, 4, 256], 256_000, TIED, 1e4, 8192, "{}"),
    ("gemma-2-9b", "gemma2", [42, 3584, 14_336, 16, 8, 256], 256_000, TIED, 1e4, 8192, "{}"),
    ("gemma-2-27b", "gemma2", [46, 4608, 36_864, 32, 16, 128], 256_000, TIED, 1e4, 8192, r#"{"query_pre_attn_scalar": 144}"#),
    ("gemma-3-1b", "gemma3_text", [26, 1152, 6912, 4, 1, 256], 262_144, TIED, 1e6, 32_768, r#"{"sliding_window": 512}"#),
    ("gemma-3-4b", "gemma3_text", [34, 2560, 10_240, 8, 4, 256], 262_208, TIED, 1e6, 131_072,
        r#"{"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}"#),
    ("gemma-3-12b", "gemma3_text", [48, 3840, 15_360, 16, 8, 256], 262_208, TIED, 1e6, 131_072,
        r#"{"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}"#),
    ("gemma-3-27b", "gemma3_text", [62, 5376, 21_504, 32, 16, 128], 262_208, TIED, 1e6, 131_072,
        r#"{"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 168}"#),
];

/// Returns the names of all shapes, in the order of the table.
pub fn names() -> String {
    SHAPES.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ")
}

/// Returns a named shape, with `layers` layers if that is set.
pub fn named(name: &str, layers: Option<usize>) -> Result<ModelSpec> {
    ModelSpec::parse(config(name, layers)?.to_string().as_bytes(), name)
}

/// Returns the config.json of a named shape, with `layers` layers if that is set.
pub fn config(name: &str, layers: Option<usize>) -> Result<Value> {
    let found = SHAPES.iter().find(|(n, ..)| *n == name);
    let (_, family, sizes, vocab_size, is_tied, rope_theta, positions, more) =
        *found.with_context(|| format!("--shape: found {name}; allowed: {}", names()))?;
    let [num_layers, hidden, intermediate, heads, kv_heads, head_dim] = sizes;
    let mut config = json!({
        "model_type": family, "num_hidden_layers": layers.unwrap_or(num_layers), "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab_size, "tie_word_embeddings": is_tied, "rope_theta": rope_theta, "max_position_embeddings": positions,
    });
    let more: Value = serde_json::from_str(more).with_context(|| format!("keys of {name}"))?;
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::TensorSpec;

    /// Billions of weights that a model's card gives, without those for images, with the embedding once where the head
    /// is tied.
    #[test]
    fn every_shape_has_the_weights_of_its_model() {
        let known = [
            ("llama-3.1-8b", 8.03),
            ("llama-3.1-70b", 70.55),
            ("llama-3.1-405b", 405.85),
            ("qwen2.5-0.5b", 0.49),
            ("qwen2.5-1.5b", 1.54),
            ("qwen2.5-3b", 3.09),
            ("qwen2.5-7b", 7.62),
            ("qwen2.5-14b", 14.77),
            ("qwen2.5-32b", 32.76),
            ("qwen2.5-72b", 72.71),
            ("qwen3-0.6b", 0.60),
            ("qwen3-1.7b", 1.72),
            ("qwen3-4b", 4.02),
            ("qwen3-8b", 8.19),
            ("qwen3-14b", 14.77),
            ("qwen3-32b", 32.76),
            ("smollm3-3b", 3.08),
            ("seed-oss-36b", 36.15),
            ("mistral-7b-v0.3", 7.25),
            ("mistral-nemo-12b", 12.25),
            ("ministral-3-3b", 3.43),
            ("ministral-3-8b", 8.49),
            ("ministral-3-14b", 13.51),
            ("mistral-small-24b", 23.57),
            ("phi-4", 14.66),
            ("granite-3.3-8b", 8.17),
            ("olmo-2-7b", 7.30),
            ("olmo-2-13b", 13.72),
            ("olmo-2-32b", 32.23),
            ("olmo-3-7b", 7.30),
            ("olmo-3-32b", 32.23),
            ("gemma-2-2b", 2.61),
            ("gemma-2-9b", 9.24),
            ("gemma-2-27b", 27.23),
            ("gemma-3-1b", 1.00),
            ("gemma-3-4b", 3.88),
            ("gemma-3-12b", 11.77),
            ("gemma-3-27b", 27.01),
        ];
        for (name, billions) in known {
            let spec = named(name, None).unwrap();
            let weights: usize = spec.tensors().iter().map(TensorSpec::num_elements).sum();
            assert!(
                (weights as f64 / 1e9 - billions).abs() < 0.006,
                "{name} has {weights} weights for {billions} billion"
            );
        }
        for (name, family, ..) in SHAPES {
            let spec = named(name, Some(1)).unwrap();
            assert_eq!((spec.family, spec.num_layers()), (*family, 1), "{name}");
            assert!(known.iter().any(|(known, _)| known == name), "no number of weights is known of {name}");
        }
    }
}

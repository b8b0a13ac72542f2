//! Generates tokens one after the other, with keys and values kept from earlier ones.

use anyhow::{Result, ensure};

use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::run::RunArgs;
use crate::fsdp::schedule::{Descriptor, Mode};
use crate::model::batch::{MicroBatch, NO_TARGET};
use crate::model::rope::RopeConfig;
use crate::model::spec::ModelSpec;

/// The rule by which the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 chooses the most likely token.
    pub temperature: f64,
    pub seed: u64,
    pub max_new_tokens: usize,
}

/// Checks that a text does not grow from a length of short factors of LongRoPE to one of long factors: its keys would be of both.
///
/// # Errors
/// It may grow so; the error says how many new tokens are allowed.
pub fn check_length(spec: &ModelSpec, prompt: usize, max_new_tokens: usize) -> Result<()> {
    for length in spec.ropes.iter().filter_map(RopeConfig::short_length) {
        // The last new token is not computed with.
        ensure!(
            prompt > length || prompt + max_new_tokens <= length + 1,
            "--max-new-tokens: found {max_new_tokens}; allowed: at most {}, because a text that grows beyond {length} tokens has to \
             be rotated anew, which is not implemented",
            length + 1 - prompt
        );
    }
    Ok(())
}

/// Continues `prompt` until a token of `stop` or the limit; returns the new tokens without the stop token.
pub fn generate<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    prompt: &[u32],
    stop: &[u32],
    sampling: &Sampling,
    adapter: bool,
) -> Result<Vec<u32>> {
    ensure!(!prompt.is_empty(), "the prompt has no token");
    let (mut new, mut input, mut past) = (Vec::new(), prompt.to_vec(), 0);
    let mut random = sampling.seed;
    while new.len() < sampling.max_new_tokens {
        let micro_batches = [Descriptor::scored(adapter)];
        let args = RunArgs { num_past_tokens: past, ..RunArgs::forward(Mode::Generate, &micro_batches) };
        engine.run(&args, &[last_token_batch(&input, past)])?;
        past += input.len();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (random >> 11) as f64 / (1u64 << 53) as f64;
        let chosen = choose(&engine.last_logits()?, sampling.temperature, uniform);
        // All ranks go on with the token of rank 0.
        let token = engine.queue.all_gather_f64("next token", &[f64::from(chosen)])?[0][0] as u32;
        if stop.contains(&token) {
            break;
        }
        new.push(token);
        input = vec![token];
    }
    Ok(new)
}

/// Makes a batch of the tokens at positions from `past` on; only the last one's logits are computed.
fn last_token_batch(input: &[u32], past: usize) -> MicroBatch {
    let tokens = input.len() as u32;
    let mut targets = vec![NO_TARGET; input.len()];
    targets[input.len() - 1] = 0;
    MicroBatch {
        input_ids: input.to_vec(),
        targets,
        positions: (past as u32..past as u32 + tokens).collect(),
        documents: vec![0, tokens],
        sample_idx: vec![0],
    }
}

/// Returns the most likely token if the temperature is 0, else the one at which the cumulative probability passes
/// `uniform`.
fn choose(logits: &[f32], temperature: f64, uniform: f64) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap_or(0);
    if temperature == 0.0 {
        return best as u32;
    }
    let max = f64::from(logits[best]);
    let weights: Vec<f64> = logits.iter().map(|&l| ((f64::from(l) - max) / temperature).exp()).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_stays_on_one_side_of_a_change_of_rotation() {
        let config = r#"{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 4, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9, "original_max_position_embeddings": 24,
            "rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [2, 2]}}"#;
        let spec = ModelSpec::parse(config.as_bytes(), "config.json").unwrap();
        for (prompt, max_new_tokens) in [(20, 5), (24, 1), (25, 100)] {
            check_length(&spec, prompt, max_new_tokens).unwrap();
        }
        let error = check_length(&spec, 20, 6).unwrap_err().to_string();
        assert!(error.contains("found 6; allowed: at most 5") && error.contains("beyond 24 tokens"), "{error}");
    }

    #[test]
    fn choosing() {
        let logits = [0.0, 2f32.ln(), 1f32.ln()];
        assert_eq!(choose(&logits, 0.0, 0.9), 1);
        // Probabilities 1/4, 1/2, 1/4.
        let chosen: Vec<u32> = [0.1, 0.3, 0.7, 0.8].iter().map(|&u| choose(&logits, 1.0, u)).collect();
        assert_eq!(chosen, [0, 1, 1, 2]);
        assert_eq!(choose(&[1.0, 1.0], 0.0, 0.0), 0, "the first of equals");
    }
}

//! Generates tokens one after the other, with keys and values kept from earlier ones.
//!
//! Prompts are dealt to the ranks in turn. Some texts of each rank go through every layer together, so that a layer is
//! gathered and dequantized once for all of them, and a text that ends gives its place to the next prompt. A text does
//! not depend on those beside it.

use std::cmp::Ordering;

use anyhow::{Context, Result, ensure};

use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::run::RunArgs;
use crate::fsdp::schedule::{Descriptor, Mode};
use crate::model::batch::{MicroBatch, NO_TARGET};
use crate::model::rope::RopeConfig;
use crate::model::spec::ModelSpec;

/// The error where a logit is NaN.
const NO_NUMBERS: &str =
    "a logit is not a number: the model or its adapter is damaged, or was trained to numbers that are not finite";

/// The rule by which the next token is chosen. Temperature, top-k and top-p apply in this order, as in transformers.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 chooses the most likely token.
    pub temperature: f64,
    /// Number of the most likely tokens that are chosen from; `None` is all of them.
    pub top_k: Option<usize>,
    /// The most likely tokens are chosen from that have this probability together.
    pub top_p: f64,
    pub seed: u64,
    pub max_new_tokens: usize,
}

impl Sampling {
    /// Always chooses the most likely token.
    pub fn greedy(max_new_tokens: usize) -> Sampling {
        Sampling { temperature: 0.0, top_k: None, top_p: 1.0, seed: 0, max_new_tokens }
    }
}

/// The reason for which a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token or a text came at which it is to stop.
    Stop,
    /// It has as many new tokens as are allowed.
    Length,
}

/// The tokens after a prompt, without the one that stopped them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    pub tokens: Vec<u32>,
    pub finish: Finish,
}

/// Follows all texts, on every rank. Each text is named by the index of its prompt.
pub trait Listener {
    /// Gets all new tokens of a text each time it has one more. Returns whether the text ends there, which must be the
    /// same on every rank.
    fn grows(&mut self, prompt: usize, tokens: &[u32]) -> Result<bool>;
    /// Gets a text that has come to its end.
    fn ends(&mut self, prompt: usize, continuation: &Continuation) -> Result<()>;
}

/// Lets every text go on.
impl Listener for () {
    fn grows(&mut self, _: usize, _: &[u32]) -> Result<bool> {
        Ok(false)
    }
    fn ends(&mut self, _: usize, _: &Continuation) -> Result<()> {
        Ok(())
    }
}

/// A text that is being written.
struct Text<'a> {
    prompt: &'a [u32],
    new: Vec<u32>,
    /// State of the random numbers.
    random: u64,
}

impl<'a> Text<'a> {
    fn new(idx: usize, prompt: &'a [u32], seed: u64) -> Text<'a> {
        // Each text has numbers of its own, whichever rank writes it beside whichever others.
        let random = seed.wrapping_add((idx as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        Text { prompt, new: Vec::new(), random }
    }

    /// The tokens that have not been computed with yet; only the last one's logits are wanted.
    fn batch(&self) -> MicroBatch {
        let (input, past) = match self.new.last() {
            None => (self.prompt, 0),
            Some(last) => (std::slice::from_ref(last), self.prompt.len() + self.new.len() - 1),
        };
        let tokens = input.len() as u32;
        let mut targets = vec![NO_TARGET; input.len()];
        targets[input.len() - 1] = 0;
        MicroBatch {
            input_ids: input.to_vec(),
            targets,
            positions: (past as u32..past as u32 + tokens).collect(),
            documents: vec![0, tokens],
            sample_idx: vec![0],
            num_past_tokens: past,
        }
    }

    /// Returns the next number, at least 0 and below 1.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Checks that a text does not grow from a length that LongRoPE rotates by its short factors to one that it rotates by
/// its long factors, because the keys that are kept would be of both.
///
/// # Errors
/// The text may grow so far. The error says how many new tokens are allowed.
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

/// Continues each prompt until a token of `stop` is chosen, the text has as many new tokens as are allowed, or the
/// listener ends it. Every rank returns all continuations, in the order of the prompts. Collective.
///
/// # Errors
/// A prompt has no token, or a logit is NaN.
pub fn generate<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    prompts: &[Vec<u32>],
    stop: &[u32],
    sampling: &Sampling,
    adapter: bool,
    listener: &mut dyn Listener,
) -> Result<Vec<Continuation>> {
    ensure!(prompts.iter().all(|prompt| !prompt.is_empty()), "a prompt has no token");
    let (rank, world_size) = (engine.queue.rank(), engine.queue.world_size());
    let mut texts: Vec<Text> =
        prompts.iter().enumerate().map(|(i, prompt)| Text::new(i, prompt, sampling.seed)).collect();
    let mut waiting: Vec<_> = (0..world_size).map(|rank| (rank..texts.len()).step_by(world_size)).collect();
    // The texts that are being written, by rank and by micro-batch, where their keys and values are.
    let mut places: Vec<Vec<Option<usize>>> = vec![vec![None; engine.limits().max_micro_batches]; world_size];
    let mut continuations: Vec<Option<Continuation>> = vec![None; texts.len()];
    loop {
        for (places, waiting) in places.iter_mut().zip(&mut waiting) {
            places.iter_mut().filter(|place| place.is_none()).for_each(|place| *place = waiting.next());
        }
        let used = |places: &Vec<Option<usize>>| places.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        let num = places.iter().map(used).max().unwrap_or(0);
        if num == 0 {
            return continuations.into_iter().map(|text| text.context("a text was not written")).collect();
        }
        let own = &places[rank][..num];
        let batches: Vec<_> =
            own.iter().map(|place| place.map_or_else(MicroBatch::new, |idx| texts[idx].batch())).collect();
        engine.run(&RunArgs::forward(Mode::Generate, &vec![Descriptor::scored(adapter); num]), &batches)?;
        let mut chosen = vec![0.0; num];
        for (micro, &place) in own.iter().enumerate() {
            if let Some(idx) = place {
                let logits = engine.last_logits(micro)?;
                ensure!(!logits.iter().any(|logit| logit.is_nan()), "prompt {idx}: {NO_NUMBERS}");
                chosen[micro] = f64::from(choose(&logits, sampling, texts[idx].uniform()));
            }
        }
        let chosen = engine.queue.all_gather_f64("next tokens", &chosen)?;
        for (places, chosen) in places.iter_mut().zip(&chosen) {
            for (place, &token) in places.iter_mut().zip(chosen) {
                let Some(idx) = *place else { continue };
                let (new, token) = (&mut texts[idx].new, token as u32);
                let stops = stop.contains(&token) || {
                    new.push(token);
                    listener.grows(idx, new)?
                };
                if stops || new.len() == sampling.max_new_tokens {
                    let finish = if stops { Finish::Stop } else { Finish::Length };
                    let continuation = Continuation { tokens: std::mem::take(new), finish };
                    listener.ends(idx, &continuation)?;
                    (continuations[idx], *place) = (Some(continuation), None);
                }
            }
        }
    }
}

/// Chooses the most likely token if the temperature is 0, else the one at which the cumulative probability of those
/// that are chosen from passes `uniform`.
fn choose(logits: &[f32], sampling: &Sampling, uniform: f64) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap_or(0);
    if sampling.temperature == 0.0 {
        return best as u32;
    }
    let max = f64::from(logits[best]);
    let mut weights: Vec<f64> = logits.iter().map(|&l| ((f64::from(l) - max) / sampling.temperature).exp()).collect();
    keep_likely(&mut weights, sampling);
    let mut left = uniform * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    best as u32
}

/// Sets the weights of tokens to 0 that top-k and top-p leave out. Tokens as likely as the k-th stay.
fn keep_likely(weights: &mut [f64], sampling: &Sampling) {
    let Sampling { top_k, top_p, .. } = *sampling;
    if top_k.is_none() && top_p >= 1.0 {
        return;
    }
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].partial_cmp(&weights[a]).unwrap_or(Ordering::Equal));
    let mut kept = weights.len();
    if let Some(k) = top_k.filter(|&k| k < kept) {
        let least = weights[order[k - 1]];
        kept = order.iter().take_while(|&&token| weights[token] >= least).count();
    }
    let total: f64 = order[..kept].iter().map(|&token| weights[token]).sum();
    let mut sum = 0.0;
    let reaches = |&token: &usize| {
        sum += weights[token];
        sum >= top_p * total
    };
    let kept = order[..kept].iter().position(reaches).map_or(kept, |last| last + 1);
    order[kept..].iter().for_each(|&token| weights[token] = 0.0);
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
        let greedy = Sampling::greedy(1);
        assert_eq!(choose(&logits, &greedy, 0.9), 1);
        assert_eq!(choose(&[1.0, 1.0], &greedy, 0.0), 0, "the first of equals");
        // Probabilities 1/4, 1/2, 1/4.
        let sampling = Sampling { temperature: 1.0, ..greedy };
        let chosen: Vec<u32> = [0.1, 0.3, 0.7, 0.8].iter().map(|&u| choose(&logits, &sampling, u)).collect();
        assert_eq!(chosen, [0, 1, 1, 2]);
    }

    /// Values of transformers' TopKLogitsWarper and TopPLogitsWarper (5.24) for these probabilities.
    #[test]
    fn unlikely_tokens_are_left_out() {
        let kept = |top_k: Option<usize>, top_p: f64| {
            let mut weights = [0.125, 0.25, 0.375, 0.125, 0.0625, 0.0625];
            keep_likely(&mut weights, &Sampling { temperature: 1.0, top_k, top_p, ..Sampling::greedy(1) });
            (0..weights.len()).filter(|&token| weights[token] > 0.0).collect::<Vec<_>>()
        };
        for (top_k, top_p, expected) in [
            (None, 1.0, &[0, 1, 2, 3, 4, 5][..]),
            (Some(1), 1.0, &[2]),
            (Some(3), 1.0, &[0, 1, 2, 3]),
            (Some(9), 1.0, &[0, 1, 2, 3, 4, 5]),
            (None, 0.3, &[2]),
            (None, 0.6, &[1, 2]),
            (Some(2), 0.61, &[1, 2]),
            (Some(2), 0.59, &[2]),
        ] {
            assert_eq!(kept(top_k, top_p), expected, "top-k {top_k:?}, top-p {top_p}");
        }
    }
}

//! The share of a GPU's rate of matrix products that training reaches: model FLOP/s utilization (Chowdhery et al. 2022,
//! PaLM, appendix B), with the products of a frozen base.

use crate::model::batch::MicroBatch;
use crate::model::spec::ModelSpec;
use crate::model::stage::Saved;
use crate::model::stage::cost::Circumstances;

/// Returns the floating-point operations of a training step on these micro-batches.
///
/// Each weight of a layer takes two for a token's output and two for the gradient of its input, and each weight of the
/// head as many for a target token; attention's scores take twice as many backward as forward. Neither LoRA's own
/// products count nor values that are computed again.
pub fn training_flops(spec: &ModelSpec, batches: &[MicroBatch]) -> f64 {
    let of_document = |tokens: usize| {
        let at = Circumstances { hidden_size: spec.hidden_size, max_length: tokens, has_dropout: false };
        let costs = spec.layers.iter().map(|layer| layer.forward_cost(&at, Saved::EVERYTHING, true));
        tokens as f64 * costs.map(|cost| 4.0 * cost.weights + 3.0 * cost.forward_scores).sum::<f64>()
    };
    let of_batch = |batch: &MicroBatch| {
        let documents = batch.documents.windows(2).map(|document| (document[1] - document[0]) as usize);
        let head = 4 * spec.hidden_size * spec.vocab_size * batch.num_target_tokens();
        documents.map(of_document).sum::<f64>() + head as f64
    };
    batches.iter().map(of_batch).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    #[test]
    fn a_base_takes_four_operations_for_each_weight_and_token() {
        let spec = shapes::named("llama-3.1-8b", None).unwrap();
        let batch = |documents: &[usize]| {
            let mut batch = MicroBatch::new();
            documents.iter().for_each(|&length| batch.push(0, &vec![0; length], &vec![true; length]));
            batch
        };
        // 32 layers of q and o (4096 · 4096), k and v (4096 · 1024), gate, up and down (4096 · 14336).
        let weights = 32.0 * (2.0 * 4096.0 * 4096.0 + 2.0 * 4096.0 * 1024.0 + 3.0 * 4096.0 * 14_336.0);
        let head = |targets: f64| 4.0 * 4096.0 * 128_256.0 * targets;
        // Two products over half of the pairs of tokens, three times.
        let scores = |length: f64| 3.0 * 32.0 * 4.0 * length * length / 2.0 * 4096.0;
        let expected = 2048.0 * 4.0 * weights + scores(2048.0) + head(2047.0);
        let whole = training_flops(&spec, &[batch(&[2048])]);
        assert!((whole / expected - 1.0).abs() < 1e-9, "{whole:e} {expected:e}");
        let packed = training_flops(&spec, &[batch(&[1024, 1024]), MicroBatch::new()]);
        let expected = 2048.0 * 4.0 * weights + 2.0 * scores(1024.0) + head(2046.0);
        assert!((packed / expected - 1.0).abs() < 1e-9, "{packed:e} {expected:e}");
    }
}

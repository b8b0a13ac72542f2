//! Refuses, before any work, models that the GPU's kernels cannot run.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use crate::device::cuda::HEAD_DIMS;
use crate::model::spec::ModelSpec;

/// The error of a model that a GPU cannot run.
#[derive(Debug, thiserror::Error)]
#[error("config.json: this model cannot run on a GPU:{}", problems.iter().map(|p| format!("\n  {p}")).collect::<String>())]
pub struct NotOnGpu {
    problems: Vec<String>,
}

/// Checks that a model's activations stay within fp16, if that is the type they are computed in.
///
/// # Errors
/// The model is of a family whose activations do not.
pub fn check_fp16(spec: &ModelSpec, is_fp16: bool) -> Result<()> {
    ensure!(
        !is_fp16 || !spec.overflows_fp16,
        "quantization.bnb_4bit_compute_dtype: found float16; activations of {} models are larger than 65504, the largest number of fp16; \
         allowed for them on a GPU: auto, bfloat16",
        spec.family
    );
    Ok(())
}

/// Number of 16-bit values that kernels read at once. A micro-batch may have any number of tokens, so the length of a
/// row must be a multiple of it.
const VALUES_AT_ONCE: usize = 8;

/// Checks that each kernel can run this model with any number of tokens.
///
/// # Errors
/// Every key of config.json that has a value which some kernel refuses, and what is allowed.
pub fn check_gpu(spec: &ModelSpec) -> std::result::Result<(), NotOnGpu> {
    let mut problems = BTreeSet::new();
    for rotary_dim in spec.ropes.iter().map(|rope| rope.rotary_dim) {
        if !rotary_dim.is_multiple_of(2 * VALUES_AT_ONCE) {
            problems.insert(format!(
                "partial_rotary_factor: {rotary_dim} elements of a head turn, allowed: a multiple of 16"
            ));
        }
    }
    for layer in &spec.layers {
        let head_dim = layer.attention.head_dim;
        if !HEAD_DIMS.contains(&head_dim) {
            problems.insert(format!("head_dim: found {head_dim}, allowed: {HEAD_DIMS:?}"));
        }
        for (key, value) in [("hidden_size", spec.hidden_size), ("intermediate_size", layer.mlp.intermediate_size)] {
            if !value.is_multiple_of(VALUES_AT_ONCE) {
                problems.insert(format!("{key}: found {value}, allowed: a multiple of {VALUES_AT_ONCE}"));
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(NotOnGpu { problems: problems.into_iter().collect() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    #[test]
    fn fp16_is_refused_where_activations_outgrow_it() {
        let llama = shapes::named("llama-3.1-8b", Some(1)).unwrap();
        check_fp16(&llama, true).unwrap();
        let gemma = ModelSpec { family: "gemma2", overflows_fp16: true, ..llama };
        check_fp16(&gemma, false).unwrap();
        let error = check_fp16(&gemma, true).unwrap_err().to_string();
        assert!(error.contains("bnb_4bit_compute_dtype: found float16; activations of gemma2 models"), "{error}");
    }

    #[test]
    fn what_kernels_refuse_is_refused_by_key() {
        let good = shapes::named("llama-3.1-8b", None).unwrap();
        check_gpu(&good).unwrap();
        let mut bad = ModelSpec { hidden_size: 2564, ..good };
        bad.ropes[0].rotary_dim = 72;
        (bad.layers[3].attention.head_dim, bad.layers[3].mlp.intermediate_size) = (80, 6911);
        let error = check_gpu(&bad).unwrap_err().to_string();
        for expected in [
            "head_dim: found 80, allowed: [64, 96, 128, 256]",
            "partial_rotary_factor: 72 elements of a head turn, allowed: a multiple of 16",
            "hidden_size: found 2564, allowed: a multiple of 8",
            "intermediate_size: found 6911, allowed: a multiple of 8",
        ] {
            assert!(error.contains(expected), "{expected} is not in {error}");
        }
    }
}

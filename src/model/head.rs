//! The head: final norm, logits piece by piece, log-probabilities, and their gradient.

use anyhow::Result;

use crate::device::*;

use super::activations::HeadState;
use super::config::ModelConfig;

/// Picks the target tokens' rows of the last boundary, norms them, and clears the running state.
pub fn begin<D: Ops>(
    ops: &D,
    config: &ModelConfig,
    state: &mut HeadState<D>,
    boundary: &Buffer<D, D::Act>,
    final_norm: &Buffer<D, f32>,
) -> Result<()> {
    let (n, len) = (state.num_targets, state.num_targets * config.hidden_size);
    ops.gather_rows(state.x.first_mut(len), boundary.view(), &state.rows, config.hidden_size)?;
    ops.rms_norm_forward(RmsNormForward {
        y: state.normed.first_mut(len),
        rstd: state.rstd.first_mut(n),
        x: Normed::Plain(state.x.first(len)),
        weight: final_norm.view(),
        eps: config.rms_norm_eps,
    })?;
    ops.upload(state.max.first_mut(n), &vec![f32::NEG_INFINITY; n])?;
    ops.fill_bytes(state.sum.first_mut(n), 0)?;
    ops.fill_bytes(state.acc.view_mut(), 0)?;
    // Poison: a target that no piece holds must not pass for a logit of 0.
    ops.fill_bytes(state.target_logit.first_mut(n), 0xFF)
}

/// Takes one piece of the vocabulary into account; `weight` `[rows, hidden]` begins at id `first_id`. Without `backward`
/// only what log-probabilities need is computed.
pub fn piece<D: Ops>(
    ops: &D,
    config: &ModelConfig,
    state: &mut HeadState<D>,
    logits: &mut Buffer<D, f32>,
    weight: View<'_, D, D::Act>,
    first_id: usize,
    backward: bool,
) -> Result<()> {
    let (n, hidden) = (state.num_targets, config.hidden_size);
    ops.cross_entropy_piece(CrossEntropyPiece {
        max: state.max.first_mut(n),
        sum: state.sum.first_mut(n),
        target_logit: state.target_logit.first_mut(n),
        acc: backward.then(|| state.acc.first_mut(n * hidden)),
        logits: logits.first_mut(n * weight.len() / hidden),
        x: state.normed.first(n * hidden),
        weight,
        target_ids: state.target_ids.first(n),
        first_id,
    })?;
    if !backward {
        return Ok(());
    }
    let (target_rows, target_ids) = (state.target_rows.first_mut(n * hidden), state.target_ids.first(n));
    ops.gather_target_rows(GatherTargetRows { target_rows, weight, target_ids, first_id })
}

/// log p(target) of each target token, `[N]`.
pub fn log_probabilities<D: Ops>(ops: &D, state: &HeadState<D>) -> Result<Vec<f64>> {
    let n = state.num_targets;
    let download = |buffer: &Buffer<D, f32>| -> Result<Vec<f32>> {
        let mut values = vec![0.0; n];
        ops.download(&mut values, buffer.first(n))?;
        Ok(values)
    };
    let (max, sum, logit) = (download(&state.max)?, download(&state.sum)?, download(&state.target_logit)?);
    Ok((0..n).map(|i| f64::from(logit[i]) - f64::from(max[i]) - f64::from(sum[i]).ln()).collect())
}

/// Writes the gradient of Σ −coefficient · log p into the last boundary's place: d `[T, hidden]`.
pub fn finish<D: Ops>(
    ops: &D,
    config: &ModelConfig,
    state: &mut HeadState<D>,
    d: &mut Buffer<D, D::Act>,
    final_norm: &Buffer<D, f32>,
    num_tokens: usize,
) -> Result<()> {
    let (n, len) = (state.num_targets, state.num_targets * config.hidden_size);
    ops.cross_entropy_finish(CrossEntropyFinish {
        d_x: state.normed.first_mut(len),
        acc: state.acc.first(len),
        sum: state.sum.first(n),
        target_rows: state.target_rows.first(len),
        coefficients: state.coefficients.first(n),
    })?;
    // The target rows are not needed any more: the gradient of the norm's input, which the op adds to, takes their
    // place.
    let HeadState { target_rows: d_rows, normed: d_normed, x, rstd, rows, .. } = state;
    ops.fill_bytes(d_rows.first_mut(len), 0)?;
    ops.rms_norm_backward(RmsNormBackward {
        d_x: d_rows.first_mut(len),
        d_y: d_normed.first(len),
        x: x.first(len),
        rstd: rstd.first(n),
        weight: final_norm.view(),
    })?;
    let d = d.first_mut(num_tokens * config.hidden_size);
    ops.scatter_rows(d, d_rows.first(len), rows, config.hidden_size)
}

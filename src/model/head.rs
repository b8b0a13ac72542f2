//! The head: final norm, logits piece by piece, log-probabilities, and their gradient.

use anyhow::{Result, ensure};

use crate::device::*;

use super::batch::{MicroBatch, NO_TARGET};
use super::spec::ModelSpec;

/// The head's running state of one micro-batch, for its N target tokens.
pub struct HeadState<D: Device> {
    /// Rows of the tokens that count, and the ids that they should predict, `[N]`.
    pub rows: RowIndices<D>,
    pub target_ids: Buffer<D, u32>,
    /// The factor of each token's −log p in the gradient, `[N]`.
    pub coefficients: Buffer<D, f32>,
    /// The last boundary's rows before and after the norm, `[N, hidden]`. After the finish, `normed` holds their
    /// gradient.
    pub x: Buffer<D, D::Act>,
    pub normed: Buffer<D, D::Act>,
    pub rstd: Buffer<D, f32>,
    /// Running maximum, sum of exponentials, logit of the target: `[N]`.
    pub max: Buffer<D, f32>,
    pub sum: Buffer<D, f32>,
    pub target_logit: Buffer<D, f32>,
    /// `Σ exp(logit − max) · W`, and `W[target]`: `[N, hidden]`, with backward only.
    pub acc: Buffer<D, f32>,
    pub target_rows: Buffer<D, D::Act>,
    pub num_targets: usize,
}

impl<D: Device> HeadState<D> {
    pub fn carve(arena: &mut Arena<D>, name: &str, hidden: usize, tokens: usize, backward: bool) -> Result<Self> {
        let f = |part: &str| format!("{name}/{part}");
        let back = if backward { tokens * hidden } else { 0 };
        Ok(Self {
            rows: RowIndices::carve(arena, &f("rows"), tokens)?,
            target_ids: arena.carve(&f("target_ids"), tokens)?,
            coefficients: arena.carve(&f("coefficients"), tokens)?,
            x: arena.carve(&f("x"), tokens * hidden)?,
            normed: arena.carve(&f("normed"), tokens * hidden)?,
            rstd: arena.carve(&f("rstd"), tokens)?,
            max: arena.carve(&f("max"), tokens)?,
            sum: arena.carve(&f("sum"), tokens)?,
            target_logit: arena.carve(&f("target_logit"), tokens)?,
            acc: arena.carve(&f("acc"), back)?,
            target_rows: arena.carve(&f("target_rows"), back)?,
            num_targets: 0,
        })
    }

    /// Uploads which tokens count.
    pub fn load(&mut self, device: &D, batch: &MicroBatch) -> Result<()> {
        let rows: Vec<u32> =
            (0..batch.num_tokens() as u32).filter(|&t| batch.targets[t as usize] != NO_TARGET).collect();
        let target_ids: Vec<u32> = rows.iter().map(|&t| batch.targets[t as usize]).collect();
        self.num_targets = rows.len();
        self.rows.put(device, &rows, batch.num_tokens())?;
        device.upload(self.target_ids.first_mut(rows.len()), &target_ids)
    }
}

/// Picks the target tokens' rows of the last boundary, norms them, and clears the running state.
pub fn begin<D: Ops>(
    ops: &D,
    spec: &ModelSpec,
    state: &mut HeadState<D>,
    boundary: &Buffer<D, D::Act>,
    final_norm: &Buffer<D, f32>,
) -> Result<()> {
    let (n, len) = (state.num_targets, state.num_targets * spec.hidden_size);
    ops.gather_rows(state.x.first_mut(len), boundary.view(), &state.rows, spec.hidden_size)?;
    ops.rms_norm_forward(RmsNormForward {
        y: state.normed.first_mut(len),
        rstd: state.rstd.first_mut(n),
        x: Normed::Plain(state.x.first(len)),
        weight: final_norm.view(),
        eps: spec.norm_eps,
    })?;
    ops.upload(state.max.first_mut(n), &vec![f32::NEG_INFINITY; n])?;
    ops.fill_bytes(state.sum.first_mut(n), 0)?;
    ops.fill_bytes(state.acc.view_mut(), 0)?;
    // Poison: a target that no piece holds must not pass for a logit of 0.
    ops.fill_bytes(state.target_logit.first_mut(n), 0xFF)
}

/// Takes one piece of the vocabulary into account; `weight` `[rows, hidden]` begins at id `first_id`. Without
/// `backward` only what log-probabilities need is computed.
pub fn piece<D: Ops>(
    ops: &D,
    spec: &ModelSpec,
    state: &mut HeadState<D>,
    logits: &mut Buffer<D, f32>,
    weight: View<'_, D, D::Act>,
    first_id: usize,
    backward: bool,
) -> Result<()> {
    let (n, hidden) = (state.num_targets, spec.hidden_size);
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
        softcap: spec.head.softcap,
    })?;
    if !backward {
        return Ok(());
    }
    let (target_rows, target_ids) = (state.target_rows.first_mut(n * hidden), state.target_ids.first(n));
    ops.gather_target_rows(GatherTargetRows { target_rows, weight, target_ids, first_id })
}

/// The scores of N target tokens.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// log p(target) of each, `[N]`.
    pub log_probabilities: Vec<f64>,
    /// Number of those whose logit is the largest.
    pub num_most_likely: usize,
}

/// Returns the scores of the target tokens.
pub fn scores<D: Ops>(ops: &D, state: &HeadState<D>) -> Result<Scores> {
    let n = state.num_targets;
    let download = |buffer: &Buffer<D, f32>| -> Result<Vec<f32>> {
        let mut values = vec![0.0; n];
        ops.download(&mut values, buffer.first(n))?;
        Ok(values)
    };
    let (max, sum, logit) = (download(&state.max)?, download(&state.sum)?, download(&state.target_logit)?);
    let log_p = |i: usize| f64::from(logit[i]) - f64::from(max[i]) - f64::from(sum[i]).ln();
    Ok(Scores {
        log_probabilities: (0..n).map(log_p).collect(),
        num_most_likely: (0..n).filter(|&i| logit[i] == max[i]).count(),
    })
}

/// Writes the gradient of Σ −coefficient · log p into the last boundary's place: d `[T, hidden]`; `coefficients`
/// `[N]`.
pub fn backward<D: Ops>(
    ops: &D,
    spec: &ModelSpec,
    state: &mut HeadState<D>,
    d: &mut Buffer<D, D::Act>,
    final_norm: &Buffer<D, f32>,
    num_tokens: usize,
    coefficients: &[f32],
) -> Result<()> {
    let (n, len) = (state.num_targets, state.num_targets * spec.hidden_size);
    ensure!(coefficients.len() == n, "{} coefficients for {n} target tokens", coefficients.len());
    ops.upload(state.coefficients.first_mut(n), coefficients)?;
    ops.cross_entropy_finish(CrossEntropyFinish {
        d_x: state.normed.first_mut(len),
        acc: state.acc.first(len),
        sum: state.sum.first(n),
        target_logit: state.target_logit.first(n),
        target_rows: state.target_rows.first(len),
        coefficients: state.coefficients.first(n),
        softcap: spec.head.softcap,
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
    let d = d.first_mut(num_tokens * spec.hidden_size);
    ops.scatter_rows(d, d_rows.first(len), rows, spec.hidden_size)
}

//! RMSNorm and its backward.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use crate::device::ops::{Normed, RmsNormBackward, RmsNormForward};
use crate::simd::vectorize;

use super::{Cpu, math};

impl Cpu {
    pub(super) fn rms_norm_forward_f32(&self, args: RmsNormForward<'_, Cpu>) -> Result<()> {
        let RmsNormForward { y, rstd, x, weight, eps } = args;
        let x = match x {
            Normed::Plain(x) => x.host(),
            Normed::Sum { sum, addend } => {
                let sum = sum.host_mut();
                self.add_f32(sum, addend.host())?;
                &*sum
            }
        };
        let (y, rstd, weight) = (y.host_mut(), rstd.host_mut(), weight.host());
        let hidden = weight.len();
        ensure!(x.len() == y.len() && x.len() == rstd.len() * hidden, "rms_norm: x {} rstd {}", x.len(), rstd.len());
        let row = |((y, rstd), x): ((&mut [f32], &mut f32), &[f32])| {
            vectorize(
                #[inline(always)]
                || {
                    *rstd = 1.0 / (math::dot(x, x) / hidden as f32 + eps).sqrt();
                    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                        *y = x * *rstd * w;
                    }
                },
            )
        };
        y.par_chunks_mut(hidden).zip(rstd.par_iter_mut()).zip(x.par_chunks(hidden)).with_min_len(64).for_each(row);
        Ok(())
    }

    pub(super) fn rms_norm_backward_f32(&self, args: RmsNormBackward<'_, Cpu>) -> Result<()> {
        let RmsNormBackward { d_x, d_y, x, rstd, weight } = args;
        let (d_x, d_y, x, rstd, weight) = (d_x.host_mut(), d_y.host(), x.host(), rstd.host(), weight.host());
        let hidden = weight.len();
        ensure!(
            x.len() == d_y.len() && x.len() == d_x.len() && x.len() == rstd.len() * hidden,
            "rms_norm backward sizes"
        );
        d_x.par_chunks_mut(hidden).enumerate().with_min_len(64).for_each(|(t, d_x)| {
            let (d_y, x, rstd) = (&d_y[t * hidden..][..hidden], &x[t * hidden..][..hidden], rstd[t]);
            vectorize(
                #[inline(always)]
                || {
                    let scale = math::dot3(d_y, weight, x) * rstd * rstd / hidden as f32;
                    for (((d_x, d), w), x) in d_x.iter_mut().zip(d_y).zip(weight).zip(x) {
                        *d_x += rstd * (d * w - x * scale);
                    }
                },
            );
        });
        Ok(())
    }
}

//! RMSNorm and its backward.

use anyhow::Result;
use rayon::prelude::*;

use crate::device::{ElementwiseOps, Normed, RmsNormBackward, RmsNormForward, RmsNormOps};
use crate::simd::vectorize;

use super::{Cpu, math};

impl RmsNormOps for Cpu {
    fn rms_norm_forward(&self, args: RmsNormForward<'_, Cpu>) -> Result<()> {
        let [_, hidden] = args.sizes()?;
        let RmsNormForward { y, rstd, x, weight, eps } = args;
        let x = match x {
            Normed::Plain(x) => x.host(),
            Normed::Sum { mut sum, addend } => {
                let len = sum.len();
                self.add(sum.range_mut(0..len), addend)?;
                &*sum.host_mut()
            }
        };
        let (y, rstd, weight) = (y.host_mut(), rstd.host_mut(), weight.host());
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

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Cpu>) -> Result<()> {
        let [_, hidden] = args.sizes()?;
        let RmsNormBackward { d_x, d_y, x, rstd, weight } = args;
        let (d_x, d_y, x, rstd, weight) = (d_x.host_mut(), d_y.host(), x.host(), rstd.host(), weight.host());
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

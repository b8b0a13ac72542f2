//! silu(gate) · up and its backward.

use anyhow::Result;

use crate::device::{SwigluBackward, SwigluForward, SwigluOps};

use super::{Cpu, math};

impl SwigluOps for Cpu {
    fn swiglu_forward(&self, args: SwigluForward<'_, Cpu>) -> Result<()> {
        args.num_elements()?;
        let (y, gate, up) = (args.y.host_mut(), args.gate.host(), args.up.host());
        self.for_rows(y, 1, |first, y| {
            let (gate, up) = (&gate[first..first + y.len()], &up[first..first + y.len()]);
            crate::simd::vectorize(
                #[inline(always)]
                || {
                    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                        *y = g * math::sigmoid(*g) * u;
                    }
                },
            );
        });
        Ok(())
    }

    fn swiglu_backward(&self, args: SwigluBackward<'_, Cpu>) -> Result<()> {
        let len = args.num_elements()?;
        let SwigluBackward { d_gate, d_up, d_y, gate, up } = args;
        let (d_gate, d_up) = (d_gate.host_mut(), d_up.host_mut());
        let (d_y, gate, up) = (d_y.host(), gate.host(), up.host());
        let part = |first: usize, d_gate: &mut [f32], d_up: &mut [f32]| {
            let end = first + d_gate.len();
            let (d_y, gate, up) = (&d_y[first..end], &gate[first..end], &up[first..end]);
            crate::simd::vectorize(
                #[inline(always)]
                || {
                    for ((((d_g, d_u), d), g), u) in d_gate.iter_mut().zip(&mut *d_up).zip(d_y).zip(gate).zip(up) {
                        let s = math::sigmoid(*g);
                        *d_u = d * g * s;
                        *d_g = d * u * s * (1.0 + g * (1.0 - s));
                    }
                },
            );
        };
        let rows = self.rows_per_thread(len);
        rayon::scope(|scope| {
            for (i, (d_gate, d_up)) in d_gate.chunks_mut(rows).zip(d_up.chunks_mut(rows)).enumerate() {
                let part = &part;
                scope.spawn(move |_| part(i * rows, d_gate, d_up));
            }
        });
        Ok(())
    }
}

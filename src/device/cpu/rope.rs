//! Rotary position embedding.

use anyhow::Result;

use crate::device::{Rope, RopeOps};

use super::Cpu;

impl RopeOps for Cpu {
    fn rope(&self, args: Rope<'_, Cpu>) -> Result<()> {
        args.num_tokens()?;
        let Rope { x, cos, sin, num_heads, head_dim, inverse } = args;
        let (x, cos, sin) = (x.host_mut(), cos.host(), sin.host());
        let (width, half) = (num_heads * head_dim, head_dim / 2);
        let sign = if inverse { -1.0 } else { 1.0 };
        self.for_rows(x, width, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let at = (first + i) * half;
                let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                for head in row.chunks_exact_mut(head_dim) {
                    let (low, high) = head.split_at_mut(half);
                    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        let (a, b, sin) = (*low, *high, sin * sign);
                        *low = a * cos - b * sin;
                        *high = b * cos + a * sin;
                    }
                }
            }
        });
        Ok(())
    }
}

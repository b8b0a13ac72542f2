//! Rotary position embedding.

use anyhow::Result;

use crate::device::{Rope, RopeOps, Rotation};

use super::Cpu;

impl RopeOps for Cpu {
    fn rope(&self, args: Rope<'_, Cpu>) -> Result<()> {
        args.rotation.num_tokens(args.x.len())?;
        let Rope { x, rotation: Rotation { cos, sin, num_heads, head_dim, rotary_dim }, inverse } = args;
        let (x, cos, sin) = (x.host_mut(), cos.host(), sin.host());
        let (width, half) = (num_heads * head_dim, rotary_dim / 2);
        let sign = if inverse { -1.0 } else { 1.0 };
        self.for_rows(x, width, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let at = (first + i) * half;
                let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                for head in row.chunks_exact_mut(head_dim) {
                    let (low, high) = head[..rotary_dim].split_at_mut(half);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Arena, Device};

    /// Two tokens of three heads, of whose eight elements the first four turn.
    #[test]
    fn the_first_elements_of_a_head_turn_and_the_others_stay() {
        let (num_heads, head_dim, rotary_dim) = (3, 8, 4);
        let cpu = Cpu::new(1);
        let buffer = |values: &[f32]| {
            let mut buffer = Arena::carved(&cpu, |arena| arena.carve("x", values.len())).unwrap();
            cpu.upload(buffer.view_mut(), values).unwrap();
            buffer
        };
        let start: Vec<f32> = (0..48).map(|i| i as f32).collect();
        let (mut x, angles) = (buffer(&start), [0.25_f32, 0.5, 0.75, 1.0]);
        let (cos, sin) = (buffer(&angles.map(f32::cos)), buffer(&angles.map(f32::sin)));
        let rotate = |x: &mut crate::device::Buffer<Cpu, f32>, inverse| {
            let rotation = Rotation { cos: cos.view(), sin: sin.view(), num_heads, head_dim, rotary_dim };
            cpu.rope(Rope { x: x.view_mut(), rotation, inverse }).unwrap();
        };
        rotate(&mut x, false);
        for (i, (&found, &before)) in x.view().host().iter().zip(&start).enumerate() {
            let (angle, at) = (angles[i / 24 * 2 + i % 2], i % head_dim);
            let expected = match at {
                0 | 1 => before * angle.cos() - start[i + 2] * angle.sin(),
                2 | 3 => before * angle.cos() + start[i - 2] * angle.sin(),
                _ => before,
            };
            assert!((found - expected).abs() <= 1e-5, "element {i}: {found}, expected {expected}");
        }
        rotate(&mut x, true);
        assert!(x.view().host().iter().zip(&start).all(|(x, before)| (x - before).abs() <= 1e-5));
        // More elements than a head has cannot turn.
        let rotation = Rotation { cos: cos.view(), sin: sin.view(), num_heads: 12, head_dim: 2, rotary_dim };
        let args = Rope { x: x.view_mut(), rotation, inverse: false };
        assert!(cpu.rope(args).unwrap_err().to_string().contains("12 heads of 2, of which 4 turn"));
    }
}

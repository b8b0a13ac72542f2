//! Numbers that look random.

use anyhow::Result;

use crate::device::{Uniform, UniformOps};

use super::Cpu;

impl UniformOps for Cpu {
    fn uniform(&self, args: Uniform<'_, Cpu>) -> Result<()> {
        let Uniform { y, seed, first, half_width } = args;
        self.for_rows(y.host_mut(), 1, |begin, part| fill(seed, first + begin as u64, half_width, part));
        Ok(())
    }
}

/// Fills `y` on the calling thread: see [`Uniform`].
pub fn fill(seed: u64, first: u64, half_width: f32, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        let mut z = (first + i as u64).wrapping_add(seed << 40);
        z = (z ^ (z >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        z = (z ^ (z >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
        *y = ((z >> 40) as f32 / 8_388_608.0 - 1.0) * half_width;
    }
}

//! Rotary position embedding.

use anyhow::{Result, ensure};

use crate::device::ops::Rope;

use super::launch::{Grid, args};
use super::{Cuda, HalfType};

impl<A: HalfType> Cuda<A> {
    pub(super) fn rope_act(&self, args: Rope<'_, Cuda<A>>) -> Result<()> {
        let Rope { x, cos, sin, num_heads, head_dim, inverse } = args;
        let (pairs, half) = (x.len() / 2, head_dim / 2);
        ensure!(pairs == cos.len() * num_heads && cos.len() == sin.len(), "rope: x {} cos {}", x.len(), cos.len());
        let sign: f32 = if inverse { -1.0 } else { 1.0 };
        let args = args![x, cos, sin, pairs as u64, num_heads as u32, half as u32, sign];
        self.launch("rope", Grid::elements(pairs), args)
    }
}

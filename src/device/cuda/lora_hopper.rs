//! The kernel for Hopper of a module's product with what LoRA adds: `kernels/lora_hopper.cu`.

use anyhow::Result;

use crate::device::{Finish, LoraLinear, Rotation};

use super::attention_hopper::{Hopper, SHARED_BYTES};
use super::launch::{Grid, args, tile_map};
use super::{Cuda, HalfType};

/// For ranks of at most 16, and for all.
pub(super) const KERNELS: [&str; 2] = ["lora_linear_hopper_16", "lora_linear_hopper"];
/// Rows and columns of y that two blocks make together.
const TILE: usize = 256;
/// Columns of an operand in a row of its tiles.
const DEPTH: usize = 64;

impl Hopper {
    /// The kernel's grid for y `[m, n]`: two blocks for each pair of multiprocessors, or for each tile where there are fewer. `None` unless
    /// the tiles keep nine tenths of the multiprocessors busy to the end.
    fn linear_grid(self, m: usize, n: usize) -> Option<Grid> {
        let (tiles, pairs) = (m.div_ceil(TILE) * n.div_ceil(TILE), self.multiprocessors / 2);
        let room = tiles.div_ceil(pairs) * pairs * TILE * TILE;
        let grid = Grid { blocks: (2 * tiles.min(pairs), 1), threads: 384, shared_bytes: SHARED_BYTES };
        (tiles > 0 && 10 * m * n >= 9 * room).then_some(grid)
    }
}

impl<A: HalfType> Cuda<A> {
    /// Returns the kernel's grid if this is a Hopper and its kernel does these sizes well; it copies runs of 16 bytes.
    pub(super) fn hopper_linear_grid(&self, [m, n, k]: [usize; 3], lora_rank: usize) -> Option<Grid> {
        let whole = [n, k, lora_rank].iter().all(|size| size.is_multiple_of(8));
        self.hopper.filter(|_| whole)?.linear_grid(m, n)
    }

    /// [`LoraLinear`] of lengths that were checked, with the grid of [`Cuda::hopper_linear_grid`].
    pub(super) fn hopper_lora_linear(
        &self,
        args: LoraLinear<'_, Cuda<A>>,
        [m, n, k]: [usize; 3],
        grid: Grid,
    ) -> Result<()> {
        let LoraLinear { mut y, x, weight, bias, u, b, lora_rank: r, scale, output_scale, finish } = args;
        // The kernel turns heads of two sizes, and whole ones.
        let can_turn = |r: &Rotation<'_, _>| [64, 128].contains(&r.head_dim) && r.rotary_dim == r.head_dim;
        let (finish, later) = match finish {
            Finish::Rotate(rotation) if !can_turn(&rotation) => (Finish::Nothing, Finish::Rotate(rotation)),
            finish => (finish, Finish::Nothing),
        };
        let (cos, sin, head_dim, residual) = match finish {
            Finish::Nothing => (None, None, 0, None),
            Finish::Add(residual) => (None, None, 0, Some(residual)),
            Finish::Rotate(Rotation { cos, sin, head_dim, .. }) => (Some(cos), Some(sin), head_dim as i32, None),
        };
        let map = |matrix, width| tile_map(matrix, width, DEPTH);
        let (x, weight, u, b) = (map(x, k)?, map(weight, k)?, map(u, r)?, map(b, r)?);
        let (m, n, k, rank) = (m as i32, n as i32, k as i32, r as i32);
        let out = y.range_mut(0..y.len());
        let args = args![out, x, weight, u, b, bias, cos, sin, head_dim, residual, m, n, k, rank, scale, output_scale];
        let kernel = if r <= 16 { KERNELS[0] } else { KERNELS[1] };
        // SAFETY: the lengths were checked by the caller, and the kernel declares these arguments in this order.
        unsafe { self.launch(kernel, grid, args) }?;
        later.run(self, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_leave_multiprocessors_idle_are_left_to_cublas() {
        let h100 = Hopper { multiprocessors: 132 };
        for (m, n, blocks) in [
            (8192, 14336, Some(132)),
            (8192, 1024, Some(132)),
            (1024, 4096, Some(128)),
            (1000, 4096, Some(128)),
            (1024, 14336, None),
            (2048, 1024, None),
            (900, 4096, None),
            (0, 4096, None),
        ] {
            assert_eq!(h100.linear_grid(m, n).map(|grid| grid.blocks.0), blocks, "{m} {n}");
        }
    }
}

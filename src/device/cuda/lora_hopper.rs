//! The kernels for Hopper of a module's product with what LoRA adds, and of an MLP's gate and up: `kernels/lora_hopper.cu`.

use anyhow::Result;

use crate::device::{Activation, Finish, LoraGatedForward, LoraLinear, Rotation, ViewMut};

use super::attention_hopper::{Hopper, SHARED_BYTES};
use super::launch::{Grid, args, tile_map};
use super::{Cuda, HalfType};

/// The kernels of each op: that for ranks of at most 16, and that for all.
const LINEAR: [&str; 2] = ["lora_linear_hopper_16", "lora_linear_hopper"];
const GATED: [&str; 2] = ["lora_gated_hopper_16", "lora_gated_hopper"];

/// All kernels, each of which takes [`SHARED_BYTES`].
pub(super) fn kernels() -> impl Iterator<Item = &'static str> {
    LINEAR.into_iter().chain(GATED)
}

/// Returns the kernel that takes a rank.
fn of_rank([few, any]: [&'static str; 2], lora_rank: usize) -> &'static str {
    if lora_rank <= 16 { few } else { any }
}

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
        // SAFETY: the lengths were checked by the caller, and the kernel declares these arguments in this order.
        unsafe { self.launch(of_rank(LINEAR, r), grid, args) }?;
        later.run(self, y)
    }

    /// Returns the grid of [`LoraGatedForward`] of lengths that were checked, if one kernel does both modules well: they have one rank,
    /// the same scales and no bias.
    pub(super) fn hopper_gated_grid(
        &self,
        args: &LoraGatedForward<'_, Cuda<A>>,
        [m, n, k]: [usize; 3],
    ) -> Option<Grid> {
        let kind = |linear: &LoraLinear<'_, Cuda<A>>| {
            linear.bias.is_none().then_some((linear.lora_rank, linear.scale, linear.output_scale))
        };
        let (lora_rank, ..) = kind(&args.gate).filter(|of_gate| kind(&args.up).as_ref() == Some(of_gate))?;
        // A tile takes as many columns of gate as of up. Rows of both are written in runs of 16 bytes.
        self.hopper_linear_grid([m, 2 * n, k], lora_rank).filter(|_| n.is_multiple_of(8))
    }

    /// [`LoraGatedForward`] of lengths that were checked, with the grid of [`Cuda::hopper_gated_grid`].
    pub(super) fn hopper_lora_gated_forward(
        &self,
        args: LoraGatedForward<'_, Cuda<A>>,
        [m, n, k]: [usize; 3],
        grid: Grid,
    ) -> Result<()> {
        let LoraGatedForward { act, gate, up, activation, keeps_inputs } = args;
        let LoraLinear { x, lora_rank: r, scale, output_scale, .. } = gate;
        let map = |matrix, width| tile_map(matrix, width, DEPTH);
        let (x, gate_weight, up_weight) = (map(x, k)?, map(gate.weight, k)?, map(up.weight, k)?);
        let (gate_u, up_u, gate_b, up_b) = (map(gate.u, r)?, map(up.u, r)?, map(gate.b, r)?, map(up.b, r)?);
        let act = act.map(ViewMut::into_view);
        let [gate, up] = [gate.y, up.y].map(|y| keeps_inputs.then_some(y.into_view()));
        let is_gelu = i32::from(activation == Activation::GeluTanh);
        let (m, n, k, rank) = (m as i32, n as i32, k as i32, r as i32);
        let args = args![
            act,
            gate,
            up,
            x,
            gate_weight,
            up_weight,
            gate_u,
            up_u,
            gate_b,
            up_b,
            is_gelu,
            m,
            n,
            k,
            rank,
            scale,
            output_scale
        ];
        // SAFETY: the lengths were checked by the caller, and the kernel declares these arguments in this order. It writes act, gate and up,
        // which are not borrowed elsewhere.
        unsafe { self.launch(of_rank(GATED, r), grid, args) }
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

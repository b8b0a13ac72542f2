//! LoRA's products of an MLP's gate and up together with their activation.

use anyhow::{Result, ensure};

use super::{Activation, Device, Finish, GatedForward, LoraLinear, LoraOps, ViewMut};

/// act = f(gate) · up `[T, out]` with the outputs gate and up of two modules that read one input. Their outputs have no finish.
pub struct LoraGated<'a, D: Device> {
    /// `None` where only gate and up are needed.
    pub act: Option<ViewMut<'a, D, D::Act>>,
    pub gate: LoraLinear<'a, D>,
    pub up: LoraLinear<'a, D>,
    pub activation: Activation,
    /// Whether somebody reads gate and up later. If not, a device may leave them out.
    pub keeps_inputs: bool,
}

/// [`LoraGated`] by other ops.
pub(super) fn gated<D: LoraOps>(ops: &D, args: LoraGated<'_, D>) -> Result<()> {
    let [tokens, features, _] = args.sizes()?;
    let LoraGated { act, mut gate, mut up, activation, .. } = args;
    for linear in [&mut gate, &mut up] {
        let y = linear.y.range_mut(0..tokens * features);
        ops.lora_linear(LoraLinear { y, finish: Finish::Nothing, ..*linear })?;
    }
    let (gate, up) = (gate.y.into_view(), up.y.into_view());
    match act {
        Some(y) => ops.gated_forward(GatedForward { y, gate, up, activation }),
        None => Ok(()),
    }
}

impl<D: Device> LoraGated<'_, D> {
    /// Checks all lengths; returns T, out and in.
    pub(super) fn sizes(&self) -> Result<[usize; 3]> {
        let (gate, up) = (self.gate.sizes()?, self.up.sizes()?);
        let [tokens, features, _] = gate;
        let act = self.act.as_ref().map_or(tokens * features, ViewMut::len);
        ensure!(gate == up && act == tokens * features, "lora_gated: gate {gate:?}, up {up:?}, activation {act}");
        let have_finish = [&self.gate, &self.up].iter().any(|linear| !matches!(linear.finish, Finish::Nothing));
        ensure!(!have_finish, "lora_gated: gate or up has a finish");
        Ok(gate)
    }
}

//! LoRA's products of an MLP's gate and up together with their activation, forward and backward.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::{Activation, Device, Finish, GatedBackward, GatedForward, LoraLinear, LoraOps, LoraOutput, View, ViewMut};

/// act = f(gate) · up `[T, out]` with the outputs gate and up of two modules that read one input. Their outputs have no finish.
pub struct LoraGatedForward<'a, D: Device> {
    /// `None` where only gate and up are needed.
    pub act: Option<ViewMut<'a, D, D::Act>>,
    pub gate: LoraLinear<'a, D>,
    pub up: LoraLinear<'a, D>,
    pub activation: Activation,
    /// Somebody reads gate and up later. If nobody does, a device may leave them out.
    pub keeps_inputs: bool,
}

/// [`LoraGatedForward`] by other ops.
pub(super) fn forward<D: LoraOps>(ops: &D, args: LoraGatedForward<'_, D>) -> Result<()> {
    let [tokens, features, _] = args.sizes()?;
    let LoraGatedForward { act, mut gate, mut up, activation, .. } = args;
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

impl<D: Device> LoraGatedForward<'_, D> {
    /// Checks all lengths; returns T, out and in.
    pub(super) fn sizes(&self) -> Result<[usize; 3]> {
        let (gate, up) = (self.gate.sizes()?, self.up.sizes()?);
        let [tokens, features, _] = gate;
        let act = self.act.as_ref().map_or(tokens * features, ViewMut::len);
        ensure!(
            gate == up && act == tokens * features,
            "lora_gated_forward: gate {gate:?}, up {up:?}, activation {act}"
        );
        let have_finish = [&self.gate, &self.up].iter().any(|linear| !matches!(linear.finish, Finish::Nothing));
        ensure!(!have_finish, "lora_gated_forward: gate or up has a finish");
        Ok(gate)
    }
}

/// [`GatedBackward`], and then [`LoraOutput`] of gate and of up, each with its gradient as d_y. Scratch is at least as
/// long as gate where an output has an adapter.
pub struct LoraGatedBackward<'a, D: Device> {
    pub backward: GatedBackward<'a, D>,
    /// The d_u of both modules, in a range each.
    pub d_u: ViewMut<'a, D, D::Act>,
    /// Gradients, among which both d_B have a range.
    pub grads: ViewMut<'a, D, f32>,
    /// `None` for an output of a module that is no target.
    pub gate: Option<OutputLora<'a, D>>,
    pub up: Option<OutputLora<'a, D>>,
    pub scratch: ViewMut<'a, D, D::Act>,
}

/// The adapter of an output: what [`LoraOutput`] has, with the places of d_u `[T, r]` and of d_B `[out, r]`.
pub struct OutputLora<'a, D: Device> {
    pub d_u_range: Range<usize>,
    pub b_range: Range<usize>,
    pub u: View<'a, D, D::Act>,
    pub b: View<'a, D, D::Act>,
    pub lora_rank: usize,
    pub scale: f32,
    pub accumulate: bool,
}

impl<'a, D: Device> OutputLora<'a, D> {
    /// The products with a d_y.
    pub fn output<'b>(
        &self,
        d_y: View<'b, D, D::Act>,
        d_u: &'b mut ViewMut<'_, D, D::Act>,
        grads: &'b mut ViewMut<'_, D, f32>,
        scratch: &'b mut ViewMut<'_, D, D::Act>,
    ) -> LoraOutput<'b, D>
    where
        'a: 'b,
    {
        LoraOutput {
            d_u: d_u.range_mut(self.d_u_range.clone()),
            d_b: grads.range_mut(self.b_range.clone()),
            d_y,
            u: self.u,
            b: self.b,
            lora_rank: self.lora_rank,
            scale: self.scale,
            accumulate: self.accumulate,
            scratch: scratch.range_mut(0..scratch.len()),
        }
    }
}

/// [`LoraGatedBackward`] by other ops.
pub(super) fn backward<D: LoraOps>(ops: &D, args: LoraGatedBackward<'_, D>) -> Result<()> {
    let LoraGatedBackward { backward, mut d_u, mut grads, gate, up, mut scratch } = args;
    let len = backward.num_elements()?;
    let GatedBackward { gate: mut d_gate, up: mut d_up, d_y, activation } = backward;
    ops.gated_backward(GatedBackward { gate: d_gate.range_mut(0..len), up: d_up.range_mut(0..len), d_y, activation })?;
    for (lora, d_y) in [(gate, d_gate.view()), (up, d_up.view())] {
        if let Some(lora) = lora {
            ops.lora_output(lora.output(d_y, &mut d_u, &mut grads, &mut scratch))?;
        }
    }
    Ok(())
}

impl<D: Device> LoraGatedBackward<'_, D> {
    /// Checks all lengths; returns T and out where both outputs have an adapter, and both adapters one rank.
    pub(super) fn shared_sizes(&mut self) -> Result<Option<[usize; 2]>> {
        self.backward.num_elements()?;
        let (d_u, grads, scratch) = (&mut self.d_u, &mut self.grads, &mut self.scratch);
        let mut sizes = [None; 2];
        let outputs = [(&self.gate, self.backward.gate.view()), (&self.up, self.backward.up.view())];
        for (sizes, (lora, d_y)) in sizes.iter_mut().zip(outputs) {
            let Some(lora) = lora else { continue };
            let [tokens, out] = lora.output(d_y, d_u, grads, scratch).sizes()?;
            *sizes = Some([tokens, out, lora.lora_rank]);
        }
        let [Some(gate), Some(up)] = sizes else { return Ok(None) };
        ensure!(gate[..2] == up[..2], "lora_gated_backward: gate [T, out] {:?}, up {:?}", &gate[..2], &up[..2]);
        Ok((gate == up).then_some([gate[0], gate[1]]))
    }
}

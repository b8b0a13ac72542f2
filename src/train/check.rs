//! Proof that the adapter learns: at the first backward every lora_B has a gradient, and every lora_A once B is not zero.

use anyhow::{Result, bail};

use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::grads::Values;
use crate::model::layer::LayerLora;
use crate::model::names;

/// Fails naming the modules whose `matrix` ("A" or "B") has no gradient at all. Collective.
pub fn every_matrix_has_a_gradient<D: Ops, Q: Queue<D>>(engine: &mut Engine<D, Q>, matrix: &str) -> Result<()> {
    let mut without = Vec::new();
    for layer in 0..engine.config().num_hidden_layers {
        let grads = engine.gather_trainable_to_host(layer, Values::Grad)?;
        let Some(LayerLora { layout, .. }) = engine.lora() else { bail!("there is no adapter") };
        for entry in layout.entries() {
            let range = if matrix == "A" { entry.a.clone() } else { entry.b.clone() };
            if grads[range].iter().all(|&g| g == 0.0) {
                without.push(format!("{}.lora_{matrix}", names::module(layer, entry.projection)));
            }
        }
    }
    if without.is_empty() {
        return Ok(());
    }
    bail!("{} LoRA matrices have no gradient, so they would never be trained: {}", without.len(), without.join(", "))
}

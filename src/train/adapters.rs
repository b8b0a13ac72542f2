//! Several adapters over one base, one after the other.

use anyhow::Result;

use crate::checkpoint::adapter::Adapter;
use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::Engine;

/// Calls `f` with each adapter's index after its values have been loaded, or once with `None` where there is no adapter.
/// All adapters have the shape that the engine was made for, and the engine has the values of the first one.
pub fn in_turn<D: Ops, Q: Queue<D>, T>(
    engine: &mut Engine<D, Q>,
    adapters: &[Adapter],
    mut f: impl FnMut(&mut Engine<D, Q>, Option<usize>) -> Result<T>,
) -> Result<Vec<T>> {
    if adapters.is_empty() {
        return Ok(vec![f(engine, None)?]);
    }
    let mut results = Vec::new();
    for (i, adapter) in adapters.iter().enumerate() {
        if i > 0 {
            for (layer, values) in adapter.layers.iter().enumerate() {
                engine.load_trainable(layer, values)?;
            }
        }
        results.push(f(engine, Some(i))?);
    }
    Ok(results)
}

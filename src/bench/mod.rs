//! Measurements of this machine: training steps on made-up weights, runs as `train` makes them, ops at the sizes of a
//! layer, collectives.

pub mod collectives;
pub mod kernels;
mod lora;
pub mod run;
pub mod step;
mod timer;

use anyhow::Result;

use crate::device::{Arena, Buffer, Element, Ops};

/// Returns a cleared buffer in an arena of its own.
fn buffer<D: Ops, T: Element>(device: &D, len: usize) -> Result<Buffer<D, T>> {
    let mut buffer = Arena::carved(device, |arena| arena.carve("bench", len))?;
    device.fill_bytes(buffer.view_mut(), 0)?;
    Ok(buffer)
}

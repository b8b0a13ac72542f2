//! A device is memory ([`Device`]) and what it computes ([`Ops`]).
//!
//! Dispatch is static: everything above is generic in `D: Ops`, and one `match` at the top of the command line picks
//! the device. An op is the files of one stem: `device/<stem>.rs` holds its contract (a struct of arguments whose
//! comment gives the formula and the shapes, outputs first), its trait and the check of sizes that both devices make;
//! `cpu/<stem>.rs` is the reference, `cuda/<stem>.rs` launches `kernels/<stem>.cu`. A new stem is listed here, in
//! `ops!`.
//!
//! In all contracts T is a number of tokens and H the hidden size. Matrices are row-major. `Act` is the device's
//! activation type; statistics, losses and gradients of parameters are f32. A T of 0 is allowed everywhere and does
//! nothing.

mod adamw;
pub mod arena;
mod attention;
pub mod cpu;
mod cross_entropy;
pub mod cuda;
mod elementwise;
mod gated;
mod gemm;
mod lora;
mod lora_mlp;
mod nf4;
mod rms_norm;
mod rope;
mod rows;
pub mod tensor;
mod uniform;

use std::time::Duration;

use anyhow::Result;

use crate::quant::record::Dtype;

pub use arena::{Arena, MemoryPlan};
use cpu::HostRegion;
pub use tensor::{Buffer, Element, HostBuffer, Place, View, ViewMut};

pub use adamw::*;
pub use attention::*;
pub use cross_entropy::*;
pub use elementwise::*;
pub use gated::*;
pub use gemm::*;
pub use lora::*;
pub use lora_mlp::*;
pub use nf4::*;
pub use rms_norm::*;
pub use rope::*;
pub use rows::*;
pub use uniform::*;

macro_rules! ops {
    ($($op:ident),* $(,)?) => {
        /// All ops: the sum of the traits of each stem. Every call is checked against the sizes of its contract before
        /// anything is written.
        pub trait Ops: $($op +)* {}
        impl<D: $($op +)*> Ops for D {}
    };
}
ops!(
    AdamWOps,
    AttentionOps,
    CrossEntropyOps,
    ElementwiseOps,
    GatedOps,
    GemmOps,
    LoraOps,
    Nf4Ops,
    RmsNormOps,
    RopeOps,
    RowsOps,
    UniformOps
);

/// Counts of the host's calls to a device's compute queue since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked {
    /// Number of kernels and matrix products.
    pub launches: u64,
    /// Time for which the host has waited for the queue.
    pub waited: Duration,
}

/// Memory of one device, and copies to and from the host.
pub trait Device: Sized + Send + Sync + 'static {
    /// Type of activations and of dequantized weights.
    type Act: Element;
    /// Keeps one allocation alive.
    type Region: Send + Sync;
    /// A point in time of the compute queue.
    type Mark;

    /// The type of activations, among the types of plain weights.
    const ACT: Dtype;
    /// True when the device is the host itself.
    const IS_HOST: bool;
    /// True when activations are so narrow (fp16) that the loss is scaled, so that gradients do not vanish.
    const NEEDS_LOSS_SCALING: bool;

    /// Allocates `bytes`; returns what keeps them alive and the address of the first.
    fn allocate(&self, bytes: usize) -> Result<(Self::Region, usize)>;
    /// Makes copies to and from this device run at full speed on host memory: on a GPU, pins it.
    fn pin(&self, region: HostRegion) -> Result<HostRegion>;
    /// Returns the bytes that all programs together take of the device, as its driver counts them; 0 where it is the
    /// host.
    fn used_bytes(&self) -> Result<usize>;
    /// Returns what the host has asked of the compute queue; nothing where the host computes itself.
    fn asked(&self) -> Asked {
        Asked::default()
    }
    /// Waits until the compute queue has done all that it was given.
    fn synchronize(&self) -> Result<()>;
    /// Returns a mark that passes when the compute queue gets here.
    fn mark(&self) -> Result<Self::Mark>;
    /// Returns the seconds between two marks that have passed; negative when `then` was first.
    fn seconds_between(&self, first: &Self::Mark, then: &Self::Mark) -> Result<f64>;
    /// Copies from the host to the device; the lengths must be equal.
    fn upload<T: Element>(&self, dst: ViewMut<'_, Self, T>, src: &[T]) -> Result<()>;
    /// Copies from the device to the host; the lengths must be equal. Waits for the compute queue.
    fn download<T: Element>(&self, dst: &mut [T], src: View<'_, Self, T>) -> Result<()>;
    /// Copies on the device, on the compute queue; the lengths must be equal.
    fn copy<T: Element>(&self, dst: ViewMut<'_, Self, T>, src: View<'_, Self, T>) -> Result<()>;
    /// Sets every byte to `byte`. With 0xFF each float of any width is a NaN: what was never written cannot pass
    /// unseen.
    fn fill_bytes<T: Element>(&self, dst: ViewMut<'_, Self, T>, byte: u8) -> Result<()>;
}

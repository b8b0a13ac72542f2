//! Models as values ([`spec`]), and their mathematics on device ops. Nothing here knows that anything is sharded: it
//! takes weights and activations and gives activations and gradients.

pub mod batch;
pub mod family;
pub mod head;
pub mod layer;
pub mod linear;
pub mod rope;
pub mod shapes;
pub mod spec;
pub mod stage;
pub mod targets;
pub mod trainable;
pub mod weights;

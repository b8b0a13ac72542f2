//! Llama-family math on device ops. It does not know that anything is sharded: weights and activations come in, and go
//! out.

pub mod activations;
pub mod batch;
pub mod config;
pub mod head;
mod json_fields;
pub mod layer;
pub mod linear;
pub mod lora;
pub mod names;
pub mod rope;
pub mod shapes;
pub mod weights;

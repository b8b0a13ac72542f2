//! The mathematics of Llama models on device ops. It does not know that anything is sharded: it takes weights and
//! activations and gives activations and gradients.

pub mod activations;
pub mod batch;
pub mod config;
pub mod head;
mod json_fields;
pub mod layer;
pub mod linear;
pub mod lora;
pub mod names;
pub mod quantization;
pub mod rope;
pub mod shapes;
pub mod weights;

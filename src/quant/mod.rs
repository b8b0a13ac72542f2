//! NF4 with double quantization, bit-equal to bitsandbytes' CUDA kernels, and the record in which it is stored.

pub mod double;
pub mod nf4;
pub mod record;

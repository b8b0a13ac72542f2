//! AdamW's numbers, learning-rate schedules and clipping; the arithmetic itself is an op of the device.

pub mod adamw;
pub mod clip;
pub mod loss_scale;
pub mod lr;

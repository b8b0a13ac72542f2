//! Everything between a job and the first step.

pub mod agree;
pub mod engine;
mod host_memory;
pub mod options;

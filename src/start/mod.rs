//! Everything between a job and the first step.

pub mod agree;

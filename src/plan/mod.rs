//! Decides and predicts, before a run takes anything, which memory and time it will use. [`memory`] and
//! [`throughput`] price the buffers and actions that the executor will use, on this machine or on another
//! ([`hardware`]). [`decide`] takes the fastest choice that fits and that the user's [`wishes`] allow, and [`ceiling`]
//! tells what a step reaches of a GPU.

pub mod calibrate;
pub mod ceiling;
pub mod decide;
pub mod hardware;
pub mod limits;
pub mod memory;
pub mod report;
pub mod throughput;
pub mod trace;
pub mod wishes;

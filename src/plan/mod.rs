//! Decides and predicts, before a run takes anything, which memory and time it will use. [`memory`] and
//! [`throughput`] price the buffers and actions that the executor will use, on this machine or on another
//! ([`hardware`]). [`decide`] takes the fastest choice that fits.

pub mod calibrate;
pub mod decide;
pub mod hardware;
pub mod limits;
pub mod memory;
pub mod report;
pub mod throughput;
pub mod trace;

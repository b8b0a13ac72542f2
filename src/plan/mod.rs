//! What a run will use, decided before it takes anything: [`memory`] and [`throughput`] price the very buffers and actions that
//! the executor will use, for this machine or for another ([`hardware`]); [`decide`] takes the fastest choice that fits.

pub mod calibrate;
pub mod decide;
pub mod hardware;
pub mod limits;
pub mod memory;
pub mod report;
pub mod throughput;
pub mod trace;

//! Fully sharded data parallelism: where bytes lie ([`layout`], [`mod@unit`]), what happens in which order
//! ([`schedule`], proved by [`check`]), and the executor that performs it ([`exec`], [`run`]).

pub mod check;
mod compute;
mod embedding;
pub mod exec;
pub mod grads;
pub mod layout;
pub mod memory;
mod offload;
pub mod run;
pub mod schedule;
mod slots;
pub mod snapshot;
pub mod unit;
mod unwind;

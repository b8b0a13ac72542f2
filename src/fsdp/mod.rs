//! Fully sharded data parallelism: where bytes lie ([`layout`], [`mod@unit`]), what happens in which order
//! ([`schedule`], proved by [`check`]), and the loop that performs it ([`exec`]).

pub mod check;
mod compute;
pub mod exec;
pub mod grads;
pub mod layout;
pub mod memory;
mod offload;
pub mod schedule;
mod slots;
pub mod unit;

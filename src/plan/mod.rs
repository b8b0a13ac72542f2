//! What a run will use, decided before it takes anything.

pub mod memory;

//! Files: the base model, shard files, adapters.

pub mod adapter;
pub mod atomic;
pub mod bnb;
mod header;
mod inventory;
pub mod load;
pub mod output;
pub mod room;
pub mod shards;
pub mod source;
pub mod synthetic;
mod zeros;

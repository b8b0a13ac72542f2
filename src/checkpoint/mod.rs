//! Files that outlive a run: base models, shard files, adapters and output folders.

pub mod adapter;
pub mod atomic;
pub mod bnb;
pub mod cache;
mod donor;
mod encodings;
pub mod folder;
pub mod gguf;
mod header;
mod identity;
mod inventory;
pub mod load;
pub mod made_up;
mod make;
pub mod mapped;
pub mod merge;
pub mod output;
mod record;
pub mod room;
pub mod shards;
pub mod source;
pub mod stage;
pub mod state;
pub mod synthetic;
pub mod trained;
pub mod weights;
mod zeros;

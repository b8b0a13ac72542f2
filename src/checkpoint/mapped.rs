//! The files that a run reads through mappings for as long as it lasts.
//!
//! Where such a file is cut short the kernel sends a signal, but not within its last page, which reads as zeros from
//! then on. The lengths are therefore compared before anything that was learned is kept.

use std::sync::{Arc, OnceLock, Weak};

use anyhow::Result;

use crate::comm::{ShardBytes, SharedBytes};

use super::weights::Weights;

/// A base as a rank has mapped it: its weights and the rank's shard.
#[derive(Clone)]
pub struct MappedBase {
    pub weights: Weights,
    /// Units of the shard once it is mapped. One that was copied to a device is mapped no longer.
    shard: Arc<OnceLock<Vec<Weak<dyn ShardBytes>>>>,
}

impl MappedBase {
    /// A base whose shard is not mapped yet.
    pub(super) fn new(weights: Weights) -> MappedBase {
        MappedBase { weights, shard: Arc::default() }
    }

    /// Says which shard this rank has mapped; once.
    pub(super) fn set_shard(&self, units: &[SharedBytes]) {
        self.shard.get_or_init(|| units.iter().map(Arc::downgrade).collect());
    }

    /// Fails, naming it, if a file has another length than it had when it was mapped. Not collective.
    pub fn check_lengths(&self) -> Result<()> {
        if let Weights::Files(stamps) = &self.weights {
            stamps.model().check_lengths()?;
        }
        // All units lie in one file.
        let unit = self.shard.get().into_iter().flatten().find_map(Weak::upgrade);
        unit.map_or(Ok(()), |unit| unit.check_length())
    }
}

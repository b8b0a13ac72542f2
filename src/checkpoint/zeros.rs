//! Finds weights that are all zeros, as in layers that were added to a trained model.

use anyhow::Result;

use crate::quant::double::DYNAMIC_MAP;
use crate::quant::nf4::CODEBOOK;
use crate::quant::record::RECORD_WEIGHTS;

use super::bnb::Absmax;
use super::source::BaseModel;

impl BaseModel {
    /// Returns whether a projection's weight is all zeros.
    pub fn is_zero(&self, weight: &str) -> Result<bool> {
        if self.is_bnb(weight) {
            return Ok(match self.bnb_tensor(weight, &CODEBOOK, &DYNAMIC_MAP)?.absmax {
                Absmax::F32(absmax) => absmax.iter().all(|&a| a == 0.0),
                Absmax::Nested { nested_absmax, offset, .. } => {
                    offset == 0.0 && nested_absmax.iter().all(|&a| a == 0.0)
                }
            });
        }
        let view = self.tensor(weight)?;
        let mut values = vec![0f32; RECORD_WEIGHTS.min(view.num_elements())];
        for first in (0..view.num_elements()).step_by(RECORD_WEIGHTS) {
            let values = &mut values[..RECORD_WEIGHTS.min(view.num_elements() - first)];
            view.to_f32(first, values)?;
            // In a trained weight a nonzero value comes early.
            if values.iter().any(|&v| v != 0.0) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

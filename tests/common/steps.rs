//! The tiny model, the rows and the objective that tests of training steps share.

use fsdp_qlora::testing::data::Source;
use fsdp_qlora::testing::{
    Cpu, DataOptions, Dataset, Engine, Format, LossOn, Mode, Objective, Overlong, Packing, Queue, Residency, Update,
    Values,
};

use super::{EngineOptions, golden};

pub const LAYERS: usize = 2;

/// Streams everything from the host that can be streamed.
pub const NOTHING_RESIDENT: Residency = Residency { units: 0, trainables: false, boundary_buffers: 0 };

pub fn update(step: u32, learning_rate: f64) -> Update {
    let (lr_ratio, beta1, beta2, epsilon, weight_decay) = (1.0, 0.9, 0.999, 1e-8, 0.1);
    let (max_grad_norm, loss_scale) = (Some(4.5), 1.0);
    Update { learning_rate, lr_ratio, beta1, beta2, epsilon, weight_decay, max_grad_norm, loss_scale, step }
}

/// The 24 rows of the golden steps.
pub fn rows(packing: Packing) -> Dataset {
    let options = DataOptions { max_length: 128, packing, overlong: Overlong::Truncate, loss_on: LossOn::Auto };
    let source = Source { format: Format::Tokenized, ..Source::new(golden("qlora_steps/rows.jsonl")) };
    Dataset::load(&[source], None, 320, &options).unwrap()
}

pub fn trainer() -> EngineOptions {
    EngineOptions::new("tiny-bnb4-nested", Mode::Train).with_adapter("qlora_steps/start")
}

pub fn layers<Q: Queue<Cpu>>(engine: &mut Engine<Cpu, Q>, values: Values) -> Vec<Vec<f32>> {
    (0..LAYERS).map(|layer| engine.gather_trainable_to_host(layer, values).unwrap()).collect()
}

/// The loss Σ linear · (−log p) + square/2 · (log p)², so
/// that the coefficient of a token depends on its score.
#[derive(Debug)]
pub struct Quadratic {
    pub linear: f64,
    pub square: f64,
}

impl Quadratic {
    pub fn loss(&self, log_probabilities: &[Vec<f64>]) -> f64 {
        log_probabilities.iter().flatten().map(|l| self.square / 2.0 * l * l - self.linear * l).sum()
    }
}

impl Objective for Quadratic {
    fn coefficients(&self, micro: usize, log_probabilities: &[Vec<f64>]) -> Vec<f32> {
        log_probabilities[micro].iter().map(|l| (self.linear - self.square * l) as f32).collect()
    }
}

//! What stages cost for each token of a micro-batch, group by group of saved values: the planner's view of forward and backward.

use std::ops::AddAssign;

use super::Saved;
use super::attention::Attention;
use super::mlp::Mlp;
use crate::model::spec::{LayerSpec, Module, ModuleId};

/// Kernels of a linear module with LoRA.
const FORWARD_LAUNCHES: f64 = 4.0;
const BACKWARD_LAUNCHES: f64 = 7.0;
/// Passes over a module's input that dropout adds.
const FORWARD_DROPOUT: f64 = 2.0;
const BACKWARD_DROPOUT: f64 = 6.0;

/// The cost of a computation, for each token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Weights that the token is multiplied with.
    pub weights: f64,
    /// Floating-point operations of attention's scores: forward, and backward.
    pub forward_scores: f64,
    pub backward_scores: f64,
    /// Elements that are read and written besides products.
    pub elements: f64,
    /// Kernels, for a micro-batch of any size.
    pub launches: f64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.weights += other.weights;
        self.forward_scores += other.forward_scores;
        self.backward_scores += other.backward_scores;
        self.elements += other.elements;
        self.launches += other.launches;
    }
}

/// The circumstances of a computation.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    pub hidden_size: usize,
    /// Tokens of the longest document.
    pub max_length: usize,
    pub has_dropout: bool,
}

impl Circumstances {
    /// Modules and other work of a forward: inputs are read, outputs written and added to.
    fn forward<'m>(&self, modules: impl Iterator<Item = &'m Module>, elements: usize, launches: usize) -> Cost {
        self.linear(modules, elements, launches, (FORWARD_LAUNCHES, FORWARD_DROPOUT))
    }

    fn backward<'m>(&self, modules: impl Iterator<Item = &'m Module>, elements: usize, launches: usize) -> Cost {
        self.linear(modules, elements, launches, (BACKWARD_LAUNCHES, BACKWARD_DROPOUT))
    }

    fn linear<'m>(
        &self,
        modules: impl Iterator<Item = &'m Module>,
        elements: usize,
        launches: usize,
        (launches_of_module, dropout): (f64, f64),
    ) -> Cost {
        let mut cost = Cost { elements: elements as f64, launches: launches as f64, ..Cost::default() };
        for module in modules {
            let (input, output) = (module.in_features as f64, module.out_features as f64);
            cost += Cost {
                weights: input * output,
                elements: input + 2.0 * output + if self.has_dropout { dropout * input } else { 0.0 },
                launches: launches_of_module,
                ..Cost::default()
            };
        }
        cost
    }
}

impl Attention {
    fn forward_cost(&self, at: &Circumstances, computed: Saved) -> Cost {
        let (h, q, kv) = (at.hidden_size, self.q_width(), self.kv_width());
        let (is_output, mut cost) = (|module: &&Module| module.id == ModuleId::O, Cost::default());
        if computed.rest {
            let inputs = self.modules.iter().filter(|module| !is_output(module));
            // The norm, and the rotation of queries and keys.
            cost += at.forward(inputs, 2 * h + 2 * q + 2 * kv, 3);
        }
        if computed.attention {
            // Causal: half of T² scores for each head, and two products.
            let forward_scores = 2.0 * at.max_length as f64 * q as f64;
            cost += Cost { forward_scores, elements: 2.0 * q as f64, launches: 1.0, ..Cost::default() };
        }
        if computed.mlp {
            cost += at.forward(self.modules.iter().filter(is_output), 0, 0);
        }
        cost
    }

    fn backward_cost(&self, at: &Circumstances) -> Cost {
        let (h, q, kv) = (at.hidden_size, self.q_width(), self.kv_width());
        let mut cost = at.backward(self.modules.iter(), 4 * h + 8 * q + 6 * kv, 6);
        cost.backward_scores = 5.0 * at.max_length as f64 * q as f64;
        cost
    }
}

impl Mlp {
    /// Without `output` the last module is left out.
    fn forward_cost(&self, at: &Circumstances, computed: Saved, output: bool) -> Cost {
        let (h, i) = (at.hidden_size, self.intermediate_size);
        let (is_output, mut cost) = (|module: &&Module| module.id == ModuleId::Down, Cost::default());
        if computed.rest {
            // The norm, and the activation.
            cost += at.forward([].into_iter(), 2 * h + 3 * i, 2);
        }
        if computed.mlp {
            // The sum of branch and residual stream, besides the modules.
            cost += at.forward(self.modules.iter().filter(|module| !is_output(module)), 3 * h, 0);
        }
        if output {
            cost += at.forward(self.modules.iter().filter(is_output), 2 * h, 1);
        }
        cost
    }

    fn backward_cost(&self, at: &Circumstances) -> Cost {
        at.backward(self.modules.iter(), 4 * at.hidden_size + 5 * self.intermediate_size, 2)
    }
}

impl LayerSpec {
    /// The groups of saved values that are `computed`, and with `output` the layer's output.
    pub fn forward_cost(&self, at: &Circumstances, computed: Saved, output: bool) -> Cost {
        let mut cost = self.attention.forward_cost(at, computed);
        cost += self.mlp.forward_cost(at, computed, output);
        cost
    }

    pub fn backward_cost(&self, at: &Circumstances) -> Cost {
        let mut cost = self.attention.backward_cost(at);
        cost += self.mlp.backward_cost(at);
        cost
    }
}

//! The cost of stages for each token of a micro-batch, by group of saved values: the planner's view of forward and backward.

use std::ops::AddAssign;

use super::Saved;
use super::attention::Attention;
use super::mlp::Mlp;
use crate::model::spec::{LayerSpec, Module, ModuleId};

/// The work of a linear module with LoRA besides its product with the base: kernels, and passes over its input and its output.
struct Passes {
    launches: f64,
    input: f64,
    output: f64,
    /// More passes over the input where its dropout mask is drawn, which takes about as long as one of them.
    dropout: f64,
}

/// u = dropout(x) · Aᵀ reads the input; u · Bᵀ writes the output, and the base's product reads it again.
const FORWARD: Passes = Passes { launches: 3.0, input: 1.0, output: 2.0, dropout: 1.0 };

/// d_u and the gradient of B each read d_y; the gradient of A reads the input, and d_u · A is added to d_x.
const BACKWARD: Passes = Passes { launches: 5.0, input: 3.0, output: 2.0, dropout: 2.0 };

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
        self.linear(modules, elements, launches, &FORWARD)
    }

    fn backward<'m>(&self, modules: impl Iterator<Item = &'m Module>, elements: usize, launches: usize) -> Cost {
        self.linear(modules, elements, launches, &BACKWARD)
    }

    fn linear<'m>(
        &self,
        modules: impl Iterator<Item = &'m Module>,
        elements: usize,
        launches: usize,
        passes: &Passes,
    ) -> Cost {
        let mut cost = Cost { elements: elements as f64, launches: launches as f64, ..Cost::default() };
        let dropout = if self.has_dropout { passes.dropout } else { 0.0 };
        for module in modules {
            let (input, output) = (module.in_features as f64, module.out_features as f64);
            cost += Cost {
                weights: input * output,
                elements: (passes.input + dropout) * input + passes.output * output,
                launches: passes.launches,
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
            let forward_scores = 4.0 * self.visible_keys(at) * q as f64;
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
        cost.backward_scores = 10.0 * self.visible_keys(at) * q as f64;
        cost
    }

    /// Keys that a query sees on average, in the longest document. Forward has two products of each, backward five.
    fn visible_keys(&self, at: &Circumstances) -> f64 {
        let length = at.max_length as f64;
        let window = self.window.map_or(length, |window| (window as f64).min(length));
        // Pairs of query and key: those of a triangle, less those of the triangle beyond the window.
        (length.powi(2) - (length - window).powi(2)) / 2.0 / length.max(1.0)
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

//! The cost of stages for each token of a micro-batch, by group of saved values: the planner's view of forward and
//! backward.

use std::ops::AddAssign;

use super::Saved;
use super::attention::Attention;
use super::mlp::Mlp;
use crate::model::spec::{LayerSpec, Module};

/// The work of linear modules with LoRA that share an input: products with the base, and besides them kernels, and
/// passes over their input and their outputs. Those over the input are times of kernels on an H100
/// (`benches/results.md`) over that of a copy.
struct Passes {
    /// Products with each weight of the base.
    products: f64,
    /// Kernels for all modules together, and for each.
    launches: [f64; 2],
    /// Passes over the input for all modules together, and for each.
    input: [f64; 2],
    output: f64,
    /// More passes over the input for each module whose dropout mask is drawn.
    dropout: f64,
}

/// u = dropout(x) · Aᵀ of all modules reads the input.
const DOWN: Passes = Passes { products: 0.0, launches: [1.0, 0.0], input: [0.35, 0.65], output: 0.0, dropout: 0.45 };

/// u · Bᵀ writes an output, and the base's product reads it again.
const FORWARD: Passes = Passes { products: 1.0, launches: [0.0, 2.0], input: [0.0; 2], output: 2.0, dropout: 0.0 };

/// d_u and the gradient of B read d_y once and add sums; the gradient of A and d_u · A of all modules read the input
/// and write d_x.
const BACKWARD: Passes =
    Passes { products: 1.0, launches: [2.0, 3.0], input: [1.15, 0.85], output: 1.3, dropout: 0.45 };

/// The gated activation's backward makes d_u and the gradient of B of gate and up from the d_y that it writes.
const GATED_BACKWARD: Passes = Passes { launches: [2.0, 2.0], output: 0.4, ..BACKWARD };

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
    /// Modules that share an input, if there are any.
    fn linears<'m>(&self, modules: impl Iterator<Item = &'m Module>, passes: &Passes) -> Cost {
        let mut cost = Cost::default();
        let dropout = if self.has_dropout { passes.dropout } else { 0.0 };
        for (i, module) in modules.enumerate() {
            let (input, output) = (module.in_features as f64, module.out_features as f64);
            let shared = |[all, each]: [f64; 2]| if i == 0 { all + each } else { each };
            cost += Cost {
                weights: passes.products * input * output,
                elements: (shared(passes.input) + dropout) * input + passes.output * output,
                launches: shared(passes.launches),
                ..Cost::default()
            };
        }
        cost
    }
}

/// The cost of kernels besides linear modules.
fn kernels(elements: usize, launches: usize) -> Cost {
    Cost { elements: elements as f64, launches: launches as f64, ..Cost::default() }
}

impl Attention {
    fn forward_cost(&self, at: &Circumstances, computed: Saved) -> Cost {
        let (h, q, kv) = (at.hidden_size, self.q_width(), self.kv_width());
        let mut cost = Cost::default();
        if computed.lora {
            cost += at.linears(self.inputs(), &DOWN);
            cost += at.linears(self.outputs(), &DOWN);
        }
        if computed.rest {
            // The norm, and the rotation of queries and keys.
            cost += kernels(2 * h + 2 * q + 2 * kv, 3);
            cost += at.linears(self.inputs(), &FORWARD);
        }
        if computed.attention {
            let forward_scores = 4.0 * self.visible_keys(at) * q as f64;
            cost += Cost { forward_scores, elements: 2.0 * q as f64, launches: 1.0, ..Cost::default() };
        }
        if computed.mlp {
            cost += at.linears(self.outputs(), &FORWARD);
        }
        cost
    }

    fn backward_cost(&self, at: &Circumstances) -> Cost {
        let (h, q, kv) = (at.hidden_size, self.q_width(), self.kv_width());
        let mut cost = kernels(4 * h + 8 * q + 6 * kv, 6);
        cost += at.linears(self.inputs(), &BACKWARD);
        cost += at.linears(self.outputs(), &BACKWARD);
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
    /// Without `output` the last module's product is left out.
    fn forward_cost(&self, at: &Circumstances, computed: Saved, output: bool) -> Cost {
        let (h, i) = (at.hidden_size, self.intermediate_size);
        let mut cost = Cost::default();
        if computed.lora {
            cost += at.linears(self.inputs(), &DOWN);
            cost += at.linears(self.outputs(), &DOWN);
        }
        if computed.rest {
            cost += kernels(2 * h, 1);
            // The activation. Where nothing reads it, backward makes it as it reads gate and up.
            cost += if output || computed.lora { kernels(3 * i, 1) } else { kernels(i, 0) };
        }
        if computed.mlp {
            // The sum of branch and residual stream, besides the modules.
            cost += kernels(3 * h, 0);
            cost += at.linears(self.inputs(), &FORWARD);
        }
        if output {
            cost += kernels(2 * h, 1);
            cost += at.linears(self.outputs(), &FORWARD);
        }
        cost
    }

    fn backward_cost(&self, at: &Circumstances) -> Cost {
        let mut cost = kernels(4 * at.hidden_size + 5 * self.intermediate_size, 2);
        cost += at.linears(self.inputs(), &GATED_BACKWARD);
        cost += at.linears(self.outputs(), &BACKWARD);
        cost
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

//! Checks that the adapter learns: every lora_B has a gradient at the first backward, every lora_A has one once B is
//! not zero, and at the end the values differ from those at the start.
//!
//! A gradient may rightly be zero where the base is: LLaMA Pro adds layers whose `o_proj` and `down_proj` are zero,
//! so no gradient reaches the projections before them. Each projection's gradient has the other weights of its branch
//! as factors (attention: q, k, v, o; MLP: gate, up, down). So a matrix without a gradient is accepted and reported
//! if another weight of its branch is all zeros. Queries and keys have none either where every target is predicted
//! from the first token of its document, which can attend only to itself. Anywhere else a matrix without a gradient
//! is an error of the program, and so is an adapter without any.

use anyhow::{Result, bail, ensure};

use crate::checkpoint::adapter::Adapter;
use crate::comm::Queue;
use crate::device::Ops;
use crate::fsdp::exec::Engine;
use crate::fsdp::grads::Values;
use crate::model::batch::{MicroBatch, NO_TARGET};
use crate::model::spec::{ModelSpec, ModuleId};
use crate::model::trainable::Kind;

use super::skipping::NotFinite;

/// Largest number of modules that a message names.
const MAX_NAMES: usize = 8;

/// Tells whether the base's weight of this name is all zeros.
pub type IsZero<'a> = &'a dyn Fn(&str) -> Result<bool>;

/// Fails naming the modules whose A or B should have a gradient and has none. Returns a line about those that rightly
/// have none. `batches` are this rank's of the step. Collective.
pub fn every_matrix_has_a_gradient<D: Ops, Q: Queue<D>>(
    engine: &mut Engine<D, Q>,
    kind: Kind,
    batches: &[MicroBatch],
    is_zero: IsZero<'_>,
) -> Result<Option<String>> {
    let attending = batches.iter().map(num_attending_targets).sum::<usize>();
    let attends = engine.queue.all_reduce_f64("targets that attend to several tokens", &[attending as f64])?[0] > 0.0;
    let (mut without, mut num_matrices) = (Vec::new(), 0);
    for layer in 0..engine.spec().num_layers() {
        let grads = engine.gather_trainable_to_host(layer, Values::Grad)?;
        let Some(trainables) = engine.trainables() else { bail!("there is no adapter") };
        for matrix in trainables.layers[layer].list().iter().filter(|matrix| matrix.kind == kind) {
            num_matrices += 1;
            if grads[matrix.range.clone()].iter().all(|&g| g == 0.0) {
                without.push((layer, matrix.module));
            }
        }
    }
    judge(engine.spec(), &without, num_matrices, kind, attends, is_zero)
}

/// Counts the targets that are predicted from more than the first token of their document.
fn num_attending_targets(batch: &MicroBatch) -> usize {
    batch
        .targets
        .iter()
        .zip(&batch.positions)
        .filter(|&(&target, &position)| target != NO_TARGET && position > 0)
        .count()
}

fn judge(
    spec: &ModelSpec,
    without: &[(usize, ModuleId)],
    num_matrices: usize,
    kind: Kind,
    attends: bool,
    is_zero: IsZero<'_>,
) -> Result<Option<String>> {
    let matrix = kind.letter();
    ensure!(without.len() < num_matrices, "no lora_{matrix} has a gradient, so the adapter would not be trained");
    let (mut rightly, mut wrongly) = (Vec::new(), Vec::new());
    for &(layer, id) in without {
        let layer = &spec.layers[layer];
        let name = layer.module(id).map_or("", |module| &module.name);
        let name = format!("{name}.lora_{matrix}");
        let mut is_right = !attends && matches!(id, ModuleId::Q | ModuleId::K);
        for other in layer.branch(id).iter().filter(|other| other.id != id) {
            is_right = is_right || is_zero(&format!("{}.weight", other.name))?;
        }
        if is_right { rightly.push(name) } else { wrongly.push(name) }
    }
    ensure!(
        wrongly.is_empty(),
        "{} LoRA matrices have no gradient, so they would never be trained: {}",
        wrongly.len(),
        list(&wrongly)
    );
    let why = "as weights of the base beside them are zeros, or no token attends to another";
    let line =
        || format!("{} of {num_matrices} lora_{matrix} have no gradient yet, {why}: {}", rightly.len(), list(&rightly));
    Ok((!rightly.is_empty()).then(line))
}

fn list(names: &[String]) -> String {
    let told = names.iter().take(MAX_NAMES).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MAX_NAMES) {
        0 => told,
        more => format!("{told} and {more} more"),
    }
}

/// Fails if an adapter must not be saved: it holds a number that is not finite, or nothing was learned since the
/// start.
pub fn result_is_sound(start: &Adapter, end: &Adapter) -> Result<()> {
    for (layer, values) in end.layers.iter().enumerate() {
        if let Some(value) = values.iter().find(|v| !v.is_finite()) {
            let said = format!(
                "training diverged in its last update: the adapter of layer {layer} holds {value}, and is not saved; \
                 help: lower training.learning_rate"
            );
            return Err(NotFinite(said).into());
        }
    }
    ensure!(
        start.layers != end.layers,
        "no step changed the adapter, so it would be saved as it was at the start; help: look at learning_rate in \
         metrics.jsonl, and at training.warmup_steps"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::adapter::AdapterSettings;
    use crate::model::shapes;

    fn spec() -> ModelSpec {
        shapes::named("llama-3.1-405b", None).unwrap()
    }

    fn zeros(zeros: &'static [&'static str]) -> impl Fn(&str) -> Result<bool> {
        |name| Ok(zeros.contains(&name))
    }

    #[test]
    fn a_gradient_may_be_zero_only_where_its_branch_is() {
        let base = zeros(&["model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"]);
        let expanded = [ModuleId::Q, ModuleId::V, ModuleId::Gate].map(|p| (1, p));
        let line = judge(&spec(), &expanded, 14, Kind::B, true, &base).unwrap().unwrap();
        assert!(line.starts_with("3 of 14 lora_B") && line.contains("layers.1.self_attn.q_proj.lora_B"), "{line}");
        assert_eq!(judge(&spec(), &[], 14, Kind::B, true, &base).unwrap(), None);
        // These are modules of a layer that has all its weights, and the zero weights themselves.
        for wrong in [(0, ModuleId::Q), (0, ModuleId::Gate), (1, ModuleId::O), (1, ModuleId::Down)] {
            let error = judge(&spec(), &[(1, ModuleId::Q), wrong], 14, Kind::B, true, &base).unwrap_err().to_string();
            let name = format!("layers.{}.", wrong.0);
            assert!(
                error.starts_with("1 LoRA matrices") && error.contains(&name) && error.contains(wrong.1.name()),
                "{error}"
            );
        }
        assert!(
            judge(&spec(), &expanded, 3, Kind::B, true, &base)
                .unwrap_err()
                .to_string()
                .contains("no lora_B has a gradient")
        );
    }

    #[test]
    fn queries_and_keys_of_single_tokens_have_no_gradient() {
        let base = zeros(&[]);
        let without = [(0, ModuleId::Q), (0, ModuleId::K)];
        assert!(judge(&spec(), &without, 14, Kind::B, false, &base).unwrap().unwrap().starts_with("2 of 14"));
        assert!(judge(&spec(), &without, 14, Kind::B, true, &base).is_err());
        assert!(judge(&spec(), &[(0, ModuleId::V)], 14, Kind::B, false, &base).is_err());
        let mut batch = MicroBatch::new();
        batch.push(0, &[5, 6], &[true, true]);
        batch.push(1, &[5, 6, 7], &[true, true, false]);
        assert_eq!(num_attending_targets(&batch), 0);
        batch.push(2, &[5, 6, 7], &[true, false, true]);
        assert_eq!(num_attending_targets(&batch), 1);
    }

    #[test]
    fn lists_are_bounded() {
        let without: Vec<_> = (0..100).map(|layer| (layer, ModuleId::Q)).collect();
        let error = judge(&spec(), &without, 200, Kind::A, true, &zeros(&[])).unwrap_err().to_string();
        assert!(
            error.contains("layers.7.self_attn.q_proj.lora_A and 92 more") && !error.contains("layers.8."),
            "{error}"
        );
    }

    #[test]
    fn an_adapter_that_learned_nothing_or_too_much_is_refused() {
        let settings = AdapterSettings::smallest(&spec());
        let adapter =
            |value: f32| Adapter { settings: settings.clone(), layers: vec![vec![1.0, 0.0], vec![1.0, value]] };
        let start = adapter(0.0);
        result_is_sound(&start, &adapter(1e-30)).unwrap();
        assert!(result_is_sound(&start, &start).unwrap_err().to_string().contains("no step changed the adapter"));
        for value in [f32::NAN, f32::INFINITY] {
            let error = result_is_sound(&start, &adapter(value)).unwrap_err().to_string();
            assert!(error.contains("layer 1") && error.contains("training.learning_rate"), "{error}");
        }
    }
}

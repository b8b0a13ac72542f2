//! Reads `training.lr_scheduler_kwargs`: the numbers of a learning-rate schedule by their names in transformers.

use serde_json::{Map, Value, json};

use super::keys;
use super::overrides::Written;
use super::values::{choice, count, integer, not_negative, number};
use crate::files::shown;
use crate::optim::lr::{Curve, LrScheduler, LrSchedulerType};

/// The arguments that were written, of which some have been read.
struct Kwargs<'a> {
    written: &'a Map<String, Value>,
    known: Vec<&'static str>,
    problems: Vec<String>,
}

impl Kwargs<'_> {
    /// Reads an argument; `null` counts as absent. An argument that is not allowed is noted, and counts as absent too.
    fn take<T>(&mut self, name: &'static str, allowed: &str, read: fn(&Value) -> Option<T>) -> Option<T> {
        self.known.push(name);
        let value = self.written.get(name).filter(|value| !value.is_null())?;
        let found = read(value);
        if found.is_none() {
            self.problems.push(format!("{name}: found {}, allowed: {allowed}", shown(&value.to_string())));
        }
        found
    }

    fn has(&self, name: &str) -> bool {
        self.written.get(name).is_some_and(|value| !value.is_null())
    }

    fn number(&mut self, name: &'static str, default: f64) -> f64 {
        self.take(name, "a number of at least 0", not_negative).unwrap_or(default)
    }

    fn rate(&mut self, name: &'static str) -> Option<f64> {
        self.take(name, "a number from 0 to 1", |v| number(v).filter(|x| (0.0..=1.0).contains(x)))
    }

    fn curve(&mut self, name: &'static str, default: Curve) -> Curve {
        self.take(name, &Curve::ALLOWED.join(", "), choice).unwrap_or(default)
    }

    /// Reads the rate at the end of a cosine, which one of two arguments gives.
    fn min_lr_rate(&mut self, learning_rate: f64) -> f64 {
        let rate = self.rate("min_lr_rate");
        let min_lr = self.take("min_lr", "a number of at least 0", not_negative);
        if min_lr.is_some_and(|min_lr| min_lr > learning_rate) {
            let rate = keys::LEARNING_RATE.path;
            self.problems
                .push(format!("min_lr: found {}, allowed: at most {rate}, {learning_rate}", min_lr.unwrap_or(0.0)));
        }
        if self.has("min_lr_rate") == self.has("min_lr") {
            self.problems.push("min_lr, min_lr_rate: exactly one of the two must be given".into());
        }
        rate.or(min_lr.map(|min_lr| min_lr / learning_rate)).unwrap_or(0.0)
    }
}

/// Returns the schedule of a recipe, or the problems of its arguments. `None` if one of the keys cannot be read.
pub(super) fn decide(written: &Written) -> Option<Result<LrScheduler, Vec<String>>> {
    let (name, learning_rate) = (written.get(&keys::LR_SCHEDULER)?, written.get(&keys::LEARNING_RATE)?);
    Some(read(name, &written.get(&keys::LR_SCHEDULER_KWARGS)?, learning_rate))
}

fn read(name: LrSchedulerType, written: &Map<String, Value>, learning_rate: f64) -> Result<LrScheduler, Vec<String>> {
    let mut kwargs = Kwargs { written, known: Vec::new(), problems: Vec::new() };
    let scheduler = match name {
        LrSchedulerType::Constant => LrScheduler::Constant,
        LrSchedulerType::ConstantWithWarmup => LrScheduler::ConstantWithWarmup,
        LrSchedulerType::Linear => LrScheduler::Linear,
        LrSchedulerType::Cosine => LrScheduler::Cosine { num_cycles: kwargs.number("num_cycles", 0.5) },
        LrSchedulerType::CosineWithRestarts => {
            LrScheduler::CosineWithRestarts { num_cycles: kwargs.number("num_cycles", 1.0) }
        }
        LrSchedulerType::Polynomial => polynomial(&mut kwargs, learning_rate),
        LrSchedulerType::CosineWithMinLr => LrScheduler::CosineWithMinLr {
            num_cycles: kwargs.number("num_cycles", 0.5),
            min_lr_rate: kwargs.min_lr_rate(learning_rate),
        },
        LrSchedulerType::CosineWarmupWithMinLr => LrScheduler::CosineWarmupWithMinLr {
            num_cycles: kwargs.number("num_cycles", 0.5),
            min_lr_rate: kwargs.min_lr_rate(learning_rate),
            warmup_lr_rate: kwargs.rate("warmup_lr_rate"),
        },
        LrSchedulerType::InverseSqrt => {
            LrScheduler::InverseSqrt { timescale: kwargs.take("timescale", "an integer of at least 1", count) }
        }
        LrSchedulerType::WarmupStableDecay => warmup_stable_decay(&mut kwargs),
    };
    let Kwargs { written, known, mut problems } = kwargs;
    let unknown = written.keys().filter(|key| !known.contains(&key.as_str())).map(|key| {
        let allowed = if known.is_empty() { "none".into() } else { known.join(", ") };
        format!("{}: not an argument of {}, allowed: {allowed}", shown(key), name.word())
    });
    problems.extend(unknown);
    match problems.is_empty() {
        true => Ok(scheduler),
        false => Err(problems.iter().map(|problem| format!("{}.{problem}", keys::LR_SCHEDULER_KWARGS.path)).collect()),
    }
}

fn polynomial(kwargs: &mut Kwargs, lr_init: f64) -> LrScheduler {
    let (power, lr_end) = (kwargs.number("power", 1.0), kwargs.number("lr_end", 1e-7));
    if lr_end >= lr_init {
        kwargs.problems.push(format!("lr_end: found {lr_end}, allowed: below {}, {lr_init}", keys::LEARNING_RATE.path));
    }
    LrScheduler::Polynomial { power, lr_end, lr_init }
}

fn warmup_stable_decay(kwargs: &mut Kwargs) -> LrScheduler {
    let steps = |v: &Value| integer(v, 0..=keys::MAX_STEPS_OF_A_RUN);
    let num_decay_steps = kwargs.take("num_decay_steps", "an integer of at least 0", steps);
    if !kwargs.has("num_decay_steps") {
        kwargs.problems.push("num_decay_steps: missing, it must be an integer of at least 0".into());
    }
    LrScheduler::WarmupStableDecay {
        num_stable_steps: kwargs.take("num_stable_steps", "an integer of at least 0", steps),
        num_decay_steps: num_decay_steps.unwrap_or(0),
        warmup_type: kwargs.curve("warmup_type", Curve::Linear),
        decay_type: kwargs.curve("decay_type", Curve::Cosine),
        min_lr_ratio: kwargs.rate("min_lr_ratio").unwrap_or(0.0),
        num_cycles: kwargs.number("num_cycles", 0.5),
    }
}

/// Returns the arguments of a schedule with all defaults, as they could be written.
pub(super) fn kwargs(scheduler: &LrScheduler) -> Value {
    match scheduler {
        LrScheduler::Constant | LrScheduler::ConstantWithWarmup | LrScheduler::Linear => json!({}),
        LrScheduler::Cosine { num_cycles } | LrScheduler::CosineWithRestarts { num_cycles } => {
            json!({"num_cycles": num_cycles})
        }
        LrScheduler::Polynomial { power, lr_end, .. } => json!({"power": power, "lr_end": lr_end}),
        LrScheduler::CosineWithMinLr { num_cycles, min_lr_rate } => {
            json!({"num_cycles": num_cycles, "min_lr_rate": min_lr_rate})
        }
        LrScheduler::CosineWarmupWithMinLr { num_cycles, min_lr_rate, warmup_lr_rate } => {
            json!({"num_cycles": num_cycles, "min_lr_rate": min_lr_rate, "warmup_lr_rate": warmup_lr_rate})
        }
        LrScheduler::InverseSqrt { timescale } => json!({"timescale": timescale}),
        LrScheduler::WarmupStableDecay {
            num_stable_steps,
            num_decay_steps,
            warmup_type,
            decay_type,
            min_lr_ratio,
            num_cycles,
        } => json!({
            "num_stable_steps": num_stable_steps,
            "num_decay_steps": num_decay_steps,
            "warmup_type": warmup_type,
            "decay_type": decay_type,
            "min_lr_ratio": min_lr_ratio,
            "num_cycles": num_cycles,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(name: &str, written: Value) -> Result<LrScheduler, Vec<String>> {
        read(name.parse().unwrap(), written.as_object().unwrap(), 1e-3)
    }

    fn golden() -> Value {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/schedules.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn learning_rates_are_those_of_transformers() {
        let golden = golden();
        let cases = golden["schedules"].as_array().unwrap();
        let number = |value: &Value| value.as_u64().unwrap() as usize;
        for case in cases {
            let (kwargs, peak) = (case["kwargs"].as_object().unwrap(), case["learning_rate"].as_f64().unwrap());
            let scheduler = read(case["name"].as_str().unwrap().parse().unwrap(), kwargs, peak).unwrap();
            let rates = case["rates"].as_array().unwrap();
            assert_eq!(rates.len(), number(&case["num_steps"]));
            for (step, rate) in rates.iter().enumerate() {
                let (ours, theirs) = (peak * scheduler.factor(step, number(&case["warmup_steps"]), rates.len()), rate);
                // Cosines and powers of two libraries differ in their last bits.
                let error = (ours - theirs.as_f64().unwrap()).abs() / peak;
                assert!(error <= 2.0 * f64::EPSILON, "{case}: {ours} at step {step}");
            }
        }
        let names: std::collections::BTreeSet<_> = cases.iter().map(|case| case["name"].as_str()).collect();
        assert_eq!(names.len(), LrSchedulerType::ALLOWED.len(), "each name is compared");
        for warmup in golden["warmups"].as_array().unwrap() {
            let steps = super::super::values::warmup(&warmup["warmup_steps"]).unwrap().of(number(&warmup["num_steps"]));
            assert_eq!(steps, number(&warmup["is"]), "{warmup}");
        }
    }

    #[test]
    fn arguments_are_read_and_written_out_with_their_defaults() {
        for (name, written, all) in [
            ("linear", json!({}), json!({})),
            ("cosine", json!({}), json!({"num_cycles": 0.5})),
            ("cosine_with_restarts", json!({"num_cycles": 3}), json!({"num_cycles": 3.0})),
            ("polynomial", json!({"power": "2"}), json!({"power": 2.0, "lr_end": 1e-7})),
            ("cosine_with_min_lr", json!({"min_lr": 1e-4}), json!({"num_cycles": 0.5, "min_lr_rate": 0.1})),
            (
                "cosine_warmup_with_min_lr",
                json!({"min_lr_rate": 0.1, "min_lr": null}),
                json!({"num_cycles": 0.5, "min_lr_rate": 0.1, "warmup_lr_rate": null}),
            ),
            ("inverse_sqrt", json!({"timescale": 100}), json!({"timescale": 100})),
            (
                "warmup_stable_decay",
                json!({"num_decay_steps": 5, "decay_type": "1-sqrt"}),
                json!({"num_stable_steps": null, "num_decay_steps": 5, "warmup_type": "linear", "decay_type": "1-sqrt",
                    "min_lr_ratio": 0.0, "num_cycles": 0.5}),
            ),
        ] {
            let scheduler = schedule(name, written).unwrap();
            assert_eq!(kwargs(&scheduler), all);
            assert_eq!(schedule(name, all).unwrap(), scheduler);
        }
    }

    #[test]
    fn arguments_that_a_schedule_does_not_have_are_refused_with_those_that_it_has() {
        for (name, written, expected) in [
            ("linear", json!({"power": 2}), "power: not an argument of linear, allowed: none"),
            ("polynomial", json!({"pow": 2}), "pow: not an argument of polynomial, allowed: power, lr_end"),
            ("polynomial", json!({"power": -1}), "power: found -1, allowed: a number of at least 0"),
            ("polynomial", json!({"lr_end": 0.1}), "lr_end: found 0.1, allowed: below training.learning_rate, 0.001"),
            ("cosine", json!({"num_cycles": "x"}), "num_cycles: found \"x\", allowed: a number of at least 0"),
            ("cosine_with_min_lr", json!({}), "min_lr, min_lr_rate: exactly one of the two must be given"),
            ("cosine_with_min_lr", json!({"min_lr": 0, "min_lr_rate": 0}), "exactly one of the two must be given"),
            (
                "cosine_with_min_lr",
                json!({"min_lr": 1}),
                "min_lr: found 1, allowed: at most training.learning_rate, 0.001",
            ),
            (
                "cosine_with_min_lr",
                json!({"min_lr_rate": 1.5}),
                "min_lr_rate: found 1.5, allowed: a number from 0 to 1",
            ),
            ("inverse_sqrt", json!({"timescale": 0}), "timescale: found 0, allowed: an integer of at least 1"),
            ("warmup_stable_decay", json!({}), "num_decay_steps: missing, it must be an integer"),
            (
                "warmup_stable_decay",
                json!({"num_decay_steps": 1, "decay_type": "exp"}),
                "decay_type: found \"exp\", allowed: linear, cosine, 1-sqrt",
            ),
        ] {
            let problems = schedule(name, written).unwrap_err();
            assert_eq!(problems.len(), 1, "{problems:?}");
            let told = problems[0].strip_prefix("training.lr_scheduler_kwargs.").unwrap();
            assert!(told.contains(expected), "{told}");
        }
    }
}

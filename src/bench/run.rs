//! The parts of a start and the steps of a run, from the times at which the run's phases began.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::comm::watch::Phase;
use crate::recipe::{Job, When};
use crate::train::metrics::peak_host_bytes;

/// Steps that warm up and are not counted.
const WARM_UP_STEPS: usize = 2;

/// Returns the number of steps of a run in which so many are timed: those that warm up come before, and behind them is
/// one more, since a step is timed from its beginning to that of the next.
pub fn num_steps(timed: usize) -> usize {
    WARM_UP_STEPS + timed + 1
}

/// Returns seconds by phase from the start of MPI to the end of the first step, and milliseconds of the steps: of all,
/// of those in which a checkpoint is taken or written, and of the others. A step lasts until the next one begins, so
/// it includes the checkpoint that is taken behind it; the checkpoint is written during the step after that.
pub fn report(shape: &str, num_layers: usize, world_size: usize, job: &Job, begun: &[(Phase, Instant)]) -> Value {
    let save_steps = if let When::Steps(every) = job.training.save { Some(every) } else { None };
    let timed: Vec<(usize, Duration)> = steps(begun).into_iter().skip(WARM_UP_STEPS).collect();
    let saves = |step: usize| save_steps.is_some_and(|every| [step, step - 1].iter().any(|s| s.is_multiple_of(every)));
    let of = |wanted: &dyn Fn(usize) -> bool| {
        let times = timed.iter().filter(|(step, _)| wanted(*step)).map(|(_, time)| time.as_secs_f64() * 1e3);
        statistics(times.collect())
    };
    json!({
        "shape": shape, "layers": num_layers, "world_size": world_size,
        "micro_batch": job.training.per_device_train_batch_size, "seq": job.data.max_length,
        "accum": job.training.accumulation_steps(world_size), "save_steps": save_steps, "job": job.values(),
        "start_s": start(begun),
        "step": of(&|_| true), "step_with_save": of(&saves), "step_without_save": of(&|step| !saves(step)),
        "peak_host_bytes": peak_host_bytes(),
    })
}

/// Returns the seconds of each phase up to the second step, and their sum; the first step is called `first_step`.
fn start(begun: &[(Phase, Instant)]) -> Value {
    let (mut seconds, mut first_step) = (Map::new(), None);
    for pair in begun.windows(2) {
        let ((phase, begin), (_, end)) = (pair[0], pair[1]);
        let name = match phase {
            Phase::Step(step) if *first_step.get_or_insert(step) == step => "first_step".into(),
            Phase::Step(_) => break,
            other => other.word(),
        };
        let before = seconds.get(&name).and_then(Value::as_f64).unwrap_or(0.0);
        seconds.insert(name, (before + (end - begin).as_secs_f64()).into());
        if first_step.is_some() {
            break;
        }
    }
    let total: f64 = seconds.values().filter_map(Value::as_f64).sum();
    seconds.insert("total".into(), total.into());
    seconds.into()
}

/// Returns the steps that another step follows, each with the time from its beginning to that of the next, whatever
/// lies between.
fn steps(begun: &[(Phase, Instant)]) -> Vec<(usize, Duration)> {
    let steps = begun.iter().filter_map(|&(phase, begin)| match phase {
        Phase::Step(step) => Some((step, begin)),
        _ => None,
    });
    let steps: Vec<(usize, Instant)> = steps.collect();
    steps.windows(2).map(|pair| (pair[0].0, pair[1].1 - pair[0].1)).collect()
}

/// Returns number, mean and median; `null` where there are none.
fn statistics(mut times: Vec<f64>) -> Value {
    if times.is_empty() {
        return Value::Null;
    }
    times.sort_by(f64::total_cmp);
    let num = times.len();
    let median = (times[(num - 1) / 2] + times[num / 2]) / 2.0;
    json!({"steps": num, "mean_ms": times.iter().sum::<f64>() / num as f64, "median_ms": median})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Phases of which each lasts so many seconds.
    fn phases(parts: &[(Phase, u64)]) -> Vec<(Phase, Instant)> {
        let mut now = Instant::now();
        let begin = |&(phase, seconds): &(Phase, u64)| {
            let begun = (phase, now);
            now += Duration::from_secs(seconds);
            begun
        };
        parts.iter().map(begin).collect()
    }

    #[test]
    fn a_start_is_told_by_phase_and_ends_with_its_first_step() {
        use Phase::{Agree, Copy, Load, Save, Start, Step};
        // A run that goes on after step 6, and loads in two parts.
        let parts = [(Start, 1), (Agree, 2), (Load, 3), (Copy, 4), (Load, 5), (Step(7), 6), (Step(8), 7), (Save, 8)];
        let expected = json!({"start": 1.0, "agree": 2.0, "load": 8.0, "copy": 4.0, "first_step": 6.0, "total": 21.0});
        assert_eq!(start(&phases(&parts)), expected);
        // The first step is the only one, or there is none.
        assert_eq!(
            start(&phases(&[(Agree, 2), (Step(1), 6), (Save, 8)])),
            json!({"agree": 2.0, "first_step": 6.0, "total": 8.0})
        );
        assert_eq!(start(&phases(&[(Agree, 2), (Save, 8)])), json!({"agree": 2.0, "total": 2.0}));
    }

    #[test]
    fn a_step_lasts_until_the_next_and_the_last_one_is_not_counted() {
        use Phase::{Load, Save, Step};
        let begun = phases(&[(Load, 9), (Step(1), 1), (Step(2), 2), (Save, 5), (Step(3), 3), (Save, 4)]);
        let found: Vec<(usize, u64)> = steps(&begun).iter().map(|(step, time)| (*step, time.as_secs())).collect();
        assert_eq!(found, [(1, 1), (2, 7)]);
        assert_eq!(statistics(vec![3.0, 1.0, 8.0, 2.0]), json!({"steps": 4, "mean_ms": 3.5, "median_ms": 2.5}));
        assert_eq!(statistics(Vec::new()), Value::Null);
    }
}

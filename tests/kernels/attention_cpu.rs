//! The CPU's attention, the reference of all others: against the plain formula in f64, and its gradients against differences of that
//! formula.

use fsdp_qlora::testing::Cpu;

use super::attention::{Case, Inputs, formula, llama, run, try_run};
use super::{error, random};

/// The relative error that sums in f32 may have.
const F32_ERROR: f64 = 3e-6;

fn check(case: &Case<'_>) {
    let inputs = Inputs::new(case);
    let (results, expected) = (run(&Cpu::new(2), case, &inputs), formula(case, &inputs, |x| x));
    for (i, what) in ["out", "d_q", "d_k", "d_v", "log-sum-exp"].into_iter().enumerate() {
        if results[i].is_empty() {
            assert!(case.num_past_tokens > 0);
            continue;
        }
        let expected: Vec<f32> = expected[i].iter().map(|&x| x as f32).collect();
        let error = error(&results[i], &expected);
        assert!(error < F32_ERROR, "{what} of {case:?}: error {error:e}");
    }
}

/// Strips of the CPU have 64 queries.
const WINDOWS: [Option<usize>; 9] =
    [None, Some(2), Some(30), Some(63), Some(64), Some(65), Some(149), Some(150), Some(151)];

#[test]
fn windows_are_those_of_the_formula() {
    for window in WINDOWS {
        check(&Case { window, ..llama(4, 2, 16, &[150, 1, 70]) });
        check(&Case { window, num_past_tokens: 100, ..llama(3, 1, 16, &[50]) });
        check(&Case { window, num_past_tokens: 149, ..llama(3, 1, 16, &[1]) });
    }
}

#[test]
fn scales_caps_and_widths_are_those_of_the_formula() {
    for head_dim in [16, 64, 96, 128, 256] {
        check(&llama(2, 1, head_dim, &[70, 3]));
        check(&Case { scale: 1.0 / 128.0, ..llama(2, 1, head_dim, &[70, 3]) });
    }
    for (scale, softcap) in [(1.0, 1.0), (1.0, 50.0), (3.0, 5.0), (1e-3, 50.0)] {
        for window in [None, Some(40)] {
            let softcap = Some(softcap);
            check(&Case { scale, softcap, window, ..llama(4, 2, 16, &[90, 1, 30]) });
            check(&Case { scale, softcap, window, num_past_tokens: 60, ..llama(4, 2, 16, &[70]) });
        }
    }
}

#[test]
fn a_window_of_one_key_is_that_key() {
    let case = Case { window: Some(1), ..llama(1, 1, 16, &[100, 3]) };
    let inputs = Inputs::new(&case);
    let [out, d_q, d_k, d_v, _] = run(&Cpu::new(2), &case, &inputs);
    assert!(out == inputs.v && d_v == inputs.d_out);
    assert!(d_q.iter().chain(&d_k).all(|d| d.abs() < 1e-5), "{d_q:?} {d_k:?}");
}

#[test]
fn a_window_that_hides_no_key_changes_no_bit() {
    let [full, wide] = [None, Some(150)].map(|window| Case { window, ..llama(4, 2, 64, &[150, 1, 70]) });
    let inputs = Inputs::new(&full);
    assert!(run(&Cpu::new(1), &full, &inputs) == run(&Cpu::new(2), &wide, &inputs));
}

/// Σ out · d_out in f64.
fn loss(case: &Case<'_>, inputs: &Inputs) -> f64 {
    let [out, ..] = formula(case, inputs, |x| x);
    out.iter().zip(&inputs.d_out).map(|(o, d)| o * f64::from(*d)).sum()
}

/// Every input is moved a little in directions that look random; the loss must change as the gradient says.
#[test]
fn gradients_are_differences_of_the_formula() {
    // Inputs have eight bits or so, so that a step of this many is exact in f32.
    const STEP: f32 = 1.0 / 1024.0;
    for (window, softcap) in [(None, None), (Some(20), None), (None, Some(1.5)), (Some(20), Some(1.5))] {
        let case = Case { window, softcap, scale: 0.4, ..llama(4, 2, 16, &[40, 3]) };
        let inputs = Inputs::new(&case);
        let [_, d_q, d_k, d_v, _] = run(&Cpu::new(1), &case, &inputs);
        for (what, of, gradient) in [("q", 0, d_q), ("k", 1, d_k), ("v", 2, d_v)] {
            let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            for seed in 10..15 {
                let direction = random(gradient.len(), 1.0, seed);
                let moved = |step: f32| {
                    let mut inputs = Inputs::new(&case);
                    let x = [&mut inputs.q, &mut inputs.k, &mut inputs.v].into_iter().nth(of).unwrap();
                    x.iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
                    loss(&case, &inputs)
                };
                let difference = (moved(STEP) - moved(-STEP)) / (2.0 * f64::from(STEP));
                let expected: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
                assert!((difference - expected).abs() < 1e-4 * norm, "{what} of {case:?}: {difference} {expected}");
            }
        }
    }
}

#[test]
fn scores_without_a_meaning_are_refused() {
    let good = llama(1, 1, 16, &[2]);
    for (case, expected) in [
        (Case { window: Some(0), ..good }, "window is 0; it must be at least 1, or None"),
        (Case { softcap: Some(0.0), ..good }, "softcap is Some(0.0); it must be positive and finite, or None"),
        (Case { softcap: Some(f32::NAN), ..good }, "softcap is Some(NaN); it must be positive"),
        (Case { scale: f32::INFINITY, ..good }, "scale is inf; it must be finite"),
    ] {
        let error = try_run(&Cpu::new(1), &case, &Inputs::new(&case)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

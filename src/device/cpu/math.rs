//! exp and tanh in f32 without a branch, so that loops over them become vector code.

/// Smallest argument whose exponential is a normal f32.
const MIN_ARGUMENT: f32 = -87.336_54;
/// Largest argument whose exponential is finite.
const MAX_ARGUMENT: f32 = 88.722_83;

/// e^x to about 1 ulp: x = n·ln 2 + r with |r| ≤ ln 2 / 2, a degree-6 polynomial in r, and 2ⁿ by the exponent bits.
/// Below the smallest normal result it is 0. Coefficients: Cephes' `expf` (S. L. Moshier).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the rounded integer in the low bits
    let clamped = x.clamp(MIN_ARGUMENT, MAX_ARGUMENT);
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_2e-4f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let y = p * r * r + r + 1.0;
    // Two factors, because 2¹²⁸ is not an f32. The integer is taken from the low bits: a cast would saturate, one by
    // one.
    let half = (n * 0.5 + ROUND) - ROUND;
    let power = |e: f32| f32::from_bits(((e + ROUND).to_bits() << 23).wrapping_add(127 << 23));
    let result = y * power(half) * power(n - half);
    if x < MIN_ARGUMENT { 0.0 } else { result }
}

/// 1 / (1 + e^−x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh(x) to about 3 ulp: an odd polynomial near 0, where 1 − 2 / (e^2|x| + 1) would lose digits. Coefficients:
/// Cephes' `tanhf`.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let (size, square) = (x.abs(), x * x);
    let mut p = -5.704_988_7e-3f32;
    for coefficient in [2.063_908_8e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = p * square + coefficient;
    }
    let large = (1.0 - 2.0 / (exp(2.0 * size) + 1.0)).copysign(x);
    if size < 0.625 { p * square * x + x } else { large }
}

/// Largest value; −∞ for an empty slice. Sixteen lanes, so that it becomes vector code.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    reduce(x, f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Sum in sixteen lanes, folded in a fixed order.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    reduce(x, 0.0, |a, b| a + b)
}

/// Σ aᵢ·bᵢ in sixteen lanes, folded in a fixed order.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let ((chunks_a, rest_a), (chunks_b, rest_b)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in chunks_a.iter().zip(chunks_b) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    let mut total = lanes.iter().sum();
    for (a, b) in rest_a.iter().zip(rest_b) {
        total += a * b;
    }
    total
}

/// Σ aᵢ·bᵢ·cᵢ, likewise.
#[inline(always)]
pub fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (chunks_a, chunks_b, chunks_c) = (a.as_chunks::<16>().0, b.as_chunks::<16>().0, c.as_chunks::<16>().0);
    for ((a, b), c) in chunks_a.iter().zip(chunks_b).zip(chunks_c) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i] * c[i];
        }
    }
    let rest = a.len() / 16 * 16;
    let products = a[rest..].iter().zip(&b[rest..]).zip(&c[rest..]).map(|((a, b), c)| a * b * c);
    products.fold(lanes.iter().sum(), |total, product| total + product)
}

#[inline(always)]
fn reduce(x: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = f(*lane, v);
        }
    }
    rest.iter().chain(&lanes).fold(start, |a, &b| f(a, b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        for i in -87_000..88_700 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}) = {}, off by {error:e}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e9), 0.0);
    }

    #[test]
    fn tanh_is_within_three_ulp() {
        for i in -12_000..=12_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).tanh();
            let error = (f64::from(tanh(x)) - exact).abs();
            assert!(error <= 3.6e-7 * exact.abs(), "tanh({x}) = {}, off by {error:e}", tanh(x));
        }
        assert_eq!([0.0, 100.0, -1e9, f32::INFINITY].map(tanh), [0.0, 1.0, -1.0, 1.0]);
    }
}

//! Double quantization: the absmax values of a tensor in 8 bits.
//!
//! Source: bitsandbytes 0.50, `functional.py` (`create_dynamic_map`, `quantize_4bit` with `compress_statistics`) and
//! `csrc/kernels.cu` (nearest rounding by binary search, which its CPU table only approximates).

use std::sync::LazyLock;

use super::record::SUPERBLOCK;

/// The signed dynamic 8-bit map, 7 exponent bits: 256 values from −0.99297 to 1, ascending.
pub static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(dynamic_map);

fn dynamic_map() -> [f32; 256] {
    let mut values = vec![0.0f32, 1.0];
    for exponent in 0..7i32 {
        let steps = (1usize << exponent) + 1;
        let boundaries = linspace(0.1, 1.0, steps);
        let scale = 10f64.powi(exponent - 6) as f32;
        for pair in boundaries.windows(2) {
            let mean = (pair[0] + pair[1]) / 2.0;
            values.extend([scale * mean, -(scale * mean)]);
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2·(1 + 2 + … + 64) = 256 values")
}

/// `torch.linspace` in f32, which counts from the nearer end.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    (0..steps)
        .map(
            |i| {
                if i < steps / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((steps - 1 - i) as f32, end) }
            },
        )
        .collect()
}

/// Absmax values of one tensor in 8 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedAbsmax {
    /// One code a block.
    pub codes: Vec<u8>,
    /// One scale a superblock.
    pub nested_absmax: Vec<f32>,
    /// Mean of the absmax values of the whole tensor.
    pub offset: f32,
}

/// Quantizes the absmax values of a whole tensor. The mean is summed in f64 and rounded once.
pub fn quantize_absmax(absmax: &[f32]) -> NestedAbsmax {
    quantize_absmax_around(absmax, mean(absmax))
}

/// The offset of double quantization.
pub fn mean(absmax: &[f32]) -> f32 {
    let sum: f64 = absmax.iter().map(|&a| f64::from(a)).sum();
    (sum / absmax.len() as f64) as f32
}

/// Quantizes with a given offset.
pub fn quantize_absmax_around(absmax: &[f32], offset: f32) -> NestedAbsmax {
    let mut codes = Vec::with_capacity(absmax.len());
    let mut nested_absmax = Vec::with_capacity(absmax.len().div_ceil(SUPERBLOCK));
    for superblock in absmax.chunks(SUPERBLOCK) {
        let scale = superblock.iter().fold(0.0f32, |m, &a| m.max((a - offset).abs()));
        let reciprocal = 1.0 / scale;
        codes.extend(superblock.iter().map(|&a| nearest_code((a - offset) * reciprocal)));
        nested_absmax.push(scale);
    }
    NestedAbsmax { codes, nested_absmax, offset }
}

/// The code of the map's value nearest to x. Ties depend on the path of the binary search, as in the CUDA kernel.
fn nearest_code(x: f32) -> u8 {
    let map = &*DYNAMIC_MAP;
    let (mut lower, mut pivot, mut upper) = (0usize, 127usize, 255usize);
    let mut step = 64;
    while step > 0 {
        if x > map[pivot] {
            lower = pivot;
            pivot += step;
        } else {
            upper = pivot;
            pivot -= step;
        }
        step /= 2;
    }
    let code = if x > map[pivot] {
        if x > (map[upper] + map[pivot]) * 0.5 { upper } else { pivot }
    } else if x < (map[lower] + map[pivot]) * 0.5 {
        lower
    } else {
        pivot
    };
    code as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_of_the_map_is_its_own_nearest() {
        for (code, &value) in DYNAMIC_MAP.iter().enumerate() {
            assert_eq!(nearest_code(value) as usize, code);
        }
        assert_eq!(DYNAMIC_MAP[255], 1.0);
        assert!((DYNAMIC_MAP[0] + 0.99297).abs() < 1e-5);
    }

    #[test]
    fn nearest_is_nearest() {
        let map = &*DYNAMIC_MAP;
        for i in 0..20_000 {
            let x = -1.0 + i as f32 * 1e-4;
            let distance = |m: f32| (f64::from(m) - f64::from(x)).abs();
            let best = map.iter().map(|&m| distance(m)).fold(f64::INFINITY, f64::min);
            // The midpoints that decide are rounded to f32.
            assert!(distance(map[nearest_code(x) as usize]) <= best + 1e-7, "x = {x}");
        }
    }

    #[test]
    fn equal_absmax_values_survive() {
        let nested = quantize_absmax(&[0.25; 300]);
        assert_eq!((nested.offset, nested.nested_absmax.len()), (0.25, 2));
        // 0 · (1/0) is a NaN: the CUDA search ends at its lowest code, and 0 · code is 0 again.
        assert!(nested.codes.iter().all(|&c| DYNAMIC_MAP[c as usize] * nested.nested_absmax[0] + 0.25 == 0.25));
    }
}

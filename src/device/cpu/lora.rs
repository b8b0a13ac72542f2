//! LoRA dropout from a counter-based generator.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Key: the seed. Counter:
//! word 0 feature / 8 with the module above it (20 and 12 bits), word 1 position, word 2 sample, word 3 step. One
//! call gives eight 16-bit numbers, for eight neighbouring features; a feature is dropped when its number is below
//! round(p·2¹⁶).

use anyhow::Result;

use crate::device::{LoraDropout, LoraOps};

use super::Cpu;

/// Calls that are computed side by side, so that they become vector code.
const LANES: usize = 16;

impl LoraOps for Cpu {
    fn lora_dropout(&self, args: LoraDropout<'_, Cpu>) -> Result<()> {
        let [tokens, features] = args.sizes()?;
        if tokens == 0 {
            return Ok(());
        }
        let LoraDropout { y, x, mask, module, accumulate } = args;
        let (y, x) = (y.host_mut(), x.host());
        let (sample_idx, positions) = (mask.sample_idx.host(), mask.positions.host());
        let (threshold, scale) = mask.threshold_and_scale();
        self.for_rows(y, features, |first, rows| {
            crate::simd::vectorize(
                #[inline(always)]
                || {
                    for (i, y) in rows.chunks_exact_mut(features).enumerate() {
                        let t = first + i;
                        let x = &x[t * features..][..features];
                        let counter = [module << 20, positions[t], sample_idx[t] as u32, mask.step];
                        for (group, (y, x)) in y.chunks_mut(8 * LANES).zip(x.chunks(8 * LANES)).enumerate() {
                            let numbers = philox(counter, (group * LANES) as u32, mask.seed);
                            for (j, (y, x)) in y.iter_mut().zip(x).enumerate() {
                                let word = numbers[(j % 8) / 2][j / 8];
                                let number = if j % 2 == 0 { word & 0xFFFF } else { word >> 16 };
                                let kept = if number < threshold { 0.0 } else { x * scale };
                                *y = if accumulate { *y + kept } else { kept };
                            }
                        }
                    }
                },
            );
        });
        Ok(())
    }
}

/// Ten rounds on [`LANES`] neighbouring counters; `first` is added to word 0 of the first. Returns the four words.
#[inline(always)]
fn philox(counter: [u32; 4], first: u32, seed: u64) -> [[u32; LANES]; 4] {
    let mut words = counter.map(|word| [word; LANES]);
    for (lane, word) in words[0].iter_mut().enumerate() {
        *word += first + lane as u32;
    }
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        // By index: four arrays advance together, and the loop becomes vector code.
        #[allow(clippy::needless_range_loop)]
        for lane in 0..LANES {
            let product0 = u64::from(words[0][lane]) * 0xD251_1F53;
            let product1 = u64::from(words[2][lane]) * 0xCD9E_8D57;
            let next0 = (product1 >> 32) as u32 ^ words[1][lane] ^ key[0];
            let next2 = (product0 >> 32) as u32 ^ words[3][lane] ^ key[1];
            words[1][lane] = product1 as u32;
            words[3][lane] = product0 as u32;
            words[0][lane] = next0;
            words[2][lane] = next2;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Arena, Device, DropoutMask};

    #[test]
    fn known_answers_of_philox() {
        // Random123's kat_vectors: philox4x32 10.
        assert_eq!(philox([0; 4], 0, 0).map(|w| w[0]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let words = philox(counter, 0, 0x299f_31d0_a409_3822).map(|w| w[0]);
        assert_eq!(words, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    /// True where an element is kept, one element at a time.
    fn is_kept(mask: &DropoutMask<'_, Cpu>, module: u32, token: usize, feature: usize) -> bool {
        let counter = [module << 20, mask.positions.host()[token], mask.sample_idx.host()[token] as u32, mask.step];
        let words = philox(counter, (feature / 8) as u32, mask.seed);
        let word = words[(feature % 8) / 2][0];
        (if feature.is_multiple_of(2) { word & 0xFFFF } else { word >> 16 }) >= mask.threshold_and_scale().0
    }

    #[test]
    fn the_mask_is_that_of_the_plain_form_and_keeps_the_mean() {
        let (tokens, features) = (37, 203);
        let cpu = Cpu::new(1);
        let carve = |arena: &mut Arena<Cpu>| {
            let x = arena.carve::<f32>("x", tokens * features).unwrap();
            let y = arena.carve::<f32>("y", tokens * features).unwrap();
            (x, y, arena.carve::<u64>("s", tokens).unwrap(), arena.carve::<u32>("p", tokens).unwrap())
        };
        let mut measure = Arena::measure();
        carve(&mut measure);
        let (mut x, mut y, mut samples, mut positions) =
            carve(&mut Arena::allocate(&cpu, measure.into_plan()).unwrap());
        x.view_mut().host_mut().fill(1.0);
        positions.view_mut().host_mut().iter_mut().enumerate().for_each(|(i, p)| *p = i as u32);
        cpu.fill_bytes(samples.view_mut(), 0).unwrap();
        let mask = DropoutMask {
            probability: 0.25,
            seed: 42,
            step: 3,
            sample_idx: samples.view(),
            positions: positions.view(),
        };
        cpu.lora_dropout(LoraDropout { y: y.view_mut(), x: x.view(), mask, module: 5, accumulate: false }).unwrap();
        let y = y.view().host();
        let kept = y.iter().filter(|&&v| v > 0.0).count() as f64 / y.len() as f64;
        assert!((kept - 0.75).abs() < 0.02, "kept {kept}");
        for t in 0..tokens {
            for f in 0..features {
                assert_eq!(y[t * features + f] > 0.0, is_kept(&mask, 5, t, f), "token {t} feature {f}");
            }
        }
    }
}

//! Rotary position embedding: frequencies, cosines and sines, as `modeling_rope_utils.py` of transformers 5.

use std::f64::consts::PI;

use rayon::prelude::*;

/// The variant of RoPE with its parameters, named as in `rope_parameters` of config.json.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f64,
    },
    /// NTK: the base grows with the length of a document once that exceeds `max_position_embeddings`.
    Dynamic {
        factor: f64,
    },
    Yarn(Yarn),
    Llama3(Llama3),
    LongRope(LongRope),
}

/// YaRN (<https://arxiv.org/abs/2309.00071>).
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub original_max_position_embeddings: usize,
    /// Factor of cosines and sines, already decided from `factor` and `mscale`.
    pub attention_factor: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub truncate: bool,
}

/// The scaling of Llama 3.1.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: usize,
}

/// LongRoPE (<https://arxiv.org/abs/2402.13753>): wavelengths are stretched by one list of factors or by another.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// `[rotary_dim / 2]` each.
    pub short_factor: Vec<f64>,
    pub long_factor: Vec<f64>,
    /// A micro-batch that has a longer document takes the long factors, for all its documents.
    pub original_max_position_embeddings: usize,
    /// Factor of cosines and sines, with either list.
    pub attention_factor: f64,
}

/// Everything that the rotation depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub rope_theta: f64,
    /// Elements of a head that turn, the first ones. Even.
    pub rotary_dim: usize,
    pub max_position_embeddings: usize,
    pub scaling: RopeScaling,
    pub growth: Option<Growth>,
}

/// A factor of cosines and sines that grows with the position in a document: 1 + beta · ln(1 + ⌊position / length⌋),
/// which is 1 for the first `length` positions. Because rotation is linear, it is a factor of what is rotated.
#[derive(Clone, Debug, PartialEq)]
pub struct Growth {
    pub beta: f64,
    pub length: usize,
}

impl Growth {
    fn factor(&self, position: u32) -> f32 {
        1.0 + self.beta as f32 * (1.0 + (position as f32 / self.length as f32).floor()).ln()
    }
}

impl RopeConfig {
    /// Inverse frequencies `[rotary_dim / 2]` for a document of `num_tokens` tokens. Only dynamic NTK and LongRoPE read
    /// the length.
    pub fn inv_freq(&self, num_tokens: usize) -> Vec<f32> {
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor } => self.dynamic_theta(factor, num_tokens),
            _ => self.rope_theta,
        };
        // The power in f64, rounded once: nearer to torch's f32 power than Rust's own.
        let power = |i: usize| theta.powf(((2 * i) as f32 / self.rotary_dim as f32).into()) as f32;
        let plain = (0..self.rotary_dim / 2).map(|i| 1.0 / power(i));
        match &self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|x| x / *factor as f32).collect(),
            RopeScaling::Yarn(yarn) => {
                let (low, high) = yarn.range(self.rope_theta, self.rotary_dim);
                let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                plain.enumerate().map(|(i, x)| x / yarn.factor as f32 * ramp(i) + x * (1.0 - ramp(i))).collect()
            }
            RopeScaling::Llama3(llama3) => plain.map(|x| llama3.scale(x)).collect(),
            RopeScaling::LongRope(longrope) => {
                let factors = longrope.factors(num_tokens).iter().enumerate();
                factors.map(|(i, &factor)| 1.0 / (factor as f32 * power(i))).collect()
            }
        }
    }

    /// Returns true if all frequencies that documents can be rotated with are finite.
    pub(super) fn is_finite(&self) -> bool {
        let documents = [1, self.max_position_embeddings.saturating_mul(2)];
        documents.into_iter().flat_map(|n| self.inv_freq(n)).all(f32::is_finite) && self.attention_scaling().is_finite()
    }

    /// Longest text whose tokens are rotated by the short factors of LongRoPE; all tokens of a longer one turn
    /// otherwise.
    pub fn short_length(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::LongRope(longrope) => Some(longrope.original_max_position_embeddings),
            _ => None,
        }
    }

    /// Factor of cosines and sines; 1 except for YaRN and LongRoPE.
    pub fn attention_scaling(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor as f32,
            RopeScaling::LongRope(longrope) => longrope.attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Cosines and sines, each `[T, rotary_dim / 2]`, attention scaling and growth included.
    ///
    /// `positions` `[T]` are positions of tokens in their own documents; `documents` `[D + 1]` holds the first token
    /// of each document and, last, T. Dynamic NTK and LongRoPE go by each document's own length, as transformers does
    /// for a batch of that document alone, so that nothing depends on what is packed together.
    pub fn cos_sin(&self, positions: &[u32], documents: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let (scaling, half) = (self.attention_scaling(), self.rotary_dim / 2);
        let num_tokens = |positions: &[u32]| positions.iter().max().map_or(0, |&last| last as usize + 1);
        let (mut cos, mut sin) = (vec![0f32; positions.len() * half], vec![0f32; positions.len() * half]);
        for document in documents.windows(2) {
            let tokens = document[0] as usize..document[1] as usize;
            let elements = tokens.start * half..tokens.end * half;
            let positions = &positions[tokens];
            let inv_freq = self.inv_freq(num_tokens(positions));
            let rows = cos[elements.clone()].par_chunks_exact_mut(half).zip(sin[elements].par_chunks_exact_mut(half));
            rows.zip(positions).for_each(|((cos, sin), &position)| {
                let scaling = self.growth.as_ref().map_or(scaling, |growth| scaling * growth.factor(position));
                for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&inv_freq) {
                    let angle = position as f32 * frequency;
                    (*cos, *sin) = (angle.cos() * scaling, angle.sin() * scaling);
                }
            });
        }
        (cos, sin)
    }

    /// Base of dynamic NTK, in f32 like the tensor `seq_len` of transformers.
    fn dynamic_theta(&self, factor: f64, num_tokens: usize) -> f64 {
        if num_tokens <= self.max_position_embeddings {
            return self.rope_theta;
        }
        let stretch = factor as f32 * num_tokens as f32 / self.max_position_embeddings as f32 - (factor - 1.0) as f32;
        let exponent = self.rotary_dim as f64 / (self.rotary_dim as f64 - 2.0);
        (self.rope_theta as f32 * stretch.powf(exponent as f32)).into()
    }
}

impl Yarn {
    /// The attention factor where config.json gives none: `mscale` counts only with `mscale_all_dim`.
    pub fn default_attention_factor(factor: f64, mscale: f64, mscale_all_dim: f64) -> f64 {
        let get = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        if mscale != 0.0 && mscale_all_dim != 0.0 { get(mscale) / get(mscale_all_dim) } else { get(1.0) }
    }

    /// Dimensions between which frequencies blend from extrapolated to interpolated.
    fn range(&self, rope_theta: f64, head_dim: usize) -> (f64, f64) {
        let dim = head_dim as f64;
        let correction = |rotations: f64| {
            let length = self.original_max_position_embeddings as f64;
            dim * (length / (rotations * 2.0 * PI)).ln() / (2.0 * rope_theta.ln())
        };
        let (mut low, mut high) = (correction(self.beta_fast), correction(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // Equal ends would divide by zero.
        (low, if low == high { high + 0.001 } else { high })
    }
}

impl LongRope {
    /// √(1 + ln factor / ln length), for a model that was stretched by `factor` from `length` positions.
    pub fn default_attention_factor(factor: f64, length: usize) -> f64 {
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (length as f64).ln()).sqrt() }
    }

    fn factors(&self, num_tokens: usize) -> &[f64] {
        if num_tokens > self.original_max_position_embeddings { &self.long_factor } else { &self.short_factor }
    }
}

impl Llama3 {
    /// Slows long wavelengths by `factor`, keeps short ones, and interpolates between.
    fn scale(&self, inv_freq: f32) -> f32 {
        let [factor, low, high] = [self.factor, self.low_freq_factor, self.high_freq_factor].map(|x| x as f32);
        let length = self.original_max_position_embeddings as f64;
        let wavelength = 2.0 * PI as f32 / inv_freq;
        if wavelength < (length / self.high_freq_factor) as f32 {
            inv_freq
        } else if wavelength > (length / self.low_freq_factor) as f32 {
            inv_freq / factor
        } else {
            let smooth = (length as f32 / wavelength - low) / (high - low);
            (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(rope_theta: f64, max_position_embeddings: usize, scaling: RopeScaling) -> RopeConfig {
        RopeConfig { rope_theta, rotary_dim: 16, max_position_embeddings, scaling, growth: None }
    }

    fn yarn() -> RopeConfig {
        let attention_factor = Yarn::default_attention_factor(4.0, 0.0, 0.0);
        let (beta_fast, beta_slow) = (32.0, 1.0);
        let yarn = Yarn {
            factor: 4.0,
            original_max_position_embeddings: 64,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate: true,
        };
        rope(10_000.0, 256, RopeScaling::Yarn(yarn))
    }

    /// Two units in the last place of f32, relative: torch rounds its vectorized power once more than we do.
    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 2.0 * f32::EPSILON * e.abs(), "{found:?} != {expected:?}");
        }
    }

    // All expected values: LlamaRotaryEmbedding of transformers 5.23.0 on torch 2.15.0, CPU, f32.

    #[test]
    fn plain_types_equal_transformers() {
        let plain = [1.0, 0.316_227_76, 0.1, 0.031_622_78, 0.01, 0.003_162_277_6, 0.001, 0.000_316_227_76];
        assert_close(&rope(1e4, 64, RopeScaling::Default).inv_freq(1000), &plain);
        let linear = rope(1e4, 64, RopeScaling::Linear { factor: 4.0 });
        assert_close(&linear.inv_freq(1), &plain.map(|x| x / 4.0));
        assert_eq!(linear.attention_scaling(), 1.0);
    }

    #[test]
    fn dynamic_ntk_goes_by_the_length_of_each_document() {
        let dynamic = rope(1e4, 64, RopeScaling::Dynamic { factor: 2.0 });
        let short = rope(1e4, 64, RopeScaling::Default).inv_freq(1);
        let long = [
            1.0,
            0.283_945_14,
            0.080_624_84,
            0.022_893_03,
            0.006_500_365,
            0.001_845_747,
            0.000_524_090_9,
            0.000_148_813_07,
        ];
        assert_eq!(dynamic.inv_freq(64), short);
        assert_close(&dynamic.inv_freq(100), &long);

        let positions: Vec<u32> = (0..3).chain(0..100).collect();
        let (cos, sin) = dynamic.cos_sin(&positions, &[0, 3, 103]);
        assert_eq!((cos.len(), sin.len()), (103 * 8, 103 * 8));
        assert_close(&sin[2 * 8..3 * 8], &short.iter().map(|x| (2.0 * x).sin()).collect::<Vec<_>>());
        assert_close(&sin[5 * 8..6 * 8], &long.map(|x| (2.0 * x).sin()));
    }

    #[test]
    fn yarn_equals_transformers() {
        let expected =
            [1.0, 0.237_170_82, 0.049_999_997, 0.007_905_695, 0.0025, 0.000_790_569_5, 0.000_25, 0.000_079_056_95];
        assert_close(&yarn().inv_freq(1), &expected);
        assert_close(&[yarn().attention_scaling()], &[1.138_629_4]);

        let other = Yarn {
            factor: 8.0,
            original_max_position_embeddings: 64,
            attention_factor: Yarn::default_attention_factor(8.0, 1.0, 0.5),
            beta_fast: 16.0,
            beta_slow: 2.0,
            truncate: false,
        };
        let other = rope(500_000.0, 512, RopeScaling::Yarn(other));
        let expected = [
            1.0,
            0.024_240_345,
            0.004_700_754,
            0.000_911_583_13,
            0.000_176_776_68,
            3.428_102_4e-5,
            6.647_87e-6,
            1.289_173_2e-6,
        ];
        assert_close(&other.inv_freq(1), &expected);
        assert_close(&[other.attention_scaling()], &[1.094_18]);
    }

    #[test]
    fn llama3_equals_transformers() {
        let scaling =
            Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 64 };
        let expected = [
            1.0,
            0.079_403_01,
            0.004_700_754,
            0.000_911_583_13,
            0.000_176_776_68,
            3.428_102_4e-5,
            6.647_87e-6,
            1.289_173_2e-6,
        ];
        assert_close(&rope(500_000.0, 512, RopeScaling::Llama3(scaling)).inv_freq(1), &expected);
    }

    /// Expected: `get_llama_4_attn_scale` of Ministral 3 in transformers 5.24.0, with beta 0.1 and length 16.
    #[test]
    fn growth_begins_after_its_length() {
        let growing = RopeConfig { growth: Some(Growth { beta: 0.1, length: 16 }), ..yarn() };
        let positions = [0, 15, 16, 31, 32, 47];
        let (plain, (cos, sin)) = (yarn().cos_sin(&positions, &[0, 6]), growing.cos_sin(&positions, &[0, 6]));
        let factors = [1.0, 1.0, 1.069_314_7, 1.069_314_7, 1.109_861_2, 1.109_861_2];
        let times = |x: &[f32]| -> Vec<f32> { x.iter().enumerate().map(|(i, x)| x * factors[i / 8]).collect() };
        assert_close(&cos, &times(&plain.0));
        assert_close(&sin, &times(&plain.1));
    }

    /// The factors divide the plain frequencies (`_compute_longrope_parameters` of transformers 5.24.0).
    #[test]
    fn longrope_goes_by_each_document() {
        let longrope = LongRope {
            short_factor: vec![1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0],
            long_factor: vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0],
            original_max_position_embeddings: 24,
            attention_factor: LongRope::default_attention_factor(32.0, 4096),
        };
        let plain = rope(1e4, 128, RopeScaling::Default).inv_freq(1);
        let by = |factors: &[f64]| plain.iter().zip(factors).map(|(x, f)| x / *f as f32).collect::<Vec<_>>();
        let (short, long) = (by(&longrope.short_factor), by(&longrope.long_factor));
        let rope = rope(1e4, 128, RopeScaling::LongRope(longrope));
        assert_close(&rope.inv_freq(24), &short);
        assert_close(&rope.inv_freq(25), &long);
        assert_close(&[rope.attention_scaling()], &[1.190_238_1]);
        // Documents of 24 and 25 tokens share a micro-batch.
        let positions: Vec<u32> = (0..24).chain(0..25).collect();
        let (_, sin) = rope.cos_sin(&positions, &[0, 24, 49]);
        for (token, frequencies) in [(1, short), (25, long)] {
            let expected: Vec<f32> = frequencies.iter().map(|x| x.sin() * rope.attention_scaling()).collect();
            assert_close(&sin[8 * token..][..8], &expected);
        }
    }

    #[test]
    fn cosines_carry_the_attention_scaling() {
        let (cos, sin) = yarn().cos_sin(&[0, 37], &[0, 2]);
        assert_close(&cos[..2], &[1.138_629_4, 1.138_629_4]);
        let expected = [
            0.871_522_96,
            -0.906_817_85,
            -0.313_795_06,
            1.090_263_8,
            1.133_761_6,
            1.138_142_3,
            1.138_580_7,
            1.138_624_5,
        ];
        // Cosines of angles near 37 carry the last bit of the angle, 4e-6.
        assert!(cos[8..].iter().zip(expected).all(|(f, e)| (f - e).abs() < 4e-6), "{cos:?}");
        assert!((sin[8 + 1] - 0.688_591_54).abs() < 4e-6);
    }
}

//! Projections that bitsandbytes has quantized to NF4 already, in the layout in which transformers saves them.
//!
//! Beside `X.weight` (uint8, two codes a byte) lie `X.weight.absmax`, `.quant_map`, with double quantization
//! `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, JSON in a uint8 tensor
//! (bitsandbytes 0.50, `functional.py`, `QuantState.as_dict(packed=True)`).

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::source::{BaseModel, Dtype, TensorView};
use crate::files::shown;

/// Weights that share one absmax.
const BLOCK: usize = 64;
/// Absmax values that share one scale.
const SUPERBLOCK: usize = 256;
const MAX_STATE_BYTES: usize = 4096;
const QUANT_STATE: &str = "quant_state.bitsandbytes__nf4";

/// One NF4 matrix as bitsandbytes stores it.
#[derive(Debug)]
pub struct BnbTensor<'a> {
    /// `[out_features, in_features]`
    pub shape: Vec<usize>,
    /// Type of the weight before it was quantized.
    pub dtype: Dtype,
    /// Two codes a byte, the first weight in the high nibble: `[(n + 1) / 2]` for n weights.
    pub codes: &'a [u8],
    pub absmax: Absmax<'a>,
}

/// The scale of each block of 64 weights, ceil(n / 64) of them.
#[derive(Debug)]
pub enum Absmax<'a> {
    F32(Vec<f32>),
    /// Double quantization: `absmax[i] = map[codes[i]] * nested_absmax[i / 256] + offset`.
    Nested {
        codes: &'a [u8],
        nested_absmax: Vec<f32>,
        offset: f32,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl BaseModel {
    /// Returns whether the weight of this name is in bitsandbytes' 4-bit layout.
    pub fn is_bnb(&self, weight: &str) -> bool {
        self.get(weight).is_some_and(|view| view.dtype == Dtype::U8)
    }

    /// Returns whether the parts of bitsandbytes' 4-bit layout lie beside a tensor.
    pub(super) fn has_quant_state(&self, weight: &str) -> bool {
        self.get(&format!("{weight}.{QUANT_STATE}")).is_some()
    }

    /// Reads a weight in bitsandbytes' NF4 layout, `weight` being e.g. `model.layers.0.mlp.up_proj.weight`.
    ///
    /// Errors name file and tensor: a part is missing or of another dtype or size; blocks other than 64 and 256;
    /// a type other than nf4; a `quant_map` other than `codebook` or a `nested_quant_map` other than
    /// `dynamic_map`; a scale that is NaN or infinite.
    pub fn bnb_tensor(&self, weight: &str, codebook: &[f32; 16], dynamic_map: &[f32; 256]) -> Result<BnbTensor<'_>> {
        let tensor = self.read_bnb(weight)?;
        self.check_map(weight, "quant_map", codebook)?;
        if let Absmax::Nested { .. } = tensor.absmax {
            self.check_map(weight, "nested_quant_map", dynamic_map)?;
        }
        Ok(tensor)
    }

    /// Does what [`Self::bnb_tensor`] does, except that it does not compare the maps.
    pub(super) fn read_bnb(&self, weight: &str) -> Result<BnbTensor<'_>> {
        let codes = self.tensor(weight)?;
        let state_view = self.part(weight, QUANT_STATE)?;
        ensure!(
            state_view.bytes.len() <= MAX_STATE_BYTES,
            "{state_view}: {} bytes, at most {MAX_STATE_BYTES} are allowed",
            state_view.bytes.len()
        );
        let state: QuantState = serde_json::from_slice(state_view.bytes).with_context(|| state_view.to_string())?;
        let dtype = state.check().with_context(|| state_view.to_string())?;
        let num_weights = state.shape.iter().try_fold(1, |product: usize, &size| product.checked_mul(size));
        let num_weights = num_weights.with_context(|| format!("{state_view}: shape {:?} overflows", state.shape))?;
        expect(&codes, Dtype::U8, num_weights.div_ceil(2))?;

        let num_blocks = num_weights.div_ceil(BLOCK);
        let absmax = self.part(weight, "absmax")?;
        let absmax = match state.nested_offset {
            None => Absmax::F32(floats(&absmax, num_blocks)?),
            Some(offset) => {
                expect(&absmax, Dtype::U8, num_blocks)?;
                let nested = self.part(weight, "nested_absmax")?;
                let nested_absmax = floats(&nested, num_blocks.div_ceil(SUPERBLOCK))?;
                let offset = offset as f32;
                ensure!(offset.is_finite(), "{state_view}: nested_offset {offset} is not finite");
                Absmax::Nested { codes: absmax.bytes, nested_absmax, offset }
            }
        };
        Ok(BnbTensor { shape: state.shape, dtype, codes: codes.bytes, absmax })
    }

    /// Returns the names of the tensors beside `weight` that hold its maps and scales.
    pub(super) fn bnb_parts(weight: &str) -> impl Iterator<Item = String> {
        ["absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE]
            .into_iter()
            .map(move |part| format!("{weight}.{part}"))
    }

    fn part(&self, weight: &str, part: &str) -> Result<TensorView<'_>> {
        self.tensor(&format!("{weight}.{part}"))
    }

    fn check_map(&self, weight: &str, part: &str, expected: &[f32]) -> Result<()> {
        let view = self.part(weight, part)?;
        let found = floats(&view, expected.len())?;
        match found.iter().zip(expected).position(|(f, e)| f != e) {
            Some(i) => bail!("{view}: entry {i} is {}, NF4 has {}", found[i], expected[i]),
            None => Ok(()),
        }
    }
}

impl QuantState {
    fn check(&self) -> Result<Dtype> {
        ensure!(self.quant_type == "nf4", "quant_type {}, allowed: nf4", shown(&self.quant_type));
        ensure!(self.blocksize == BLOCK, "blocksize {}, allowed: {BLOCK}", self.blocksize);
        let nested = (self.nested_blocksize, self.nested_dtype.as_deref(), self.nested_offset.is_some());
        ensure!(
            nested == (None, None, false) || nested == (Some(SUPERBLOCK), Some("float32"), true),
            "nested_blocksize {:?}, nested_dtype {:?}, nested_offset {:?}, \
             allowed: {SUPERBLOCK}, float32, a number; or none of the three",
            self.nested_blocksize,
            self.nested_dtype,
            self.nested_offset
        );
        match self.dtype.as_str() {
            "bfloat16" => Ok(Dtype::BF16),
            "float16" => Ok(Dtype::F16),
            "float32" => Ok(Dtype::F32),
            other => bail!("dtype {}, allowed: bfloat16, float16, float32", shown(other)),
        }
    }
}

fn expect(view: &TensorView, dtype: Dtype, num_elements: usize) -> Result<()> {
    let (found, found_elements) = (view.dtype, view.num_elements());
    ensure!(
        found == dtype && found_elements == num_elements,
        "{view}: {found_elements} elements of {found:?}, expected {num_elements} of {dtype:?}"
    );
    Ok(())
}

fn floats(view: &TensorView, num_elements: usize) -> Result<Vec<f32>> {
    expect(view, Dtype::F32, num_elements)?;
    let mut values = vec![0.0; num_elements];
    view.to_f32(0, &mut values)?;
    Ok(values)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::source::tests::{Written, f32s, write};
    use super::*;
    use tempfile::TempDir;

    pub fn u8s(name: String, shape: &[usize], bytes: Vec<u8>) -> Written {
        (name, Dtype::U8, shape.to_vec(), bytes)
    }

    /// A doubly quantized weight of `out * in_` elements, all parts of it.
    pub fn nested(weight: &str, out: usize, in_: usize) -> Vec<Written> {
        let blocks = (out * in_).div_ceil(64);
        let state = format!(
            r#"{{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[{out},{in_}],{}}}"#,
            r#""nested_blocksize":256,"nested_dtype":"float32","nested_offset":0.0516"#
        );
        let bytes = (out * in_).div_ceil(2);
        vec![
            u8s(weight.to_owned(), &[bytes, 1], vec![0x71; bytes]),
            u8s(format!("{weight}.absmax"), &[blocks], vec![3; blocks]),
            f32s(&format!("{weight}.nested_absmax"), &[blocks.div_ceil(256)], &vec![0.25; blocks.div_ceil(256)]),
            f32s(&format!("{weight}.quant_map"), &[16], &codebook()),
            f32s(&format!("{weight}.nested_quant_map"), &[256], &map()),
            u8s(format!("{weight}.{QUANT_STATE}"), &[state.len()], state.into_bytes()),
        ]
    }

    fn codebook() -> [f32; 16] {
        std::array::from_fn(|i| i as f32 / 15.0)
    }

    fn map() -> [f32; 256] {
        std::array::from_fn(|i| i as f32 / 255.0)
    }

    fn open(tensors: &[Written]) -> (TempDir, BaseModel) {
        let dir = TempDir::new().unwrap();
        write(&dir.path().join("model.safetensors"), tensors);
        let model = BaseModel::open(dir.path()).unwrap();
        (dir, model)
    }

    /// Returns the error after one change to a good tensor.
    fn error(change: impl FnOnce(&mut Vec<Written>)) -> String {
        let mut tensors = nested("x.weight", 3, 43);
        change(&mut tensors);
        let (_dir, model) = open(&tensors);
        format!("{:#}", model.bnb_tensor("x.weight", &codebook(), &map()).expect_err("must be refused"))
    }

    fn set_state(tensors: &mut [Written], from: &str, to: &str) {
        let old = String::from_utf8(tensors[5].3.clone()).unwrap();
        let new = old.replace(from, to);
        assert_ne!(old, new);
        tensors[5] = u8s(tensors[5].0.clone(), &[new.len()], new.into_bytes());
    }

    #[test]
    fn both_kinds_are_read() {
        let mut tensors = nested("x.weight", 3, 43);
        let (_dir, model) = open(&tensors);
        assert!(model.is_bnb("x.weight") && !model.is_bnb("x.weight.quant_map") && !model.is_bnb("y"));
        let tensor = model.bnb_tensor("x.weight", &codebook(), &map()).unwrap();
        assert_eq!((tensor.shape, tensor.dtype, tensor.codes), (vec![3, 43], Dtype::BF16, &[0x71; 65][..]));
        let Absmax::Nested { codes, nested_absmax, offset } = tensor.absmax else { panic!("not nested") };
        assert_eq!((codes, nested_absmax, offset), (&[3; 3][..], vec![0.25], 0.0516));

        set_state(&mut tensors, r#","nested_blocksize":256,"nested_dtype":"float32","nested_offset":0.0516"#, "");
        tensors[1] = f32s("x.weight.absmax", &[3], &[1.0, 2.0, 3.0]);
        let (_dir, model) = open(&tensors);
        let tensor = model.bnb_tensor("x.weight", &codebook(), &map()).unwrap();
        let Absmax::F32(absmax) = tensor.absmax else { panic!("nested") };
        assert_eq!(absmax, [1.0, 2.0, 3.0]);
    }

    #[test]
    fn another_format_is_refused_by_name() {
        let state = |from: &str, to: &str| error(|tensors| set_state(tensors, from, to));
        assert!(state("nf4", "fp4").contains("quant_state.bitsandbytes__nf4: quant_type fp4, allowed: nf4"));
        assert!(state(":64", ":128").contains("blocksize 128, allowed: 64"));
        assert!(state(":256", ":128").contains("nested_blocksize Some(128)"));
        assert!(state("bfloat16", "int8").contains("dtype int8"));
        assert!(state("{", "[").contains("quant_state.bitsandbytes__nf4"));
        assert!(state("0.0516", "1e300").contains("nested_offset inf is not finite"));
        assert!(state("\"shape\"", "\"twist\":1,\"shape\"").contains("unknown field `twist`"));
        assert!(state("[3,43]", "[4294967296,4294967297]").contains("overflows"));
        assert!(state("[3,43]", &format!("[3,43{}]", " ".repeat(5000))).contains("at most 4096 are allowed"));
        assert!(state("[3,43]", "[3,44]").contains("x.weight: 65 elements of U8, expected 66"));
    }

    #[test]
    fn wrong_parts_are_refused_by_name() {
        assert!(error(|t| drop(t.remove(5))).contains("tensor x.weight.quant_state.bitsandbytes__nf4 is missing"));
        assert!(error(|t| drop(t.remove(4))).contains("tensor x.weight.nested_quant_map is missing"));
        let absmax = error(|t| t[1] = u8s("x.weight.absmax".into(), &[2], vec![0; 2]));
        assert!(absmax.contains("x.weight.absmax: 2 elements of U8, expected 3"));
        let nan = error(|t| t[2] = f32s("x.weight.nested_absmax", &[1], &[f32::NAN]));
        assert!(nan.contains("x.weight.nested_absmax: element 0 is NaN"));
        let mut other = codebook();
        other[3] = 0.5;
        let book = error(|t| t[3] = f32s("x.weight.quant_map", &[16], &other));
        assert!(book.contains("x.weight.quant_map: entry 3 is 0.5, NF4 has 0.2"), "{book}");
        let dynamic = error(|t| t[4] = f32s("x.weight.nested_quant_map", &[256], &[0.0; 256]));
        assert!(dynamic.contains("x.weight.nested_quant_map: entry 1"));
        let storage = error(|t| t[0] = ("x.weight".into(), Dtype::BF16, vec![1], vec![0; 2]));
        assert!(storage.contains("x.weight: 1 elements of BF16, expected 65 of U8"));
    }
}

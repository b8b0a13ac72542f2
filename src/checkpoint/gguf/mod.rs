//! An adapter in GGUF, as llama.cpp's `convert_lora_to_gguf.py` writes it and `llama-server --lora` reads it.
//!
//! The names of architectures and tensors, and the rows that are reordered, are those of that script with `conversion/*.py` and
//! `gguf-py` of llama.cpp, as in llama-cpp-python 0.3.36.

mod format;

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};

use super::adapter::Adapter;
use super::atomic;
use crate::files::shown_path;
use crate::model::spec::{LayerSpec, ModelSpec, ModuleId};
use crate::model::trainable::{Kind, LayerTrainables, LoraModule, Trainable};

pub use format::Type;
use format::{Info, Value};

/// Version of GGUF's quantized types. Every file names it.
const QUANTIZATION_VERSION: u32 = 2;

/// An architecture of llama.cpp.
struct Architecture {
    name: &'static str,
    /// True if rotation pairs neighbouring elements of a head, so that the rows of q and k are reordered.
    pairs_are_neighbours: bool,
}

/// Families of this program, with their architectures.
const ARCHITECTURES: [(&str, Architecture); 13] = [
    ("llama", Architecture { name: "llama", pairs_are_neighbours: true }),
    ("mistral", Architecture { name: "llama", pairs_are_neighbours: true }),
    ("smollm3", Architecture { name: "smollm3", pairs_are_neighbours: true }),
    ("granite", Architecture { name: "granite", pairs_are_neighbours: true }),
    ("qwen2", Architecture { name: "qwen2", pairs_are_neighbours: false }),
    ("qwen3", Architecture { name: "qwen3", pairs_are_neighbours: false }),
    ("seed_oss", Architecture { name: "seed_oss", pairs_are_neighbours: false }),
    ("olmo2", Architecture { name: "olmo2", pairs_are_neighbours: false }),
    ("olmo3", Architecture { name: "olmo2", pairs_are_neighbours: false }),
    ("phi3", Architecture { name: "phi3", pairs_are_neighbours: false }),
    ("gemma2", Architecture { name: "gemma2", pairs_are_neighbours: false }),
    ("gemma3_text", Architecture { name: "gemma3", pairs_are_neighbours: false }),
    ("gemma3", Architecture { name: "gemma3", pairs_are_neighbours: false }),
];

/// Returns llama.cpp's name of a module.
fn module_name(module: ModuleId) -> &'static str {
    match module {
        ModuleId::Q => "attn_q",
        ModuleId::K => "attn_k",
        ModuleId::V => "attn_v",
        ModuleId::Qkv => "attn_qkv",
        ModuleId::O => "attn_output",
        ModuleId::Gate => "ffn_gate",
        ModuleId::Up | ModuleId::GateUp => "ffn_up",
        ModuleId::Down => "ffn_down",
    }
}

/// A matrix of the file.
struct Matrix<'a> {
    info: Info,
    /// Its values, `[rows, columns]`.
    values: &'a [f32],
    /// Number of heads if the rows of each head are reordered; `None` if all rows stay in their places.
    permuted_heads: Option<usize>,
    /// Factor of the values. It differs from 1 where the scale of the module is not the one that the file's alpha gives.
    factor: f32,
}

/// An adapter that is to be written.
pub struct Export<'a> {
    header: Vec<u8>,
    matrices: Vec<Matrix<'a>>,
}

impl<'a> Export<'a> {
    /// Decides what is written. The file has `name` as its `general.name`.
    ///
    /// # Errors
    /// The converter of llama.cpp has no architecture for adapters of this family.
    pub fn new(adapter: &'a Adapter, spec: &ModelSpec, name: &str, kind: Type) -> Result<Export<'a>> {
        let known = || ARCHITECTURES.iter().map(|(family, _)| *family).collect::<Vec<_>>().join(", ");
        let architecture = ARCHITECTURES.iter().find(|(family, _)| *family == spec.family).map(|(_, found)| found);
        let architecture = architecture.with_context(|| {
            format!("llama.cpp's converter makes no adapter of the family {}; allowed: {}", spec.family, known())
        })?;
        // llama.cpp scales by alpha / r.
        let keys = &adapter.settings.keys;
        let alpha = if keys.use_rslora { keys.alpha * (keys.r as f64).sqrt() } else { keys.alpha };
        let matrices = matrices(adapter, spec, architecture, alpha, kind)?;
        let text = |text: &str| Value::String(text.into());
        let pairs = [
            ("general.architecture", text(architecture.name)),
            ("general.type", text("adapter")),
            ("adapter.type", text("lora")),
            ("general.name", text(name)),
            ("adapter.lora.alpha", Value::F32(alpha as f32)),
            ("general.quantization_version", Value::U32(QUANTIZATION_VERSION)),
        ];
        let infos: Vec<Info> = matrices.iter().map(|matrix| matrix.info.clone()).collect();
        Ok(Export { header: format::header(&pairs, &infos), matrices })
    }

    /// Number of bytes of the file.
    pub fn bytes(&self) -> usize {
        format::file_bytes(&self.header, self.matrices.iter().map(|matrix| &matrix.info))
    }

    /// Writes the file, which appears when it is whole.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut file = atomic::beside_with_room(path, self.bytes())?;
        let place = || format!("{}: cannot be written", shown_path(path));
        file.write_all(&self.header).with_context(place)?;
        for matrix in &self.matrices {
            let bytes = matrix.bytes().with_context(|| matrix.info.name.clone())?;
            format::write_data(&mut file, &bytes).with_context(place)?;
        }
        atomic::rename(file, path)
    }
}

/// Returns the matrices in the order of PEFT's names, which is that of the script.
fn matrices<'a>(
    adapter: &'a Adapter,
    spec: &ModelSpec,
    architecture: &Architecture,
    alpha: f64,
    kind: Type,
) -> Result<Vec<Matrix<'a>>> {
    let lora = adapter.settings.lora_config();
    let mut named = Vec::new();
    for (idx, (layer, values)) in spec.layers.iter().zip(&adapter.layers).enumerate() {
        let trainables = LayerTrainables::new(layer, &lora.layers[idx]);
        for Trainable { module, kind: role, shape, range } in trainables.list() {
            let factor = trainables.module(*module).map_or(1.0, |module| factor(module, alpha));
            let place = &layer.module(*module).context("a trainable without a module")?.name;
            let name = format!("blk.{idx}.{}.weight.lora_{}", module_name(*module), role.letter().to_lowercase());
            let is_moved = architecture.pairs_are_neighbours && *role == Kind::B;
            let permuted_heads = if is_moved { rotated_heads(layer, *module) } else { None };
            let (info, values) = (Info { name, shape: *shape, kind }, &values[range.clone()]);
            let factor = if *role == Kind::B { factor } else { 1.0 };
            named.push(((place.clone(), role.letter()), Matrix { info, values, permuted_heads, factor }));
        }
    }
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(named.into_iter().map(|(_, matrix)| matrix).collect())
}

/// Returns the factor of a module's B in a file of this alpha. Scales that differ by rounding alone count as equal.
fn factor(module: &LoraModule, alpha: f64) -> f32 {
    let factor = f64::from(module.scale) * module.lora_rank as f64 / alpha;
    if (factor - 1.0).abs() < 1e-6 { 1.0 } else { factor as f32 }
}

/// Returns the number of heads of a module whose output is rotated, or `None` for another module.
fn rotated_heads(layer: &LayerSpec, module: ModuleId) -> Option<usize> {
    match module {
        ModuleId::Q => Some(layer.attention.num_heads),
        ModuleId::K => Some(layer.attention.num_key_value_heads),
        _ => None,
    }
}

impl Matrix<'_> {
    /// Returns the bytes in the type of the file.
    fn bytes(&self) -> Result<Vec<u8>> {
        let [rows, columns] = self.info.shape;
        let mut bytes = Vec::with_capacity(self.info.bytes());
        for row in 0..rows {
            let from = self.permuted_heads.map_or(row, |heads| row_before(row, rows / heads));
            for &value in &self.values[from * columns..][..columns] {
                let value = value * self.factor;
                match self.info.kind {
                    Type::F32 => bytes.extend(value.to_le_bytes()),
                    Type::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                    Type::F16 => {
                        let half = f16::from_f32(value);
                        ensure!(half.is_finite(), "{value} is too large for f16; help: --outtype bf16 or f32");
                        bytes.extend(half.to_le_bytes());
                    }
                }
            }
        }
        Ok(bytes)
    }
}

/// Returns the row of the Hugging Face model that is put in this row. Row i of the first half of a head and row i of its
/// second half become neighbours (`LlamaModel.permute` of llama.cpp).
fn row_before(row: usize, head_dim: usize) -> usize {
    let (head, place) = (row / head_dim, row % head_dim);
    head * head_dim + place % 2 * (head_dim / 2) + place / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_of_another_scale_has_a_factor() {
        let module = |lora_rank, scale| LoraModule { id: ModuleId::Q, lora_rank, scale };
        assert_eq!([module(3, 8.0 / 3.0), module(8, 1.0), module(16, 0.5)].map(|m| factor(&m, 8.0)), [1.0; 3]);
        assert_eq!(factor(&module(4, 4.0), 8.0), 2.0);
    }

    #[test]
    fn halves_of_a_head_are_interleaved() {
        let order: Vec<usize> = (0..12).map(|row| row_before(row, 6)).collect();
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }
}

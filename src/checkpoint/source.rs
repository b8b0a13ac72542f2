//! The base model on disk: the safetensors files of a Hugging Face directory, mapped read-only.
#![expect(unsafe_code, reason = "maps files")]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::{Mmap, UncheckedAdvice};
pub use safetensors::Dtype;
use serde::Deserialize;

use super::folder::{self, INDEX_FILE, SINGLE_FILE};
use super::header::{self, Entry};
use crate::files::{self, map_opened, shown, shown_path};

/// Largest index that is read, in bytes; it holds some 300,000 tensors.
pub const MAX_INDEX_BYTES: u64 = 32 << 20;

/// All tensors of a model directory. A tensor's bytes are read when it is asked for.
#[derive(Debug)]
pub struct BaseModel {
    dir: PathBuf,
    files: Vec<MappedFile>,
    /// Name to (index in `files`, place there), sorted by name.
    tensors: BTreeMap<String, (usize, Entry)>,
    /// Names in the files, where they differ from those in memory.
    stored_names: BTreeMap<String, String>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
}

/// One tensor in its mapped file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub file: &'a Path,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Elements in row-major order, little-endian, at any alignment.
    pub bytes: &'a [u8],
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Beginnings of names in files of models that also see, each with its place in memory, by which transformers 5 and
/// PEFT know the tensor.
const RENAMED: [(&str, &str); 4] = [
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
];

/// The name in memory of a tensor with this name in a file.
pub(super) fn name_in_memory(name: &str) -> String {
    let renamed = RENAMED.iter().find_map(|(old, new)| Some(format!("{new}{}", name.strip_prefix(old)?)));
    renamed.unwrap_or_else(|| name.into())
}

impl BaseModel {
    /// Returns whether `dir` has weights to open.
    pub fn has_weights(dir: &Path) -> bool {
        dir.join(SINGLE_FILE).exists() || dir.join(INDEX_FILE).exists()
    }

    /// Maps `model.safetensors` of `dir` or, without one, the files of `model.safetensors.index.json`: what
    /// transformers loads, in its order of preference.
    ///
    /// Errors name the file, and the tensor where there is one: neither file is there, a named file is missing, leads
    /// elsewhere or is damaged (see `header::parse`), a tensor is in two files or not in the one that the index
    /// names.
    pub fn open(dir: &Path) -> Result<Self> {
        if dir.join(SINGLE_FILE).exists() {
            return Self::map(dir, [SINGLE_FILE]);
        }
        let index_path = dir.join(INDEX_FILE);
        ensure!(index_path.exists(), folder::no_weights(dir));
        let place = || shown_path(&index_path);
        let Index { weight_map } = files::read_json(&index_path, MAX_INDEX_BYTES)?;
        let mut names: Vec<&str> = weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        ensure!(!names.is_empty(), "{}: weight_map names no file", place());
        names.iter().try_for_each(|name| folder::check_named(dir, name)).with_context(place)?;
        let model = Self::map(dir, names)?;
        for (tensor, file) in &weight_map {
            let found = model.tensors.get(&name_in_memory(tensor)).map(|&(file_idx, _)| &model.files[file_idx].path);
            ensure!(
                found == Some(&dir.join(file)),
                "{}: says that tensor {} is in {file}, which lacks it",
                place(),
                shown(tensor)
            );
        }
        Ok(model)
    }

    fn map<'a>(dir: &Path, names: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let (tensors, stored_names) = (BTreeMap::new(), BTreeMap::new());
        let mut model = Self { dir: dir.to_owned(), files: Vec::new(), tensors, stored_names };
        for name in names {
            let path = dir.join(name);
            let file = files::open(&path)?;
            let map = map_opened(&file).with_context(|| shown_path(&path))?;
            let beginning = &map[..map.len().min(200)];
            ensure!(!map.is_empty(), "{}: truncated: 0 bytes; download it again", shown_path(&path));
            files::check_lfs_pointer(&path, beginning)?;
            files::check_html(&path, beginning)?;
            let tensors = header::parse(&map).with_context(|| shown_path(&path))?;
            for (stored, entry) in tensors {
                let tensor = name_in_memory(&stored);
                if let Some((other, _)) = model.tensors.get(&tensor) {
                    let other = shown_path(&model.files[*other].path);
                    bail!("{}: tensor {} is also in {other}", shown_path(&path), shown(&tensor));
                }
                if stored != tensor {
                    model.stored_names.insert(tensor.clone(), stored);
                }
                model.tensors.insert(tensor, (model.files.len(), entry));
            }
            model.files.push(MappedFile { path, file, map });
        }
        Ok(model)
    }

    /// Returns the directory that was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the names of all tensors, those in memory, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the name that a tensor has in its file.
    pub(super) fn stored_name<'a>(&'a self, name: &'a str) -> &'a str {
        self.stored_names.get(name).map_or(name, String::as_str)
    }

    /// Number of tensors.
    pub fn num_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Returns the files, each with its path.
    pub(super) fn files(&self) -> impl ExactSizeIterator<Item = (&Path, &File)> {
        self.files.iter().map(|file| (file.path.as_path(), &file.file))
    }

    /// Fails if a file has another length than it had when it was mapped.
    pub(super) fn check_lengths(&self) -> Result<()> {
        self.files.iter().try_for_each(|MappedFile { path, file, map }| files::check_length(path, file, map))
    }

    /// Returns every tensor with the index of its file and its place there, sorted by name.
    pub(super) fn entries(&self) -> impl ExactSizeIterator<Item = (&str, usize, &Entry)> {
        self.tensors.iter().map(|(name, (file_idx, entry))| (name.as_str(), *file_idx, entry))
    }

    /// Returns the tensor of this name, or `None`.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, (file_idx, entry)) = self.tensors.get_key_value(name)?;
        let MappedFile { path, map, .. } = &self.files[*file_idx];
        let bytes = &map[entry.range.clone()];
        Some(TensorView { name, file: path, dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// Returns the tensor of this name. Fails if there is none.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).with_context(|| format!("{}: tensor {} is missing", shown_path(&self.dir), shown(name)))
    }

    /// Gives the resident pages of a tensor back to the system, so that walking over a model does not make
    /// it resident. The tensor stays usable: its pages are read again when touched.
    pub fn release(&self, tensor: &TensorView<'_>) -> Result<()> {
        let (file_idx, entry) = self.tensors.get(tensor.name).context("a tensor of another model")?;
        let map = &self.files[*file_idx].map;
        // SAFETY: the mapping is a read-only, shared one of a file, so that dropped pages come back from the
        // file with the same bytes; neighbours that share the first or last page do so too.
        unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.range.start, entry.range.len()) }
            .with_context(|| format!("{}: madvise", shown_path(tensor.file)))
    }
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Converts the elements from `start` on, in row-major order, into the whole of `out`.
    ///
    /// Errors: a dtype other than bf16, f16, f32; a range beyond the end; a NaN or an infinity.
    pub fn to_f32(self, start: usize, out: &mut [f32]) -> Result<()> {
        let size = match self.dtype {
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
            other => bail!("{self}: dtype {other:?}, allowed are BF16, F16 and F32"),
        };
        let Some(bytes) = self.bytes.get(start * size..(start + out.len()) * size) else {
            bail!("{self}: elements {start}..{} of {}", start + out.len(), self.num_elements());
        };
        match self.dtype {
            Dtype::F32 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, &b)| *x = f32::from_le_bytes(b)),
            Dtype::BF16 => out
                .iter_mut()
                .zip(bytes.as_chunks().0)
                .for_each(|(x, &b)| *x = f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            _ => f16_to_f32(bytes, out),
        }
        // `all` would stop early and so would not vectorize.
        if !out.iter().fold(true, |finite, x| finite & x.is_finite()) {
            let at = out.iter().position(|x| !x.is_finite()).unwrap_or_default();
            bail!("{self}: element {} is {}, weights must be finite", start + at, out[at]);
        }
        Ok(())
    }
}

/// Converts little-endian f16 at any alignment. A small aligned buffer lies between, because the vectorized
/// conversion takes slices.
fn f16_to_f32(bytes: &[u8], out: &mut [f32]) {
    let mut aligned = [f16::ZERO; 256];
    for (bytes, out) in bytes.chunks(2 * aligned.len()).zip(out.chunks_mut(aligned.len())) {
        aligned.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, &b)| *x = f16::from_le_bytes(b));
        aligned[..out.len()].convert_to_f32_slice(out);
    }
}

/// Names file and tensor, for messages.
impl std::fmt::Display for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}: tensor {}", shown_path(self.file), shown(self.name))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;

    use half::bf16;
    use tempfile::TempDir;

    /// A tensor to be written: name, dtype, shape, bytes.
    pub type Written = (String, Dtype, Vec<usize>, Vec<u8>);

    pub fn write(path: &Path, tensors: &[Written]) {
        let view = |(name, dtype, shape, bytes): &'_ Written| {
            let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes);
            (name.clone(), view.map(|v| (v.dtype(), v.shape().to_vec(), v.data().to_vec())).unwrap())
        };
        let owned: Vec<_> = tensors.iter().map(view).collect();
        let views = owned.iter().map(|(name, (dtype, shape, bytes))| {
            (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    pub fn f32s(name: &str, shape: &[usize], values: &[f32]) -> Written {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        (name.to_owned(), Dtype::F32, shape.to_vec(), bytes)
    }

    fn error(dir: &TempDir) -> String {
        format!("{:#}", BaseModel::open(dir.path()).expect_err("must be refused"))
    }

    fn write_index(dir: &TempDir, map: &str) {
        fs::write(dir.path().join(INDEX_FILE), format!("{{\"metadata\":{{}},\"weight_map\":{map}}}")).unwrap();
    }

    #[test]
    fn one_file_is_read() {
        let dir = TempDir::new().unwrap();
        let values = [1.0, -2.5, 0.1, 65504.0, 3.0, 4.0];
        let halves: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let brains: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let tensors = [
            f32s("a", &[2, 3], &values),
            ("b".to_owned(), Dtype::F16, vec![6], halves),
            ("c".to_owned(), Dtype::BF16, vec![6], brains),
        ];
        write(&dir.path().join(SINGLE_FILE), &tensors);
        let model = BaseModel::open(dir.path()).unwrap();
        assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        let a = model.tensor("a").unwrap();
        assert_eq!((a.dtype, a.shape, a.num_elements()), (Dtype::F32, &[2, 3][..], 6));
        let read = |name: &str| {
            let mut out = [0.0; 4];
            model.tensor(name).unwrap().to_f32(1, &mut out).unwrap();
            out
        };
        assert_eq!(read("a"), values[1..5]);
        assert_eq!(read("b").to_vec(), values[1..5].iter().map(|&x| f16::from_f32(x).to_f32()).collect::<Vec<_>>());
        assert_eq!(read("c").to_vec(), values[1..5].iter().map(|&x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>());
        model.release(&a).unwrap();
        assert_eq!(read("a"), values[1..5]);
        assert!(a.to_f32(3, &mut [0.0; 4]).unwrap_err().to_string().contains("tensor a: elements 3..7 of 6"));
        assert!(model.tensor("d").unwrap_err().to_string().contains("tensor d is missing"));
    }

    #[test]
    fn long_f16_tensors_cross_the_buffer() {
        let values: Vec<f32> = (0..1000).map(|i| i as f32 / 8.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let mut odd = vec![0];
        odd.extend(&bytes);
        let mut out = vec![0.0; 1000];
        f16_to_f32(&odd[1..], &mut out);
        assert_eq!(out, values);
    }

    #[test]
    fn weights_that_are_not_finite_are_refused() {
        let dir = TempDir::new().unwrap();
        let bytes = [1.0, f32::NAN].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let brain = ("b".to_owned(), Dtype::BF16, vec![2], bytes);
        write(&dir.path().join(SINGLE_FILE), &[f32s("a", &[3], &[0.0, 1.0, f32::INFINITY]), brain]);
        let model = BaseModel::open(dir.path()).unwrap();
        let error = |name: &str| model.tensor(name).unwrap().to_f32(1, &mut [0.0; 1]).unwrap_err().to_string();
        model.tensor("a").unwrap().to_f32(0, &mut [0.0; 2]).unwrap();
        assert!(
            model.tensor("a").unwrap().to_f32(1, &mut [0.0; 2]).unwrap_err().to_string().contains("element 2 is inf")
        );
        assert!(error("b").contains("model.safetensors: tensor b: element 1 is NaN"));
    }

    #[test]
    fn an_index_is_followed() {
        let dir = TempDir::new().unwrap();
        write(&dir.path().join("x-1.safetensors"), &[f32s("a", &[1], &[1.0]), f32s("b", &[1], &[2.0])]);
        write(&dir.path().join("x-2.safetensors"), &[f32s("c", &[1], &[3.0])]);
        write_index(&dir, r#"{"a":"x-1.safetensors","b":"x-1.safetensors","c":"x-2.safetensors"}"#);
        let model = BaseModel::open(dir.path()).unwrap();
        assert_eq!(model.names().count(), 3);
        assert_eq!(model.tensor("c").unwrap().file, dir.path().join("x-2.safetensors"));

        write_index(&dir, r#"{"a":"x-1.safetensors","c":"x-1.safetensors","b":"x-2.safetensors"}"#);
        assert!(error(&dir).contains("tensor b is in x-2.safetensors, which lacks it"));
        write_index(&dir, r#"{"a":"x-1.safetensors","c":"x-3.safetensors"}"#);
        assert!(error(&dir).contains("index.json: names x-3.safetensors, which is not there"));
        write_index(&dir, "{}");
        assert!(error(&dir).contains("names no file"));
        write_index(&dir, "[");
        assert!(error(&dir).contains("not the JSON that is expected"));
        write(&dir.path().join("x-2.safetensors"), &[f32s("a", &[1], &[3.0])]);
        write_index(&dir, r#"{"a":"x-1.safetensors","b":"x-2.safetensors"}"#);
        assert!(error(&dir).contains("x-2.safetensors: tensor a is also in"));
    }

    #[test]
    fn missing_and_damaged_files_are_named() {
        let dir = TempDir::new().unwrap();
        assert!(error(&dir).contains("neither model.safetensors nor model.safetensors.index.json"));
        let path = dir.path().join(SINGLE_FILE);
        fs::write(&path, "").unwrap();
        assert!(error(&dir).contains("model.safetensors: truncated: 0 bytes"));
        write(&path, &[f32s("a", &[2], &[1.0, 2.0])]);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(error(&dir).contains("model.safetensors: tensor a: data_offsets [0, 8] are out of range"));
    }
}

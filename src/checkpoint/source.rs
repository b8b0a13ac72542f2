//! The base model on disk: the safetensors files of a Hugging Face directory, mapped read-only.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::{Mmap, UncheckedAdvice};
pub use safetensors::Dtype;
use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3;

use super::header::{self, Entry};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Bytes of each sample that [`BaseModel::identity`] takes.
const SAMPLE_BYTES: usize = 4096;

/// All tensors of a model directory. Nothing is read until it is asked for.
#[derive(Debug)]
pub struct BaseModel {
    dir: PathBuf,
    files: Vec<MappedFile>,
    /// Name to (index in `files`, place there), sorted by name.
    tensors: BTreeMap<String, (usize, Entry)>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mmap,
    /// Where the data begins, in bytes.
    data_start: usize,
}

/// One tensor, in place in its mapped file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub file: &'a Path,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Row-major, little-endian, at any alignment.
    pub bytes: &'a [u8],
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Maps a whole file, read-only.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let file = fs::File::open(path).with_context(|| path.display().to_string())?;
    // SAFETY: read-only, and no file is written in place by this program. Another process that cuts the file short
    // under us ends this one with SIGBUS; nothing but a copy of the whole file prevents that.
    unsafe { Mmap::map(&file) }.with_context(|| format!("{}: cannot be mapped", path.display()))
}

impl BaseModel {
    /// Whether there is anything to open.
    pub fn has_weights(dir: &Path) -> bool {
        dir.join(SINGLE_FILE).exists() || dir.join(INDEX_FILE).exists()
    }

    /// Maps `model.safetensors` of `dir` or, without one, the files of `model.safetensors.index.json`: what
    /// transformers loads, in its order of preference.
    ///
    /// Errors name the file, and the tensor where there is one: neither file is there, a named file is missing
    /// or damaged (see `header::parse`), a tensor is in two files or not in the one that the index names.
    pub fn open(dir: &Path) -> Result<Self> {
        ensure!(dir.is_dir(), "{}: not a directory", dir.display());
        if dir.join(SINGLE_FILE).exists() {
            return Self::map(dir, [SINGLE_FILE]);
        }
        let index_path = dir.join(INDEX_FILE);
        ensure!(index_path.exists(), "{}: neither {SINGLE_FILE} nor {INDEX_FILE} is there", dir.display());
        let index = fs::read(&index_path).with_context(|| index_path.display().to_string())?;
        let Index { weight_map } =
            serde_json::from_slice(&index).with_context(|| format!("{}: not an index", index_path.display()))?;
        let mut names: Vec<&str> = weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        ensure!(!names.is_empty(), "{}: weight_map names no file", index_path.display());
        if let Some(missing) = names.iter().find(|name| !dir.join(name).exists()) {
            bail!("{}: names {missing}, which is not there", index_path.display());
        }
        let model = Self::map(dir, names)?;
        for (tensor, file) in &weight_map {
            let found = model.tensors.get(tensor).map(|&(file_idx, _)| &model.files[file_idx].path);
            ensure!(
                found == Some(&dir.join(file)),
                "{}: says that tensor {tensor} is in {file}, which lacks it",
                index_path.display()
            );
        }
        Ok(model)
    }

    fn map<'a>(dir: &Path, names: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut model = Self { dir: dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            let path = dir.join(name);
            let map = map(&path)?;
            let header = header::parse(&map).with_context(|| path.display().to_string())?;
            for (tensor, entry) in header.tensors {
                if let Some((other, _)) = model.tensors.get(&tensor) {
                    let other = model.files[*other].path.display();
                    bail!("{}: tensor {tensor} is also in {other}", path.display());
                }
                model.tensors.insert(tensor, (model.files.len(), entry));
            }
            model.files.push(MappedFile { path, map, data_start: header.data_start });
        }
        Ok(model)
    }

    /// The directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of this name, or nothing.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, (file_idx, entry)) = self.tensors.get_key_value(name)?;
        let MappedFile { path, map, .. } = &self.files[*file_idx];
        let bytes = &map[entry.range.clone()];
        Some(TensorView { name, file: path, dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// The tensor of this name. Error: there is none.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).with_context(|| format!("{}: tensor {name} is missing", self.dir.display()))
    }

    /// Gives the resident pages of a tensor back to the system, so that walking over a model does not make
    /// it resident. The tensor stays usable: its pages are read again when touched.
    pub fn release(&self, tensor: &TensorView<'_>) -> Result<()> {
        let (file_idx, entry) = self.tensors.get(tensor.name).context("a tensor of another model")?;
        let map = &self.files[*file_idx].map;
        // SAFETY: the mapping is a read-only, shared one of a file, so that dropped pages come back from the
        // file with the same bytes; neighbours that share the first or last page do so too.
        unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.range.start, entry.range.len()) }
            .with_context(|| format!("{}: madvise", tensor.file.display()))
    }

    /// 128-bit xxh3, in hex, of config.json, of each file's name, size and header, and of three samples (first,
    /// middle and last 4 KiB) of each tensor. It does not depend on where the directory lies.
    ///
    /// Not of every byte: reading 140 GB at each start takes minutes, while another model, another revision or
    /// other weights differ in nearly every tensor. Bytes edited by hand between the samples go unnoticed.
    pub fn identity(&self) -> Result<String> {
        let config_path = self.dir.join("config.json");
        let mut hash = Xxh3::new();
        hash.update(&fs::read(&config_path).with_context(|| config_path.display().to_string())?);
        for MappedFile { path, map, data_start } in &self.files {
            hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update(&(map.len() as u64).to_le_bytes());
            hash.update(&map[..*data_start]);
        }
        for name in self.names() {
            let tensor = self.tensor(name)?;
            let end = tensor.bytes.len();
            for start in [0, (end / 2).saturating_sub(SAMPLE_BYTES / 2), end.saturating_sub(SAMPLE_BYTES)] {
                hash.update(&tensor.bytes[start..end.min(start + SAMPLE_BYTES)]);
            }
            self.release(&tensor)?;
        }
        Ok(format!("{:032x}", hash.digest128()))
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
    pub fn to_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
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

/// Little-endian f16 at any alignment: through a small aligned buffer, because the vectorized conversion wants slices.
fn f16_to_f32(bytes: &[u8], out: &mut [f32]) {
    let mut aligned = [f16::ZERO; 256];
    for (bytes, out) in bytes.chunks(2 * aligned.len()).zip(out.chunks_mut(aligned.len())) {
        aligned.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, &b)| *x = f16::from_le_bytes(b));
        aligned[..out.len()].convert_to_f32_slice(out);
    }
}

/// File and tensor, for messages.
impl std::fmt::Display for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}: tensor {}", self.file.display(), self.name)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
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
        assert!(error(&dir).contains("not an index"));
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
        let missing = BaseModel::open(&dir.path().join("nowhere")).unwrap_err();
        assert!(missing.to_string().contains("nowhere: not a directory"));
    }

    #[test]
    fn identity_sees_config_and_weights_but_not_the_place() {
        let identity = |config: &str, weight: f32| {
            let dir = TempDir::new().unwrap();
            fs::write(dir.path().join("config.json"), config).unwrap();
            let mut values = vec![0.5; 5000];
            values[2500] = weight;
            write(&dir.path().join(SINGLE_FILE), &[f32s("a", &[5000], &values)]);
            BaseModel::open(dir.path()).unwrap().identity().unwrap()
        };
        let first = identity("{}", 1.0);
        assert_eq!(first.len(), 32);
        assert_eq!(first, identity("{}", 1.0));
        assert_ne!(first, identity("{ }", 1.0));
        assert_ne!(first, identity("{}", 1.5));
    }
}

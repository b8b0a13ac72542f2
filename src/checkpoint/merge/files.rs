//! The safetensors files of the result, and their index.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use super::{Merge, Planned};
use crate::checkpoint::atomic;
use crate::checkpoint::folder::{INDEX_FILE, SINGLE_FILE};
use crate::files::shown_path;

/// Distributes tensors over files in their order. A file is full when the next tensor would make it exceed `max_bytes`.
/// Within a file, wider types come first, so that every tensor is aligned.
pub(super) fn split(tensors: Vec<Planned<'_>>, max_bytes: usize) -> Vec<Vec<Planned<'_>>> {
    let (mut files, mut bytes): (Vec<Vec<Planned<'_>>>, usize) = (Vec::new(), 0);
    for tensor in tensors {
        bytes += tensor.bytes();
        match files.last_mut() {
            Some(file) if bytes <= max_bytes => file.push(tensor),
            _ => {
                bytes = tensor.bytes();
                files.push(vec![tensor]);
            }
        }
    }
    files.iter_mut().for_each(|file| file.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.bitsize())));
    files
}

/// Returns the name that transformers gives to a file.
pub(super) fn name(idx: usize, num_files: usize) -> String {
    match num_files {
        1 => SINGLE_FILE.into(),
        n => format!("model-{:05}-of-{n:05}.safetensors", idx + 1),
    }
}

impl Merge<'_> {
    /// Writes the file of these tensors and syncs it.
    pub(super) fn write_file(&self, path: &Path, tensors: &[Planned<'_>]) -> Result<()> {
        let place = || format!("{}: cannot be written", shown_path(path));
        let mut file = BufWriter::new(File::create(path).with_context(place)?);
        file.write_all(&header(tensors)?).with_context(place)?;
        tensors.iter().try_for_each(|tensor| self.write_tensor(tensor, &mut file)).with_context(|| shown_path(path))?;
        file.flush().with_context(place)?;
        file.get_ref().sync_all().with_context(place)
    }
}

/// Returns the bytes before the data: the length, and the header as JSON, padded so that the data are aligned.
fn header(tensors: &[Planned<'_>]) -> Result<Vec<u8>> {
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let begin = end;
        end += tensor.bytes();
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (begin, end) };
        (tensor.stored.to_string(), info)
    });
    // transformers refuses a file that does not say this.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let mut json = serde_json::to_vec(&Metadata::new(Some(metadata), infos.collect())?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// Writes and syncs `model.safetensors.index.json`, in the form in which transformers writes it.
pub(super) fn write_index(dir: &Path, files: &[Vec<Planned<'_>>]) -> Result<()> {
    let tensors = || files.iter().flatten();
    let mut places: Vec<(&str, Value)> = files
        .iter()
        .enumerate()
        .flat_map(|(idx, tensors)| tensors.iter().map(move |tensor| (tensor.stored, name(idx, files.len()).into())))
        .collect();
    places.sort_unstable_by_key(|(tensor, _)| *tensor);
    let weight_map: Map<String, Value> = places.into_iter().map(|(tensor, file)| (tensor.to_string(), file)).collect();
    let index = json!({
        "metadata": {
            "total_parameters": tensors().map(|tensor| tensor.shape.iter().product::<usize>()).sum::<usize>(),
            "total_size": tensors().map(Planned::bytes).sum::<usize>(),
        },
        "weight_map": weight_map,
    });
    atomic::write_synced(&dir.join(INDEX_FILE), format!("{index:#}\n").as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::source::Dtype;

    #[test]
    fn a_file_is_full_before_a_tensor_that_would_exceed_it() {
        let tensor =
            |stored, elements, dtype| Planned { stored, name: stored, dtype, shape: vec![elements], linear: None };
        let split_by = |max_bytes| -> Vec<Vec<&str>> {
            let tensors = vec![
                tensor("a", 3, Dtype::BF16),
                tensor("b", 1, Dtype::F32),
                tensor("c", 100, Dtype::F32),
                tensor("d", 2, Dtype::F32),
            ];
            split(tensors, max_bytes).iter().map(|file| file.iter().map(|tensor| tensor.stored).collect()).collect()
        };
        assert_eq!(split_by(1000), [["b", "c", "d", "a"]]);
        assert_eq!(split_by(10), [vec!["b", "a"], vec!["c"], vec!["d"]]);
        assert_eq!(split_by(1), [["a"], ["b"], ["c"], ["d"]]);
        assert_eq!((name(0, 1), name(1, 12)), (SINGLE_FILE.into(), "model-00002-of-00012.safetensors".into()));
        let header = header(&[tensor("b", 1, Dtype::F32), tensor("a", 3, Dtype::BF16)]).unwrap();
        assert!(header.len().is_multiple_of(8));
        let text = std::str::from_utf8(&header[8..]).unwrap().trim_end();
        assert_eq!(
            text,
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"BF16","shape":[3],"data_offsets":[4,10]}}"#
        );
    }
}

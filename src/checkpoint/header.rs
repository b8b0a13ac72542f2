//! The header of one safetensors file, checked in full before a byte behind it is used.
//!
//! Format (<https://huggingface.co/docs/safetensors>): the header's length as u64 little-endian, the header
//! as JSON (`name: {dtype, shape, data_offsets}`), then the data, which the tensors cover without hole or overlap.

use std::fmt;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

/// Largest header that the format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: usize = 8;

/// Where one tensor lies in its file.
#[derive(Debug)]
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes from the beginning of the file.
    pub range: Range<usize>,
}

/// What the header says, in the order of the data.
#[derive(Debug)]
pub(super) struct Header {
    /// Where the data begins, in bytes from the beginning of the file.
    pub data_start: usize,
    pub tensors: Vec<(String, Entry)>,
}

/// One header entry as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// A JSON object that keeps repeated keys, which a map would swallow.
struct Pairs(Vec<(String, serde_json::Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}

/// Parses and checks the header of `file`, the whole file.
///
/// Errors: a file shorter than its header, invalid JSON, a tensor named twice, a tensor whose bytes are not
/// those of its shape and dtype, overlapping or out-of-range offsets, bytes that belong to no tensor.
pub(super) fn parse(file: &[u8]) -> Result<Header> {
    let Some(length) = file.first_chunk::<LENGTH_BYTES>() else {
        bail!("truncated: {} bytes, a safetensors file has at least {LENGTH_BYTES}", file.len());
    };
    let length = u64::from_le_bytes(*length);
    let room = file.len() - LENGTH_BYTES;
    ensure!(length <= MAX_HEADER_BYTES, "header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed");
    ensure!(length <= room as u64, "header of {length} bytes, the file has only {room} after its first {LENGTH_BYTES}");
    let data_start = LENGTH_BYTES + length as usize;
    let pairs: Pairs = serde_json::from_slice(&file[LENGTH_BYTES..data_start]).context("header is not valid JSON")?;

    let mut tensors = Vec::with_capacity(pairs.0.len());
    for (name, value) in pairs.0.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry = locate(value, data_start, file.len()).with_context(|| format!("tensor {name}"))?;
        tensors.push((name, entry));
    }
    check_unique(&tensors)?;
    tensors.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
    check_cover(&tensors, data_start, file.len())?;
    Ok(Header { data_start, tensors })
}

fn locate(value: serde_json::Value, data_start: usize, file_bytes: usize) -> Result<Entry> {
    let Written { dtype, shape, data_offsets: (start, end) } = serde_json::from_value(value)?;
    ensure!(start <= end, "data_offsets [{start}, {end}] end before they start");
    let data_bytes = file_bytes - data_start;
    ensure!(
        end <= data_bytes,
        "data_offsets [{start}, {end}] are out of range, the file has {data_bytes} bytes of data"
    );
    let bits = shape.iter().try_fold(dtype.bitsize(), |product, &size| product.checked_mul(size));
    let bits = bits.with_context(|| format!("shape {shape:?} overflows"))?;
    ensure!(
        bits % 8 == 0 && bits / 8 == end - start,
        "{dtype:?} {shape:?} takes {} bytes, data_offsets [{start}, {end}] hold {}",
        bits.div_ceil(8),
        end - start
    );
    Ok(Entry { dtype, shape, range: data_start + start..data_start + end })
}

fn check_unique(tensors: &[(String, Entry)]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => bail!("tensor {} is there twice", pair[0]),
        None => Ok(()),
    }
}

fn check_cover(tensors: &[(String, Entry)], data_start: usize, file_bytes: usize) -> Result<()> {
    let mut covered = data_start;
    for (name, Entry { range, .. }) in tensors {
        let at = range.start - data_start;
        ensure!(range.start >= covered, "tensor {name} at data offset {at} overlaps the tensor before it");
        ensure!(range.start == covered, "{} bytes before tensor {name} belong to no tensor", range.start - covered);
        covered = range.end;
    }
    ensure!(covered == file_bytes, "{} bytes at the end belong to no tensor", file_bytes - covered);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.resize(file.len() + data_bytes, 0);
        file
    }

    fn error(file: &[u8]) -> String {
        format!("{:#}", parse(file).expect_err("must be refused"))
    }

    const A: &str = r#""a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}"#;

    #[test]
    fn a_good_header_is_read() {
        let b = r#""b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}"#;
        let bytes = file(&format!("{{\"__metadata__\":{{\"format\":\"pt\"}},{b},{A}}}"), 14);
        let header = parse(&bytes).unwrap();
        let names: Vec<_> = header.tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(header.tensors[1].1.dtype, Dtype::BF16);
        assert_eq!(header.tensors[1].1.shape, [3]);
        assert_eq!(header.tensors[1].1.range, header.data_start + 8..bytes.len());
    }

    #[test]
    fn short_files_and_headers_are_refused() {
        assert!(error(&[1, 2, 3]).contains("truncated: 3 bytes"));
        let mut long = file(&format!("{{{A}}}"), 8);
        long[0..8].copy_from_slice(&1_000_u64.to_le_bytes());
        assert!(error(&long).contains("header of 1000 bytes, the file has only"));
        long[0..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(error(&long).contains("at most 100000000"));
        assert!(error(&file(&format!("{{{A}}}"), 7)).contains("tensor a: data_offsets [0, 8] are out of range"));
    }

    #[test]
    fn broken_json_is_refused() {
        assert!(error(&file("{\"a\":", 0)).contains("not valid JSON"));
        assert!(error(&file("[1]", 0)).contains("not valid JSON"));
        assert!(error(&file(r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4)).contains("tensor a: missing field"));
        assert!(
            error(&file(r#"{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}"#, 4)).contains("unknown variant")
        );
    }

    #[test]
    fn wrong_offsets_are_refused() {
        let with = |second: &str, data_bytes| error(&file(&format!("{{{A},{second}}}"), data_bytes));
        let f32 = |name: &str, start: usize| {
            format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{}]}}"#, start + 4)
        };
        assert!(with(&f32("b", 4), 8).contains("tensor b at data offset 4 overlaps"));
        assert!(with(&f32("b", 12), 16).contains("4 bytes before tensor b belong to no tensor"));
        assert!(with(&f32("b", 8), 14).contains("2 bytes at the end"));
        assert!(with(&f32("b", 8), 11).contains("tensor b: data_offsets [8, 12] are out of range"));
        assert!(with(&f32("a", 8), 12).contains("tensor a is there twice"));
        let sizes = r#""b":{"dtype":"F32","shape":[2],"data_offsets":[8,12]}"#;
        assert!(with(sizes, 12).contains("tensor b: F32 [2] takes 8 bytes, data_offsets [8, 12] hold 4"));
        let backwards = r#""b":{"dtype":"F32","shape":[0],"data_offsets":[12,8]}"#;
        assert!(with(backwards, 12).contains("end before they start"));
        let huge = format!(r#""b":{{"dtype":"F32","shape":[{0},{0}],"data_offsets":[8,12]}}"#, u64::MAX / 2);
        assert!(with(&huge, 12).contains("overflows"));
    }
}

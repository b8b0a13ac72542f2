//! The header of one safetensors file, checked in full before a byte behind it is used.
//!
//! Format (<https://huggingface.co/docs/safetensors>): the header's length as u64 little-endian, the header
//! as JSON (`name: {dtype, shape, data_offsets}`), then the data, which the tensors cover without hole or overlap.

use std::fmt;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use crate::files::shown;

/// Largest header that is read. The format allows 100 MB, which would be a million tensors; parsing one of this size
/// takes 150 MB.
const MAX_HEADER_BYTES: u64 = 16 << 20;
const LENGTH_BYTES: usize = 8;
const MAX_DIMENSIONS: usize = 8;

/// Type, shape and position of one tensor in its file.
#[derive(Debug)]
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes from the beginning of the file.
    pub range: Range<usize>,
}

/// One header entry as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// A header as it is written, without its metadata. Repeated names, which a map would hide, are kept.
struct Pairs(Vec<(String, Written)>);

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
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let value = map.next_value();
                    let written =
                        value.map_err(|error| A::Error::custom(format!("tensor {}: {error}", shown(&name))))?;
                    pairs.push((name, written));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}

/// Returns where the data of a safetensors file begin, computed from its first eight bytes.
///
/// Errors: the header is longer than the file, or than [`MAX_HEADER_BYTES`].
pub(super) fn data_start(file: &[u8]) -> Result<usize> {
    let Some(length) = file.first_chunk::<LENGTH_BYTES>() else {
        bail!("truncated: {} bytes, a safetensors file has at least {LENGTH_BYTES}", file.len());
    };
    let length = u64::from_le_bytes(*length);
    let room = file.len() - LENGTH_BYTES;
    ensure!(length <= MAX_HEADER_BYTES, "header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed");
    ensure!(
        length <= room as u64,
        "truncated: header of {length} bytes, the file has only {room} after its first {LENGTH_BYTES}"
    );
    Ok(LENGTH_BYTES + length as usize)
}

/// Parses and checks the header of `file`, the whole file, and returns its tensors in the order of their data.
///
/// Errors: a file shorter than its header, invalid JSON, a tensor named twice, a tensor whose bytes are not
/// those of its shape and dtype, overlapping or out-of-range offsets, bytes that belong to no tensor.
pub(super) fn parse(file: &[u8]) -> Result<Vec<(String, Entry)>> {
    let data_start = data_start(file)?;
    let pairs: Pairs = serde_json::from_slice(&file[LENGTH_BYTES..data_start]).context("header cannot be read")?;
    let mut tensors = Vec::with_capacity(pairs.0.len());
    for (name, written) in pairs.0 {
        let entry = locate(written, data_start, file.len()).with_context(|| format!("tensor {}", shown(&name)))?;
        tensors.push((name, entry));
    }
    check_unique(&tensors)?;
    tensors.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
    check_cover(&tensors, data_start, file.len())?;
    Ok(tensors)
}

fn locate(written: Written, data_start: usize, file_bytes: usize) -> Result<Entry> {
    let Written { dtype, shape, data_offsets: (start, end) } = written;
    ensure!(shape.len() <= MAX_DIMENSIONS, "{} dimensions, at most {MAX_DIMENSIONS} are allowed", shape.len());
    ensure!(start <= end, "data_offsets [{start}, {end}] end before they start");
    let data_bytes = file_bytes - data_start;
    ensure!(
        end <= data_bytes,
        "data_offsets [{start}, {end}] are out of range, the file has {data_bytes} bytes of data (was it truncated?)"
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
        Some(pair) => bail!("tensor {} is there twice", shown(pair[0])),
        None => Ok(()),
    }
}

fn check_cover(tensors: &[(String, Entry)], data_start: usize, file_bytes: usize) -> Result<()> {
    let mut covered = data_start;
    for (name, Entry { range, .. }) in tensors {
        let name = shown(name);
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
        let tensors = parse(&bytes).unwrap();
        let names: Vec<_> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(tensors[1].1.dtype, Dtype::BF16);
        assert_eq!(tensors[1].1.shape, [3]);
        assert_eq!(tensors[1].1.range, bytes.len() - 6..bytes.len());
    }

    #[test]
    fn short_files_and_headers_are_refused() {
        assert!(error(&[1, 2, 3]).contains("truncated: 3 bytes"));
        let mut long = file(&format!("{{{A}}}"), 8);
        long[0..8].copy_from_slice(&1_000_u64.to_le_bytes());
        assert!(error(&long).contains("header of 1000 bytes, the file has only"));
        long[0..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(error(&long).contains("at most 16777216"));
        assert!(error(&file(&format!("{{{A}}}"), 7)).contains("tensor a: data_offsets [0, 8] are out of range"));
    }

    #[test]
    fn broken_json_is_refused() {
        assert!(error(&file("{\"a\":", 0)).contains("header cannot be read"));
        assert!(error(&file("[1]", 0)).contains("expected an object of tensors"));
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
    #[test]
    fn odd_headers_end_in_an_error() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            file(&format!(r#"{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}"#), 8)
        };
        for shape in [
            "[-1]",
            "[1.5]",
            "[1e308]",
            "[18446744073709551616]",
            "\"2\"",
            "null",
            "{}",
            "[[2]]",
            "[1,1,1,1,1,1,1,1,2]",
        ] {
            assert!(error(&one("\"F32\"", shape, "[0,8]")).contains("tensor a: "), "{shape}");
        }
        for offsets in
            ["[0]", "[0,8,9]", "[-8,0]", "[0,8.0]", "[8,18446744073709551615]", "[18446744073709551615,0]", "null"]
        {
            assert!(error(&one("\"F32\"", "[2]", offsets)).contains("tensor a: "), "{offsets}");
        }
        assert!(error(&one("7", "[2]", "[0,8]")).contains("tensor a: "));
        let named = error(&file("{\"a\\u001b[2J\\n\":{}}", 0));
        assert!(named.contains("tensor a\\u{1b}[2J\\n: missing field"), "{named}");
        assert!(error(&file(&format!("{{\"a\":{}", "[".repeat(1 << 20)), 0)).contains("tensor a: "));
        let metadata = format!("{{\"__metadata__\":{}{},{A}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(parse(&file(&metadata, 8)).unwrap().len(), 1);
    }
}

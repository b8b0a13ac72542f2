//! Adapters in GGUF have the bytes that llama.cpp's converter writes (scripts/golden/converted.py), in every family that it knows.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fsdp_qlora::testing::gguf::{Export, Type};
use fsdp_qlora::testing::{ModelSpec, adapter};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{families, model_with};
use crate::common::golden;

/// The entry of a model in gguf.json.
#[derive(Debug, PartialEq, Deserialize)]
struct Digests {
    metadata: Map<String, Value>,
    tensors: usize,
    /// CRC-32 of all descriptions of tensors, and of the data.
    infos: u32,
    data: u32,
    /// CRC-32 of the data in f16.
    f16: u32,
}

/// Reads numbers and texts one after the other.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        self.at += len;
        &self.bytes[self.at - len..self.at]
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    fn len(&mut self) -> usize {
        u64::from_le_bytes(self.take(8).try_into().unwrap()) as usize
    }

    fn text(&mut self) -> String {
        let len = self.len();
        String::from_utf8(self.take(len).to_vec()).unwrap()
    }
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Returns the pairs, the number of tensors, and the digests of their descriptions and data.
fn read(path: &Path) -> (Map<String, Value>, usize, u32, u32) {
    let bytes = fs::read(path).unwrap();
    let mut reader = Reader { bytes: &bytes, at: 0 };
    assert_eq!((reader.take(4), reader.u32()), (&b"GGUF"[..], 3));
    let (num_tensors, num_pairs) = (reader.len(), reader.len());
    let mut pairs = Map::new();
    for _ in 0..num_pairs {
        let (key, kind) = (reader.text(), reader.u32());
        let value = match kind {
            4 => reader.u32().into(),
            6 => f32::from_bits(reader.u32()).into(),
            8 => reader.text().into(),
            other => panic!("{key} has type {other}"),
        };
        pairs.insert(key, value);
    }
    let begin = reader.at;
    for _ in 0..num_tensors {
        reader.text();
        assert_eq!(reader.u32(), 2);
        reader.take(2 * 8 + 4 + 8);
    }
    let data = &bytes[reader.at.next_multiple_of(32)..];
    (pairs, num_tensors, crc(&bytes[begin..reader.at]), crc(data))
}

#[test]
fn adapters_in_gguf_are_those_of_llama_cpp() {
    let digests = fs::read(golden("gguf.json")).unwrap();
    let digests: BTreeMap<String, Option<Digests>> = serde_json::from_slice(&digests).unwrap();
    let models = families().models;
    assert!(digests.keys().eq(models.keys()));
    let place = tempfile::tempdir().unwrap();
    for (name, theirs) in &digests {
        let folder = golden(&format!("families/{name}"));
        let case = folder.join(models[name].cases.keys().next().unwrap());
        let model = model_with(&case.join("config.v5.json"), &folder.join("model.safetensors"));
        let spec = ModelSpec::load(model.path()).unwrap();
        let adapter = adapter::load(&folder.join("adapter"), &spec).unwrap();
        let export = |kind| Export::new(&adapter, &spec, name, kind);
        let Some(theirs) = theirs else {
            let error = export(Type::F32).map(|_| ()).expect_err(name).to_string();
            let family = &models[name].family;
            assert!(error.contains(&format!("makes no adapter of the family {family}; allowed: llama, ")), "{error}");
            continue;
        };
        let written = |kind| {
            let path = place.path().join("adapter.gguf");
            export(kind).unwrap().write(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len() as usize, export(kind).unwrap().bytes());
            read(&path)
        };
        let (mut metadata, tensors, infos, data) = written(Type::F32);
        assert_eq!(metadata.shift_remove("general.name"), Some(name.as_str().into()));
        let ours = Digests { metadata, tensors, infos, data, f16: written(Type::F16).3 };
        assert_eq!(ours, *theirs, "{name}");
        assert_ne!(written(Type::Bf16).3, ours.f16, "{name}");
    }
}

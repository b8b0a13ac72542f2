//! Writes GGUF, version 3: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! All numbers are little-endian. A file is: the bytes `GGUF`, the version, the number of tensors, the number of pairs,
//! the pairs, a description of each tensor, and the data, in which every tensor begins at a multiple of [`ALIGNMENT`].

use std::io::{self, Write};

const VERSION: u32 = 3;
/// Alignment of the data in a file whose pairs give no other.
const ALIGNMENT: usize = 32;

/// A value of a pair.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
    String(String),
}

/// Type of the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    F32,
    F16,
    Bf16,
}

impl Type {
    /// Number of the type in `ggml_type`.
    fn number(self) -> u32 {
        match self {
            Type::F32 => 0,
            Type::F16 => 1,
            Type::Bf16 => 30,
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Type::F32 => 4,
            Type::F16 | Type::Bf16 => 2,
        }
    }
}

/// The description of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    pub name: String,
    /// `[rows, columns]`, in row-major order.
    pub shape: [usize; 2],
    pub kind: Type,
}

impl Info {
    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.shape[0] * self.shape[1] * self.kind.bytes()
    }
}

/// Returns everything before the data.
pub fn header(pairs: &[(&str, Value)], infos: &[Info]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((infos.len() as u64).to_le_bytes());
    out.extend((pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        add_string(&mut out, key);
        // The number of the type comes first.
        match value {
            Value::U32(number) => out.extend([4u32, *number].map(u32::to_le_bytes).as_flattened()),
            Value::F32(number) => out.extend([6u32, number.to_bits()].map(u32::to_le_bytes).as_flattened()),
            Value::String(text) => {
                out.extend(8u32.to_le_bytes());
                add_string(&mut out, text);
            }
        }
    }
    let mut offset = 0;
    for info in infos {
        add_string(&mut out, &info.name);
        out.extend((info.shape.len() as u32).to_le_bytes());
        // Dimensions go from the innermost to the outermost.
        info.shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
        out.extend(info.kind.number().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += info.bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

fn add_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes the bytes of a tensor, and zeros up to the place of the next one.
pub fn write_data(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.write_all(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])
}

/// Number of bytes of a file with this header and these tensors.
pub fn file_bytes<'a>(header: &[u8], infos: impl IntoIterator<Item = &'a Info>) -> usize {
    header.len() + infos.into_iter().map(|info| info.bytes().next_multiple_of(ALIGNMENT)).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_in_their_places() {
        let pairs = [("a", Value::U32(2)), ("bc", Value::F32(1.0)), ("d", Value::String("ä".into()))];
        let infos = [
            Info { name: "w".into(), shape: [3, 5], kind: Type::F32 },
            Info { name: "v".into(), shape: [1, 2], kind: Type::Bf16 },
        ];
        let out = header(&pairs, &infos);
        let mut expected = b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0".to_vec();
        expected.extend(b"\x01\0\0\0\0\0\0\0a\x04\0\0\0\x02\0\0\0");
        expected.extend(b"\x02\0\0\0\0\0\0\0bc\x06\0\0\0\0\0\x80\x3f");
        expected.extend(b"\x01\0\0\0\0\0\0\0d\x08\0\0\0\x02\0\0\0\0\0\0\0\xc3\xa4");
        expected.extend(b"\x01\0\0\0\0\0\0\0w\x02\0\0\0\x05\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        // 60 bytes of data come before, and are filled up to 64.
        expected
            .extend(b"\x01\0\0\0\0\0\0\0v\x02\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x1e\0\0\0\x40\0\0\0\0\0\0\0");
        assert_eq!(&out[..expected.len()], expected);
        assert!(
            out[expected.len()..].iter().all(|&byte| byte == 0) && out.len() == expected.len().next_multiple_of(32)
        );
        assert_eq!(file_bytes(&out, &infos), out.len() + 96);
        let mut data = Vec::new();
        write_data(&mut data, &[1; 33]).unwrap();
        write_data(&mut data, &[2; 32]).unwrap();
        assert_eq!((data.len(), data[32], data[33], data[64]), (96, 1, 0, 2));
    }
}

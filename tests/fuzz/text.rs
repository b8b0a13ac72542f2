//! Changes of bytes that know nothing of their form beyond words and numbers.

use std::ops::Range;

use fastrand::Rng;

/// Longest input that a change may make, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// Pieces that readers of text stumble over.
const ODD: [&[u8]; 22] = [
    b"\0",
    b"\\u0000",
    b"\\ud800",
    b"\xff",
    b"\xef\xbb\xbf",
    "\u{202e}".as_bytes(),
    "\u{1b}[2J".as_bytes(),
    "\u{fdd0}".as_bytes(),
    "\u{fdd2}1".as_bytes(),
    "e\u{301}".as_bytes(),
    "ß".as_bytes(),
    "𝒳".as_bytes(),
    b"{}",
    b"[]",
    b"null",
    b"\"",
    b"\n",
    b"\r\n",
    b" ",
    b",",
    b":",
    b"../",
];

/// Numbers at the ends of types, and some that no type holds.
pub const NUMBERS: [&str; 24] = [
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "3",
    "63",
    "255",
    "256",
    "65536",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "340282366920938463463374607431768211456",
    "0.5",
    "1e-46",
    "3.5e38",
    "1e308",
    "1e400",
];

/// Returns a range of up to `max` bytes.
fn range(rng: &mut Rng, len: usize, max: usize) -> Range<usize> {
    let begin = rng.usize(0..=len);
    begin..begin + rng.usize(0..=max.min(len - begin))
}

/// Returns the place of a number that is written out, if there is one.
fn number(rng: &mut Rng, text: &[u8]) -> Option<Range<usize>> {
    let from = rng.usize(0..=text.len());
    let begin = from + text[from..].iter().position(u8::is_ascii_digit)?;
    let len = text[begin..].iter().position(|b| !b"+-.eE0123456789".contains(b)).unwrap_or(text.len() - begin);
    Some(begin..begin + len)
}

/// Changes one place of the text. `words` are of the language of the text, `other` is another input.
pub fn change(rng: &mut Rng, text: &mut Vec<u8>, words: &[Vec<u8>], other: &[u8]) {
    let at = rng.usize(0..=text.len());
    match rng.u32(0..12) {
        0 if at < text.len() => text[at] ^= 1 << rng.u32(0..8),
        1 if at < text.len() => text[at] = rng.u8(..),
        2 => drop(text.drain(range(rng, text.len(), 16))),
        3 => drop(text.drain(range(rng, text.len(), 1 << 12))),
        4 => {
            let piece = text[range(rng, text.len(), 64)].to_vec();
            text.splice(at..at, piece);
        }
        // Nesting and length: a short piece many times.
        5 => {
            let piece = text[range(rng, text.len(), 8)].to_vec();
            let most = if rng.u32(0..20) == 0 { 17 } else { 8 };
            let times = 1 << rng.u32(0..most);
            text.splice(at..at, piece.repeat(times));
        }
        6 | 7 if !words.is_empty() => {
            let word = &words[rng.usize(0..words.len())];
            let end = if rng.bool() { at } else { (at + word.len()).min(text.len()) };
            text.splice(at..end, word.iter().copied());
        }
        8 => {
            let new = NUMBERS[rng.usize(0..NUMBERS.len())].bytes();
            let place = number(rng, text).unwrap_or(at..at);
            text.splice(place, new);
        }
        9 => {
            let odd = ODD[rng.usize(0..ODD.len())];
            text.splice(at..at, odd.iter().copied());
        }
        10 => {
            let piece = other[range(rng, other.len(), 256)].to_vec();
            let place = range(rng, text.len(), 256);
            text.splice(place, piece);
        }
        _ => {
            text.truncate(at);
            text.extend_from_slice(&other[rng.usize(0..=other.len())..]);
        }
    }
    text.truncate(MAX_BYTES);
}

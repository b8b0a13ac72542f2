//! Lines on standard error.

use std::io::Write;

/// Writes a line in one call: the launcher mixes what ranks write, and must not get half a line.
pub fn line(text: &str) {
    // Nothing can be done when standard error is closed.
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

//! Writes lines to standard error.

use std::io::Write;

use crate::files::escaped;
use crate::progress;

/// Longest text of one line's write, in bytes; a recipe's list of errors fits.
const MAX_BYTES: usize = 16 << 10;

/// Writes a line in one call, because the launcher mixes what ranks write and must not get half a line. Text that
/// came from a file can neither move the cursor nor fill the screen.
pub fn line(text: &str) {
    unchanged_line(&harmless(text));
}

/// Writes a line in one call like [`line()`], but neither escapes nor cuts it.
pub fn unchanged_line(text: &str) {
    progress::aside(|| {
        // If standard error is closed, there is nowhere to report it.
        let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
    });
}

/// Returns the text with control characters except newlines escaped, cut to 16 KiB.
pub fn harmless(text: &str) -> String {
    let end = (0..=MAX_BYTES.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let lines: Vec<_> = text[..end].split('\n').map(escaped).collect();
    let rest = match text.len() - end {
        0 => String::new(),
        rest => format!("… ({rest} more bytes)"),
    };
    lines.join("\n") + &rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_or_fills_the_screen() {
        assert_eq!(harmless("line\n  naïve 日本 🦊"), "line\n  naïve 日本 🦊");
        assert_eq!(harmless("a\u{1b}[2Jb\rc\0\u{9b}\u{202e}"), r"a\u{1b}[2Jb\rc\u{0}\u{9b}\u{202e}");
        let long = harmless(&("x".to_string() + &"é".repeat(MAX_BYTES)));
        assert!(
            long.ends_with("é… (16386 more bytes)") && long.len() < MAX_BYTES + 100,
            "{}",
            &long[long.len() - 40..]
        );
    }
}

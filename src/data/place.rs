//! The place of a row in its file, for messages.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The place of a row: `file:line`, or `file, row n` in a file whose rows are not lines.
#[derive(Clone, Debug)]
pub struct Place {
    file: Arc<PathBuf>,
    /// Number of a line or of a row, counted from 1.
    number: usize,
    is_line: bool,
}

impl Place {
    pub fn line(file: &Arc<PathBuf>, number: usize) -> Place {
        Place { file: file.clone(), number, is_line: true }
    }

    pub fn row(file: &Arc<PathBuf>, number: usize) -> Place {
        Place { file: file.clone(), number, is_line: false }
    }

    /// Number of the line or row.
    pub fn number(&self) -> usize {
        self.number
    }

    pub fn is_line(&self) -> bool {
        self.is_line
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let file: &Path = &self.file;
        match self.is_line {
            true => write!(f, "{}:{}", file.display(), self.number),
            false => write!(f, "{}, row {}", file.display(), self.number),
        }
    }
}

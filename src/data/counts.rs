//! Counts of what has become of rows, and the places of some of them.

use std::fmt;

use serde::{Serialize, Serializer};

use super::place::Place;

/// Counts of what happened to the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub rows: usize,
    /// Documents over max_length, with `overlong: truncate`.
    pub truncated: usize,
    /// Documents over max_length, with `overlong: split`.
    pub split: usize,
    /// Documents over max_length, with `overlong: drop`.
    pub dropped: usize,
    /// Documents of fewer than two tokens, or with none that counts in the loss.
    pub without_target: usize,
    pub sequences: usize,
    pub tokens: usize,
    pub target_tokens: usize,
    pub max_length: usize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{} rows, {} sequences, {} tokens, {} of them targets",
            self.rows, self.sequences, self.tokens, self.target_tokens
        )?;
        let limit = self.max_length;
        for (n, what) in [
            (self.truncated, format!("truncated to {limit} tokens")),
            (self.split, format!("over {limit} tokens and split")),
            (self.dropped, format!("over {limit} tokens and dropped")),
            (self.without_target, "dropped because no token of them counts in the loss".into()),
        ] {
            if n > 0 {
                write!(f, "; {n} {what}")?;
            }
        }
        Ok(())
    }
}

/// Rows, or messages in rows, that all have a property: how many, and where the first ones are.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pub rows: usize,
    first: Vec<String>,
}

/// Serializes the first places.
impl Serialize for Places {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.first.serialize(serializer)
    }
}

impl Places {
    const SHOWN: usize = 5;

    pub fn add(&mut self, place: &Place) {
        self.rows += 1;
        if self.rows <= Places::SHOWN {
            self.first.push(place.to_string());
        }
    }
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}{}", self.first.join(", "), if self.rows > Places::SHOWN { ", …" } else { "" })
    }
}

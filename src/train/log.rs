//! Tells people what a run does, from rank 0.

use std::time::Duration;

/// Speaks on rank 0 and is silent elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Log {
    pub enabled: bool,
}

impl Log {
    /// Tells what goes on.
    pub fn line(&self, text: impl AsRef<str>) {
        if self.enabled {
            tracing::info!("{}", text.as_ref());
        }
    }

    /// Tells what the user should know even if the run is to be quiet.
    pub fn warn(&self, text: impl AsRef<str>) {
        if self.enabled {
            tracing::warn!("{}", text.as_ref());
        }
    }
}

pub use crate::plan::memory::text as bytes;

/// Returns a duration as `1h02m`, `3m07s` or `12s`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_people() {
        assert_eq!((bytes(12).as_str(), bytes(1536).as_str()), ("12 B", "1.5 KiB"));
        assert_eq!(duration(Duration::from_secs(3725)), "1h02m");
        assert_eq!(duration(Duration::from_secs(187)), "3m07s");
    }
}

//! The longest times that a rank waits for others.

use std::time::Duration;

use anyhow::{Context, Result};

/// Limit of a wait during which no rank makes progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Limit of steps that all ranks reach at once: MPI_Init and the first collectives of NCCL.
    Start,
    /// Limit of everything else.
    Any,
}

#[derive(Clone, Copy)]
pub(super) struct Limits {
    start: Duration,
    any: Duration,
}

const LIMIT_VARIABLE: &str = "FSDP_QLORA_TIMEOUT_S";
const START_LIMIT_VARIABLE: &str = "FSDP_QLORA_START_TIMEOUT_S";
const LIMIT: Duration = Duration::from_secs(1800);
const START_LIMIT: Duration = Duration::from_secs(120);

impl Limits {
    /// `$FSDP_QLORA_TIMEOUT_S`, else half an hour; `$FSDP_QLORA_START_TIMEOUT_S`, else two minutes or the former where that is less.
    pub fn from_environment() -> Result<Limits> {
        let seconds = |name: &str, default: Duration| -> Result<Duration> {
            let Ok(text) = std::env::var(name) else { return Ok(default) };
            let seconds = text.parse().ok().filter(|&seconds: &u64| seconds > 0);
            seconds.map(Duration::from_secs).with_context(|| format!("{name} is {text:?}, allowed: seconds, 1 or more"))
        };
        let any = seconds(LIMIT_VARIABLE, LIMIT)?;
        Ok(Limits { start: seconds(START_LIMIT_VARIABLE, START_LIMIT.min(any))?, any })
    }

    pub fn of(&self, limit: Limit) -> (Duration, &'static str) {
        match limit {
            Limit::Start => (self.start, START_LIMIT_VARIABLE),
            Limit::Any => (self.any, LIMIT_VARIABLE),
        }
    }
}

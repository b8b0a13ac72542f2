//! Writes a step as a file for <https://ui.perfetto.dev> or chrome://tracing, with one row per queue.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use crate::comm::spans::{Lane, Span};

/// Writes spans in the JSON format of Chrome's trace viewer ("Trace Event Format", Google 2016); times in
/// microseconds.
pub fn write(path: &Path, spans: &[Span]) -> Result<()> {
    let lanes = [Lane::Compute, Lane::Communication, Lane::Fetch, Lane::Put];
    let mut events: Vec<serde_json::Value> = lanes
        .iter()
        .map(|lane| {
            let name = format!("{lane:?}").to_lowercase();
            json!({"ph": "M", "name": "thread_name", "pid": 0, "tid": *lane as usize, "args": {"name": name}})
        })
        .collect();
    events.extend(spans.iter().map(|span| {
        let (begin, duration) = (span.begin * 1e6, (span.end - span.begin) * 1e6);
        json!({"ph": "X", "name": span.name, "pid": 0, "tid": span.lane as usize, "ts": begin, "dur": duration})
    }));
    let text = json!({"traceEvents": events, "displayTimeUnit": "ms"}).to_string();
    std::fs::write(path, text).with_context(|| format!("{}: cannot be written", path.display()))
}

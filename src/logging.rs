//! Writes events of `tracing` to standard error, as lines for people or as JSON.

use std::fmt::{self, Debug};
use std::io;
use std::sync::OnceLock;

use clap::ValueEnum;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::stderr;

/// The form of events on standard error. The comments of the variants are the help of the option.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// An object on each line: level, rank, message, and more fields where there are some
    Json,
}

impl LogFormat {
    /// Returns the form that the command line asks for, even if the rest of it cannot be parsed.
    pub fn asked_for() -> LogFormat {
        let words: Vec<_> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        let is_json = words.iter().any(|word| word == "--log-format=json")
            || words.windows(2).any(|pair| pair == ["--log-format", "json"]);
        if is_json { LogFormat::Json } else { LogFormat::Text }
    }
}

/// Installs the subscriber of this process. `quiet` leaves out everything but warnings and errors.
pub fn install(rank: usize, format: LogFormat, quiet: bool) {
    let level = if quiet { Level::WARN } else { Level::INFO };
    let subscriber = tracing_subscriber::fmt().with_max_level(level).with_writer(move || Lines(format));
    INSTALLED.get_or_init(|| (rank, format));
    // A second call, from a test of this crate, changes nothing.
    let _ = tracing::subscriber::set_global_default(subscriber.event_format(Form { rank, format }).finish());
}

/// The rank and the form of this process's events.
static INSTALLED: OnceLock<(usize, LogFormat)> = OnceLock::new();

/// Tells whether the events of this process are JSON.
pub fn is_json() -> bool {
    matches!(INSTALLED.get(), Some((_, LogFormat::Json)))
}

/// Writes the error that ends the run. `prefix` names the rank where there are several.
pub fn error(prefix: &str, message: &str) {
    match INSTALLED.get() {
        Some((rank, LogFormat::Json)) => {
            stderr::unchanged_line(&json_line(Level::ERROR, *rank, message, Map::new()));
        }
        _ => stderr::line(&format!("{prefix}{message}")),
    }
}

/// Returns an event as a line of JSON. Its message is escaped and cut before it is encoded, so that the line stays JSON.
fn json_line(level: Level, rank: usize, message: &str, others: Map<String, Value>) -> String {
    let mut object = Map::new();
    object.insert("level".into(), level.as_str().to_lowercase().into());
    object.insert("rank".into(), rank.into());
    object.insert("message".into(), stderr::harmless(message).into());
    object.extend(others);
    Value::Object(object).to_string()
}

/// Writes an event in the form of this process.
struct Form {
    rank: usize,
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for Form
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        match self.format {
            LogFormat::Json => {
                let level = *event.metadata().level();
                write!(writer, "{}", json_line(level, self.rank, &fields.message, fields.others))
            }
            // Rank 0 speaks for all.
            LogFormat::Text if self.rank == 0 => write!(writer, "{}", fields.message),
            LogFormat::Text => write!(writer, "rank {}: {}", self.rank, fields.message),
        }
    }
}

/// The fields of an event.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn take(&mut self, field: &Field, value: Value) {
        self.others.insert(field.name().into(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            _ => self.take(field, format!("{value:?}").into()),
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.take(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.take(field, value.into());
    }
}

/// Standard error, which gets an event of this form at a time.
struct Lines(LogFormat);

impl io::Write for Lines {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        match self.0 {
            LogFormat::Text => stderr::line(&text),
            LogFormat::Json => stderr::unchanged_line(&text),
        }
        Ok(event.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_stays_json() {
        let long = "\"".repeat(20_000);
        let line = json_line(Level::WARN, 1, &format!("\u{202e}\n{long}"), Map::new());
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&event["level"], &event["rank"]), (&"warn".into(), &1.into()));
        let message = event["message"].as_str().unwrap();
        assert!(message.starts_with("\\u{202e}\n\"") && message.ends_with(" more bytes)"), "{message:.40}");
    }
}

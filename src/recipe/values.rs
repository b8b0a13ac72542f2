//! Reads the values of keys. Each function returns `None` for a value that is not allowed.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::SignedDuration;
use serde_json::{Map, Value};

use super::job::WrittenEval;
use super::keys::MAX_STEPS_OF_A_RUN;
use super::paths;
use super::sources::WrittenSources;
use super::steps::Warmup;
use crate::checkpoint::output::Resume;
use crate::model::spec::ModuleId;
use crate::model::targets::{MAX_RANK, Modules};

/// Largest integer of keys without a smaller limit. f64 holds every integer up to it exactly, however it is written.
pub(super) const MAX_INTEGER: usize = 1 << 53;

/// The longest duration: ten years.
const MAX_SECONDS: f64 = 10.0 * 365.0 * 86_400.0;

/// Reads a string, or a boolean as the text that it would be: `true` is a choice of data.packing.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

pub(super) fn nullable<T>(value: &Value, read: fn(&Value) -> Option<T>) -> Option<Option<T>> {
    if value.is_null() { Some(None) } else { read(value).map(Some) }
}

pub(super) fn choice<T: FromStr>(value: &Value) -> Option<T> {
    text(value)?.parse().ok()
}

/// Reads the only word that a key allows.
pub(super) fn only(value: &Value, word: &'static str) -> Option<&'static str> {
    (value.as_str()? == word).then_some(word)
}

/// Reads a number, which may be quoted: some tools quote `1e-4`, which YAML 1.1 readers would take for a word.
pub(super) fn number(value: &Value) -> Option<f64> {
    let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
    // The arithmetic is in f32.
    number.filter(|&x| (x as f32).is_finite())
}

/// Reads a number that is above 0, also in f32.
pub(super) fn positive(value: &Value) -> Option<f64> {
    number(value).filter(|&x| x as f32 > 0.0)
}

pub(super) fn not_negative(value: &Value) -> Option<f64> {
    number(value).filter(|&x| x >= 0.0)
}

/// Reads an integer in a range, which may be written as `1e3` or `1000.0`.
pub(super) fn integer(value: &Value, range: RangeInclusive<usize>) -> Option<usize> {
    let number = number(value).filter(|x| x.fract() == 0.0 && (0.0..=MAX_INTEGER as f64).contains(x))?;
    Some(number as usize).filter(|n| range.contains(n))
}

/// Reads an integer of at least 1.
pub(super) fn count(value: &Value) -> Option<usize> {
    integer(value, 1..=MAX_INTEGER)
}

/// Reads a number from 0 to below 1, also in f32.
pub(super) fn below_1(value: &Value) -> Option<f64> {
    number(value).filter(|&x| x >= 0.0 && (x as f32) < 1.0)
}

/// Reads a mapping; `null` is an empty one.
pub(super) fn mapping(value: &Value) -> Option<Map<String, Value>> {
    if value.is_null() { Some(Map::new()) } else { value.as_object().cloned() }
}

/// Reads PEFT's r.
pub(super) fn rank(value: &Value) -> Option<usize> {
    integer(value, 1..=MAX_RANK)
}

/// Reads modules as PEFT names them. The name of one alone, which as an expression would match nothing, is a list of it.
pub(super) fn targets(value: &Value) -> Option<Modules> {
    Modules::read(&listed(value))
}

/// Reads modules to exclude, as [`targets`].
pub(super) fn excluded(value: &Value) -> Option<Modules> {
    Modules::read_excluded(&listed(value))
}

fn listed(value: &Value) -> Value {
    match value.as_str().and_then(ModuleId::from_name) {
        Some(id) => Value::from(vec![id.name()]),
        None => value.clone(),
    }
}

/// Reads a number of steps, or a fraction of all steps.
pub(super) fn warmup(value: &Value) -> Option<Warmup> {
    match number(value) {
        Some(ratio) if 0.0 < ratio && ratio < 1.0 => Some(Warmup::Ratio(ratio)),
        _ => integer(value, 0..=MAX_STEPS_OF_A_RUN).map(Warmup::Steps),
    }
}

pub(super) fn auto_or<T>(value: &Value, read: fn(&Value) -> Option<T>) -> Option<Option<T>> {
    if value.as_str() == Some("auto") { Some(None) } else { read(value).map(Some) }
}

pub(super) fn auto_or_bool(value: &Value) -> Option<Option<bool>> {
    auto_or(value, Value::as_bool)
}

/// Reads a number of bytes: a number with a unit of 1024 (KiB, MiB, GiB, TiB) or of 1000 (KB, MB, GB, TB), or a plain
/// number of bytes.
pub(super) fn size(value: &Value) -> Option<usize> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    let bytes = match value.as_str() {
        None => number(value)?,
        Some(text) => {
            let (text, unit) = UNITS
                .iter()
                .find_map(|(name, unit)| Some((text.trim().strip_suffix(name)?, *unit)))
                .unwrap_or((text, 1.0));
            text.trim().parse::<f64>().ok()? * unit
        }
    };
    (1.0..9e15).contains(&bytes).then_some(bytes as usize)
}

/// Reads a number of bytes as a key of a recipe has it, e.g. `5GB`. The error says what is allowed.
pub fn read_size(text: &str) -> Result<usize, String> {
    size(&Value::String(text.into())).ok_or("allowed: a size, e.g. 5GB".into())
}

/// Reads a duration: a number of seconds, or a text such as `3h50m`, `10s` or `03:50:00`.
pub(super) fn seconds(value: &Value) -> Option<f64> {
    let seconds = match number(value) {
        Some(seconds) => seconds,
        None => value.as_str()?.trim().parse::<SignedDuration>().ok()?.as_secs_f64(),
    };
    (-MAX_SECONDS..=MAX_SECONDS).contains(&seconds).then_some(seconds)
}

pub(super) fn path(value: &Value) -> Option<PathBuf> {
    paths::read(value.as_str()?).ok()
}

/// Says why a value is not a path; `None` if it is one.
pub(super) fn why_no_path(value: &Value) -> Option<String> {
    match value {
        Value::Array(list) => list.iter().find_map(why_no_path),
        Value::Object(keys) => why_no_path(keys.get("path")?),
        value => paths::read(value.as_str()?).err(),
    }
}

/// Says why a scheduler that transformers has is not available here; `None` if the value is not the name of one.
pub(super) fn why_no_scheduler(value: &Value) -> Option<String> {
    let name = value.as_str().filter(|name| ["reduce_lr_on_plateau", "greedy"].contains(name))?;
    Some(format!("{name} follows the losses, and the learning rates of a run are decided before its first step"))
}

/// Reads a metric by either of the names that transformers has for it.
pub(super) fn metric(value: &Value) -> Option<&'static str> {
    only(value, "eval_loss").or(only(value, "loss").map(|_| "eval_loss"))
}

pub(super) fn resume(value: &Value) -> Option<Resume> {
    match value.as_str()? {
        "auto" => Some(Resume::Auto),
        "never" => Some(Resume::Never),
        _ => path(value).map(Resume::From),
    }
}

pub(super) fn eval_data(value: &Value) -> Option<WrittenEval> {
    match number(value) {
        Some(fraction) => (0.0 < fraction && fraction < 1.0).then_some(WrittenEval::Fraction(fraction)),
        None => WrittenSources::read(value).map(WrittenEval::Sources),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_read_in_every_spelling() {
        assert_eq!(number(&json!("1e-4")), Some(1e-4));
        assert_eq!(number(&json!(3)), Some(3.0));
        assert_eq!([json!("inf"), json!("NaN"), json!("x"), json!(true), json!(null)].map(|v| number(&v)), [None; 5]);
        assert_eq!(integer(&json!("1e3"), 1..=1000), Some(1000));
        assert_eq!([json!(1.5), json!(-1), json!(0), json!(1e300)].map(|v| integer(&v, 1..=9)), [None; 4]);
    }

    #[test]
    fn a_warmup_is_steps_or_a_fraction() {
        assert_eq!(
            [json!(0), json!(3), json!("1e2"), json!(0.25), json!("0.5")].map(|v| warmup(&v)),
            [Warmup::Steps(0), Warmup::Steps(3), Warmup::Steps(100), Warmup::Ratio(0.25), Warmup::Ratio(0.5)].map(Some)
        );
        assert_eq!([json!(1.5), json!(-0.5), json!(-1), json!("x")].map(|v| warmup(&v)), [const { None }; 4]);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size(&json!("22GiB")), Some(22 << 30));
        assert_eq!([json!("1.5 MB"), json!("512B"), json!(7)].map(|v| size(&v)), [Some(1_500_000), Some(512), Some(7)]);
        assert_eq!([json!("GiB"), json!("-1GiB"), json!("22 G"), json!(0), json!(true)].map(|v| size(&v)), [None; 5]);
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(
            [json!("3h50m"), json!("10s"), json!("1h 30m"), json!(7), json!("0.5")].map(|v| seconds(&v)),
            [Some(13_800.0), Some(10.0), Some(5_400.0), Some(7.0), Some(0.5)]
        );
        assert_eq!(seconds(&json!("03:50:00")), Some(13_800.0));
        assert_eq!(
            [json!("soon"), json!("3x"), json!(true), json!("1e300"), json!("99999999h")].map(|v| seconds(&v)),
            [None; 5]
        );
    }

    #[test]
    fn eval_is_a_file_or_a_fraction() {
        assert_eq!(eval_data(&json!(0.1)), Some(WrittenEval::Fraction(0.1)));
        assert!(matches!(eval_data(&json!("e.jsonl")), Some(WrittenEval::Sources(_))));
        assert_eq!([json!(0), json!(1), json!(-0.5), json!("")].map(|v| eval_data(&v)), [const { None }; 4]);
    }
}

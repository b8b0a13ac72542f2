//! Values as Python has them, for chat templates: integers of any length, floats by `repr`, `json.dumps`, `strftime`.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::Arc;

use anyhow::ensure;
use jiff::Zoned;
use minijinja::value::{Kwargs, Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Begins a string that stands for an integer of more than 64 bits: serde_json would make a float of it. It is a
/// noncharacter of Unicode, which messages must not hold.
pub const LONG_INTEGER: char = '\u{FDD2}';

/// Levels of lists and objects that `tojson` writes; Python's limit is close to it.
const MAX_DEPTH: usize = 900;

/// The line of a JSON file with each integer that no 64 bits hold as a string behind [`LONG_INTEGER`], for
/// [`from_json`]. Python reads `-0` as the integer 0. Errors: the line holds that character already.
pub fn keep_long_integers(line: &[u8]) -> anyhow::Result<Cow<'_, [u8]>> {
    let is_mark = |rest: &[u8]| {
        rest.starts_with("\u{FDD2}".as_bytes()) || rest.get(..6).is_some_and(|r| r.eq_ignore_ascii_case(br"\ufdd2"))
    };
    let mut out: Option<Vec<u8>> = None;
    let (mut at, mut copied, mut in_string) = (0, 0, false);
    while at < line.len() {
        let byte = line[at];
        if in_string || !(byte == b'-' || byte.is_ascii_digit()) {
            ensure!(
                !(matches!(byte, b'\\' | 0xef) && is_mark(&line[at..])),
                "found U+FDD2; allowed: characters of Unicode (it is a noncharacter, which marks long integers here)"
            );
            in_string ^= byte == b'"';
            at += if in_string && byte == b'\\' { 2 } else { 1 };
            continue;
        }
        let rest = &line[at..];
        let len = rest.iter().position(|b| !b"+-.eE0123456789".contains(b)).unwrap_or(rest.len());
        let number = &rest[..len];
        if is_long(number) {
            let out = out.get_or_insert_default();
            out.extend_from_slice(&line[copied..at]);
            out.extend_from_slice(format!("\"{LONG_INTEGER}").as_bytes());
            out.extend_from_slice(if number == b"-0" { b"0" } else { number });
            out.push(b'"');
            copied = at + len;
        }
        at += len;
    }
    Ok(match out {
        None => Cow::Borrowed(line),
        Some(mut out) => {
            out.extend_from_slice(&line[copied..]);
            Cow::Owned(out)
        }
    })
}

/// Returns true if these bytes are an integer, by JSON's rules, that neither `i64` nor `u64` holds.
fn is_long(number: &[u8]) -> bool {
    let digits = number.strip_prefix(b"-").unwrap_or(number);
    let is_integer =
        !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) && (digits.len() == 1 || digits[0] != b'0');
    let text = std::str::from_utf8(number).unwrap_or_default();
    is_integer && (number == b"-0" || (text.parse::<i64>().is_err() && text.parse::<u64>().is_err()))
}

/// A number that minijinja cannot hold, or that it would not print as Python does: `1e-07`, `1e+20`, an integer of
/// 200 bits.
#[derive(Debug)]
struct Number {
    text: String,
    is_integer: bool,
}

impl Object for Number {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// A value of JSON, read after [`keep_long_integers`], as a template sees it.
pub fn from_json(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let number = |text: String, is_integer| Value::from_object(Number { text, is_integer });
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (_, _, Some(n)) if Value::from(n).to_string() == repr(n) => Value::from(n),
            (_, _, n) => number(n.map_or_else(String::new, repr), false),
        },
        Json::String(text) => match text.strip_prefix(LONG_INTEGER) {
            None => Value::from(text.as_str()),
            Some(digits) => digits.parse::<i128>().map_or_else(|_| number(digits.into(), true), Value::from),
        },
        Json::Array(items) => items.iter().map(from_json).collect(),
        Json::Object(items) => Value::from_pairs(items.iter().map(|(key, value)| (key.clone(), from_json(value)))),
    }
}

/// The tests `number`, `integer` and `float` of Jinja: integers, floats or both.
pub fn is_number(value: &Value, integers: bool, floats: bool) -> bool {
    match value.downcast_object_ref::<Number>() {
        Some(number) => {
            if number.is_integer {
                integers
            } else {
                floats
            }
        }
        None => value.is_number() && if value.is_integer() { integers } else { floats },
    }
}

/// Python's `str()`; minijinja prints all other values than floats as Python does.
pub fn str(value: &Value) -> String {
    match float(value) {
        Some(x) => repr(x),
        None => value.to_string(),
    }
}

fn float(value: &Value) -> Option<f64> {
    if value.is_number() && !value.is_integer() { f64::try_from(value.clone()).ok() } else { None }
}

/// Python's `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
pub fn repr(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// Arguments of `json.dumps`.
struct Dumps {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    out: String,
    max_bytes: usize,
}

/// The filter `tojson` of transformers: `json.dumps(value, ensure_ascii=False, indent=None, separators=None,
/// sort_keys=False)`.
pub fn to_json(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")?.filter(|v| !v.is_none()) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_string),
        Some(n) => Some(" ".repeat(i64::try_from(n)?.clamp(0, 1000) as usize)),
    };
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let [item_separator, key_separator] = match separators.as_deref() {
        None => [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_string),
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => return Err(invalid("tojson: separators are two strings".into())),
    };
    let mut dumps = Dumps {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item_separator,
        key_separator,
        out: String::new(),
        // Four bytes of JSON cost one fuel, as in minijinja's own filter.
        max_bytes: state.fuel_levels().map_or(usize::MAX, |(_, remaining)| remaining as usize * 4),
    };
    kwargs.assert_all_used()?;
    dumps.value(value, 0)?;
    state.consume_fuel(dumps.out.len() as u64 / 4)?;
    Ok(Value::from_safe_string(dumps.out))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

impl Dumps {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("tojson: a value of more than {MAX_DEPTH} levels")));
        }
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match float(value) {
                Some(x) if x.is_nan() => self.push("NaN"),
                Some(x) if x.is_infinite() => self.push(if x > 0.0 { "Infinity" } else { "-Infinity" }),
                Some(x) => self.push(&repr(x)),
                None => self.push(&value.to_string()),
            },
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items('[', ']', &items, depth, |dumps, item| dumps.value(item, depth + 1))
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    pairs.push((key_text(&key)?, item));
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.items('{', '}', &pairs, depth, |dumps, (key, item)| {
                    dumps.string(key)?;
                    dumps.push(&dumps.key_separator.clone())?;
                    dumps.value(item, depth + 1)
                })
            }
            _ => match value.downcast_object_ref::<Number>() {
                Some(number) => self.push(&number.text),
                None => {
                    Err(invalid(format!("tojson: found a value of kind {}, which JSON does not have", value.kind())))
                }
            },
        }
    }

    fn items<T>(
        &mut self,
        open: char,
        close: char,
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut Dumps, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |levels: usize| move |indent: &String| format!("\n{}", indent.repeat(levels));
        self.push(open.encode_utf8(&mut [0; 4]))?;
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.push(&self.item_separator.clone())?;
            }
            if let Some(line) = self.indent.as_ref().map(line(depth + 1)) {
                self.push(&line)?;
            }
            write(self, item)?;
        }
        if let Some(line) = self.indent.as_ref().filter(|_| !items.is_empty()).map(line(depth)) {
            self.push(&line)?;
        }
        self.push(close.encode_utf8(&mut [0; 4]))
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        let mut quoted = String::with_capacity(text.len() + 2);
        quoted.push('"');
        for c in text.chars() {
            match c {
                '"' => quoted += "\\\"",
                '\\' => quoted += "\\\\",
                '\n' => quoted += "\\n",
                '\r' => quoted += "\\r",
                '\t' => quoted += "\\t",
                '\u{8}' => quoted += "\\b",
                '\u{c}' => quoted += "\\f",
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(quoted, "\\u{unit:04x}").map_err(|e| invalid(e.to_string()))?;
                    }
                }
                c => quoted.push(c),
            }
        }
        quoted.push('"');
        self.push(&quoted)
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.out.len() + text.len() > self.max_bytes {
            return Err(Error::from(ErrorKind::OutOfFuel));
        }
        self.out += text;
        Ok(())
    }
}

/// A key of an object as `json.dumps` writes it, without quotes.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String | ValueKind::Number => Ok(str(key)),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(key.is_true().to_string()),
        kind => {
            Err(invalid(format!("tojson: found a key of kind {kind}; allowed: strings, numbers, booleans and None")))
        }
    }
}

/// `datetime.now().strftime(format)` in the C locale. The time is a naive one there: `%z` and `%Z` are empty.
pub fn strftime(format: &str, now: &Zoned) -> Result<String, Error> {
    let mut rewritten = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        let code = if c == '%' { chars.next() } else { None };
        match (c, code) {
            ('%', Some('c')) => rewritten += "%a %b %e %H:%M:%S %Y",
            ('%', Some('x' | 'D')) => rewritten += "%m/%d/%y",
            ('%', Some('X')) => rewritten += "%H:%M:%S",
            ('%', Some('r')) => rewritten += "%I:%M:%S %p",
            ('%', Some('f')) => rewritten += "%6f",
            ('%', Some('z' | 'Z')) => {}
            ('%', Some(code)) => rewritten.extend(['%', code]),
            ('%', None) => rewritten += "%%",
            (c, _) => rewritten.push(c),
        }
    }
    jiff::fmt::strtime::format(&rewritten, now).map_err(|e| invalid(format!("strftime_now({format:?}): {e}")))
}

/// Returns true if a text begins with the arguments of a call that are one literal, a format of days, months and years
/// for [`strftime`].
pub fn is_of_dates(text: &str) -> bool {
    let argument = text.strip_prefix('(').unwrap_or_default().trim_start();
    let Some(quote) = argument.chars().next().filter(|c| matches!(c, '"' | '\'')) else { return false };
    let Some((format, rest)) = argument[1..].split_once(quote) else { return false };
    let is_of_date = |code: &str| code.trim_start_matches('-').starts_with(|c| "aAbBdejmuwyY".contains(c));
    rest.trim_start().starts_with(')') && format.split('%').skip(1).all(is_of_date)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> serde_json::Value {
        serde_json::from_slice(&keep_long_integers(text.as_bytes()).unwrap()).unwrap()
    }

    /// The expected texts were printed by `repr` of Python 3.11.
    #[test]
    fn floats_are_repr() {
        for (x, expected) in [
            (1e-5, "1e-05"),
            (1e-7, "1e-07"),
            (0.0001, "0.0001"),
            (0.00012345, "0.00012345"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1e100, "1e+100"),
            (5e-324, "5e-324"),
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (-2.5e-10, "-2.5e-10"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(repr(x), expected);
        }
    }

    #[test]
    fn long_integers_are_kept_and_strings_left_alone() {
        let long = "12345678901234567890123";
        let row =
            parse(&format!(r#"{{"a": {long}, "b": -{long}, "c": "x {long} \" 1", "d": [18446744073709551615, -0]}}"#));
        assert_eq!(row["c"], format!("x {long} \" 1"));
        let value = from_json(&row);
        assert_eq!(value.get_attr("a").unwrap().to_string(), long);
        assert_eq!(value.get_attr("b").unwrap().to_string(), format!("-{long}"));
        assert_eq!(value.get_attr("d").unwrap().to_string(), "[18446744073709551615, 0]");
        let digits = "9".repeat(60);
        assert_eq!(from_json(&parse(&format!("[{digits}]"))).to_string(), format!("[{digits}]"));
        for plain in
            [r#"{"a": 1, "b": [1.5, -2e3, 0], "c": "\\", "d": 7}"#, "[1, 01]", "-", "12345678901234567890123.5"]
        {
            assert!(matches!(keep_long_integers(plain.as_bytes()).unwrap(), Cow::Borrowed(_)), "{plain}");
        }
        for text in ["[\"\u{FDD2}1\"]", r#"["\uFDD21"]"#] {
            assert!(keep_long_integers(text.as_bytes()).unwrap_err().to_string().contains("U+FDD2"), "{text}");
        }
    }

    #[test]
    fn numbers_are_numbers_to_tests() {
        let value = |text: &str| from_json(&parse(text));
        for (text, is_integer, is_float) in [
            ("1", true, false),
            ("1.5", false, true),
            ("1e-7", false, true),
            (&"9".repeat(60) as &str, true, false),
            ("\"1\"", false, false),
        ] {
            let value = value(text);
            let found = (is_number(&value, true, false), is_number(&value, false, true), is_number(&value, true, true));
            assert_eq!(found, (is_integer, is_float, is_integer || is_float), "{text}");
        }
        assert_eq!(from_json(&json!(null)).to_string(), "None");
    }

    /// The expected texts were printed by `datetime.strftime` of Python 3.11 in the C locale.
    #[test]
    fn time_is_formatted_as_in_python() {
        let now: Zoned = "2026-03-07T08:09:10.012345+01:00[+01:00]".parse().unwrap();
        for (format, expected) in [
            ("%d %b %Y", "07 Mar 2026"),
            ("%Y-%m-%d %H:%M:%S", "2026-03-07 08:09:10"),
            ("%A, %B %-d, %y", "Saturday, March 7, 26"),
            ("%c", "Sat Mar  7 08:09:10 2026"),
            ("%x %X %I %p %j", "03/07/26 08:09:10 08 AM 066"),
            ("%f", "012345"),
            ("[%z%Z]", "[]"),
            ("100%%", "100%"),
        ] {
            assert_eq!(strftime(format, &now).unwrap(), expected, "{format}");
        }
        assert!(strftime("%!", &now).unwrap_err().to_string().contains("strftime_now"));
    }
}

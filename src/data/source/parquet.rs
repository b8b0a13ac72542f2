//! Parquet files, record by record.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

use super::super::place::Place;
use super::lines::check_length;
use crate::files::shown;
use crate::guarded::guarded;

/// The records of a file.
pub struct Parquet {
    records: RowIter<'static>,
    path: Arc<PathBuf>,
    /// Number of rows that have been read.
    row: usize,
}

impl Parquet {
    pub fn new(file: File, path: Arc<PathBuf>) -> Result<Parquet> {
        let records = guarded("parquet", || Ok(RowIter::from_file_into(Box::new(SerializedFileReader::new(file)?))));
        Ok(Parquet { records: records.with_context(|| path.display().to_string())?, path, row: 0 })
    }

    /// Reads the next record as an object.
    pub fn next_object(&mut self) -> Result<Option<(Place, Map<String, Value>)>> {
        let place = Place::row(&self.path, self.row + 1);
        let record = guarded("parquet", || Ok(self.records.next().transpose()?));
        let Some(record) = record.with_context(|| place.to_string())? else { return Ok(None) };
        self.row += 1;
        check_length(record.get_column_iter().map(|(_, field)| length(field)).sum(), &place)?;
        let object = object(&record).with_context(|| place.to_string())?;
        Ok(Some((place, object)))
    }
}

fn object(record: &Row) -> Result<Map<String, Value>> {
    let field = |(name, field): (&String, &Field)| Ok((name.clone(), value(field).with_context(|| shown(name))?));
    record.get_column_iter().map(field).collect()
}

/// Returns the bytes of a field's texts, and one for each other value.
fn length(field: &Field) -> usize {
    match field {
        Field::Str(text) => text.len(),
        Field::Bytes(bytes) => bytes.len(),
        Field::Group(record) => record.get_column_iter().map(|(_, field)| length(field)).sum(),
        Field::ListInternal(list) => list.elements().iter().map(length).sum(),
        Field::MapInternal(map) => map.entries().iter().map(|(key, field)| length(key) + length(field)).sum(),
        _ => 1,
    }
}

/// Returns a field as JSON has it. Dates, times and decimals become text.
fn value(field: &Field) -> Result<Value> {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float16(x) => float(f64::from(*x)),
        Field::Float(x) => float(f64::from(*x)),
        Field::Double(x) => float(*x),
        Field::Str(text) => text.clone().into(),
        Field::Bytes(bytes) => {
            let text = std::str::from_utf8(bytes.data());
            text.context("bytes that are no UTF-8; allowed: strings, numbers, lists and objects")?.into()
        }
        Field::Group(record) => Value::Object(object(record)?),
        Field::ListInternal(list) => list.elements().iter().map(value).collect::<Result<_>>()?,
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| match key {
                Field::Str(name) => Ok((name.clone(), value(field)?)),
                other => bail!("found the key {}; allowed: a string", shown(&other.to_string())),
            };
            Value::Object(map.entries().iter().map(entry).collect::<Result<_>>()?)
        }
        other => Value::String(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::super::MAX_ROW_BYTES;
    use super::*;

    #[test]
    fn the_longest_row_is_bounded() {
        let schema = parse_message_type("message rows { required binary text (utf8); }").unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let mut writer = SerializedFileWriter::new(&mut file, Arc::new(schema), Arc::default()).unwrap();
        let mut rows = writer.next_row_group().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        let texts = [MAX_ROW_BYTES, MAX_ROW_BYTES + 1].map(|length| ByteArray::from("a".repeat(length).into_bytes()));
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        rows.close().unwrap();
        writer.close().unwrap();
        let mut read = Parquet::new(file, Arc::new("rows.parquet".into())).unwrap();
        assert!(read.next_object().unwrap().is_some());
        let error = format!("{:#}", read.next_object().unwrap_err());
        assert!(error.contains("rows.parquet, row 2: the row is longer than 4 MiB"), "{error}");
    }
}

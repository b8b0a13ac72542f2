use std::io::Write;

use super::super::row::{Alpaca, Content};
use super::*;

/// Reads the bytes as a file of this name.
fn read_as(name: &str, bytes: &[u8]) -> Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join(name);
    std::fs::write(&path, bytes)?;
    Rows::of(&Files::find(&[Source::new(path)])?).map(|row| Ok(row?.0)).collect()
}

fn read_bytes(bytes: &[u8]) -> Result<Vec<Row>> {
    read_as("rows.jsonl", bytes)
}

fn error_as(name: &str, bytes: &[u8]) -> String {
    format!("{:#}", read_as(name, bytes).unwrap_err())
}

fn error_of(bytes: &[u8]) -> String {
    error_as("rows.jsonl", bytes)
}

fn answers(rows: &[Row]) -> Vec<String> {
    rows.iter().map(Row::answer).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/rows").join(name)).unwrap()
}

#[test]
fn the_format_is_that_of_the_first_row() {
    let alpaca = Alpaca { instruction: "a".into(), output: "b".into(), ..Alpaca::default() };
    for (text, expected) in [
        (r#"{"text": "a"}"#, Content::Text("a".into())),
        (r#"{"instruction": "a", "input": null, "output": "b"}"#, Content::Alpaca(alpaca)),
    ] {
        assert_eq!(read_bytes(text.as_bytes()).unwrap()[0].content, expected);
    }
    let error = error_of(b"{\"text\": \"a\"}\n{\"instruction\": \"a\", \"output\": \"b\"}");
    assert!(error.contains("rows.jsonl:2: the column \"text\" is missing"), "{error}");
}

#[test]
fn errors_name_file_and_line() {
    let deep = "[".repeat(200);
    for (text, said) in [
        ("{\"text\": \"a\"}\n\n{\"text\": ", "rows.jsonl:3: not a JSON object: EOF while parsing a value, column 8"),
        (
            "[1]",
            "rows.jsonl:1: not a JSON object: invalid type: sequence, expected a map, column 0; help: name the file .json",
        ),
        ("{\n \"text\": \"a\"\n}", "rows.jsonl:1: not a JSON object: EOF while parsing an object, column 1; help"),
        ("{\"text\": \"a\"}\r\n{\"text\": ", "rows.jsonl:2: not a JSON object"),
        ("{\"text\": \"a\0b\"}", "rows.jsonl:1: not a JSON object: control character"),
        (&format!("{{\"text\": {deep}"), "rows.jsonl:1: not a JSON object: recursion limit exceeded"),
        (r#"{"text": 1}"#, "rows.jsonl:1: text: found 1; allowed: a string"),
        (r#"{"body": "a"}"#, "rows.jsonl:1: found the columns [\"body\"]"),
        (r#"{"messages": []}"#, "rows.jsonl:1: messages: the list is empty"),
        (r#"{"messages": [{"content": "a"}]}"#, "rows.jsonl:1: messages[0]: found"),
        (r#"{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#, "rows.jsonl:1: completion: found"),
        (r#"{"input_ids": [1.0]}"#, "rows.jsonl:1: input_ids: found [1.0]"),
        (r#"{"input_ids": [[1]]}"#, "rows.jsonl:1: input_ids: found [[1]]"),
        (r#"{"input_ids": "1 2"}"#, "rows.jsonl:1: input_ids: found \"1 2\""),
        ("version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        ("<!DOCTYPE html>\n<p>", "an HTML page"),
        ("\n \n", "rows.jsonl: has no rows"),
        ("", "rows.jsonl: has no rows"),
    ] {
        let error = error_of(text.as_bytes());
        assert!(error.contains(said), "{text}: {error}");
    }
}

#[test]
fn bytes_that_are_no_text_are_refused_with_their_line() {
    let error = error_of(b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n");
    assert!(error.contains("rows.jsonl:2: not a JSON object: invalid unicode"), "{error}");
    let utf16: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(error_of(&utf16).contains("found UTF-16"), "{}", error_of(&utf16));
}

#[test]
fn a_byte_order_mark_and_ends_of_lines_are_no_part_of_rows() {
    let rows = read_bytes("\u{feff}{\"text\": \"a\"}\r\n\r\n  {\"text\": \"b\"}  ".as_bytes()).unwrap();
    assert_eq!(answers(&rows), ["a", "b"]);
    assert!(rows[1].place.to_string().ends_with("rows.jsonl:3"));
}

#[test]
fn the_longest_row_is_bounded() {
    let row = |bytes: usize| format!("{{\"text\": \"{}\"}}", "a".repeat(bytes - 12));
    let long = format!("{}\n{}\n", row(20), row(MAX_ROW_BYTES + 1));
    let error = error_of(long.as_bytes());
    assert!(error.contains("rows.jsonl:2: the row is longer than 4 MiB"), "{error}");
    assert!(error.len() < 500, "{} bytes", error.len());
    let longest = format!("{}\n{}", row(MAX_ROW_BYTES), row(20));
    assert_eq!(read_bytes(longest.as_bytes()).unwrap().len(), 2);
}

#[test]
fn errors_show_the_beginning_of_a_value() {
    let error = error_of(format!("{{\"text\": [\"\u{9b}2J{}\"]}}", "x".repeat(3_000_000)).as_bytes());
    assert!(error.contains("rows.jsonl:1: text: found [\"\\u{9b}2Jxxx") && error.len() < 1000, "{}", error.len());
}

/// Answers of rows, each with the number of times that it is in an epoch; and notes.
type Opened = (Vec<(String, usize)>, Vec<String>);

fn open(source: Source) -> Result<Opened> {
    let files = Files::find(&[source])?;
    let mut rows = Rows::of(&files);
    let read = rows.by_ref().map(|row| row.map(|(row, times)| (row.answer(), times))).collect::<Result<_>>()?;
    Ok((read, [files.notes(), &rows.notes(None)].concat()))
}

#[test]
fn folders_are_read_by_name_and_other_files_refused() {
    let dir = tempfile::tempdir().unwrap();
    let texts = |source| open(source).map(|(rows, _)| rows.into_iter().map(|row| row.0).collect::<Vec<_>>());
    let error = texts(Source::new(dir.path())).unwrap_err().to_string();
    assert!(error.contains("holds no file of rows; allowed: .jsonl"), "{error}");
    for (name, text) in [
        ("b.jsonl", r#"{"text": "2"}"#),
        ("a.jsonl", r#"{"text": "1"}"#),
        ("c.csv", "x"),
        ("README.md", "x"),
        ("dataset_info.json", "x"),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let (rows, notes) = open(Source::new(dir.path())).unwrap();
    assert_eq!(rows, [("1".to_string(), 1), ("2".to_string(), 1)]);
    assert!(notes[0].ends_with(": its .jsonl files are read, and c.csv and others like it are not"), "{notes:?}");
    let error = texts(Source::new(dir.path().join("README.md"))).unwrap_err().to_string();
    assert!(error.contains("README.md: the name has no known ending; allowed: .jsonl, .json, .csv"), "{error}");
    let fifo = dir.path().join("d.jsonl");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for path in [fifo, dir.path().into()] {
        let error = format!("{:#}", texts(Source::new(path)).unwrap_err());
        assert!(error.contains("d.jsonl: a FIFO"), "{error}");
    }
}

#[test]
fn a_split_is_a_part_of_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    for name in
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl", "my_val.jsonl", "trainer.jsonl"]
    {
        std::fs::write(dir.path().join(name), format!("{{\"text\": {name:?}}}")).unwrap();
    }
    std::fs::create_dir(dir.path().join("extra")).unwrap();
    std::fs::write(dir.path().join("extra/a.jsonl"), r#"{"text": "extra"}"#).unwrap();
    let of = |split: &str| {
        let (rows, _) = open(Source { split: Some(split.into()), ..Source::new(dir.path()) })?;
        Ok::<_, anyhow::Error>(rows.into_iter().map(|row| row.0).collect::<Vec<_>>())
    };
    assert_eq!(of("train").unwrap(), ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]);
    assert_eq!(of("test").unwrap(), ["test.jsonl"]);
    assert_eq!(of("val").unwrap(), ["my_val.jsonl"]);
    assert_eq!(of("my_val").unwrap(), ["my_val.jsonl"]);
    assert_eq!(of("train-00001").unwrap(), ["train-00001-of-00002.jsonl"]);
    assert_eq!(of("extra").unwrap(), ["extra"]);
    assert!(of("dev").unwrap_err().to_string().contains("holds no file of rows of the split dev"));
    let error = open(Source::new(dir.path())).unwrap_err().to_string();
    assert!(error.contains("which are splits; help: name the file, or in a recipe the split"), "{error}");
    let file = Source { split: Some("train".into()), ..Source::new(dir.path().join("test.jsonl")) };
    assert!(open(file).unwrap_err().to_string().contains("split is for folders"));
}

#[test]
fn a_weight_is_the_number_of_times() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.txt");
    std::fs::write(&path, "a\nb\nc\nd\n").unwrap();
    for (weight, times) in
        [(1.0, [1, 1, 1, 1]), (0.5, [0, 1, 0, 1]), (2.5, [2, 3, 2, 3]), (3.0, [3; 4]), (0.25, [0, 0, 0, 1])]
    {
        let (rows, _) = open(Source { weight, ..Source::new(&path) }).unwrap();
        assert_eq!(rows.iter().map(|row| row.1).collect::<Vec<_>>(), times, "{weight}");
    }
    let none = Source { weight: 0.2, ..Source::new(&path) };
    let error = Rows::of(&Files::find(&[none, Source::new(&path)]).unwrap()).find_map(Result::err).unwrap().to_string();
    assert!(error.ends_with("rows.txt: a weight of 0.2 takes none of its 4 rows"), "{error}");
    // The rows of a folder's files are counted together, and those of each source alone.
    for name in ["a.txt", "b.txt", "c.txt"] {
        std::fs::create_dir_all(dir.path().join("folder")).unwrap();
        std::fs::write(dir.path().join("folder").join(name), "a\n").unwrap();
    }
    let folder = Source { weight: 0.5, ..Source::new(dir.path().join("folder")) };
    let rows = Rows::of(&Files::find(&[folder.clone(), folder]).unwrap());
    assert_eq!(rows.map(|row| row.unwrap().1).collect::<Vec<_>>(), [0, 1, 0, 0, 1, 0]);
}

#[test]
fn each_source_has_its_own_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name)
    };
    let both = r#"{"text": "t", "prompt": "p", "completion": "c"}"#;
    let a = Source { format: Format::Text, ..Source::new(path("a.jsonl", both)) };
    let columns = ColumnNames::read(&json!({"completion": "text"})).unwrap();
    let b = Source { columns, ..Source::new(path("b.jsonl", both)) };
    let rows = Rows::of(&Files::find(&[a, b]).unwrap()).map(|row| row.unwrap().0.content).collect::<Vec<_>>();
    let expected = Content::PromptCompletion { prompt: "p".into(), completion: "t".into() };
    assert_eq!(rows, [Content::Text("t".into()), expected]);
}

/// Writes the same three rows in every form of file; `scripts/golden/rows.py` has written the Parquet files.
#[test]
fn the_rows_do_not_depend_on_the_form_of_the_file() {
    let lines = "{\"prompt\": \"a, \\\"b\\\"\", \"completion\": \"ü\\nz\", \"n\": 1}\n\
                 {\"prompt\": \"p\", \"completion\": \"c\", \"n\": null}\n\n  {\"prompt\": \"\\\\\", \"completion\": \"]},\", \"n\": 3}";
    let array =
        format!("\u{feff} [{}]\n", lines.split('\n').filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n,"));
    let comma = "\u{feff}prompt,completion,n\r\n\"a, \"\"b\"\"\",\"ü\nz\",1\r\np,c,\r\n\\,\"]},\",3\r\n";
    let tabs = "prompt\tcompletion\tn\n\"a, \"\"b\"\"\"\t\"ü\nz\"\t1\np\tc\t\n\\\t]},\t3";
    let contents = |name: &str, bytes: &[u8]| {
        let rows = read_as(name, bytes).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        rows.into_iter().map(|row| row.content).collect::<Vec<_>>()
    };
    let expected = contents("rows.jsonl", lines.as_bytes());
    assert_eq!(expected.len(), 3);
    let files = [
        ("rows.json", lines.as_bytes().to_vec()),
        ("rows.json", array.clone().into_bytes()),
        ("rows.csv", comma.as_bytes().to_vec()),
        ("rows.tsv", tabs.as_bytes().to_vec()),
        ("rows.parquet", golden("prompts.parquet")),
        ("rows.parquet", golden("prompts-zstd.parquet")),
        ("rows.parquet", golden("prompts-gzip.parquet")),
        ("rows.parquet", golden("prompts-plain.parquet")),
    ];
    for (name, bytes) in files {
        assert_eq!(contents(name, &bytes), expected, "{name}");
        assert_eq!(contents(&format!("{name}.gz"), &gzip(&bytes)), expected, "{name}.gz");
        assert_eq!(contents(&format!("{name}.zst"), &zstd(&bytes)), expected, "{name}.zst");
        // A compressed file may have several parts.
        let parts = if name.ends_with("parquet") { vec![&bytes[..]] } else { Vec::from_iter(bytes.chunks(40)) };
        let parts: Vec<u8> = parts.into_iter().flat_map(gzip).collect();
        assert_eq!(contents(&format!("{name}.gz"), &parts), expected, "{name}.gz in parts");
    }
}

#[test]
fn conversations_come_from_parquet_whole() {
    let messages = |name: &str, bytes: &[u8]| match &read_as(name, bytes).unwrap()[..] {
        [Row { content: Content::Messages { messages, variables }, .. }, ..] => (messages.clone(), variables.clone()),
        other => panic!("{other:?}"),
    };
    let line = r#"{"messages": [{"role": "user", "content": "q", "thinking": null}, {"role": "assistant", "content": "a", "thinking": "t"}]}"#;
    assert_eq!(messages("rows.parquet", &golden("messages.parquet")), messages("rows.jsonl", line.as_bytes()));
    let ids = read_as("rows.parquet", &golden("tokenized.parquet")).unwrap();
    assert_eq!(answers(&ids), ["[5, 6, 7]", "[8, 9]"]);
}

#[test]
fn lines_of_text_are_rows() {
    let rows = read_as("rows.txt", "\u{feff}one\r\n\n  two  \n \nthree".as_bytes()).unwrap();
    assert_eq!(answers(&rows), ["one", "  two  ", "three"]);
    assert!(rows[2].place.to_string().ends_with("rows.txt:5"));
    let error = error_as("rows.txt", b"one\ncaf\xe9\n");
    assert!(error.contains("rows.txt:2: not UTF-8"), "{error}");
}

#[test]
fn errors_of_each_form_name_the_row() {
    let long = "a".repeat(MAX_ROW_BYTES + (1 << 20));
    let array = format!("[{{\"text\": \"a\"}}, {{\"text\": \"{long}\"}}]");
    let table = format!("text\na\n\"{long}\n");
    for (name, text, said) in [
        ("rows.json", "[", "rows.json, row 1: the file ends within this row"),
        ("rows.json", "[]", "rows.json: has no rows"),
        ("rows.json", "[1]", "rows.json, row 1: not a JSON object: invalid type"),
        ("rows.json", "[{\"text\": \"a\"}, {\"text\": 1}]", "rows.json, row 2: text: found 1"),
        (
            "rows.json",
            "[{\"text\": \"a\"} {\"text\": \"b\"}]",
            "rows.json, row 1: not a JSON object: trailing characters",
        ),
        ("rows.json", "[{\"text\": \"a\"},]", "rows.json, row 2: found no value; allowed: an object"),
        ("rows.json", "[{\"text\": \"a\"}", "rows.json, row 1: the file ends within this row"),
        ("rows.json", "[{\"text\": \"a\"}]]", "rows.json: something follows the array's last bracket"),
        ("rows.json", "[{\"text\": \"a\"}}]", "rows.json, row 2: found '}'; allowed: a comma"),
        ("rows.json", "{\n \"text\": \"a\"\n}", "rows.json:1: not a JSON object: EOF while parsing an object"),
        ("rows.json", &array, "rows.json, row 2: the row is longer than 4 MiB"),
        ("rows.csv", "text,id\na,1\nb\n", "rows.csv:3: found 1 field; allowed: 2, one for each name"),
        ("rows.csv", "text,text\na,1\n", "rows.csv:1: two columns have the name text"),
        ("rows.csv", "text\r\na\r\n\r\n1,2\r\n", "rows.csv:4: found 2 fields; allowed: 1, one for each name"),
        ("rows.tsv", "text\n\n\n\"a\nb\"\tc\n", "rows.tsv:4: found 2 fields; allowed: 1, one for each name"),
        ("rows.csv", "text\na\n\"b\nc\n", "rows.csv:3: the file ends within the quotes of this row; help: close them"),
        ("rows.csv", "text\r\n\"b\"\"", "rows.csv:2: the file ends within the quotes of this row; help: close them"),
        ("rows.csv", "body\na\n", "rows.csv:2: found the columns [\"body\"]"),
        ("rows.csv", "text\n", "rows.csv: has no rows"),
        ("rows.csv", "", "rows.csv: has no rows"),
        ("rows.csv", &table, "rows.csv:3: the row is longer than 4 MiB"),
        ("rows.csv", "messages\n[]\n", "rows.csv:2: messages: found \"[]\"; allowed: a list of messages"),
        ("rows.txt", "\n \n", "rows.txt: has no rows"),
        ("rows.parquet", "{\"text\": \"a\"}", "rows.parquet: "),
        ("rows.parquet", "<html>", "rows.parquet: an HTML page"),
        ("rows.parquet", "", "rows.parquet: "),
        ("rows.csv", "version https://git-lfs.github.com/spec/v1\noid", "rows.csv: a Git LFS pointer"),
        ("rows.jsonl.gz", "version https://git-lfs.github.com/spec/v1\noid", "rows.jsonl.gz: a Git LFS pointer"),
        ("rows.jsonl.gz", "{\"text\": \"a\"}", "rows.jsonl.gz: invalid gzip header"),
        ("rows.jsonl.zst", "{\"text\": \"a\"}", "rows.jsonl.zst: Unknown frame descriptor"),
    ] {
        let error = error_as(name, text.as_bytes());
        assert!(error.contains(said) && error.len() < 1000, "{name} {said}: {error}");
    }
    let rows = read_as("rows.csv", b"text,n\n\"a\",\"\"\n5\" tall,2\n\"c\n\",\"\"").unwrap();
    assert_eq!(answers(&rows), ["a", "5\" tall", "c\n"]);
    let error = error_as("rows.csv", b"text\na\ncaf\xe9\n");
    assert!(error.contains("rows.csv:3: not UTF-8"), "{error}");
}

#[test]
fn what_is_compressed_is_read_to_its_end() {
    let lines = "{\"text\": \"a\"}\n".repeat(1000);
    for (name, packed) in [("rows.jsonl.gz", gzip(lines.as_bytes())), ("rows.jsonl.zst", zstd(lines.as_bytes()))] {
        assert_eq!(read_as(name, &packed).unwrap().len(), 1000);
        let error = error_as(name, &packed[..packed.len() - 6]);
        assert!(error.contains(name), "{error}");
    }
    // Few bytes that stand for a long line are refused when the line has become too long.
    let bomb = gzip(&vec![b' '; 64 << 20]);
    assert!(bomb.len() < 1 << 20);
    assert!(error_as("rows.jsonl.gz", &bomb).contains("rows.jsonl.gz:1: the row is longer than 4 MiB"));
}

/// Bytes that a generator changes at random: every form of file ends in rows or in an error that names the file.
#[test]
fn changed_files_are_read_or_refused() {
    let lines = b"{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"c\", \"completion\": \"d\"}\n".to_vec();
    let array = b"[{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}, {\"messages\": []}]".to_vec();
    let seeds = [
        ("rows.jsonl", lines.clone()),
        ("rows.json", array),
        ("rows.csv", b"prompt,completion\na,\"b\"\nc,d\n".to_vec()),
        ("rows.txt", b"a\nb\n".to_vec()),
        ("rows.jsonl.gz", gzip(&lines)),
        ("rows.jsonl.zst", zstd(&lines)),
        ("rows.parquet", golden("prompts.parquet")),
        ("rows.parquet", golden("messages.parquet")),
    ];
    let mut random = fastrand::Rng::with_seed(7);
    for (name, seed) in seeds {
        for _ in 0..200 {
            let mut bytes = seed.clone();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..bytes.len());
                match random.u8(..4) {
                    0 => bytes[at] = random.u8(..),
                    1 => bytes[at] ^= 1 << random.u8(..8),
                    2 => bytes.truncate(at.max(1)),
                    _ => bytes.insert(at, *random.choice(b"\"[]{},\n\\\xff").unwrap()),
                }
            }
            if let Err(error) = read_as(name, &bytes) {
                assert!(format!("{error:#}").contains(name), "{error:#}");
            }
        }
    }
}

#[test]
fn the_root_of_a_hub_cache_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("datasets--org--some--rows");
    std::fs::create_dir_all(root.join("snapshots/abc")).unwrap();
    let error = format!("{:#}", Files::find(&[Source::new(root)]).err().unwrap());
    assert!(error.contains("a repository in the hub's cache") && error.contains("help: org/some--rows in"), "{error}");
}

use std::os::unix::fs::FileExt;
use std::path::Path;

use jiff::Zoned;

use super::super::source::{Files, Source};
use super::super::tokenizer::tests::GOLDEN;
use super::super::tokens::Making;
use super::super::{LossOn, TextTokenizer};
use super::*;

const ROWS: &str = "{\"input_ids\": [1, 2, 3], \"labels\": [1, -100, 3]}\n\n{\"input_ids\": [4, 5, 6, 7], \"seq_lengths\": [2, 2]}\n\
                    {\"input_ids\": [], \"position_ids\": []}\n{\"input_ids\": [8]}\n";

fn file_of(rows: &str) -> File {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows).unwrap();
    let files = Files::find(&[Source::new(path)]).unwrap();
    let making = Making { tokenizer: None, vocab_size: 100, loss_on: LossOn::Auto, held_out: 0.0 };
    let mut file = tempfile::tempfile().unwrap();
    making.write(&files, vec!["rows".into()], &mut file, "a test", &mut |_| {}).unwrap();
    file
}

fn entries(store: &Store) -> Vec<(Entry, usize)> {
    let mut entries = Vec::new();
    let mut take = |entry: &Entry, begin| {
        entries.push((*entry, begin));
        Ok(())
    };
    store.each_entry(&mut take).unwrap();
    entries
}

#[test]
fn a_store_gives_back_tokens_targets_and_places() {
    let store = Store::open(file_of(ROWS)).unwrap();
    let t = TARGET;
    assert_eq!(store.words(), [1 | t, 2, 3 | t, 4 | t, 5 | t, 6 | t, 7 | t, 8 | t]);
    let entries = entries(&store);
    let places: Vec<_> = entries.iter().map(|(e, begin)| (e.row_idx, e.number, e.num_tokens, *begin)).collect();
    assert_eq!(places, [(0, 1, 3, 0), (1, 3, 2, 3), (1, 3, 2, 5), (2, 4, 0, 7), (3, 5, 1, 7)]);
    assert_eq!(entries.iter().map(|(e, _)| e.num_targets).collect::<Vec<_>>(), [1, 1, 1, 0, 0]);
    assert!(entries.iter().all(|(e, _)| e.has(Entry::IS_LINE) && e.times == 1 && e.file == 0));
    assert_eq!(
        entries.iter().map(|(e, _)| e.has(Entry::IS_EMPTY)).collect::<Vec<_>>(),
        [false, false, false, true, false]
    );
    assert_eq!((store.meta.remarks.len(), &store.meta.made_from[..]), (1, &["rows".to_string()][..]));
}

#[test]
fn any_byte_that_changes_is_found() {
    let file = file_of(ROWS);
    let size = file.metadata().unwrap().len();
    Store::open(file.try_clone().unwrap()).unwrap();
    for at in 0..size {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        assert!(Store::open(file.try_clone().unwrap()).is_err(), "byte {at}");
        file.write_all_at(&byte, at).unwrap();
    }
    for len in (0..size).step_by(7).chain([size - 1, size + 1]) {
        let cut = file_of(ROWS);
        cut.set_len(len).unwrap();
        assert!(Store::open(cut).is_err(), "{len} bytes");
    }
    assert!(Store::open(file).is_ok());
}

/// Rows of several batches, of which the longest is a batch of its own.
fn many_rows() -> String {
    let mut random = fastrand::Rng::with_seed(7);
    let row = |i: usize| {
        let len = if i == 300 { 150_000 } else { random.usize(1..1000) };
        let words: Vec<&str> =
            (0..len).map(|_| ["the fox ", "dog ", "lazy, ", "\u{fc}\u{df} ", "12 "][random.usize(0..5)]).collect();
        match i % 3 {
            0 => serde_json::json!({"text": words.concat()}),
            1 => serde_json::json!({"text": words.concat(), "topic": i}),
            _ => serde_json::json!({"text": "a"}),
        }
    };
    (0..800).map(row).map(|row| row.to_string() + "\n").collect()
}

fn write(rows: &str, threads: usize) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, rows)?;
    let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &Zoned::now())?;
    let making = Making { tokenizer: Some(&tokenizer), vocab_size: 320, loss_on: LossOn::Auto, held_out: 0.0 };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let mut out = tempfile::tempfile()?;
    making.write_on(&pool, &Files::find(&[Source::new(path)])?, Vec::new(), &mut out, "a test", &mut |_| {})?;
    let mut bytes = vec![0; out.metadata()?.len() as usize];
    out.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[test]
fn any_number_of_threads_writes_the_same_bytes() {
    let rows = many_rows();
    assert!(rows.len() > 3 << 19, "several batches, one of them of one row");
    let serial = write(&rows, 1).unwrap();
    assert!(serial == write(&rows, 4).unwrap());
}

#[test]
fn the_first_bad_row_is_named_whichever_thread_meets_one() {
    let rows = many_rows();
    let mut lines: Vec<&str> = rows.lines().collect();
    lines[700] = "{\"text\": 5}";
    lines[500] = "no JSON";
    lines[494] = "{\"input_ids\": [1, 2]}";
    let error = |lines: &[&str]| format!("{:#}", write(&lines.join("\n"), 4).unwrap_err());
    assert!(error(&lines).contains("rows.jsonl:495: the column \"text\" is missing"), "{}", error(&lines));
    lines[494] = lines[0];
    assert!(error(&lines).contains("rows.jsonl:501: not a JSON object"), "{}", error(&lines));
}

#[test]
fn the_key_follows_all_that_decides_the_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, ROWS).unwrap();
    let source = Source::new(&path);
    let making = Making { tokenizer: None, vocab_size: 100, loss_on: LossOn::Auto, held_out: 0.0 };
    let key =
        |making: &Making, source: &Source| making.key(&Files::find(std::slice::from_ref(source)).unwrap()).unwrap();
    let first = key(&making, &source);
    let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &Zoned::now()).unwrap();
    let mut keys = vec![
        key(&Making { tokenizer: Some(&tokenizer), ..making }, &source),
        key(&Making { vocab_size: 101, ..making }, &source),
        key(&Making { loss_on: LossOn::All, ..making }, &source),
        key(&making, &Source { weight: 2.0, ..source.clone() }),
        key(&making, &Source { format: super::super::Format::Tokenized, ..source.clone() }),
    ];
    assert_eq!(key(&Making { held_out: 0.5, ..making }, &source), first, "rows are held out later");
    // The same rows in another place have the same key, and other rows of the same size do not.
    let other = dir.path().join("other.jsonl");
    std::fs::copy(&path, &other).unwrap();
    assert_eq!(key(&making, &Source::new(other)), first);
    let text = dir.path().join("rows.json");
    std::fs::copy(&path, &text).unwrap();
    keys.push(key(&making, &Source::new(text)));
    // Half of the rows of a folder are others than half of the rows of each of its files.
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let files = ["a.jsonl", "b.jsonl"].map(|name| dir.path().join("folder").join(name));
    for file in &files {
        std::fs::copy(&path, file).unwrap();
    }
    let half = |path: &Path| Source { weight: 0.5, ..Source::new(path) };
    let each = files.each_ref().map(|file| half(file));
    keys.push(making.key(&Files::find(&each).unwrap()).unwrap());
    keys.push(key(&making, &half(&dir.path().join("folder"))));
    let before = path.metadata().unwrap().modified().unwrap();
    std::fs::write(&path, ROWS.replace('8', "9")).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
    keys.push(key(&making, &source));
    keys.push(first);
    assert_eq!(keys.iter().collect::<std::collections::BTreeSet<_>>().len(), keys.len());
}

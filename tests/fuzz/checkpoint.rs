//! Files of this program that a later run reads: shard files, run.json and checkpoints of training.

use std::fs;
use std::path::Path;

use fsdp_qlora::testing::state::{self, Checkpoint, Progress, Values};
use fsdp_qlora::testing::{Adapter, Found, Made, ModelSpec, RunRecord, ShardSpec, ShardWriter, adapter};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::driver::Target;
use super::folder::Folder;
use super::form::Form;
use super::golden;

/// Bytes of each unit without padding.
const PART_BYTES: [usize; 2] = [60, 128];
const UNIT_BYTES: [usize; 2] = [64, 128];

/// A shard file: its metadata and checksums.
pub fn shard() -> Target {
    let folder = Folder::new(&[]);
    let spec = ShardSpec {
        dir: folder.path(),
        base: "0123456789abcdef0123456789abcdef".into(),
        encoding: "nf4+dq".into(),
        num_shards: 2,
        unit_bytes: UNIT_BYTES.into(),
        model: "/model".into(),
    };
    let makers = vec!["rank 0 on a".to_string(), "rank 1 on b".to_string()];
    let made = Made { makers, beside: vec![0, 1] };
    let mut writer = ShardWriter::create(&spec, 0, PART_BYTES.into(), &made).unwrap();
    PART_BYTES.iter().enumerate().for_each(|(idx, &bytes)| writer.append(idx, &vec![7; bytes]).unwrap());
    writer.finish().unwrap();
    let whole = fs::read(spec.path(0)).unwrap();
    let data = whole[whole.len() - UNIT_BYTES.iter().sum::<usize>()..].to_vec();
    let read = move |input: &[u8]| {
        // The folder goes with the last reader.
        folder.write(spec.path(0).file_name().unwrap().to_str().unwrap(), input);
        // A writer reads the header of a file that is in its way.
        let writer = ShardWriter::create(&spec, 0, PART_BYTES.into(), &made).map(drop);
        match spec.open(0)? {
            Found::Valid(units) => {
                let units: Vec<&[u8]> = units.iter().map(|unit| (**unit).as_ref()).collect();
                assert_eq!(units.concat(), data, "other bytes were taken for whole");
            }
            Found::Missing => panic!("a file that is there is missing"),
            Found::Foreign(reason) => {
                assert!(writer.is_err(), "a foreign file would have been overwritten: {reason}");
            }
            Found::Damaged(_) => {}
        }
        Ok(())
    };
    let words = &["format", "layout_version", "base", "encoding", "shard", "checksums", "program", "makers", "U8"];
    Target::new(Form::Safetensors, words, vec![whole], read)
}

const RECORD: &str = r#"{"program": "fsdp-qlora 0.1.0", "state": "finished", "started": "2026-03-07T08:09:10Z", "ended": null, "host": "a",
    "pid": 1, "world_size": 2, "global_batch_size": 6, "base": "0123", "tokenizer": "4567", "adapter": "89ab", "data": "cdef", "eval_data": null,
    "recipe": {"lora.r": 16, "data.train": ["rows.jsonl"], "training.learning_rate": 1e-4}, "files": ["metrics.jsonl"]}"#;

/// `run.json` of an output folder.
pub fn run_record() -> Target {
    let folder = Folder::new(&[]);
    let read = {
        let whole: RunRecord = serde_json::from_str(RECORD).unwrap();
        move |input: &[u8]| {
            folder.write("run.json", input);
            let found = RunRecord::read(&folder.path())?.expect("a record that is there");
            assert_eq!(
                whole.identity.obstacles(&found.identity).is_empty(),
                found.identity.obstacles(&whole.identity).is_empty()
            );
            Ok(())
        }
    };
    let words = &["running", "stopped", "finished", "failed", "reason", "ended", "eval_data", "\u{1b}[2J"];
    Target::new(Form::Json, words, vec![RECORD.into()], read)
}

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
/// The name under which a checkpoint is written.
const NEW: &str = ".fsdp-qlora-checkpoint-new";

fn spec() -> ModelSpec {
    ModelSpec::load(&golden("tiny")).unwrap()
}

fn trained() -> Adapter {
    adapter::load(&golden("qlora_steps/start"), &spec()).unwrap()
}

/// Names and bytes of a checkpoint of step 3, the state first.
fn files() -> Vec<(String, Vec<u8>)> {
    let (output, run) = (tempfile::tempdir().unwrap(), serde_json::from_str::<RunRecord>(RECORD).unwrap().identity);
    let progress = Progress { step: 3, ..Progress::default() };
    let (trained, spec, base) = (trained(), spec(), Path::new("/model"));
    let slices = || trained.layers.iter().map(Vec::as_slice).collect();
    let values = Values { settings: &trained.settings, adapter: slices(), exp_avg: slices(), exp_avg_sq: slices() };
    let checkpoint = Checkpoint { values: &values, progress, run: &run, spec: &spec, base, metrics: b"{}\n" };
    let path = checkpoint.write(output.path()).unwrap();
    let entries = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.map(|path| (path.file_name().unwrap().to_str().unwrap().into(), fs::read(&path).unwrap())).collect();
    files.sort_by_key(|(name, _)| name != STATE);
    files
}

fn write_all(files: &[(String, Vec<u8>)], dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(dir.join(name), bytes).unwrap());
}

/// Returns a state with the checksum that belongs to it, so that the keys themselves are read. One that is none, or whose checksum is
/// no text, stays as it is.
fn with_checksum(input: &[u8]) -> Vec<u8> {
    let Ok(mut state) = serde_json::from_slice::<Value>(input) else { return input.into() };
    let Some(checksum @ Value::String(_)) = state.get_mut("checksum") else { return input.into() };
    *checksum = "".into();
    let digest = format!("{:016x}", xxh3_64(state.to_string().as_bytes()));
    state["checksum"] = digest.into();
    state.to_string().into()
}

/// `state.json` of a checkpoint that a killed run has left complete under the name of a new one, as a start finds it.
pub fn checkpoint_state() -> Target {
    let files = files();
    // The folder outside has files of these names.
    let named: Vec<_> = files[1..].iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    let folder = Folder::new(&named);
    let seed = files[0].1.clone();
    let read = move |input: &[u8]| {
        let output = folder.path();
        fs::remove_dir_all(&output).unwrap();
        write_all(&files[1..], &output.join(NEW));
        fs::write(output.join(NEW).join(STATE), with_checksum(input)).unwrap();
        let recovered = state::recover(&output);
        let found = state::list(&output);
        let result = found.first().map(|(_, path)| state::Found::open(path)).transpose();
        folder.check_outside();
        recovered?;
        let entries: Vec<_> = fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(entries, found.iter().map(|(_, path)| path.clone()).collect::<Vec<_>>());
        if let Some(found) = result? {
            assert_eq!(found.path, output.join(format!("checkpoint-{}", found.state.progress.step)));
            found.metrics()?;
        }
        Ok(())
    };
    let words = &["../outside/metrics.jsonl", "/dev/zero", STATE, ".", "..", "", "files", "xxh3", "loss_scaler"];
    Target::new(Form::Json, words, vec![seed], read)
}

/// The moments of a checkpoint whose `state.json` has their digest.
pub fn checkpoint_tensors() -> Target {
    let (folder, files, settings) = (Folder::new(&[]), files(), trained().settings);
    let (path, spec) = (folder.path().join("checkpoint-3"), spec());
    write_all(&files, &path);
    let whole = files.iter().find(|(name, _)| name == OPTIMIZER).unwrap().1.clone();
    let lengths: Vec<usize> = trained().layers.iter().map(Vec::len).collect();
    let mut state: Value = serde_json::from_slice(&files[0].1).unwrap();
    let read = move |input: &[u8]| {
        // The folder goes with the last reader.
        folder.write("checkpoint-3/optimizer.safetensors", input);
        let listed = state["files"].as_array_mut().unwrap().iter_mut().find(|file| file["name"] == OPTIMIZER).unwrap();
        listed["bytes"] = input.len().into();
        listed["xxh3"] = format!("{:016x}", xxh3_64(input)).into();
        folder.write("checkpoint-3/state.json", &with_checksum(state.to_string().as_bytes()));
        let found = state::Found::open(&path).expect("a checkpoint with its digests");
        let mut read = Vec::new();
        found.values(&settings, &spec, |_, values| {
            assert!(values.iter().all(|part| part.len() == values[0].len()));
            read.push(values[0].len());
            Ok(())
        })?;
        assert_eq!(read, lengths);
        Ok(())
    };
    Target::new(Form::Safetensors, &["exp_avg", "exp_avg_sq", "lora_A", "F16", "BF16"], vec![whole], read)
}

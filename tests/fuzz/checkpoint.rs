//! Files of this program that a later run reads: shard files and run.json. Training checkpoints will have their targets
//! here.

use std::fs;

use fsdp_qlora::testing::{Found, Made, RunRecord, ShardSpec, ShardWriter};

use super::driver::Target;
use super::folder::Folder;
use super::form::Form;

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

/// `run.json` of an output folder.
pub fn run_record() -> Target {
    let folder = Folder::new(&[]);
    let record = r#"{"program": "fsdp-qlora 0.1.0", "state": "finished", "started": "2026-03-07T08:09:10Z", "ended": null, "host": "a",
        "pid": 1, "world_size": 2, "global_batch_size": 6, "base": "0123", "tokenizer": "4567", "adapter": "89ab", "data": "cdef", "eval_data": null,
        "recipe": {"lora.r": 16, "data.train": ["rows.jsonl"], "training.learning_rate": 1e-4}, "files": ["metrics.jsonl"]}"#;
    let read = {
        let whole: RunRecord = serde_json::from_str(record).unwrap();
        move |input: &[u8]| {
            folder.write("run.json", input);
            let found = RunRecord::read(&folder.path())?.expect("a record that is there");
            assert_eq!(
                whole.identity.differences(&found.identity).is_empty(),
                found.identity.differences(&whole.identity).is_empty()
            );
            Ok(())
        }
    };
    let words = &["running", "stopped", "finished", "failed", "reason", "ended", "eval_data", "\u{1b}[2J"];
    Target::new(Form::Json, words, vec![record.into()], read)
}

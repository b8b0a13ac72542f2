use super::*;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::output::record::tests::identity;

fn spec() -> ModelSpec {
    ModelSpec::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny")).unwrap()
}

/// An adapter with its moments, by layer.
fn values() -> (Adapter, [Vec<Vec<f32>>; 2]) {
    let adapter = adapter::fresh(adapter::tests::settings(&spec()), &spec(), 42);
    let moments = |step: f32| {
        let of_layer = |values: &Vec<f32>| (0..values.len()).map(|i| i as f32 * step).collect();
        adapter.layers.iter().map(of_layer).collect()
    };
    let moments = [moments(1e-3), moments(1e-7)];
    (adapter, moments)
}

fn write(output: &Path, step: usize) -> PathBuf {
    let ((adapter, [exp_avg, exp_avg_sq]), run, spec) = (values(), identity(1.0), spec());
    let settings = &adapter.settings;
    let [adapter, exp_avg, exp_avg_sq] =
        [&adapter.layers, &exp_avg, &exp_avg_sq].map(|layers| layers.iter().map(Vec::as_slice).collect());
    let values = Values { settings, adapter, exp_avg, exp_avg_sq };
    let loss_scaler = LossScaler::new(true);
    let progress = Progress {
        step,
        num_updates: 5,
        last_update: step,
        has_learned: true,
        loss_scaler,
        owes_evaluation: true,
        ..Progress::default()
    };
    let base = Path::new("base");
    Checkpoint { values: &values, progress, run: &run, spec: &spec, base, metrics: b"{}\n" }.write(output).unwrap()
}

#[test]
fn what_is_written_is_found_and_read() {
    let output = tempfile::tempdir().unwrap();
    let (spec, path) = (spec(), write(output.path(), 7));
    assert_eq!(list(output.path()), [(7, path.clone())]);
    let (found, (adapter, [means, squares])) = (Found::open(&path).unwrap(), values());
    assert_eq!((found.state.progress.step, found.metrics().unwrap()), (7, b"{}\n".to_vec()));
    assert_eq!(adapter::load(&path, &spec).unwrap(), adapter);
    let mut num_layers = 0;
    let each = |i: usize, [master, exp_avg, exp_avg_sq]: [Vec<f32>; 3]| {
        assert_eq!([&master, &exp_avg, &exp_avg_sq], [&adapter.layers[i], &means[i], &squares[i]]);
        num_layers += 1;
        Ok(())
    };
    found.values(&adapter.settings, &spec, each).unwrap();
    assert_eq!(num_layers, spec.num_layers());
}

#[test]
fn the_newest_and_the_best_are_never_removed() {
    let output = tempfile::tempdir().unwrap();
    let left = |steps: &[usize], proved, limit, best| {
        steps.iter().for_each(|&step| drop(write(output.path(), step)));
        prune(output.path(), proved, limit, best).unwrap();
        list(output.path()).into_iter().map(|(step, _)| step).collect::<Vec<_>>()
    };
    assert_eq!(left(&[1, 2, 3, 4, 10], 5, 3, Some(5)), [10, 4, 3, 2, 1], "that of step 5 could not be written");
    assert_eq!(left(&[], 4, 3, Some(1)), [10, 4, 3, 1]);
    assert_eq!(left(&[], 4, 1, Some(3)), [10, 4, 3]);
    assert_eq!(left(&[5], 5, 1, Some(5)), [10, 5]);
    assert_eq!(left(&[6], 6, 1, Some(2)), [10, 6], "the best is lost");
}

#[test]
fn any_byte_that_changes_is_found() {
    let output = tempfile::tempdir().unwrap();
    let path = write(output.path(), 7);
    for name in [TENSORS_FILE, CONFIG_FILE, OPTIMIZER_FILE, METRICS_FILE] {
        let whole = std::fs::read(path.join(name)).unwrap();
        for at in (0..whole.len()).step_by(1 + whole.len() / 50).chain([whole.len() - 1]) {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            for damaged in [&flipped[..], &whole[..at]] {
                std::fs::write(path.join(name), damaged).unwrap();
                let error = format!("{:#}", Found::open(&path).err().unwrap());
                assert!(error.contains(name) && error.contains("were written"), "{error}");
            }
        }
        std::fs::write(path.join(name), whole).unwrap();
    }
    Found::open(&path).unwrap();
    std::fs::remove_file(path.join(OPTIMIZER_FILE)).unwrap();
    assert!(format!("{:#}", Found::open(&path).err().unwrap()).contains(OPTIMIZER_FILE));
    std::fs::remove_file(path.join(STATE_FILE)).unwrap();
    assert_eq!(list(output.path()), []);
}

#[test]
fn a_state_that_was_damaged_says_nothing_else() {
    let output = tempfile::tempdir().unwrap();
    let path = write(output.path(), 7);
    let (whole, state) = (std::fs::read(path.join(STATE_FILE)).unwrap(), read_state(&path).unwrap());
    let mut refused = 0;
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        std::fs::write(path.join(STATE_FILE), &damaged).unwrap();
        match read_state(&path) {
            Ok(found) => assert_eq!(found, state, "byte {at}: {}", String::from_utf8_lossy(&damaged)),
            Err(error) => {
                assert!(format!("{error:#}").contains(STATE_FILE), "{error:#}");
                refused += 1;
            }
        }
    }
    assert!(2 * refused > whole.len(), "{refused} of {} bytes matter", whole.len());
}

#[test]
fn the_oldest_go_and_other_folders_stay() {
    let output = tempfile::tempdir().unwrap();
    for step in [2, 10, 4, 30] {
        write(output.path(), step);
    }
    std::fs::create_dir_all(output.path().join("checkpoint-best")).unwrap();
    std::fs::create_dir_all(output.path().join("checkpoint-3")).unwrap();
    let steps = || list(output.path()).iter().map(|(step, _)| *step).collect::<Vec<_>>();
    assert_eq!(steps(), [30, 10, 4, 2]);
    prune(output.path(), 10, 2, None).unwrap();
    assert_eq!(steps(), [30, 10, 4]);
    assert!(output.path().join("checkpoint-best").exists() && output.path().join("checkpoint-3").exists());
    let again = write(output.path(), 10);
    assert_eq!(list(output.path())[1], (10, again));
}

//! The run that an adapter came from. Its record says on which base the adapter was trained, and in what form.

use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::output::record::{RunIdentity, RunRecord};
use super::state;
use crate::files::shown_path;

/// Returns the run that wrote the adapter in a folder, which is a result or a checkpoint. Returns `None` for adapters of
/// other programs.
pub fn run_of(adapter: &Path) -> Result<Option<RunIdentity>> {
    if let Some(record) = RunRecord::read(adapter)? {
        return Ok(Some(record.identity));
    }
    let is_checkpoint = adapter.join(state::STATE_FILE).exists();
    is_checkpoint.then(|| state::read_state(adapter).map(|state| state.run)).transpose()
}

/// Fails if a run trained on another base than the one in `model`, whose identity is `base`.
pub fn check_base(run: &RunIdentity, base: &str, model: &Path) -> Result<()> {
    ensure!(
        run.base == base,
        "the adapter was trained on another base than {}: the record of its run names {} with the content {}, and this one has \
         {base}\nhelp: give the base that it was trained on; --other-base takes this one, for instance the model in 16 bit that a \
         checkpoint in 4 bit was made from",
        shown_path(model),
        run.recipe.get("model").unwrap_or(&Value::Null),
        run.base
    );
    Ok(())
}

/// Fails if a run held its base, one in 16 bit, in another form than these keys of `quantization` say. `None` stands for
/// the default of `bnb_4bit_use_double_quant`, which is true.
pub fn check_quantization(run: &RunIdentity, load_in_4bit: bool, double_quant: Option<bool>) -> Result<()> {
    let key = |key: &str| run.recipe.get(key).cloned().unwrap_or_default();
    let in_4bit = key("quantization.load_in_4bit") != Value::Bool(false);
    ensure!(
        in_4bit || !load_in_4bit,
        "the adapter was trained with quantization.load_in_4bit=false, on weights that were not quantized\n\
         help: --base original; with --dataset, add --set quantization.load_in_4bit=false"
    );
    ensure!(
        !in_4bit || load_in_4bit,
        "the adapter was trained with quantization.load_in_4bit=true\n\
         help: leave out --set quantization.load_in_4bit=false"
    );
    let trained = key("quantization.bnb_4bit_use_double_quant");
    let word = |found: Value| if found.is_null() { Value::Bool(true) } else { found };
    ensure!(
        !in_4bit || word(trained.clone()) == word(double_quant.into()),
        "the adapter was trained with quantization.bnb_4bit_use_double_quant={trained}\n\
         help: --set quantization.bnb_4bit_use_double_quant={trained}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::output::record::tests::identity;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_run_says_on_what_its_adapter_was_trained() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(run_of(dir.path()).unwrap(), None);
        let mut run = identity(1.0);
        RunRecord::new(run.clone()).write(dir.path()).unwrap();
        assert_eq!(run_of(dir.path()).unwrap(), Some(run.clone()));
        check_base(&run, &run.base.clone(), dir.path()).unwrap();
        let error = check_base(&run, "another", dir.path()).unwrap_err().to_string();
        assert!(error.contains("was trained on another base") && error.contains("help: give the base"), "{error}");
        let mut check = |in_4bit: bool, trained: Value, load_in_4bit, double_quant| {
            run.recipe.insert("quantization.load_in_4bit".into(), in_4bit.into());
            run.recipe.insert("quantization.bnb_4bit_use_double_quant".into(), trained);
            check_quantization(&run, load_in_4bit, double_quant).map_err(|error| error.to_string())
        };
        for (trained, wanted) in
            [(json!(null), None), (json!(true), None), (json!(null), Some(true)), (json!(false), Some(false))]
        {
            check(true, trained, true, wanted).unwrap();
        }
        let error = check(true, json!(false), true, None).unwrap_err();
        assert!(error.ends_with("--set quantization.bnb_4bit_use_double_quant=false"), "{error}");
        assert!(check(true, json!(true), true, Some(false)).is_err());
        check(false, json!(null), false, None).unwrap();
        assert!(check(false, json!(null), true, None).unwrap_err().contains("help: --base original"));
        assert!(check(true, json!(null), false, None).unwrap_err().contains("help: leave out --set"));
    }
}

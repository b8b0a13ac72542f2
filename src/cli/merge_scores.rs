//! The scores that `merge --dataset` prints, of the adapter over its base and of the models that both forms merge to.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::eval;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::load::OpenedBase;
use crate::checkpoint::merge::{Form, Merge, Options};
use crate::checkpoint::stage::Stage;
use crate::comm::mpi::MpiComm;
use crate::recipe::Job;
use crate::start::Start;
use crate::start::agree::{Agreed, agree_on};
use crate::train::eval::Score;

pub struct Scores<'a> {
    start: &'a Start<'a>,
    job: &'a Agreed<Job>,
    /// Folder of a model and of shards that are not kept.
    scratch: Stage,
    scores: Vec<(&'static str, Score)>,
}

impl<'a> Scores<'a> {
    /// Makes the folder for what is not kept, beside the result. It must have room for a model of so many bytes and its
    /// shards.
    pub fn new(start: &'a Start, job: &'a Agreed<Job>, output: &Path, model_bytes: usize) -> Result<Scores<'a>> {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let scratch = Stage::beside(&output.with_file_name(format!("{name}-scored"))).context("--dataset")?;
        scratch.check_room(model_bytes.saturating_mul(2)).context("--dataset")?;
        Ok(Scores { start, job, scratch, scores: Vec::new() })
    }

    /// Scores the adapter over its base, as `eval` does.
    pub fn of_adapter(&mut self, adapter: &Path) -> Result<()> {
        let job = (**self.job).clone().with_adapters(&[adapter.into()]);
        self.score("adapter", job)
    }

    /// Scores the model that the other form merges to, if the base has that form.
    pub fn of_other_form(&mut self, opened: &OpenedBase, adapter: &Adapter, options: Options) -> Result<()> {
        let form = match options.form {
            Form::Original => Form::Dequantized,
            Form::Dequantized => Form::Original,
        };
        let merge = match Merge::new(opened, adapter, Options { form, ..options }) {
            Ok(merge) => merge,
            Err(why) => {
                self.start.log.line(format!("not scored: {why:#}"));
                return Ok(());
            }
        };
        let model = self.scratch.dir().join("model");
        std::fs::create_dir(&model).with_context(|| model.display().to_string())?;
        merge.write(&model, &mut |_| ())?;
        self.of_merged(form, &model)
    }

    /// Scores a merged model, and empties the folder of what is not kept.
    pub fn of_merged(&mut self, form: Form, model: &Path) -> Result<()> {
        let job = self.job.on_merged(model.into(), self.scratch.dir().join("shards"));
        let name = match form {
            Form::Original => "merged original",
            Form::Dequantized => "merged dequantized",
        };
        self.score(name, job)?;
        self.scratch.clear()
    }

    fn score(&mut self, name: &'static str, job: Job) -> Result<()> {
        let job = agree_on(&mut MpiComm::new(self.start.world)?, job)?;
        let scores = eval::scores(self.start, MpiComm::new(self.start.world)?, &job, None)?;
        self.scores.push((name, scores[0][0]));
        Ok(())
    }

    /// Prints a line for each score, or all scores as one JSON object.
    pub fn print(&self, as_json: bool) {
        let line = |score: &Score| {
            json!({"loss": score.loss, "perplexity": score.loss.exp(), "token_accuracy": score.token_accuracy,
                "num_target_tokens": score.num_target_tokens})
        };
        if as_json {
            let all: Map<String, Value> =
                self.scores.iter().map(|(name, score)| (name.replace(' ', "_"), line(score))).collect();
            println!("{}", Value::Object(all));
            return;
        }
        for (name, Score { loss, num_target_tokens, token_accuracy }) in &self.scores {
            println!(
                "{name:>18}  loss {loss}  perplexity {:.4}  token accuracy {token_accuracy:.4}  target tokens {num_target_tokens}",
                loss.exp()
            );
        }
    }
}

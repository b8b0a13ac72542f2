//! The places that a job names: repositories of the hub, and the local files that replace them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::command::Command;
use super::job::{EvalData, Job};
use super::keys;
use crate::data::Source;
use crate::hub::{Kind, Part, Reference, Unsaid, Wanted};

/// The files of a repository of the hub in the cache of this machine.
pub struct Located {
    /// The repository at a commit.
    pub reference: Reference,
    /// The folder of the first file.
    pub folder: PathBuf,
    pub files: Vec<PathBuf>,
}

impl Job {
    /// Returns the parts of repositories that the job names, each once.
    pub fn wanted(&self) -> Vec<Wanted> {
        let adapters = self.lora.adapter.iter().chain(&self.adapters).filter_map(|path| self.adapter_wanted(path));
        let mut all: Vec<Wanted> = self.model_wanted().into_iter().chain(adapters).collect();
        all.extend(self.data.train.iter().filter_map(|source| self.rows_wanted(source, self.unsaid_split())));
        all.extend(self.held_out().iter().filter_map(|source| self.rows_wanted(source, Unsaid::Only)));
        let mut wanted: Vec<Wanted> = Vec::new();
        all.into_iter().for_each(|part| {
            if !wanted.contains(&part) {
                wanted.push(part)
            }
        });
        wanted
    }

    /// Returns the job with local paths instead of repositories. Its values name the repositories at their commits.
    pub fn located(mut self, find: impl Fn(&Wanted) -> Result<Located>) -> Result<Job> {
        if let Some(wanted) = self.model_wanted() {
            let Located { reference, folder, .. } = find(&wanted)?;
            self.set_value(keys::MODEL.path, |value| *value = reference.to_string().into());
            self.model = folder;
        }
        if let Some(wanted) = self.lora.adapter.as_deref().and_then(|path| self.adapter_wanted(path)) {
            let Located { reference, folder, .. } = find(&wanted)?;
            self.set_value(keys::ADAPTER.path, |value| *value = reference.to_string().into());
            self.lora.adapter = Some(folder);
        }
        for i in 0..self.adapters.len() {
            if let Some(wanted) = self.adapter_wanted(&self.adapters[i]) {
                self.adapters[i] = find(&wanted)?.folder;
            }
        }
        let train = self.located_rows(keys::TRAIN.path, self.data.train.clone(), self.unsaid_split(), &find)?;
        self.data.train = train;
        if let Some(EvalData::Sources(sources)) = self.data.eval.clone() {
            let sources = self.located_rows(keys::EVAL.path, sources, Unsaid::Only, &find)?;
            self.data.eval = Some(EvalData::Sources(sources));
        }
        Ok(self)
    }

    /// Returns a line for each folder that is used although the hub may have a repository of that name.
    pub fn folders_called_like_repositories(&self) -> Vec<String> {
        let mut paths = vec![(keys::MODEL.path, &self.model, Kind::Model)];
        paths.retain(|_| self.command.needs_model());
        let adapters = self.lora.adapter.iter().chain(&self.adapters);
        paths.extend(adapters.map(|path| (keys::ADAPTER.path, path, Kind::Model)));
        paths.extend(self.data.train.iter().map(|source| (keys::TRAIN.path, &source.path, Kind::Dataset)));
        paths.extend(self.held_out().iter().map(|source| (keys::EVAL.path, &source.path, Kind::Dataset)));
        paths.retain(|(_, path, kind)| path.is_dir() && Reference::of_id(&path.to_string_lossy(), *kind).is_some());
        let told = |(key, path, _): (&'static str, &PathBuf, Kind)| {
            let name = self.command.name_of(key).unwrap_or(key);
            format!("{name}: the folder {} is here, so the hub is not asked", path.display())
        };
        paths.into_iter().map(told).collect()
    }

    fn model_wanted(&self) -> Option<Wanted> {
        let part = match self.command {
            Command::Train | Command::Eval | Command::Generate | Command::Quantize => Part::Weights,
            Command::Merge | Command::MergeScored => Part::Merge,
            Command::Data => Part::Tokenizer,
            Command::Plan | Command::Export => Part::Config,
            _ => return None,
        };
        Some(Wanted { reference: Reference::of(&self.model, Kind::Model)?, part })
    }

    fn adapter_wanted(&self, path: &Path) -> Option<Wanted> {
        self.command.name_of(keys::ADAPTER.path)?;
        Some(Wanted { reference: Reference::of(path, Kind::Model)?, part: Part::Adapter })
    }

    fn rows_wanted(&self, source: &Source, unsaid: Unsaid) -> Option<Wanted> {
        self.command.name_of(keys::TRAIN.path)?;
        let reference = Reference::of(&source.path, Kind::Dataset)?;
        Some(Wanted { reference, part: Part::Rows { split: source.split.clone(), unsaid } })
    }

    /// Returns the split that `data.train` stands for if it names none.
    fn unsaid_split(&self) -> Unsaid {
        if matches!(self.command, Command::Eval | Command::MergeScored) { Unsaid::Only } else { Unsaid::Train }
    }

    fn held_out(&self) -> &[Source] {
        match &self.data.eval {
            Some(EvalData::Sources(sources)) => sources,
            Some(EvalData::Fraction(_)) | None => &[],
        }
    }

    /// Returns sources with local files, and writes the commits into the values of their key.
    fn located_rows(
        &mut self,
        key: &'static str,
        sources: Vec<Source>,
        unsaid: Unsaid,
        find: &impl Fn(&Wanted) -> Result<Located>,
    ) -> Result<Vec<Source>> {
        let mut located = Vec::new();
        for (i, source) in sources.into_iter().enumerate() {
            let Some(wanted) = self.rows_wanted(&source, unsaid) else {
                located.push(source);
                continue;
            };
            let Located { reference, folder, files } = find(&wanted).with_context(|| key.to_string())?;
            self.set_value(key, |value| match value.get_mut(i) {
                Some(Value::Object(source)) => _ = source.insert("path".into(), reference.to_string().into()),
                Some(path) => *path = reference.to_string().into(),
                None => {}
            });
            located.push(Source { path: folder, files, split: None, ..source });
        }
        Ok(located)
    }
}

/// Tells whether a path can be that of a model: a folder, or the id of a repository of the hub.
pub(super) fn is_model(path: &Path) -> bool {
    path.is_dir() || Reference::of(path, Kind::Model).is_some()
}

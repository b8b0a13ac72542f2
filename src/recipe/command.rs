//! Lists the recipe keys that each command reads, and the options of its command line that replace a key.

use super::keys;

/// A command that reads some of the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Train,
    Data,
    /// `plan` with a recipe.
    Plan,
    /// `plan` with a shape.
    PlanShape,
    Eval,
    Generate,
    Merge,
    /// `merge` that scores a data set.
    MergeScored,
    Export,
    Quantize,
    /// `quantize` with a shape.
    QuantizeShape,
    /// `bench step` with a shape.
    BenchStep,
    /// `bench step` with made-up shards.
    BenchRun,
    BenchKernels,
    BenchCollectives,
}

impl Command {
    #[cfg(test)]
    pub const ALL: [Command; 15] = [
        Self::Train,
        Self::Data,
        Self::Plan,
        Self::PlanShape,
        Self::Eval,
        Self::Generate,
        Self::Merge,
        Self::MergeScored,
        Self::Export,
        Self::Quantize,
        Self::QuantizeShape,
        Self::BenchStep,
        Self::BenchRun,
        Self::BenchKernels,
        Self::BenchCollectives,
    ];

    /// Returns the command's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Data => "data",
            Self::Plan => "plan",
            Self::PlanShape => "plan --shape",
            Self::Eval => "eval",
            Self::Generate => "generate",
            Self::Merge => "merge",
            Self::MergeScored => "merge --dataset",
            Self::Export => "export",
            Self::Quantize => "quantize",
            Self::QuantizeShape => "quantize --shape",
            Self::BenchStep => "bench step",
            Self::BenchRun => "bench step --shards",
            Self::BenchKernels => "bench kernels",
            Self::BenchCollectives => "bench collectives",
        }
    }

    /// Returns the keys that an option of the command line sets, with that option.
    pub(super) fn options(self) -> &'static [(&'static str, &'static str)] {
        const MODEL: &str = keys::MODEL.path;
        const LENGTH: &str = keys::MAX_LENGTH.path;
        match self {
            Self::Train | Self::Data | Self::Plan | Self::BenchCollectives => &[],
            Self::Eval | Self::MergeScored => &[
                (MODEL, "--model"),
                (keys::ADAPTER.path, "--adapter"),
                (keys::TRAIN.path, "--dataset"),
                (LENGTH, "--max-length"),
            ],
            Self::Generate => &[(MODEL, "--model"), (keys::ADAPTER.path, "--adapter"), (keys::SEED.path, "--seed")],
            Self::Merge | Self::Export => &[(MODEL, "--model"), (keys::ADAPTER.path, "--adapter")],
            Self::Quantize => &[(MODEL, "--model"), (keys::SHARDS.path, "--output")],
            Self::QuantizeShape => &[(MODEL, "--shape"), (keys::SHARDS.path, "--output")],
            Self::BenchRun => &[
                (MODEL, "--shards"),
                (keys::SHARDS.path, "--shards"),
                (keys::OUTPUT_DIR.path, "--output"),
                (LENGTH, "--seq"),
                (keys::BATCH_SIZE.path, "--micro-batch"),
                (keys::ACCUMULATION_STEPS.path, "--accum"),
                (keys::MAX_STEPS.path, "--steps"),
                (keys::SAVE_STEPS.path, "--save-steps"),
            ],
            Self::PlanShape | Self::BenchStep => &[
                (MODEL, "--shape"),
                (LENGTH, "--seq"),
                (keys::BATCH_SIZE.path, "--micro-batch"),
                (keys::ACCUMULATION_STEPS.path, "--accum"),
            ],
            Self::BenchKernels => &[(MODEL, "--shape"), (LENGTH, "--seq")],
        }
    }

    /// Returns what a user of this command writes to set a key: its option if the command line has one, else the
    /// key's path, as in `--set key=…` and in a recipe. Returns `None` if the command does not read the key.
    pub fn name_of(self, path: &'static str) -> Option<&'static str> {
        let option = self.options().iter().find(|(key, _)| *key == path).map(|(_, option)| *option);
        let is_read = || keys::ALL.iter().any(|key| key.path == path && key.readers.contains(&self));
        option.or_else(|| is_read().then_some(path))
    }

    /// Returns whether the command needs the folder of a model.
    pub(super) fn needs_model(self) -> bool {
        use Command::{Data, Eval, Export, Generate, Merge, MergeScored, Plan, Quantize, Train};
        matches!(self, Train | Data | Plan | Eval | Generate | Merge | MergeScored | Export | Quantize)
    }
}

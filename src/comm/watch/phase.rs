//! The parts of a run, from before MPI_Init to the end.

/// The parts of a run, named in messages and in tests of how a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before MPI_Init.
    Start,
    /// The exchange of what ranks must have in common.
    Agree,
    /// Finding models and rows of the hub, and downloading them.
    Fetch,
    /// Making shard files.
    Quantize,
    /// Reading and mapping what the model needs.
    Load,
    /// Starting the device.
    Device,
    /// Starting the device's collectives and deciding what is kept where.
    Decide,
    /// Taking memory and copying the shards to where they stay.
    Copy,
    /// Loading the adapter that training starts from.
    Adapter,
    Step(usize),
    /// Bringing the values of a checkpoint together.
    Checkpoint,
    /// Giving the values of a checkpoint to the ranks.
    Resume,
    Save,
    /// Before MPI_Finalize.
    End,
}

impl Phase {
    /// Returns the phase's name in the variable for faults.
    pub fn word(self) -> String {
        match self {
            Phase::Step(step) => step.to_string(),
            other => format!("{other:?}").to_lowercase(),
        }
    }

    pub fn text(self) -> String {
        match self {
            Phase::Start => "the start of MPI".into(),
            Phase::Agree => "the agreement of the ranks".into(),
            Phase::Fetch => "fetching from the hub".into(),
            Phase::Quantize => "making the shards".into(),
            Phase::Load => "loading the model".into(),
            Phase::Device => "starting the device".into(),
            Phase::Decide => "deciding what is kept where".into(),
            Phase::Copy => "copying the shards".into(),
            Phase::Adapter => "loading the adapter".into(),
            Phase::Step(step) => format!("step {step}"),
            Phase::Checkpoint => "saving a checkpoint".into(),
            Phase::Resume => "resuming from a checkpoint".into(),
            Phase::Save => "saving".into(),
            Phase::End => "the end".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_know_every_phase_by_one_word() {
        let phases = [
            (Phase::Start, "start"),
            (Phase::Agree, "agree"),
            (Phase::Fetch, "fetch"),
            (Phase::Quantize, "quantize"),
            (Phase::Load, "load"),
            (Phase::Device, "device"),
            (Phase::Decide, "decide"),
            (Phase::Copy, "copy"),
            (Phase::Adapter, "adapter"),
            (Phase::Resume, "resume"),
            (Phase::Checkpoint, "checkpoint"),
            (Phase::Save, "save"),
            (Phase::End, "end"),
        ];
        phases.into_iter().for_each(|(phase, word)| assert_eq!(phase.word(), word));
        assert_eq!(Phase::Step(12).word(), "12");
    }
}

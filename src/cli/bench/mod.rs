//! `bench`: one file a benchmark.

mod step;

use anyhow::Result;
use clap::Subcommand;

use super::start::Start;

#[derive(Subcommand)]
pub enum Bench {
    /// Training steps on made-up weights of a shape; prints one JSON object
    Step(step::StepBench),
}

pub fn run(start: &Start, bench: &Bench, overrides: &[String]) -> Result<()> {
    match bench {
        Bench::Step(args) => step::run(start, args, overrides),
    }
}

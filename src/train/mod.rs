//! Runs training, evaluation and generation, with logs and with checks on the way.

pub mod adapters;
pub mod best;
pub mod check;
pub mod eval;
pub mod generate;
pub mod log;
pub mod metrics;
pub mod objective;
pub mod per_token;
pub mod result;
pub mod run;
pub mod saving;
pub mod signals;
pub mod skipping;
pub mod step;
pub mod stop;

//! Lists the items that tests and benchmarks outside of the crate use. All modules are private to the crate, so the
//! compiler finds what nobody uses any more.

pub use crate::checkpoint::adapter::{Adapter, AdapterSettings};
pub use crate::checkpoint::load::LoadOptions;
pub use crate::checkpoint::output::record::RunRecord;
pub use crate::checkpoint::shards::{Found, Made, ShardSpec, ShardWriter};
pub use crate::checkpoint::source::BaseModel;
pub use crate::comm::cuda_queue::{CudaQueue, QueueOptions};
pub use crate::comm::guarded::Guarded;
pub use crate::comm::host_queue::HostQueue;
pub use crate::comm::mpi::{MpiComm, World};
pub use crate::comm::spans::Span;
pub use crate::comm::{
    Comm, Delays, Gather, Groups, HostCopy, Position, Queue, ShardSource, TrainableBuffers, Waits, barrier,
};
pub use crate::data::chat_template::ChatTemplate;
pub use crate::data::{DataOptions, Dataset, Format, LossOn, Overlong, Packing, Sampler, TextTokenizer};
pub use crate::device::cpu::{Cpu, HostRegion};
pub use crate::device::cuda::compile::{AttentionVariant, Source};
pub use crate::device::cuda::{Cuda, HalfType, device_uuids, libraries};
pub use crate::device::*;
pub use crate::fsdp::check::check;
pub use crate::fsdp::exec::Engine;
pub use crate::fsdp::grads::Values;
pub use crate::fsdp::memory::{Limits, Residency};
pub use crate::fsdp::run::{Objective, RunArgs};
pub use crate::fsdp::schedule::{Accumulation, Action, Descriptor, Keep, Mode, build};
pub use crate::fsdp::unit::NumUnits;
pub use crate::model::batch::{MicroBatch, NO_TARGET};
pub use crate::model::spec::ModelSpec;
pub use crate::model::targets::{LoraKeys, Modules};
pub use crate::model::trainable::{LoraModule, Trainable, Trainables};
pub use crate::optim::adamw::Update;
pub use crate::plan::hardware::Hardware;
pub use crate::plan::memory::Sizes;
pub use crate::quant::double::{DYNAMIC_MAP, NestedAbsmax, quantize_absmax_around};
pub use crate::quant::nf4::{Absmax, CODEBOOK, Nf4Tensor, THRESHOLDS, quantize};
pub use crate::quant::record::{Dtype, Encoding};
pub use crate::start::planned::{Machine, Planned};
pub use crate::train::step::{StepArgs, StepRecord, step, step_unless};

/// Adapters, made and read.
pub mod adapter {
    pub use crate::checkpoint::adapter::{fresh, load, remarks, save};
}

/// Kernels, compiled without a GPU.
pub mod compile {
    pub use crate::device::cuda::compile::{HOPPER, HOPPER_SOURCES, SOURCES, compile, nvrtc_version, target};
}

/// Rows as micro-batches.
pub mod data {
    pub use crate::data::prompts::Prompts;
    pub use crate::data::{Source, eval_micro_batches, step_micro_batches};
}

/// Double quantization.
pub mod double {
    pub use crate::quant::double::mean;
}

/// Held-out scores.
pub mod eval {
    pub use crate::train::eval::score;
}

/// Adapters in GGUF.
pub mod gguf {
    pub use crate::checkpoint::gguf::{Export, Type};
}

/// Texts, one token after the other.
pub mod generate {
    pub use crate::train::generate::{Finish, Sampling, generate};
}

/// Bases and their shards.
pub mod load {
    pub use crate::checkpoint::load::{open, planned};
}

/// Ranks as threads.
pub mod local {
    pub use crate::comm::local::groups;
}

/// Adapters merged into their bases.
pub mod merge {
    pub use crate::checkpoint::merge::{Form, Merge, Options};
}

/// NF4.
pub mod nf4 {
    pub use crate::quant::nf4::quantize;
}

/// Recipes, read.
pub mod recipe {
    pub use crate::recipe::{Command, load};
}

/// Checkpoints of training, written and found.
pub mod state {
    pub use crate::checkpoint::state::{Checkpoint, Found, Progress, Values, list, recover};
}

/// Bases of made-up weights.
pub mod synthetic {
    pub use crate::checkpoint::synthetic::base;
}

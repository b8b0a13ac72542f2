//! QLoRA fine-tuning of Llama-family models, sharded over ranks that `mpirun` or `srun` starts.
//!
//! Every rank memory-maps its own shard of the frozen base, kept as NF4 in bytes, and takes part in a hand-written FSDP
//! schedule: one all-gather per layer and pass, one reduce-scatter of each layer's LoRA gradients per step.
//!
//! # Code map
//!
//! | module | what is in it | what it does not know |
//! |---|---|---|
//! | [`device`] | memory, one op per kernel ([`device::ops`]); [`device::cpu`] is the reference, [`device::cuda`] the same on a GPU, its kernels in `kernels/` | models, ranks |
//! | [`quant`] | NF4, double quantization, the record | devices, files |
//! | [`comm`] | host collectives (MPI, threads), NCCL, and the ordered queue of collectives on device memory | models |
//! | [`model`] | Llama math on device ops | that it is sharded: neither [`comm`] nor [`fsdp`] |
//! | [`fsdp`] | layout, units, the schedule and its checker, the executor | files, data, the recipe |
//! | [`optim`] | AdamW's numbers, learning rates, clipping | |
//! | [`data`] | rows to documents to sequences to micro-batches | devices |
//! | [`checkpoint`] | base models, shard files, adapters | the recipe |
//! | [`plan`] | what a run will use: memory | files, data, the recipe |
//! | [`train`] | steps, evaluation, generation, logs | the command line |
//! | [`recipe`] | what was written (the recipe) becomes what was decided (the job) | |
//! | [`cli`] | one file per subcommand | |
//!
//! # How a step goes
//!
//! [`train::step`] counts the target tokens of all ranks and calls [`fsdp::exec::Engine::run`], which builds the schedule
//! ([`fsdp::schedule::build`], a pure function), has it checked ([`fsdp::check`]) and performs it action by action. A unit
//! is gathered into one of two slots by the communication thread while the unit before it computes; waited for;
//! dequantized into the one set of dense weights; passed through by all micro-batches; resharded. [`model::layer`] is a
//! flat list of ops forward, the same list cut short for a recompute, and a list backward.
//!
//! On a GPU the queue is a stream: starting a collective makes it wait for the compute stream, waiting makes the compute
//! stream wait for it, and the host runs ahead.
//!
//! # Invariants
//!
//! - A shard never cuts a record ([`quant::record`]), so any part of a tensor can be dequantized by itself.
//! - A buffer that a collective fills belongs to the queue until it is waited for: nobody can read it. Slots are NaN in
//!   every byte from the start of a gather on.
//! - All device memory is carved at start, by name, from a plan ([`device::arena`]); the loop allocates none.
//! - Random numbers depend on seed, step, sample, position, layer, module and feature: never on ranks or packing.
//! - Reductions over ranks are sums in rank order. Layer- or micro-batch-major, recomputed or kept, sharded or not: the
//!   same bits (tests/fsdp.rs).
//! - Any error or panic on any rank ends all ranks ([`comm::mpi::abort`]); nothing half-written has a final name
//!   ([`checkpoint::atomic`]).
//!
//! Two places where bitsandbytes' CPU and CUDA code differ are decided for CUDA: a block of zeros gets code 0 (so that with
//! double quantization it dequantizes to minus the error of its absmax, as there), and a short last block is multiplied by
//! the reciprocal of its absmax like all others.

pub mod checkpoint;
mod choices;
pub mod cli;
pub mod comm;
pub mod data;
pub mod device;
pub mod fsdp;
pub mod model;
pub mod optim;
pub mod plan;
pub mod quant;
pub mod recipe;
mod simd;
pub mod train;

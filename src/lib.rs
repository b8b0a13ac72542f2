//! QLoRA fine-tuning of language models, sharded over ranks that `mpirun` or `srun` starts.
//!
//! Every rank memory-maps its own shard of the frozen base, kept as NF4 in bytes, and takes part in a hand-written
//! FSDP schedule: one all-gather per layer and pass, one reduce-scatter of each layer's LoRA gradients per step.
//!
//! # Code map
//!
//! | module | what is in it | what it does not know |
//! |---|---|---|
//! | [`device`] | memory, one op per kernel ([`device::Ops`]); [`device::cpu`] is the reference, [`device::cuda`] the same on a GPU, its kernels in `kernels/` | models, ranks |
//! | [`quant`] | NF4, double quantization, the record | devices, files |
//! | [`comm`] | groups of ranks, host collectives (MPI, threads), NCCL, the watchdog, memory that the ranks of a node share, and the ordered queues of collectives on device memory and of copies to and from the host | models |
//! | [`model`] | a model as a value ([`model::spec`]), the families that make it from a config.json ([`model::family`]), what is trained in it ([`model::trainable`]), and the math of its layers ([`model::stage`]) and head on device ops | that it is sharded: neither [`comm`] nor [`fsdp`] |
//! | [`fsdp`] | layout, units, the schedule and its checker, the executor | files, data, the recipe |
//! | [`optim`] | AdamW's numbers, learning rates, loss scaling, clipping | ranks, the recipe |
//! | [`data`] | rows to tokens in a file ([`data::store`]) to documents to sequences to micro-batches | devices |
//! | [`checkpoint`] | base models, shard files, adapters, the life of an output folder | the recipe |
//! | [`hub`] | models, adapters and data sets by their names: the cache of `huggingface_hub`, and downloads into it | ranks, the recipe |
//! | [`plan`] | the choice of what is kept where, and predictions of memory and time, for this machine or another | data, the recipe |
//! | [`train`] | steps, objectives, evaluation, generation, logs, how a result comes to rest | the command line |
//! | [`recipe`] | the recipe, as it was written, becomes the job, as it was decided | devices, ranks, how a job is run |
//! | [`start`] | everything between a job and the first step: what all ranks must have in common ([`start::agree`]), placement, budgets, the engine; a plan for a machine that is not there | the command line, how a recipe is written |
//! | [`mod@bench`] | measurements of this machine: steps on made-up weights, ops at the sizes of a layer, collectives | the command line, how a recipe is written |
//! | [`cli`] | one file per subcommand | |
//! | [`files`] | opening, mapping and reading input files, bounded; names of files as messages show them | everything else |
//! | [`logging`], [`progress`], [`stderr`] | events as lines or JSON; how far long work is, as a bar or lines; lines on standard error, each written whole | everything else |
//!
//! Two more serve others: `choices` declares enums of a recipe's words, and `simd` compiles loops for wide vectors.
//! The modules are private; the program takes what this file re-exports, and tests take what [`testing`] lists.
//!
//! # A model
//!
//! [`model::spec::ModelSpec`] lists the tensors, norms, linear modules and sizes of every layer, each found by its
//! id. Loading, sharding, memory, the planner and the names in an adapter are derived from it. A family (a file of
//! `src/model/family`) reads its config.json and says how its layers differ from the decoder that all families are
//! variants of. The math is in the stages: attention and the MLP, each with forward, backward, the values that it
//! saves, its scratch and its cost in one place.
//!
//! # A step
//!
//! [`train::step`] counts the target tokens of all ranks and calls [`fsdp::exec::Engine::run`], which builds the
//! schedule ([`fsdp::schedule::build`], a pure function), has it checked ([`fsdp::check`]) and performs it action by
//! action. The communication thread gathers a unit into one of two slots while the unit before it computes. When its
//! gather has been waited for, the unit is dequantized into the one set of dense weights that layers share, all
//! micro-batches pass through it, and it is resharded. Plain weights that a device can compute with are used where they
//! lie, and layers for which there is room keep their dense weights. A unit that a GPU has as a whole already
//! ([`comm::Queue::whole`]) is dequantized from where it is, and adapter values likewise; where nothing is gathered, the
//! slots take no memory. A micro-batch may
//! be scored without a backward pass, with the adapter or without it, beside others that train
//! ([`fsdp::schedule::Descriptor`]). [`model::layer`] runs the stages of a layer one after the other; a stage is a flat
//! list of ops forward, the same list cut short for a recompute, and a list backward. The head gives the
//! log-probabilities of the target tokens; an [`Objective`](fsdp::run::Objective) ([`train::objective`]) turns them into
//! the coefficients of their gradients.
//!
//! The host looks up the embedding of the first micro-batch of the next step while a GPU still computes this one
//! (`fsdp::embedding`), and reads the norm of the gradients of all layers at once, so that a GPU hardly waits for it.
//!
//! On a GPU each queue is a stream: starting an action makes its stream wait for the compute stream, waiting makes
//! the compute stream wait for the action, and the host runs ahead. [`comm::watch`] ends all ranks when one waits too
//! long, from MPI_Init to MPI_Finalize.
//!
//! # Streaming
//!
//! [`plan::decide`] weighs what stays on the device ([`fsdp::memory::Residency`]) and what of each layer is kept for
//! backward ([`fsdp::schedule::Keep`]) by the time that the schedule would take ([`plan::throughput`]). The rest
//! waits in one mapping of exact size that the driver pins ([`device::cpu::HostRegion`]), never in a mapped file.
//!
//! A *shard* is fetched as the first half of its gather, into its own place in the slot, so that the all-gather is in
//! place. CPU ranks do the same, from the mapped file. If the ranks of a node share that memory
//! ([`comm::Gather::Host`]), each rank fetches all shards instead. A *boundary* (a layer's input) is put on the host
//! when its layer has read it, and fetched into whatever buffer is free when backward comes near: `fsdp::offload`
//! weaves these copies into the schedule, where the checker sees them. *LoRA values* are fetched like shards, their
//! gradients are put after the reduction, and AdamW runs on the host, in the arithmetic of its kernel to the bit.
//!
//! # Groups of ranks
//!
//! [`comm::Groups`] has three: all ranks; the ranks that hold one base together, a shard each; and the ranks that
//! hold the same shard. full_shard, hybrid_shard and no_shard differ in the size of these groups alone. Gradients are
//! summed over the ranks of a base in their order, then over the bases in theirs.
//!
//! # Invariants
//!
//! - A shard never cuts a record ([`quant::record`]), so any part of a tensor can be dequantized by itself.
//! - A buffer that a collective fills belongs to the queue until it is waited for: nobody can read it. Slots are NaN
//!   in every byte until a gather fills them.
//! - All device memory is carved at start, by name, from a plan ([`device::arena`]); the loop allocates none.
//! - Random numbers depend on seed, step, sample, position, layer, module and feature: never on ranks or packing.
//! - Reductions over ranks are sums in rank order (hybrid_shard: inside each node, then over nodes). The result has
//!   the same bits whether the order is layer- or micro-batch-major, activations are recomputed or kept, the base is
//!   sharded or not, shards are resident or streamed, and NCCL or the host gathers them (tests/fsdp.rs on CPU ranks,
//!   tests/gpu.rs on GPUs).
//! - Any error or panic on any rank ends all ranks ([`comm::mpi::abort`]); nothing half-written has a final name
//!   ([`checkpoint::atomic`]), and a result takes the place of another as one step ([`checkpoint::output`]).
//!
//! Where bitsandbytes' CPU and CUDA code differ, CUDA is followed (tests/golden/nf4_cuda.safetensors was made there):
//! a block of zeros gets code 0 (so that with double quantization it dequantizes to minus the error of its absmax, as
//! there), a short last block is multiplied by the reciprocal of its absmax like all others, and the thresholds
//! between codes are the kernel's constants, not the midpoints that f32 gives.

mod bench;
mod checkpoint;
mod choices;
mod cli;
mod comm;
mod data;
mod device;
mod files;
mod fsdp;
mod guarded;
mod hub;
mod logging;
mod model;
mod optim;
mod plan;
mod progress;
mod quant;
mod recipe;
mod simd;
mod start;
pub mod stderr;
pub mod testing;
mod train;

pub use cli::Cli;
pub use comm::mpi::{World, abort, launcher_rank};
pub use comm::watch;
pub use guarded::is_guarded;
pub use logging::{LogFormat, error as log_error, install as install_log, is_json as is_json_log};
pub use recipe::RecipeError;
pub use start::agree::Disagreement;
pub use train::run::Outcome;
pub use train::signals::claim as claim_signals;
pub use train::stop::{STOPPED, listen as listen_for_signals};

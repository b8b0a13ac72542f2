//! Training on GPUs: streaming against resident, several ranks against one, and how a job ends there. These tests are
//! ignored unless the caller asks for them. A test of several ranks runs itself again, under mpirun.

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::cli::{MPI_ENVIRONMENT, program};
use common::relative_error;
use fsdp_qlora::testing::{
    Accumulation, Adapter, AdapterSettings, Arena, Cpu, Cuda, CudaQueue, Delays, Device, Engine, Gather, Groups,
    Guarded, HostCopy, HostRegion, Keep, Limits, LoraKeys, MicroBatch, Mode, ModelSpec, Modules, MpiComm, Position,
    Queue, QueueOptions, Residency, Sizes, StepArgs, Trainables, Update, Values, World, adapter, barrier, local, step,
    synthetic,
};
use half::bf16;

const LAYERS: usize = 5;
/// Micro-batches of a step, on all ranks.
const GLOBAL_MICRO_BATCHES: usize = 8;
const TOKENS: usize = 192;

/// Streams everything from the host that can be streamed.
const NOTHING_RESIDENT: Residency = Residency { units: 0, trainables: false, boundary_buffers: 0 };

/// Variable that says that this process is a rank which a test has started.
const IS_RANK: &str = "GPU_TEST_IS_RANK";

fn gpu(ordinal: usize) -> Cuda<bf16> {
    Cuda::new(ordinal, &std::env::temp_dir().join("fsdp-qlora-test-kernels")).unwrap()
}

fn config() -> ModelSpec {
    let text = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9000, "hidden_size": 512,
        "intermediate_size": 1408, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10_000.0, "tie_word_embeddings": false,
    });
    ModelSpec::parse(text.to_string().as_bytes(), "test").unwrap()
}

/// An adapter whose B is not zero, so that every matrix has a gradient.
fn start_adapter(config: &ModelSpec) -> Adapter {
    let keys = LoraKeys::uniform(8, 16.0, Modules::AllLinear);
    let settings = AdapterSettings::new(keys, 0.1, config).unwrap();
    let mut adapter = adapter::fresh(settings, config, 7);
    for values in &mut adapter.layers {
        for (i, value) in values.iter_mut().enumerate().filter(|(_, v)| **v == 0.0) {
            *value = ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.02;
        }
    }
    adapter
}

/// The way in which a run is made.
#[derive(Clone, Copy, Debug)]
struct Options {
    accumulation: Accumulation,
    keep: Keep,
    gather: Gather,
    residency: Residency,
    dense_layers: usize,
    /// True for a base in 4 bit, false for one in bf16.
    in_4bit: bool,
    /// Number of ranks that hold a base together; `None` means all.
    num_shards: Option<usize>,
    /// Takes the micro-batches of a step in the opposite order: the same step but for the order of sums.
    reversed: bool,
    delay: Duration,
}

const PLAIN: Options = Options {
    accumulation: Accumulation::Layer,
    keep: Keep::NOTHING,
    gather: Gather::Collective,
    residency: Residency::ALL,
    dense_layers: 0,
    in_4bit: true,
    num_shards: None,
    reversed: false,
    delay: Duration::ZERO,
};

/// Losses, the gradients of step 1 by layer, and the final values by layer.
#[derive(Clone, Debug, PartialEq)]
struct Curve {
    losses: Vec<f64>,
    grads: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

fn micro_batch(step_idx: usize, index: usize) -> MicroBatch {
    let mut batch = MicroBatch::new();
    let mut left = TOKENS;
    for document in 0.. {
        let len = (31 + 40 * document).min(left);
        let sample = ((step_idx * GLOBAL_MICRO_BATCHES + index) * 100 + document) as u64;
        let ids: Vec<u32> = (0..len).map(|t| ((sample as usize * 7919 + t * 104_729) % 9000) as u32).collect();
        batch.push(sample, &ids, &vec![true; len]);
        left -= len;
        if left == 0 {
            return batch;
        }
    }
    unreachable!("a micro-batch is filled")
}

fn train(cuda: &Cuda<bf16>, ranks: Ranks, options: &Options, num_steps: usize) -> Curve {
    let (groups, config) = (ranks(options.num_shards), config());
    let Position { rank, world_size, shard, num_shards, .. } = groups.position();
    let base =
        synthetic::base(cuda, config.clone(), options.in_4bit.then_some(true), (shard, num_shards), |_| ()).unwrap();
    let adapter = start_adapter(&config);
    let lora = Trainables::new(&config, adapter.settings.lora_config());
    let num_micro_batches = GLOBAL_MICRO_BATCHES / world_size;
    let limits = Limits {
        accumulation: options.accumulation,
        keep: options.keep,
        gather: options.gather,
        residency: options.residency,
        dense_layers: options.dense_layers,
        ..Limits::new(Mode::Train, TOKENS, num_micro_batches)
    };
    let sizes = Sizes { spec: &config, layouts: &base.layouts, trainables: Some(&lora), world_size };
    let max_gradients = sizes.max_gradients();
    let queue_options = QueueOptions { max_gradients, share_gpu: shares_gpu(), delays: Delays::all(options.delay) };
    let queue = CudaQueue::new(cuda.clone(), groups, queue_options).unwrap();
    let mut engine = Engine::new(cuda.clone(), Cpu::new(2), queue, base, Some(lora), limits).unwrap();
    for (layer, values) in adapter.layers.iter().enumerate() {
        engine.load_trainable(layer, values).unwrap();
    }
    let mut curve = Curve { losses: Vec::new(), grads: Vec::new(), values: Vec::new() };
    let batches_of = |step_idx| -> Vec<MicroBatch> {
        let mut batches: Vec<MicroBatch> =
            (0..num_micro_batches).map(|m| micro_batch(step_idx, m * world_size + rank)).collect();
        if options.reversed {
            batches.reverse();
        }
        batches
    };
    for step_idx in 0..num_steps {
        let batches = batches_of(step_idx);
        // The second step begins with another micro-batch than the first one was told.
        let next = batches_of(if step_idx == 0 { 0 } else { step_idx + 1 });
        let update = Update {
            learning_rate: 1e-3,
            lr_ratio: 1.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: Some(0.5),
            loss_scale: 1.0,
            step: step_idx as u32 + 1,
        };
        let step_number = step_idx as u32 + 1;
        let args = StepArgs { step: step_number, num_micro_batches, update: &update, seed: 42, next: next.first() };
        curve.losses.push(step(&mut engine, &batches, &args).unwrap().loss);
        if step_idx == 0 {
            curve.grads =
                (0..LAYERS).map(|layer| engine.gather_trainable_to_host(layer, Values::Grad).unwrap()).collect();
        }
    }
    curve.values = (0..LAYERS).map(|layer| engine.gather_trainable_to_host(layer, Values::Master).unwrap()).collect();
    curve
}

/// Returns whether the ranks share a GPU, as they do where there is only one.
fn shares_gpu() -> bool {
    fsdp_qlora::testing::device_uuids().unwrap().len() < 2
}

/// Makes the ranks of a run, in groups of `num_shards`; `None` makes one group.
type Ranks<'a> = &'a dyn Fn(Option<usize>) -> Groups;

fn alone(_: Option<usize>) -> Groups {
    local::groups(1, 1).remove(0)
}

/// Lists the variants of a run that may not change a bit of its result.
fn variants() -> Vec<Options> {
    let mut all = Vec::new();
    let partly = Residency { units: 3, boundary_buffers: 13, ..Residency::ALL };
    let parts = Keep { lora: 4, attention: 2, mlp: 3, rest: 1 };
    let some_u = Keep { lora: 2, ..Keep::NOTHING };
    for keep in [Keep::NOTHING, some_u, Keep::LORA, parts, Keep::DEAREST, Keep::EVERYTHING] {
        for (gather, residency, delay_ms) in [
            (Gather::Collective, Residency::ALL, 0),
            (Gather::Host, Residency::ALL, 0),
            (Gather::Collective, NOTHING_RESIDENT, 2),
            (Gather::Host, NOTHING_RESIDENT, 2),
            (Gather::Collective, partly, 1),
            (Gather::Host, partly, 0),
        ] {
            all.push(Options { keep, gather, residency, delay: Duration::from_millis(delay_ms), ..PLAIN });
        }
        let (accumulation, delay) = (Accumulation::MicroBatch, Duration::from_millis(1));
        all.push(Options { accumulation, keep, gather: Gather::Host, residency: partly, ..PLAIN });
        all.push(Options { accumulation, keep, residency: NOTHING_RESIDENT, delay, ..PLAIN });
    }
    all.push(Options { num_shards: Some(1), ..PLAIN });
    for dense_layers in [1, usize::MAX] {
        all.push(Options { dense_layers, ..PLAIN });
        all.push(Options { dense_layers, keep: Keep::EVERYTHING, num_shards: Some(1), ..PLAIN });
        all.push(Options { dense_layers, gather: Gather::Host, residency: NOTHING_RESIDENT, ..PLAIN });
    }
    all.push(Options { num_shards: Some(1), residency: NOTHING_RESIDENT, ..PLAIN });
    all
}

#[test]
#[ignore = "needs a GPU"]
fn streaming_and_lifetime_do_not_change_a_bit() {
    let cuda = gpu(0);
    let reference = train(&cuda, &alone, &PLAIN, 3);
    assert!(reference.grads.iter().flatten().all(|g| g.is_finite()));
    assert!(reference.losses[2] < reference.losses[0], "it learns: {:?}", reference.losses);
    for options in variants() {
        assert!(train(&cuda, &alone, &options, 3) == reference, "{options:?}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn weights_that_are_used_in_place_do_not_change_a_bit() {
    let cuda = gpu(0);
    let plain = Options { in_4bit: false, ..PLAIN };
    let reference = train(&cuda, &alone, &plain, 3);
    assert!(reference.losses[2] < reference.losses[0], "it learns: {:?}", reference.losses);
    let delay = Duration::from_millis(2);
    for accumulation in [Accumulation::Layer, Accumulation::MicroBatch] {
        for (gather, residency) in [
            (Gather::Collective, NOTHING_RESIDENT),
            (Gather::Host, NOTHING_RESIDENT),
            (Gather::Host, Residency { units: 3, ..Residency::ALL }),
        ] {
            let options = Options { accumulation, gather, residency, delay, ..plain };
            assert!(train(&cuda, &alone, &options, 3) == reference, "{options:?}");
        }
    }
}

fn is_rank() -> bool {
    std::env::var_os(IS_RANK).is_some()
}

/// Runs a test of this program on two ranks; [`is_rank`] is true there.
fn on_two_ranks(test: &str, variables: &[(&str, &str)]) -> std::process::Output {
    let mut command = Command::new(std::env::var("MPIEXEC").unwrap_or("mpirun".into()));
    command.args(["-np", "2"]).arg(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.envs(MPI_ENVIRONMENT).envs(variables.iter().copied()).env(IS_RANK, "1");
    command.output().expect("mpirun (scripts/setup installs it)")
}

/// The GPU of a rank that a test has started.
fn gpu_of_rank(world: &World) -> Cuda<bf16> {
    gpu(if shares_gpu() { 0 } else { world.local_rank })
}

#[test]
#[ignore = "needs a GPU"]
fn two_ranks_are_as_one() {
    const STEPS: usize = 50;
    if !is_rank() {
        let output = on_two_ranks("two_ranks_are_as_one", &[]);
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{stdout}\n{stderr}");
        return println!("{stdout}");
    }
    let world = World::init().unwrap();
    let cuda = gpu_of_rank(&world);
    let comm = |num_shards: Option<usize>| {
        MpiComm::new(&world).unwrap().into_groups(num_shards.unwrap_or(world.world_size)).unwrap()
    };
    let one = train(&cuda, &alone, &PLAIN, STEPS);
    let two = train(&cuda, &comm, &PLAIN, STEPS);
    assert_eq!(two.losses[0].to_bits(), one.losses[0].to_bits(), "the loss of step 1");
    for (layer, (a, b)) in two.grads.iter().zip(&one.grads).enumerate() {
        let error = relative_error(a, b);
        assert!(error <= 1e-5, "gradients of layer {layer} differ by {error:e}");
    }
    let spread = |curve: &Curve| {
        let relative = curve.losses.iter().zip(&one.losses).map(|(a, b)| ((a - b) / b).abs());
        relative.fold(0.0, f64::max)
    };
    let (ranks, order) = (spread(&two), spread(&train(&cuda, &alone, &Options { reversed: true, ..PLAIN }, STEPS)));
    println!(
        "rank {}: {STEPS} steps differ by {ranks:e} for two ranks, {order:e} for another order of sums",
        world.rank
    );
    // bf16 feeds the order of sums back into the losses: two samples of the same spread.
    assert!(ranks <= 2.0 * order, "losses {:?} and {:?}", two.losses, one.losses);
    assert!(train(&cuda, &comm, &PLAIN, STEPS) == two, "the same run twice");
    let short = train(&cuda, &comm, &PLAIN, 3);
    for options in variants() {
        assert!(train(&cuda, &comm, &options, 3) == short, "{options:?}");
    }
    barrier(&mut MpiComm::new(&world).unwrap()).unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn a_stuck_gather_ends_all_ranks_with_its_name() {
    if is_rank() {
        let world = World::init().unwrap();
        let cuda = gpu_of_rank(&world);
        let delay = if world.rank == 1 { Duration::from_secs(30) } else { Duration::ZERO };
        let groups = |_| MpiComm::new(&world).unwrap().into_groups(2).unwrap();
        train(&cuda, &groups, &Options { delay, ..PLAIN }, 1);
        return;
    }
    let start = Instant::now();
    let output = on_two_ranks("a_stuck_gather_ends_all_ranks_with_its_name", &[("FSDP_QLORA_TIMEOUT_S", "3")]);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success(), "{stdout}{stderr}");
    assert!(stderr.contains("gather of") && stderr.contains("did not end within 3 s"), "{stdout}{stderr}");
    println!("a stuck gather: all ranks gone after {:.1} s\n{stderr}", start.elapsed().as_secs_f64());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
#[ignore = "needs a GPU"]
fn the_host_reads_what_a_slow_put_brings_once_it_has_waited() {
    const LEN: usize = 4096;
    let cuda = gpu(0);
    let delay = Duration::from_millis(200);
    let delays = Delays { before_put: delay, ..Delays::default() };
    let mut queue = CudaQueue::new(cuda.clone(), alone(None), QueueOptions { delays, ..Default::default() }).unwrap();
    let mut on_host = Arena::<Cpu>::measure();
    on_host.carve::<f32>("values", LEN).unwrap();
    let mut on_host = Arena::allocate_host(&cuda, on_host.into_plan()).unwrap();
    let host = Guarded::new(on_host.carve::<f32>("values", LEN).unwrap());
    let mut device = Arena::carved(&cuda, |arena| arena.carve::<f32>("values", LEN)).unwrap();
    let values: Vec<f32> = (0..LEN).map(|i| i as f32 - 0.5).collect();
    cuda.upload(device.view_mut(), &values).unwrap();

    let start = Instant::now();
    let put = queue.put("put".into(), HostCopy { device, host, len: LEN }).unwrap();
    let mut copy = queue.wait(put).unwrap();
    // The computation that follows is ordered after the put: it does not change what comes to the host.
    cuda.fill_bytes(copy.device.view_mut(), 0xFF).unwrap();
    assert!(copy.host.wait_on_host().unwrap().view().host() == values, "the host has read before the put has ended");
    assert!(start.elapsed() > delay / 2, "the put was not delayed: {:?}", start.elapsed());

    // The host writes where the put has ended, and a fetch brings that back.
    copy.host.wait_on_host_mut().unwrap().view_mut().host_mut().fill(7.0);
    let fetch = queue.fetch("fetch".into(), copy).unwrap();
    let copy = queue.wait(fetch).unwrap();
    let mut fetched = vec![0.0; LEN];
    cuda.download(&mut fetched, copy.device.view()).unwrap();
    assert!(fetched == [7.0; LEN]);
}

/// A folder with a small model's config.json.
fn shape() -> tempfile::TempDir {
    let shape = tempfile::tempdir().unwrap();
    let text = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9000, "hidden_size": 512,
        "intermediate_size": 1408, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2,
    });
    std::fs::write(shape.path().join("config.json"), text.to_string()).unwrap();
    shape
}

#[test]
#[ignore = "needs a GPU"]
fn a_rank_that_dies_ends_all() {
    let shape = shape();
    for fault in ["abort:1:3", "panic:1:3"] {
        let mut command = Command::new(std::env::var("MPIEXEC").unwrap_or("mpirun".into()));
        command.args(["-np", "2"]).arg(program()).args(["bench", "step", "--seq", "128", "--steps", "1000"]);
        command.args(["--device", "cuda", "--ranks-per-gpu", if shares_gpu() { "2" } else { "1" }]);
        command.arg("--shape").arg(shape.path()).envs(MPI_ENVIRONMENT).env("FSDP_QLORA_FAULT", fault);
        let start = Instant::now();
        let output = command.output().expect("mpirun (scripts/setup installs it)");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains("step 2"), "{fault}: {stderr}");
        println!("{fault}: all ranks gone {:.1} s after the start\n{stderr}", start.elapsed().as_secs_f64());
        assert!(start.elapsed() < Duration::from_secs(60), "{fault}: {:?}", start.elapsed());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn memory_that_is_not_there_is_refused_with_numbers() {
    let cuda = gpu(0);
    // The driver refuses to pin what is pinned already.
    let pinned = cuda.pin(HostRegion::new(1 << 20).unwrap()).unwrap();
    let error = cuda.pin(pinned).err().expect("pinned twice").to_string();
    assert!(error.contains("cannot pin 1048576 bytes of host memory"), "{error}");
    // Another process takes memory between the plan and the start.
    let free = cuda.free_bytes().unwrap();
    let taken = cuda.allocate(free / 2).unwrap();
    let error = cuda.allocate(free - (256 << 20)).err().expect("half of it is taken").to_string();
    assert!(error.contains(&format!("{} bytes of GPU memory are needed", free - (256 << 20))), "{error}");
    drop(taken);
    let shape = shape();
    for (set, text) in [
        ("fsdp.vram_budget=600MiB", "of device memory (a larger machine, or fsdp.vram_budget)"),
        ("fsdp.host_budget=1MiB", "of host memory (a larger machine, or fsdp.host_budget)"),
    ] {
        let mut command = Command::new(program());
        command
            .args(["bench", "step", "--seq", "128", "--accum", "2", "--steps", "1", "--device", "cuda", "--set", set]);
        command.args(["--set", "fsdp.offload_params=true", "--shape"]).arg(shape.path());
        let stderr = String::from_utf8_lossy(&command.output().unwrap().stderr).into_owned();
        assert!(stderr.contains("a rank needs at least") && stderr.contains(text), "{set}: {stderr}");
        println!("{set}: {stderr}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn training_in_fp16_scales_its_loss() {
    let place = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(program()).args(args).current_dir(place.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["quantize", "--shape", "qwen2.5-0.5b", "--world-size", "1", "--output", "shards"]);
    let steps = ["bench", "step", "--shards", "shards", "--output", "out", "--steps", "2", "--seq", "128"];
    run(&[&steps[..], &["--set", "quantization.bnb_4bit_compute_dtype=float16"]].concat());
    let metrics = std::fs::read_to_string(place.path().join("out/metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!(first["loss_scale"], 65_536.0, "{first}");
}

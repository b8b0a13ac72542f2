//! Gives a target its kept inputs and new ones made from them, and judges every run.
#![expect(clippy::print_stdout, reason = "tells scripts/fuzz how a campaign ended")]

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use fsdp_qlora::stderr;
use serde_json::json;

use super::alloc;
use super::coverage::Seen;
use super::form::Form;

/// New inputs of a target under `cargo test`, the same ones in every run.
const NUM_INPUTS: usize = 500;

/// Reads an input as the program does. It may fail with a message; it panics where more than reading went wrong.
type Read = Box<dyn FnMut(&[u8]) -> Result<()>>;

/// A reader of untrusted input.
pub struct Target {
    pub form: Form,
    /// Bytes that a run may hold at a time.
    pub max_bytes: usize,
    /// Seconds of the processor that a run may take; the program itself takes milliseconds for a usual input.
    pub max_seconds: f64,
    /// Words to put into inputs, besides those that the kept inputs have.
    pub words: &'static [&'static str],
    /// Files of tests/golden that are inputs too.
    pub seeds: Vec<Vec<u8>>,
    pub read: Read,
}

impl Target {
    /// A target with bounds far from what its inputs take.
    pub fn new(
        form: Form,
        words: &'static [&'static str],
        seeds: Vec<Vec<u8>>,
        read: impl FnMut(&[u8]) -> Result<()> + 'static,
    ) -> Target {
        Target { form, max_bytes: 256 << 20, max_seconds: 10.0, words, seeds, read: Box::new(read) }
    }
}

/// The allocator and the counters see the whole process, so one target runs at a time.
static ALONE: Mutex<()> = Mutex::new(());
/// Panics of all threads. The program ends all ranks at any of them.
static PANICS: AtomicU64 = AtomicU64::new(0);
/// Number of the input that is being read; odd while it is.
static INPUT: AtomicU64 = AtomicU64::new(0);

/// A campaign that `scripts/fuzz` has asked for.
struct Campaign {
    time: Duration,
    seed: u64,
    /// Folder for inputs that reached something new.
    grown: PathBuf,
}

impl Campaign {
    fn from_env(target: &str) -> Option<Campaign> {
        let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
        let time = Duration::from_secs(number("FUZZ_SECONDS")?);
        let grown = folder("grown").join(target);
        fs::create_dir_all(&grown).unwrap();
        Some(Campaign { time, seed: number("FUZZ_SEED").unwrap_or_default(), grown })
    }
}

/// A folder of `$FUZZ_FOLDER`, or of the build folder.
fn folder(name: &str) -> PathBuf {
    let of_build = || Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    let folder = std::env::var_os("FUZZ_FOLDER").map_or_else(of_build, PathBuf::from).join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Gives a target its inputs. `name` is that of its test, and of its folder in `tests/fuzz/corpus`.
pub fn fuzz(name: &'static str, target: Target) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    count_panics();
    let campaign = Campaign::from_env(name);
    let mut fuzzer = Fuzzer::new(name, target);
    let corpus = super::repository().join("tests/fuzz/corpus").join(name);
    let mut kept = [std::mem::take(&mut fuzzer.target.seeds), inputs_of(&corpus)].concat();
    assert!(!kept.is_empty(), "{}: no input", corpus.display());
    kept.extend(campaign.iter().flat_map(|campaign| inputs_of(&campaign.grown)));
    kept.into_iter().for_each(|input| fuzzer.keep(input));
    match campaign {
        None => (0..NUM_INPUTS).for_each(|i| drop(fuzzer.run_new(i as u64))),
        Some(campaign) => fuzzer.run_campaign(&campaign),
    }
}

/// The files of a folder, in the order of their names.
fn inputs_of(folder: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // The program makes an error of a guarded one, which is there for libraries and not for its own code.
            let is_own = info.location().is_some_and(|place| place.file().starts_with("src/"));
            if is_own || !fsdp_qlora::is_guarded() {
                PANICS.fetch_add(1, Ordering::SeqCst);
                shown(info);
            }
        }));
    });
}

struct Fuzzer {
    name: &'static str,
    target: Target,
    words: Vec<Vec<u8>>,
    /// Inputs that new ones are made from.
    pool: Vec<Vec<u8>>,
    seen: Seen,
    num_inputs: usize,
    /// The input that is being read, for the case that it ends the process.
    current: File,
    path: PathBuf,
}

impl Fuzzer {
    fn new(name: &'static str, target: Target) -> Fuzzer {
        let words = target.words.iter().map(|word| word.as_bytes().to_vec()).collect();
        let path = folder("current").join(name);
        let current = File::options().create(true).truncate(false).write(true).open(&path).unwrap();
        watch(target.max_seconds, &path);
        Fuzzer { name, target, words, pool: Vec::new(), seen: Seen::new(), num_inputs: 0, current, path }
    }

    /// Runs an input and keeps it, to make others from it.
    fn keep(&mut self, input: Vec<u8>) {
        self.run(&input);
        self.words.extend(self.target.form.words(&input));
        self.words.sort();
        self.words.dedup();
        self.pool.push(input);
    }

    fn run_campaign(&mut self, campaign: &Campaign) {
        let begin = Instant::now();
        while begin.elapsed() < campaign.time {
            let number = campaign.seed.wrapping_mul(1 << 32).wrapping_add(self.num_inputs as u64);
            if let Some(input) = self.run_new(number) {
                let mut hash = DefaultHasher::new();
                input.hash(&mut hash);
                fs::write(campaign.grown.join(format!("{:016x}", hash.finish())), &input).unwrap();
                self.pool.push(input);
            }
        }
        let (name, kept, edges) = (self.name, self.pool.len(), self.seen.num_edges());
        println!("\n{}", json!({"target": name, "inputs": self.num_inputs, "pool": kept, "edges": edges}));
    }

    /// Runs a new input, which `number` decides. Returns it if it reached something new.
    fn run_new(&mut self, number: u64) -> Option<Vec<u8>> {
        let mut rng = Rng::with_seed(number);
        // Half of the choices fall on the newest quarter.
        let from = if rng.bool() { self.pool.len() * 3 / 4 } else { 0 };
        let input = &self.pool[rng.usize(from..self.pool.len())];
        let other = &self.pool[rng.usize(0..self.pool.len())];
        let input = self.target.form.change(&mut rng, input, other, &self.words);
        self.run(&input).then_some(input)
    }

    /// Reads an input and judges the run. Returns true if it reached something new.
    fn run(&mut self, input: &[u8]) -> bool {
        // Some file systems write a file to the disk at once where it was cut to nothing before.
        self.current.write_all_at(input, 0).and_then(|()| self.current.set_len(input.len() as u64)).unwrap();
        self.num_inputs += 1;
        let panics = PANICS.load(Ordering::SeqCst);
        INPUT.fetch_add(1, Ordering::SeqCst);
        let read = AssertUnwindSafe(|| (self.target.read)(input));
        let ((result, is_new), held) = alloc::peak_of(|| self.seen.run(|| catch_unwind(read)));
        INPUT.fetch_add(1, Ordering::SeqCst);
        let max_bytes = self.target.max_bytes;
        if result.is_err() || PANICS.load(Ordering::SeqCst) != panics {
            self.fail("a panic");
        }
        if held > max_bytes {
            self.fail(&format!("{held} bytes of memory, at most {max_bytes} are allowed"));
        }
        is_new
    }

    fn fail(&self, what: &str) -> ! {
        panic!("{}: {what}\n{}", self.name, how_to_keep(self.name, &self.path));
    }
}

fn how_to_keep(target: &str, input: &Path) -> String {
    format!("help: copy {} to tests/fuzz/corpus/{target}, and it is read in every test", input.display())
}

/// Bound of the seconds for an input, and the input's path.
static WATCHED: Mutex<Option<(f64, PathBuf)>> = Mutex::new(None);

/// Ends the process from now on when the reading of one input takes more than so many seconds of the processor, or twenty
/// times as long by the clock.
fn watch(max_seconds: f64, input: &Path) {
    static ONCE: Once = Once::new();
    *WATCHED.lock().unwrap() = Some((max_seconds, input.to_path_buf()));
    ONCE.call_once(|| drop(std::thread::spawn(end_when_slow)));
}

fn end_when_slow() {
    /// Seconds between looks. Their number is the time by the clock, but for a time in which the whole process was stopped.
    const PAUSE: f64 = 0.5;
    let (mut seen, mut looks) = ((0, 0.0), 0);
    loop {
        std::thread::sleep(Duration::from_secs_f64(PAUSE));
        let (input, cpu) = (INPUT.load(Ordering::SeqCst), cpu_seconds());
        looks += 1;
        if input != seen.0 || input % 2 == 0 {
            (seen, looks) = ((input, cpu), 0);
        }
        let Some((max_seconds, path)) = WATCHED.lock().unwrap().clone() else { continue };
        if cpu - seen.1 > max_seconds || f64::from(looks) * PAUSE > 20.0 * max_seconds {
            let name = path.file_name().unwrap().to_string_lossy();
            stderr::line(&format!("{name}: more than {max_seconds} s\n{}", how_to_keep(&name, &path)));
            std::process::abort();
        }
    }
}

/// Time that this process has spent on processors.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    // After the name, which may hold spaces, the 12th and 13th field are ticks of 10 ms, in the program and the kernel.
    let fields = stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2);
    fields.map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
}

/// Targets that break each rule are found.
mod tests {
    use super::*;

    fn target(read: impl FnMut(&[u8]) -> Result<()> + 'static) -> Target {
        Target::new(Form::Text, &[], vec![b"input".to_vec()], read)
    }

    #[test]
    #[should_panic(expected = "a_panic: a panic")]
    fn a_panic() {
        fuzz("a_panic", target(|input| panic!("at {}", input.len())));
    }

    #[test]
    #[should_panic(expected = "a_panic_elsewhere: a panic")]
    fn a_panic_on_another_thread() {
        let read = |_: &[u8]| {
            let _ = std::thread::spawn(|| panic!("elsewhere")).join();
            Ok(())
        };
        fuzz("a_panic_elsewhere", target(read));
    }

    #[test]
    #[should_panic(expected = "bytes of memory, at most 268435456 are allowed")]
    fn too_much_memory() {
        let read = |_: &[u8]| {
            drop(vec![1u8; 300 << 20]);
            Ok(())
        };
        fuzz("too_much_memory", target(read));
    }

    #[test]
    #[should_panic(expected = "outside: a panic")]
    fn a_file_outside() {
        let folder = crate::folder::Folder::new(&[("file", Vec::new())]);
        let read = move |_: &[u8]| {
            fs::read(folder.root().join("model/file"))?;
            folder.check_outside();
            fs::read(folder.root().join("model/../outside/file"))?;
            folder.check_outside();
            Ok(())
        };
        fuzz("outside", target(read));
    }
}

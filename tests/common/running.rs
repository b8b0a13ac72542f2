//! A run that is at work, to be watched and interfered with.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::cli::Place;

/// A program at work, with its standard error in a file.
pub struct Running<'a> {
    pub place: &'a Place,
    pub child: Child,
}

impl<'a> Running<'a> {
    pub fn start(place: &'a Place, mut command: Command) -> Running<'a> {
        let log = std::fs::File::create(place.path("log")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().expect("mpirun (scripts/setup installs it)");
        Running { place, child }
    }

    /// Returns what the program has said so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.place.read("log")).into_owned()
    }

    /// Waits until something is so; false if the program has ended before.
    pub fn until(&mut self, is_so: impl Fn(&Place) -> bool) -> bool {
        let start = Instant::now();
        while !is_so(self.place) {
            if self.child.try_wait().unwrap().is_some() {
                return is_so(self.place);
            }
            assert!(start.elapsed() < Duration::from_secs(120), "it never came:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits until the program has said these words; false if it has ended without them.
    pub fn says(&mut self, words: &str) -> bool {
        self.until(|place| String::from_utf8_lossy(&place.read("log")).contains(words))
    }

    /// Waits for the end; its status, and what the program said.
    pub fn ends(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap().code();
        (status, self.text())
    }
}

/// A test that fails leaves no run behind.
impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            drop(self.child.kill());
            self.place.ranks().into_iter().for_each(|rank| _ = signal(rank, "KILL"));
        }
    }
}

/// Sends a signal to a process; false if it is gone.
pub fn signal(pid: u32, name: &str) -> bool {
    Command::new("sh").args(["-c", &format!("kill -{name} {pid} 2>/dev/null")]).status().unwrap().success()
}

/// Returns whether a set of signals of a process has this one: `SigCgt`, those that it catches, or `SigIgn`, those that it ignores (proc(5)).
pub fn has_signal(pid: u32, set: &str, number: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(':'));
    mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() >> (number - 1) & 1 == 1)
}

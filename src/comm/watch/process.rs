//! The state of the other ranks' processes as /proc shows it.

use std::io::ErrorKind;

/// State of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Runs,
    /// Stopped by a signal or a debugger.
    Stopped,
    /// In an uninterruptible system call: a disk, a network file system or a driver.
    InTheKernel,
    /// The process has ended.
    Gone,
    /// /proc does not show it.
    Unknown,
}

/// Returns the start time of a process, in clock ticks since the machine started; `None` if /proc does not show it.
pub fn start_time(process: u64) -> Option<u64> {
    parse(&std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?).map(|(_, started)| started)
}

/// Returns the state of the process that was started at that time with that id.
pub fn look(process: u64, started: u64) -> Process {
    match std::fs::read_to_string(format!("/proc/{process}/stat")) {
        Ok(text) => judge(&text, started),
        Err(error) if error.kind() == ErrorKind::NotFound => Process::Gone,
        // ESRCH: the process ended while its file was being read.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Process::Gone,
        Err(_) => Process::Unknown,
    }
}

fn judge(stat: &str, started: u64) -> Process {
    match parse(stat) {
        None => Process::Unknown,
        Some((_, found)) if found != started => Process::Gone,
        Some(('Z' | 'X' | 'x', _)) => Process::Gone,
        Some(('T' | 't', _)) => Process::Stopped,
        Some(('D', _)) => Process::InTheKernel,
        Some(_) => Process::Runs,
    }
}

/// State and start time, fields 3 and 22 of /proc/PID/stat (proc_pid_stat(5)). The name before them may hold
/// anything.
fn parse(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(state: char, started: u64) -> String {
        format!("42 (a) b) c) {state} {} {started} 0 0", "1 ".repeat(18).trim_end())
    }

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        for (state, expected) in [
            ('R', Process::Runs),
            ('S', Process::Runs),
            ('D', Process::InTheKernel),
            ('T', Process::Stopped),
            ('t', Process::Stopped),
            ('Z', Process::Gone),
        ] {
            assert_eq!(judge(&stat(state, 7), 7), expected, "{state}");
        }
        assert_eq!(judge(&stat('R', 8), 7), Process::Gone, "another process has its number");
        assert_eq!(judge("42 (a", 7), Process::Unknown);
        let own = u64::from(std::process::id());
        assert_eq!(look(own, start_time(own).unwrap()), Process::Runs);
        assert_eq!(look(u64::MAX, 1), Process::Gone);
    }
}

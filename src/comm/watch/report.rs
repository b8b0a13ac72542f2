//! The message of a time-out: which ranks are missing, and what every rank of this node is doing.

use super::board::{Record, State};
use super::process::Process;

/// A wait that took too long, as seen by the rank that reports it.
pub struct TimeOut<'a> {
    pub name: &'a str,
    pub limit_s: u64,
    /// Name of the variable that raises the limit.
    pub variable: &'a str,
    /// Further help.
    pub help: Option<&'a str>,
    /// Number, record and process state of each rank of this node; empty before MPI says which ranks these are.
    pub ranks: &'a [(usize, Record, Process)],
    pub world_size: usize,
}

impl TimeOut<'_> {
    /// Returns the lines of the message, without the prefix of the rank that reports it.
    pub fn text(&self) -> String {
        let TimeOut { name, limit_s, variable, help, ranks, world_size } = self;
        let missing: Vec<usize> =
            ranks.iter().filter(|(_, record, _)| !is_in(record, name)).map(|(rank, ..)| *rank).collect();
        let others = world_size - ranks.len();
        let why = match (&missing[..], others) {
            _ if *world_size == 1 => String::new(),
            _ if ranks.is_empty() => ": a rank was not started, or hangs before it".into(),
            ([], 0) => ": all ranks have come to it".into(),
            ([], _) => {
                ": no rank that is seen from here is missing; the other machines have messages of their own".into()
            }
            ([_], _) => format!(": {} has not come to it", numbers(&missing)),
            (..) => format!(": {} have not come to it", numbers(&missing)),
        };
        let mut text = format!("{name} did not end within {limit_s} s{why}");
        if *world_size > 1 {
            for (ranks, state) in self.by_state() {
                text += &format!("\n  {}: {state}", numbers(&ranks));
            }
        }
        if others > 0 && !ranks.is_empty() {
            text += &format!("\n  {others} more: not seen from here (other machines)");
        }
        if others > 0 && missing.is_empty() && !ranks.is_empty() {
            text += "\nhelp: a machine without a message is gone or cut off: start again without it, and the run goes on after its \
                     newest checkpoint";
        }
        if let Some(help) = help {
            text += &format!("\nhelp: {help}");
        }
        text + &format!("\nhelp: {variable} sets the limit, in seconds")
    }

    /// Groups the ranks that do the same thing, ordered by the first of each group.
    fn by_state(&self) -> Vec<(Vec<usize>, String)> {
        let mut groups: Vec<(Vec<usize>, String)> = Vec::new();
        for (rank, record, process) in self.ranks {
            let state = describe(record, *process);
            match groups.iter_mut().find(|(_, other)| *other == state) {
                Some((ranks, _)) => ranks.push(*rank),
                None => groups.push((vec![*rank], state)),
            }
        }
        groups
    }
}

/// Returns whether a rank waits in the action of this name; its record may hold only the beginning of the name.
fn is_in(record: &Record, name: &str) -> bool {
    !record.waiting.is_empty() && name.starts_with(&record.waiting)
}

fn describe(record: &Record, process: Process) -> String {
    let Record { state, process: number, doing, waiting, .. } = record;
    let what = match state {
        State::Unknown => return "not seen from here".into(),
        State::Done => "ended".into(),
        State::Running if waiting.is_empty() => format!("at {doing}"),
        State::Running if waiting == doing || doing.is_empty() => format!("waiting in {waiting}"),
        State::Running => format!("waiting in {waiting} (at {doing})"),
    };
    match process {
        Process::Runs | Process::Unknown => what,
        Process::Stopped => format!("{what}; its process {number} was stopped by a signal or a debugger"),
        Process::InTheKernel => {
            format!("{what}; its process {number} is stuck in the kernel: a disk, a network or a driver")
        }
        Process::Gone => format!("{what}; its process {number} is gone"),
    }
}

/// `rank 3`, `ranks 0, 1 and 5`, `ranks 0 to 7`.
pub fn numbers(ranks: &[usize]) -> String {
    let follow_each_other = ranks.windows(2).all(|pair| pair[0] + 1 == pair[1]);
    match ranks {
        [] => "no rank".into(),
        [one] => format!("rank {one}"),
        [first, .., last] if follow_each_other && ranks.len() > 2 => format!("ranks {first} to {last}"),
        [rest @ .., last] => {
            let rest: Vec<String> = rest.iter().map(usize::to_string).collect();
            format!("ranks {} and {last}", rest.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(doing: &str, waiting: &str) -> Record {
        Record { state: State::Running, process: 77, started: 1, doing: doing.into(), waiting: waiting.into() }
    }

    fn time_out(ranks: &[(usize, Record, Process)], world_size: usize) -> String {
        let (name, variable) = ("gather of layer 7", "LIMIT_S");
        TimeOut { name, limit_s: 9, variable, help: None, ranks, world_size }.text()
    }

    #[test]
    fn the_rank_that_has_not_come_is_named_with_what_it_does() {
        let waits = record("step 2", "gather of layer 7");
        let ranks = [
            (0, waits.clone(), Process::Runs),
            (1, waits.clone(), Process::Runs),
            (2, record("step 2: the loss", ""), Process::Stopped),
        ];
        assert_eq!(
            time_out(&ranks, 3),
            "gather of layer 7 did not end within 9 s: rank 2 has not come to it\n  \
             ranks 0 and 1: waiting in gather of layer 7 (at step 2)\n  \
             rank 2: at step 2: the loss; its process 77 was stopped by a signal or a debugger\n\
             help: LIMIT_S sets the limit, in seconds"
        );
        let all = [(0, waits.clone(), Process::Runs), (1, waits, Process::Runs)];
        assert!(time_out(&all, 2).contains("all ranks have come to it"));
        assert!(time_out(&all, 4).contains("no rank that is seen from here is missing"));
        assert!(time_out(&all, 4).contains("2 more: not seen from here"));
        assert!(time_out(&all, 4).contains("help: a machine without a message is gone or cut off"));
        let late = [(0, record("x", "gather of layer 7"), Process::Runs), (1, record("", "reduce"), Process::Runs)];
        assert!(time_out(&late, 2).contains("rank 1 has not come to it"), "waiting elsewhere is not coming");
    }

    #[test]
    fn numbers_of_ranks_read_well() {
        let text = |ranks: &[usize]| numbers(ranks);
        assert_eq!(text(&[3]), "rank 3");
        assert_eq!(text(&[0, 1]), "ranks 0 and 1");
        assert_eq!(text(&[0, 2, 3]), "ranks 0, 2 and 3");
        assert_eq!(text(&[4, 5, 6, 7]), "ranks 4 to 7");
    }
}

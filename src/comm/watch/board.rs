//! The board of a node: memory that all its ranks share, where each of them writes what it is doing.
//!
//! A rank that has waited too long reads there which ranks are missing. Reading and writing the board is never
//! collective.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst, fence};

use anyhow::Result;

use crate::device::cpu::SharedWords;

/// Number of words of a rank's record, and of the header before the records.
const RECORD_WORDS: usize = 64;

/// Positions of the words of a record.
const PROCESS: usize = 0;
const STARTED: usize = 1;
const BEATS: usize = 2;
const STATE: usize = 3;
const SEQUENCE: usize = 4;
const LENGTHS: usize = 5;
const DOING: usize = 8;
const WAITING: usize = DOING + TEXT_WORDS;

/// Number of words of each of the two texts; longer texts are cut.
const TEXT_WORDS: usize = 24;

/// Positions in the header: of 1 + the local rank that speaks for all, of its [`End`], of the length of its reason, and of that text.
const SPEAKER: usize = 0;
const END: usize = 1;
const REASON_LENGTH: usize = 2;
const REASON: usize = 3;

/// Number of times that a reader tries to get a record that is not being changed.
const READS: usize = 1000;

/// State of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Unknown, because the rank's process cannot map the board.
    Unknown,
    Running,
    /// It has ended well, or is ending all ranks.
    Done,
}

/// How all ranks end when one of them ends them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Failed,
    /// The run can go on.
    Stopped,
}

/// The entries that a rank has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub state: State,
    pub process: u64,
    /// Start time of the process, in clock ticks since the machine started.
    pub started: u64,
    pub doing: String,
    /// Empty when it waits for nobody.
    pub waiting: String,
}

/// The records of the ranks of a node, in the order of their local ranks.
pub struct Board {
    words: SharedWords,
    own: usize,
}

impl Board {
    /// Returns the bytes of the board of a node with this many ranks.
    pub fn bytes(num_ranks: usize) -> usize {
        (1 + num_ranks) * RECORD_WORDS * size_of::<u64>()
    }

    /// Makes a board of one rank.
    pub fn alone() -> Result<Board> {
        Ok(Board::over(SharedWords::new(Board::bytes(1))?, 0))
    }

    /// Makes the board in shared memory; `own` is the local rank of this process.
    pub fn over(words: SharedWords, own: usize) -> Board {
        let board = Board { words, own };
        let process = u64::from(std::process::id());
        board.own(PROCESS).store(process, SeqCst);
        board.own(STARTED).store(super::process::start_time(process).unwrap_or(0), SeqCst);
        board.set_state(State::Running);
        board
    }

    pub fn num_ranks(&self) -> usize {
        self.words.words().len() / RECORD_WORDS - 1
    }

    fn word(&self, local_rank: usize, place: usize) -> &AtomicU64 {
        &self.words.words()[(1 + local_rank) * RECORD_WORDS + place]
    }

    fn own(&self, place: usize) -> &AtomicU64 {
        self.word(self.own, place)
    }

    /// Notes progress of this rank.
    pub fn beat(&self) {
        self.own(BEATS).fetch_add(1, SeqCst);
    }

    /// Returns the sum of all ranks' beats.
    pub fn beats(&self) -> u64 {
        (0..self.num_ranks()).fold(0, |sum, rank| sum.wrapping_add(self.word(rank, BEATS).load(SeqCst)))
    }

    pub fn set_state(&self, state: State) {
        self.own(STATE).store(state as u64, SeqCst);
    }

    fn header(&self) -> &[AtomicU64] {
        &self.words.words()[..RECORD_WORDS]
    }

    /// Makes this rank the one that speaks for all, with how and why all end; false when another one does already.
    pub fn take_the_word(&self, end: End, why: &str) -> bool {
        let (own, header) = (1 + self.own as u64, self.header());
        match header[SPEAKER].compare_exchange(0, own, SeqCst, SeqCst) {
            Ok(_) => {
                header[END].store(end as u64, SeqCst);
                header[REASON_LENGTH].store(write_text(&header[REASON..], why), SeqCst);
                true
            }
            Err(speaker) => speaker == own,
        }
    }

    /// Returns the local rank that speaks for all, and how and why all end, once it has written that.
    pub fn end(&self) -> Option<(usize, End, String)> {
        let header = self.header();
        let len = header[REASON_LENGTH].load(SeqCst) as usize;
        let end = if header[END].load(SeqCst) == End::Stopped as u64 { End::Stopped } else { End::Failed };
        (len > 0).then(|| (header[SPEAKER].load(SeqCst) as usize - 1, end, read_text(&header[REASON..], len)))
    }

    /// Returns whether another rank speaks for all.
    pub fn another_speaks(&self) -> bool {
        let speaker = self.header()[SPEAKER].load(SeqCst);
        speaker != 0 && speaker != 1 + self.own as u64
    }

    /// Writes what this rank is doing and what it waits for. One thread at a time may call it.
    pub fn write(&self, doing: &str, waiting: &str) {
        let sequence = self.own(SEQUENCE);
        let odd = sequence.load(SeqCst) | 1;
        sequence.store(odd, SeqCst);
        fence(SeqCst);
        let lengths =
            [(DOING, doing), (WAITING, waiting)].map(|(place, text)| write_text(self.text(self.own, place), text));
        self.own(LENGTHS).store(lengths[0] | lengths[1] << 32, SeqCst);
        fence(SeqCst);
        sequence.store(odd + 1, SeqCst);
        self.beat();
    }

    /// The words of one of a record's two texts.
    fn text(&self, local_rank: usize, place: usize) -> &[AtomicU64] {
        let begin = (1 + local_rank) * RECORD_WORDS + place;
        &self.words.words()[begin..begin + TEXT_WORDS]
    }

    /// Reads a rank's latest record.
    pub fn read(&self, local_rank: usize) -> Record {
        let word = |place: usize| self.word(local_rank, place).load(SeqCst);
        let texts = || {
            let lengths = word(LENGTHS);
            [(DOING, lengths as u32 as usize), (WAITING, (lengths >> 32) as usize)]
                .map(|(place, len)| read_text(self.text(local_rank, place), len))
        };
        let mut unchanged = (0..READS).find_map(|_| {
            let before = word(SEQUENCE);
            let texts = texts();
            (before % 2 == 0 && word(SEQUENCE) == before).then_some(texts)
        });
        // A process that was killed while writing leaves such a record.
        let [doing, waiting] = unchanged.take().unwrap_or_else(texts);
        let state = match word(STATE) {
            state if state == State::Running as u64 => State::Running,
            state if state == State::Done as u64 => State::Done,
            _ => State::Unknown,
        };
        Record { state, process: word(PROCESS), started: word(STARTED), doing, waiting }
    }
}

/// Writes as much of a text as these words take, and returns its number of bytes.
fn write_text(words: &[AtomicU64], text: &str) -> u64 {
    let bytes = &text.as_bytes()[..text.len().min(size_of_val(words))];
    for (word, chunk) in words.iter().zip(bytes.chunks(size_of::<u64>())) {
        let mut padded = [0; size_of::<u64>()];
        padded[..chunk.len()].copy_from_slice(chunk);
        word.store(u64::from_ne_bytes(padded), SeqCst);
    }
    bytes.len() as u64
}

/// Reads a text of so many bytes. One that was cut inside a character ends in a replacement character.
fn read_text(words: &[AtomicU64], len: usize) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.load(SeqCst).to_ne_bytes()).collect();
    String::from_utf8_lossy(&bytes[..len.min(bytes.len())]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_board_gives_back_what_was_written_last() {
        let board = Board::alone().unwrap();
        let long = "x".repeat(200);
        for (doing, waiting) in [("step 2", ""), ("saving", "gather of layer 7"), ("", "x"), (long.as_str(), "")] {
            let beats = board.beats();
            board.write(doing, waiting);
            assert!(board.beats() > beats);
            let read = board.read(0);
            assert_eq!(read.state, State::Running);
            assert!(doing.starts_with(&read.doing) && read.doing.len() == doing.len().min(192), "{read:?}");
            assert_eq!(read.waiting, waiting);
        }
    }

    #[test]
    fn one_rank_has_the_word() {
        let (words, again) = SharedWords::pair(Board::bytes(2)).unwrap();
        let (first, second) = (Board::over(words, 0), Board::over(again, 1));
        assert!(!first.another_speaks() && first.end().is_none());
        assert!(second.take_the_word(End::Stopped, "why") && second.take_the_word(End::Failed, "another"));
        assert!(first.another_speaks() && !second.another_speaks() && !first.take_the_word(End::Failed, "late"));
        assert_eq!(first.end(), Some((1, End::Stopped, "why".into())));
        second.set_state(State::Done);
        assert_eq!(first.read(1).state, State::Done);
        assert_eq!(first.read(1).process, u64::from(std::process::id()));
    }
}

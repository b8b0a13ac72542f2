//! Spans: when each action of a run, or of a predicted one, begins and ends on its queue.

/// The queues of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    Compute,
    Communication,
    Fetch,
    Put,
}

/// One action on its queue, in seconds since the step's begin.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub lane: Lane,
    pub name: String,
    pub begin: f64,
    pub end: f64,
}

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

/// Returns the share of the time between the first and the last action on the compute queue in which none runs. Waits for other queues are
/// no actions here, and what passes between two kernels of one action is not seen. 0 without spans.
pub fn idle_share(spans: &[Span]) -> f64 {
    let is_busy = |span: &&Span| span.lane == Lane::Compute && !span.name.starts_with("Wait");
    let mut busy: Vec<(f64, f64)> = spans.iter().filter(is_busy).map(|span| (span.begin, span.end)).collect();
    busy.sort_by(|a, b| a.0.total_cmp(&b.0));
    let Some(&(begin, mut end)) = busy.first() else { return 0.0 };
    let mut idle = 0.0;
    for (from, to) in busy {
        idle += (from - end).max(0.0);
        end = end.max(to);
    }
    if end > begin { idle / (end - begin) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compute_queue_is_idle_between_its_own_actions() {
        let span = |lane, name: &str, begin, end| Span { lane, name: name.into(), begin, end };
        let spans = [
            span(Lane::Compute, "Backward { .. }", 6.0, 10.0),
            span(Lane::Compute, "Forward { .. }", 2.0, 4.0),
            span(Lane::Fetch, "fetch", 4.0, 6.0),
            span(Lane::Compute, "WaitFetch { .. }", 5.0, 6.0),
            span(Lane::Compute, "Forward { .. }", 3.0, 5.0),
        ];
        assert_eq!(idle_share(&spans), 1.0 / 8.0);
        assert_eq!(idle_share(&[]), 0.0);
    }
}

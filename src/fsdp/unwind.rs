//! The end of a run that is abandoned: the actions that wait for whatever is under way, and give it up.

use super::schedule::Action;

/// Returns the actions after which nothing is under way, if these have been performed: gathers, reduces, puts and
/// fetches that were begun are waited for, and slots are given up. Boundaries stay where they are.
pub fn actions(done: &[Action]) -> Vec<Action> {
    let mut owed = Vec::new();
    for &action in done {
        match action {
            Action::Gather { unit, slot } => owed.extend([Action::Wait { unit, slot }, Action::Reshard { unit, slot }]),
            Action::Reduce { layer, grad_slot } => owed.push(Action::WaitReduce { layer, grad_slot }),
            Action::Put { layer, micro } => owed.push(Action::WaitPut { layer, micro }),
            Action::Fetch { layer, micro } => owed.push(Action::WaitFetch { layer, micro }),
            settled => {
                if let Some(i) = owed.iter().position(|owed| *owed == settled) {
                    owed.remove(i);
                }
            }
        }
    }
    owed
}

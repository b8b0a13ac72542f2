//! Signals that stop a run: SIGTERM, SIGINT and SIGUSR1 to any rank. All ranks stop after the same step, save a
//! checkpoint, and end with status 75.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

use crate::comm::Queue;
use crate::device::Device;

/// Exit status of a program that an interrupt ended, as shells have it.
const INTERRUPTED: i32 = 130;

/// The last signal that came; 0 before the first.
static CAUGHT: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Takes note of the signals from here on, in the place of ending at once. A second SIGINT ends the program at once.
pub fn listen() -> Result<()> {
    let caught = CAUGHT.get_or_init(Arc::default);
    let interrupted = Arc::new(AtomicBool::new(false));
    let listen = || -> std::io::Result<()> {
        flag::register_conditional_shutdown(SIGINT, INTERRUPTED, interrupted.clone())?;
        flag::register(SIGINT, interrupted.clone())?;
        for signal in [SIGTERM, SIGINT, SIGUSR1] {
            flag::register_usize(signal, caught.clone(), signal as usize)?;
        }
        Ok(())
    };
    listen().context("signals cannot be caught")
}

/// Returns a reason to stop if a signal has come to any rank. Collective.
pub fn agree<D: Device, Q: Queue<D>>(queue: &mut Q) -> Result<Option<String>> {
    let own = CAUGHT.get().map_or(0, |caught| caught.load(Ordering::Relaxed));
    let signals = queue.all_gather_f64("signals", &[own as f64])?;
    let first = signals.iter().enumerate().find(|(_, signal)| signal[0] > 0.0);
    Ok(first.map(|(rank, signal)| format!("{} to rank {rank}", name(signal[0] as i32))))
}

fn name(signal: i32) -> &'static str {
    match signal {
        SIGTERM => "SIGTERM",
        SIGINT => "SIGINT",
        _ => "SIGUSR1",
    }
}

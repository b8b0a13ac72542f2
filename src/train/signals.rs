//! The signals that stop a run. A library that is loaded later may take a signal for itself, so that the signal ends the program before
//! the run is saved. The run therefore claims its signals again before each step and each evaluation, and all the time before the first.
#![expect(unsafe_code, reason = "catches signals")]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context, Result};
use libc::{SIGINT, SIGTERM, SIGUSR1, c_int};

/// Exit status of a program that an interrupt ended, as shells have it.
const INTERRUPTED: c_int = 130;

/// The last signal that came; 0 before the first.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

static WAS_INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Takes note of the signals from here on, instead of ending at once; a second SIGINT ends the program at once. Handlers that were there
/// before are not called any more.
pub fn claim() -> Result<()> {
    // SAFETY: all bytes of the struct may be 0, which means no flags and no signals to block.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = note as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    for signal in [SIGTERM, SIGINT, SIGUSR1] {
        // SAFETY: `note` has the signature of a handler, and calls only what a handler may call.
        let result = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
        (result == 0).then_some(()).ok_or_else(io::Error::last_os_error).context("signals cannot be caught")?;
    }
    Ok(())
}

/// Returns the last signal that came, if one did.
pub fn caught() -> Option<c_int> {
    Some(CAUGHT.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
}

extern "C" fn note(signal: c_int) {
    CAUGHT.store(signal, Ordering::Relaxed);
    if signal == SIGINT && WAS_INTERRUPTED.swap(true, Ordering::Relaxed) {
        // SAFETY: a handler may call _exit (signal-safety(7)).
        unsafe { libc::_exit(INTERRUPTED) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_a_library_took_is_claimed_back() {
        claim().unwrap();
        // SAFETY: the default handler and the signal number are valid; the signal comes after it was claimed again.
        unsafe {
            libc::signal(SIGUSR1, libc::SIG_DFL);
            claim().unwrap();
            libc::raise(SIGUSR1);
        }
        assert_eq!(caught(), Some(SIGUSR1));
        CAUGHT.store(0, Ordering::Relaxed);
    }
}

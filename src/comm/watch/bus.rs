//! Reads of mapped files that fail. The kernel sends SIGBUS where a page of a mapping cannot be had, since the file was cut short or its
//! disk has failed. The watchdog makes of it a message that names the file, and ends all ranks.
#![expect(unsafe_code, reason = "catches a signal of the kernel")]

use std::fs;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use anyhow::{Context, Result};

/// Address of the first read that failed; 0 before.
static ADDRESS: AtomicUsize = AtomicUsize::new(0);

/// Seconds for which a thread whose read has failed waits for the watchdog to end the process. They are more than
/// [`super::END_IN_ANY_CASE`].
const WAIT_S: u32 = 20;

/// Catches SIGBUS from here on. It comes before MPI_Init, because Open MPI leaves a handler that is there in its place.
pub fn listen() -> Result<()> {
    // SAFETY: all bytes of the struct may be 0, which means no flags and no signals to block.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = note as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `note` has the signature that SA_SIGINFO asks for, and calls what a handler may call alone.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("SIGBUS cannot be caught") }
}

/// Handles SIGBUS: leaves the address to the watchdog, and waits for the end. Returning would read again.
extern "C" fn note(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid `info`.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Another process may send the signal too, with a code that is not above 0. Then there is no address.
    if code > 0 {
        let _ = ADDRESS.compare_exchange(0, address.max(1), SeqCst, SeqCst);
        let mut left = WAIT_S;
        while left > 0 {
            // SAFETY: a handler may call sleep (signal-safety(7)); it returns early where another signal is handled.
            left = unsafe { libc::sleep(left) };
        }
    }
    // SAFETY: a handler may call both. The signal ends the process when this returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Returns the message about a read of this process that has failed.
pub fn message() -> Option<String> {
    let address = Some(ADDRESS.load(SeqCst)).filter(|address| *address > 0)?;
    let maps = fs::read("/proc/self/maps").unwrap_or_default();
    Some(describe(address, find(&String::from_utf8_lossy(&maps), address)))
}

/// Returns the path of the file that is mapped at an address, and the place in it. `maps` has the form of proc_pid_maps(5).
fn find(maps: &str, address: usize) -> Option<(&str, usize)> {
    maps.lines().find_map(|line| {
        let fields: Vec<&str> = line.splitn(6, ' ').collect();
        let [range, _, offset, _, _, path] = fields[..] else { return None };
        let hex = |text| usize::from_str_radix(text, 16).ok();
        let (begin, end) = range.split_once('-')?;
        let (begin, end, offset) = (hex(begin)?, hex(end)?, hex(offset)?);
        (begin..end).contains(&address).then(|| (path.trim_start(), offset + (address - begin)))
    })
}

fn describe(address: usize, found: Option<(&str, usize)>) -> String {
    let Some((path, at)) = found.filter(|(path, _)| !path.is_empty()) else {
        return format!("the memory at {address:#x} cannot be read or written (SIGBUS)");
    };
    let why = match fs::metadata(path) {
        Ok(file) if file.len() <= at as u64 => {
            format!("it was cut short to {} bytes while this run had it mapped", file.len())
        }
        _ if path.starts_with("/dev/shm") || path.starts_with("/memfd:") => "no memory is left for it".into(),
        _ => "its disk or network has failed, of which `dmesg` may say more".into(),
    };
    format!(
        "{path}: byte {at} cannot be read: {why}\nhelp: put this right and start again: a damaged shard file is made again, and a run \
         goes on after its newest checkpoint"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "7f0000001000-7f0000003000 r--p 00002000 fd:00 1234                       /a b/model.safetensors\n\
                        7f0000003000-7f0000004000 rw-p 00000000 00:00 0 \n\
                        7f0000004000-7f0000005000 rw-s 00000000 00:01 77                         /memfd:board (deleted)\n";

    #[test]
    fn the_mapping_of_an_address_is_found() {
        assert_eq!(find(MAPS, 0x7f00_0000_2010), Some(("/a b/model.safetensors", 0x3010)));
        assert_eq!(find(MAPS, 0x7f00_0000_3000), Some(("", 0)));
        assert_eq!(find(MAPS, 0x7f00_0000_5000), None);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(find(&maps, find as *const () as usize).unwrap().0.starts_with('/'), "this program is mapped");
    }

    #[test]
    fn a_message_says_why_as_far_as_can_be_known() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "12345").unwrap();
        let path = file.path().to_str().unwrap();
        assert!(
            describe(1, Some((path, 4096)))
                .contains(&format!("{path}: byte 4096 cannot be read: it was cut short to 5 bytes"))
        );
        assert!(describe(1, Some((path, 3))).contains("its disk or network has failed"));
        assert!(
            describe(1, find(MAPS, 0x7f00_0000_4000))
                .contains("/memfd:board (deleted): byte 0 cannot be read: no memory is left")
        );
        assert!(describe(0x10, None).contains("the memory at 0x10"));
        assert!(describe(0x10, Some(("", 0))).contains("the memory at 0x10"));
    }
}

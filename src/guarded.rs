//! Calls into libraries that may panic on input that is not trusted. Such a panic becomes an error, where any other
//! ends all ranks.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, anyhow};

thread_local! {
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Returns true if a panic of this thread will become an error. The panic hook leaves it alone then.
pub fn is_guarded() -> bool {
    IS_GUARDED.get()
}

/// Calls `f`, which reads something with a library. The error of a panic says that the library fails on `what`.
pub fn guarded<T>(what: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = IS_GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    IS_GUARDED.set(before);
    result.unwrap_or_else(|panic| Err(anyhow!("the library that reads {what} fails on it: {}", message(&*panic))))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        assert!(guarded("it", || Ok(is_guarded())).unwrap());
        for f in [|| panic!("at {}", 5), || panic!("at 5")] as [fn() -> Result<()>; 2] {
            let error = guarded("a file", f).unwrap_err().to_string();
            assert_eq!(error, "the library that reads a file fails on it: at 5");
        }
        assert!(!is_guarded());
    }
}

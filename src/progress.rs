//! Shows how far long work has come, as a bar on a terminal and as lines elsewhere. Rank 0 shows one piece of work at a
//! time.

use std::fmt::Debug;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use crate::files::escaped;

/// Columns of a terminal whose width is not known.
const WIDTH: u16 = 100;
const STYLE: &str = "{prefix} {wide_bar} {pos}/{len} {msg}";

/// The way in which progress is shown.
enum Show {
    Nothing,
    Lines,
    Bar,
}

/// The work that is shown.
struct Work {
    what: String,
    /// Tenths of it that lines have told.
    tenths: usize,
    bar: Option<ProgressBar>,
}

struct Screen {
    show: Show,
    work: Option<Work>,
}

static SCREEN: Mutex<Screen> = Mutex::new(Screen { show: Show::Nothing, work: None });

fn screen() -> MutexGuard<'static, Screen> {
    SCREEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows progress from now on, as a bar if a person looks at standard error, else as lines.
pub fn show() {
    screen().show = if is_watched() { Show::Bar } else { Show::Lines };
}

/// Takes note that `done` of `total` parts of work are done. Where there is no bar, a line tells every tenth.
pub fn at(what: &str, done: usize, total: usize) {
    let mut screen = screen();
    match screen.show {
        Show::Nothing => {}
        Show::Bar => draw(&mut screen, what, done, total, String::new()),
        Show::Lines => {
            let (work, tenths) = (screen.begin(what), done * 10 / total.max(1));
            let is_new = tenths > work.tenths;
            work.tenths = tenths;
            drop(screen);
            if is_new {
                tracing::info!("{what}: {done} of {total}");
            }
        }
    }
}

/// Takes note of progress like [`at`], with a note behind the bar. Nothing is shown where there is no bar.
pub fn bar(what: &str, done: usize, total: usize, note: impl FnOnce() -> String) {
    let mut screen = screen();
    if let Show::Bar = screen.show {
        draw(&mut screen, what, done, total, note());
    }
}

/// Takes the work off the screen.
pub fn end() {
    if let Some(Work { bar: Some(bar), .. }) = screen().work.take() {
        bar.finish_and_clear();
    }
}

/// Writes with the bar off the screen, which comes back afterwards. While another thread draws the bar, nobody waits for
/// it: the text is then written at once.
pub fn aside(write: impl FnOnce()) {
    let screen = SCREEN.try_lock();
    match screen.as_ref().ok().and_then(|screen| screen.work.as_ref()?.bar.as_ref()) {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

impl Screen {
    /// Returns the work of this name, which takes the place of another.
    fn begin(&mut self, what: &str) -> &mut Work {
        if self.work.as_ref().is_none_or(|work| work.what != what)
            && let Some(Work { bar: Some(bar), .. }) = self.work.take()
        {
            bar.finish_and_clear();
        }
        self.work.get_or_insert_with(|| Work { what: what.into(), tenths: 0, bar: None })
    }
}

fn draw(screen: &mut Screen, what: &str, done: usize, total: usize, note: String) {
    let work = screen.begin(what);
    let bar = work.bar.get_or_insert_with(|| {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::term_like(Box::new(Terminal)));
        if let Ok(style) = ProgressStyle::with_template(STYLE) {
            bar.set_style(style.progress_chars("━╸╌"));
        }
        bar.with_prefix(escaped(what).into_owned())
    });
    bar.set_length(total as u64);
    bar.set_message(escaped(&note).into_owned());
    bar.set_position(done as u64);
}

/// Returns whether standard error is a terminal, or that of a launcher which hands on what its ranks write: mpirun of
/// Open MPI on this machine.
fn is_watched() -> bool {
    let launcher = || {
        let parent = std::os::unix::process::parent_id();
        let name = std::fs::read_to_string(format!("/proc/{parent}/comm")).ok()?;
        ["mpirun", "mpiexec", "orterun", "prterun"].contains(&name.trim()).then_some(())?;
        let stderr = PathBuf::from(format!("/proc/{parent}/fd/2"));
        let is_terminal = std::fs::metadata(&stderr).ok()?.file_type().is_char_device();
        Some(is_terminal && std::fs::read_link(&stderr).ok()?.starts_with("/dev/pts"))
    };
    std::io::stderr().is_terminal() || launcher().unwrap_or(false)
}

/// The terminal behind standard error, which may be a pipe.
#[derive(Debug)]
struct Terminal;

impl Terminal {
    fn write(&self, text: &str) -> std::io::Result<()> {
        std::io::stderr().write_all(text.as_bytes())
    }

    fn step(&self, n: usize, direction: char) -> std::io::Result<()> {
        if n == 0 { Ok(()) } else { self.write(&format!("\x1b[{n}{direction}")) }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        let columns = rustix::termios::tcgetwinsize(std::io::stderr()).map_or(0, |size| size.ws_col);
        if columns == 0 { WIDTH } else { columns }
    }
    fn move_cursor_up(&self, n: usize) -> std::io::Result<()> {
        self.step(n, 'A')
    }
    fn move_cursor_down(&self, n: usize) -> std::io::Result<()> {
        self.step(n, 'B')
    }
    fn move_cursor_right(&self, n: usize) -> std::io::Result<()> {
        self.step(n, 'C')
    }
    fn move_cursor_left(&self, n: usize) -> std::io::Result<()> {
        self.step(n, 'D')
    }
    fn write_line(&self, line: &str) -> std::io::Result<()> {
        self.write(&format!("{line}\n"))
    }
    fn write_str(&self, text: &str) -> std::io::Result<()> {
        self.write(text)
    }
    fn clear_line(&self) -> std::io::Result<()> {
        self.write("\r\x1b[2K")
    }
    fn flush(&self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

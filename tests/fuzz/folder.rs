//! A folder for the files that a target reads, beside one that must stay closed.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tempfile::TempDir;

/// `model` is the folder to read. `outside`, beside it, has files of the same names: whoever follows a path out of
/// `model` finds there what it looks for.
pub struct Folder {
    root: TempDir,
    watch: OwnedFd,
}

impl Folder {
    /// Makes both folders with these files.
    pub fn new(files: &[(&str, Vec<u8>)]) -> Folder {
        // The files lie in memory where that is possible, because they are written again for each input.
        let root = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap();
        let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        for folder in ["model", "outside"] {
            fs::create_dir(root.path().join(folder)).unwrap();
            for (name, bytes) in files {
                fs::write(root.path().join(folder).join(name), bytes).unwrap();
            }
        }
        inotify::add_watch(&watch, root.path().join("outside"), WatchFlags::OPEN | WatchFlags::ACCESS).unwrap();
        Folder { root, watch }
    }

    /// Folder of both.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn path(&self) -> PathBuf {
        self.root().join("model")
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path().join(name), bytes).unwrap();
    }

    /// Fails if a file of the folder outside was opened since the last call. Other programs may list folders.
    pub fn check_outside(&self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.watch, &mut buffer);
        while let Ok(event) = events.next() {
            assert!(event.events().contains(ReadFlags::ISDIR), "a file outside of the folder was opened");
        }
    }
}

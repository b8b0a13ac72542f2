//! Finds CUDA's libraries in the places where they may be, and loads them before `cudarc` looks for them.
//!
//! The driver (`libcuda.so.1`) is the system's. NVRTC and cuBLAS are searched in this order: the folder that
//! `FSDP_QLORA_CUDA_PATH` names (or its `lib64`, `lib`), which then is the only one; the dynamic linker's own paths;
//! `$CUDA_HOME`, `$CUDA_PATH`, `/usr/local/cuda`, `/usr/local/cuda-*`, `/opt/cuda`; `$CONDA_PREFIX/lib`; the
//! `nvidia-*` packages of `$VIRTUAL_ENV`, or else of `python3`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Result, bail, ensure};
use cudarc::{cublas, driver, nvrtc};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Names the one folder to search.
const PATH_VARIABLE: &str = "FSDP_QLORA_CUDA_PATH";

/// True when the driver's library can be loaded.
pub fn driver_is_there() -> bool {
    // SAFETY: only opens libraries by name.
    unsafe { driver::sys::is_culib_present() }
}

/// True when the driver has the function that gives the time between two events.
pub fn driver_times_events() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        // SAFETY: the symbol is looked up, not called.
        unsafe { driver::sys::culib().get::<unsafe extern "C" fn()>(b"cuEventElapsedTime_v2").is_ok() }
    })
}

/// Loads NVRTC, or says what to install.
pub fn load_nvrtc() -> Result<()> {
    // SAFETY: only opens libraries by name.
    load(&["nvrtc"], "nvidia-cuda-nvrtc", || unsafe { nvrtc::sys::is_culib_present() })
}

/// Loads cuBLAS with its other half, cuBLASLt, of the same folder, or says what to install.
pub fn load_cublas() -> Result<()> {
    // SAFETY: only opens libraries by name.
    load(&["cublasLt", "cublas"], "nvidia-cublas", || unsafe { cublas::sys::is_culib_present() })?;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    check_one_folder(&maps)
}

/// Loads the last of these libraries, after the others, of one folder.
fn load(libraries: &[&str], package: &str, is_present: impl Fn() -> bool) -> Result<()> {
    if std::env::var_os(PATH_VARIABLE).is_none() && is_present() {
        return Ok(());
    }
    let folders = folders();
    let with_all = folders.iter().filter(|folder| has_all(folder, libraries));
    let mut opened = with_all.map(|folder| libraries.iter().all(|library| open(folder, library)));
    if opened.any(|all| all) && is_present() {
        return Ok(());
    }
    let searched: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    let files: Vec<String> = libraries.iter().map(|library| format!("lib{library}")).collect();
    bail!(
        "{} cannot be found in one folder; searched: {}. Install the CUDA toolkit 12 or 13, or `pip install {package}`, or name the \
         folder in {PATH_VARIABLE}",
        files.join(" with "),
        if searched.is_empty() { "the dynamic linker's paths".into() } else { searched.join(", ") }
    )
}

/// True when a folder has all these libraries.
fn has_all(folder: &Path, libraries: &[&str]) -> bool {
    libraries.iter().all(|library| !files(folder, library).is_empty())
}

/// Fails when cuBLAS and cuBLASLt, as /proc/self/maps shows them, come from several folders: they may be of two
/// versions, which crash or compute wrongly.
fn check_one_folder(maps: &str) -> Result<()> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let is_cublas = |path: &&Path| {
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        ["libcublas.so", "libcublasLt.so"].iter().any(|prefix| name.starts_with(prefix))
    };
    let folders: BTreeSet<&Path> = paths.filter(is_cublas).filter_map(Path::parent).collect();
    let names: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    ensure!(
        names.len() < 2,
        "cuBLAS and cuBLASLt come from several folders: {}; name the one to take in {PATH_VARIABLE} and take the others out of \
         LD_LIBRARY_PATH",
        names.join(" and ")
    );
    Ok(())
}

/// Opens a library that `cudarc` cannot find by itself: by its name, else in the folders.
pub fn open_first(name: &str) -> Option<Library> {
    let mut files: Vec<PathBuf> = folders().iter().flat_map(|folder| files(folder, name)).collect();
    let by_name = PathBuf::from(format!("lib{name}.so.2"));
    if std::env::var_os(PATH_VARIABLE).is_some() {
        files.push(by_name)
    } else {
        files.insert(0, by_name)
    }
    // SAFETY: CUDA's libraries have initializers that may run at any time.
    files.iter().find_map(|file| unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) }.ok())
}

/// Opens `lib<name>.so*` of a folder for everybody, and for good.
fn open(folder: &Path, name: &str) -> bool {
    files(folder, name).iter().any(|file| {
        // SAFETY: CUDA's libraries have initializers that may run at any time.
        let library = unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) };
        library.map(std::mem::forget).is_ok()
    })
}

/// `lib<name>.so*` of a folder.
fn files(folder: &Path, name: &str) -> Vec<PathBuf> {
    let prefix = format!("lib{name}.so");
    let is_it = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|e| e.path()).filter(is_it).collect();
    files.sort();
    files
}

fn folders() -> Vec<PathBuf> {
    let with_lib = |root: PathBuf| [root.clone(), root.join("lib64"), root.join("lib")];
    if let Some(root) = std::env::var_os(PATH_VARIABLE) {
        return with_lib(root.into()).to_vec();
    }
    let mut roots: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    roots.extend(["/usr/local/cuda".into(), "/opt/cuda".into()]);
    let local = std::fs::read_dir("/usr/local").into_iter().flatten().flatten().map(|e| e.path());
    let mut versions: Vec<PathBuf> = local.filter(|p| p.to_string_lossy().contains("/cuda-")).collect();
    versions.sort_by(|a, b| b.cmp(a));
    roots.extend(versions);
    roots.extend(std::env::var_os("CONDA_PREFIX").map(PathBuf::from));
    let mut folders: Vec<PathBuf> = roots.into_iter().flat_map(with_lib).collect();
    for package in python_packages() {
        let parts = std::fs::read_dir(package).into_iter().flatten().flatten();
        folders.extend(parts.map(|part| part.path().join("lib")));
    }
    folders.retain(|f| f.is_dir());
    folders
}

/// Folders of the namespace package `nvidia`.
fn python_packages() -> Vec<PathBuf> {
    let python = match std::env::var_os("VIRTUAL_ENV") {
        Some(root) => Path::new(&root).join("bin/python3"),
        None => "python3".into(),
    };
    let script = "import nvidia; print('\\n'.join(nvidia.__path__))";
    let output = std::process::Command::new(python).args(["-c", script]).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_of_cublas_come_from_one_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str, files: &[&str]| {
            let folder = root.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            files.iter().for_each(|file| std::fs::write(folder.join(file), "").unwrap());
            folder
        };
        let pair = ["cublasLt", "cublas"];
        assert!(!has_all(&folder("lt", &["libcublasLt.so.13"]), &pair));
        assert!(!has_all(&folder("cublas", &["libcublas.so.12"]), &pair));
        assert!(has_all(&folder("both", &["libcublas.so.12", "libcublasLt.so.12.9", "libnvrtc.so"]), &pair));
        assert!(!has_all(&root.path().join("absent"), &pair));
    }

    #[test]
    fn a_mixture_of_two_folders_is_refused_with_both() {
        let line = |path: &str| format!("7f00-7f01 r-xp 00000000 08:01 42   {path}\n");
        let maps =
            |paths: &[&str]| paths.iter().map(|path| line(path)).collect::<String>() + "7f02-7f03 rw-p 0 00:00 0\n";
        let same = ["/cuda/lib64/libcublas.so.13", "/cuda/lib64/libcublasLt.so.13.1", "/other/libcudart.so.12"];
        assert!(check_one_folder(&maps(&same)).is_ok() && check_one_folder("").is_ok());
        for mixture in [["/a/libcublas.so.13", "/b/libcublasLt.so.12"], ["/a/libcublas.so.13", "/b/libcublas.so.12"]] {
            let error = check_one_folder(&maps(&mixture)).unwrap_err().to_string();
            assert!(error.contains("several folders: /a and /b"), "{error}");
        }
    }
}

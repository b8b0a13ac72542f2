//! The folder of a base model: the files that it may consist of, and a likely explanation of a folder that is no
//! model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::files::{gguf_advice, shown, shown_path};

pub const CONFIG_FILE: &str = "config.json";
pub const SINGLE_FILE: &str = "model.safetensors";
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Checks that this is the folder of a model. The error says what it is instead: the root of a repository in the
/// hub's cache, an adapter, weights in another format.
pub(super) fn check(dir: &Path) -> Result<()> {
    ensure!(dir.is_dir(), "{}: not a directory", shown_path(dir));
    if dir.join(CONFIG_FILE).exists() {
        return Ok(());
    }
    if let Some(snapshot) = snapshot_of(dir) {
        bail!(
            "{}: a repository in the hub's cache, not a model's folder; the model is in a snapshot\nhelp: model: {}",
            shown_path(dir),
            shown_path(&snapshot)
        );
    }
    if dir.join("adapter_config.json").exists() {
        bail!(
            "{}: an adapter (adapter_config.json), not a base model; give the folder of its base model",
            shown_path(dir)
        );
    }
    bail!("{}: there is no config.json{}", shown_path(dir), other_weights(dir).unwrap_or_default())
}

/// The error of a folder with a config.json and no safetensors file.
pub(super) fn no_weights(dir: &Path) -> String {
    let others = other_weights(dir)
        .unwrap_or_else(|| format!("\nhelp: hf download {} --local-dir {}", repository(dir), shown_path(dir)));
    format!("{}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{others}", shown_path(dir))
}

/// Names weights that cannot be read as they are, and says what to do about it; `None` if there are none.
fn other_weights(dir: &Path) -> Option<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).ok()?.flatten().map(|e| e.file_name().to_string_lossy().into()).collect();
    names.sort();
    let with = |extensions: &[&str]| names.iter().find(|name| extensions.iter().any(|e| name.ends_with(e)));
    if let Some(name) = with(&[".bin", ".pth", ".pt", ".ckpt"]) {
        return Some(format!(
            "; {} is in PyTorch's format, which is not read: convert it to safetensors\n\
             help: python -c \"from transformers import AutoModelForCausalLM as A; \
             A.from_pretrained('{2}', dtype='auto').save_pretrained('{2}-safetensors')\", or look for a revision with safetensors \
             (hf download {1})",
            shown(name),
            repository(dir),
            shown_path(dir)
        ));
    }
    if let Some(name) = with(&[".gguf"]) {
        return Some(format!(
            "; {} is in GGUF, which is not read\nhelp: {}",
            shown(name),
            gguf_advice(&dir.join(name))
        ));
    }
    with(&[".safetensors"]).map(|name| {
        format!("; {} is there, but no {INDEX_FILE} that names it: download it again\nhelp: hf download {} --local-dir FOLDER", shown(name), repository(dir))
    })
}

/// Returns the snapshot of a repository in the hub's cache (`models--ORG--NAME`): the one that `refs/main` names,
/// else any.
fn snapshot_of(dir: &Path) -> Option<PathBuf> {
    let snapshots = dir.join("snapshots");
    let main = std::fs::read_dir(dir.join("refs"))
        .ok()
        .and_then(|_| crate::files::read_text(&dir.join("refs/main"), 1000).ok());
    let main = main.map(|revision| snapshots.join(revision.trim())).filter(|path| path.is_dir());
    let mut all: Vec<PathBuf> = std::fs::read_dir(&snapshots).ok()?.flatten().map(|entry| entry.path()).collect();
    all.sort();
    main.or(all.pop())
}

/// Returns `ORG/NAME` of a folder in the hub's cache.
fn repository(dir: &Path) -> String {
    let root = dir.ancestors().filter_map(|path| path.file_name()?.to_str()?.strip_prefix("models--")).next();
    root.map_or("ORG/NAME".into(), |name| shown(&name.replacen("--", "/", 1)))
}

/// Returns id and commit of a folder that is a snapshot of a model in the hub's cache.
pub(super) fn id_and_commit(dir: &Path) -> Option<(String, String)> {
    let name = |path: &Path| path.file_name()?.to_str().map(String::from);
    let (commit, snapshots) = (name(dir)?, dir.parent()?);
    let id = name(snapshots.parent()?)?.strip_prefix("models--")?.replacen("--", "/", 1);
    (snapshots.ends_with("snapshots") && is_commit(&commit)).then_some((id, commit))
}

/// Tells whether a text is the full hash of a commit.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Checks a file that an index names: it lies in the model's folder, or is a link to a file there or, from a snapshot
/// of the hub's cache, to one in `../../blobs`, or in the `blobs` that all repositories of the cache share (`huggingface_hub` 2). An index comes from somebody else, and must not choose which files of
/// this machine are read.
pub(super) fn check_named(dir: &Path, name: &str) -> Result<()> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    ensure!(plain, "names {:?}; allowed are names of files in its own folder", shown(name));
    let path = dir.join(name);
    ensure!(path.symlink_metadata().is_ok(), "names {}, which is not there", shown(name));
    let place = || shown_path(&path);
    let real = path.canonicalize().with_context(place)?;
    let own = dir.canonicalize().with_context(place)?;
    let root = own.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent);
    let blobs = |folder: Option<&Path>| folder.and_then(|folder| folder.join("blobs").canonicalize().ok());
    let (of_model, of_all) = (blobs(root), blobs(root.and_then(Path::parent)));
    let folder = real.parent();
    ensure!(
        folder == Some(&own)
            || of_model.is_some() && folder == of_model.as_deref()
            || of_all.is_some() && folder.and_then(Path::parent) == of_all.as_deref(),
        "names {}, a link to {}; allowed are files of its own folder, and of ../../blobs from a snapshot in the hub's cache",
        shown(name),
        shown_path(&real)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::tempdir;

    #[test]
    fn a_folder_that_is_no_model_is_told_apart() {
        let error = |files: &[&str]| {
            let dir = tempdir().unwrap();
            let root = dir.path().join("models--org--some--name");
            fs::create_dir(&root).unwrap();
            for file in files {
                fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
                fs::write(root.join(file), "b\n").unwrap();
            }
            match check(&root) {
                Err(error) => error.to_string(),
                Ok(()) => no_weights(&root),
            }
        };
        for (files, found) in [
            (&["snapshots/a/config.json", "snapshots/b/config.json"][..], "/snapshots/b"),
            (&["snapshots/b/config.json", "snapshots/c/config.json", "refs/main"], "/snapshots/b"),
            (&["adapter_config.json", "adapter_model.safetensors"], "an adapter (adapter_config.json)"),
            (&["consolidated.00.pth"], "no config.json; consolidated.00.pth is in PyTorch's format"),
            (
                &["config.json", "pytorch_model.bin"],
                "pytorch_model.bin is in PyTorch's format, which is not read: convert",
            ),
            (&["config.json", "model-Q4_K.gguf"], "model-Q4_K.gguf is in GGUF"),
            (
                &["model.gguf"],
                "no config.json; model.gguf is in GGUF, which is not read\nhelp: `python scripts/gguf_to_hf.py ",
            ),
            (&["config.json", "model-00001-of-00002.safetensors"], "no model.safetensors.index.json that names it"),
            (&["config.json"], "help: hf download org/some--name --local-dir"),
            (&[], "there is no config.json"),
        ] {
            let error = error(files);
            assert!(error.contains(found), "{found} in {error}");
        }
        let error = check(Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert_eq!(error, "/nowhere/at/all: not a directory");
    }

    #[test]
    fn a_snapshot_of_the_cache_tells_id_and_commit() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let of = |path: String| id_and_commit(Path::new(&path));
        assert_eq!(
            of(format!("/x/models--org--na--me/snapshots/{commit}")),
            Some(("org/na--me".into(), commit.into()))
        );
        for other in
            ["models--o--n/snapshots/abc", "models--o--n/x/COMMIT", "datasets--o--n/snapshots/COMMIT", "COMMIT", "/"]
        {
            assert_eq!(of(other.replace("COMMIT", commit)), None, "{other}");
        }
    }

    #[test]
    fn an_index_names_files_of_its_own_folder_or_of_the_hub_s_blobs() {
        let cache = tempdir().unwrap();
        let root = cache.path().join("models--org--name");
        let (snapshot, blobs) = (root.join("snapshots/abc"), root.join("blobs"));
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(&blobs).unwrap();
        for file in [snapshot.join("own"), blobs.join("1234"), root.join("other"), cache.path().join("outside")] {
            fs::write(file, "").unwrap();
        }
        fs::create_dir_all(cache.path().join("blobs/ab")).unwrap();
        fs::write(cache.path().join("blobs/ab/abcd"), "").unwrap();
        symlink("../../blobs/ab/abcd", blobs.join("5678")).unwrap();
        for (name, target) in [
            ("blob", "../../blobs/1234"),
            ("shared", "../../blobs/5678"),
            ("link", "own"),
            ("twice", "blob"),
            ("other", "../../other"),
            ("outside", "../../../outside"),
            ("absolute", "/etc/hostname"),
            ("dangling", "none"),
            ("endless", "endless"),
        ] {
            symlink(target, snapshot.join(name)).unwrap();
        }
        for name in ["own", "blob", "link", "twice", "shared"] {
            check_named(&snapshot, name).unwrap();
        }
        for name in [
            "other",
            "outside",
            "absolute",
            "dangling",
            "endless",
            "none",
            "../abc/own",
            "/etc/hostname",
            "..",
            ".",
            "",
            "a/b",
        ] {
            let error = format!("{:#}", check_named(&snapshot, name).unwrap_err());
            assert!(error.contains("names ") || error.contains("os error"), "{name}: {error}");
        }
        // Outside the hub's cache there are no blobs.
        let plain = cache.path().join("plain/folder/model");
        fs::create_dir_all(&plain).unwrap();
        fs::create_dir(cache.path().join("plain/blobs")).unwrap();
        fs::write(cache.path().join("plain/blobs/1"), "").unwrap();
        symlink("../../blobs/1", plain.join("blob")).unwrap();
        assert!(check_named(&plain, "blob").unwrap_err().to_string().contains("a link to"));
    }
}

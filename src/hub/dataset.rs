//! Chooses the files with the rows of a split: those that the README of a repository names, else those that have the split's name.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::model::some;
use super::reference::Reference;
use crate::data::source::{self, kind_of};
use crate::files::{listed, shown};

/// Name of the file in which a repository may say which of its files are rows.
pub const README: &str = "README.md";

/// Largest README, in bytes.
pub const MAX_README_BYTES: u64 = 16 << 20;

/// Words for each split in names of files and folders; the first word is the hub's name of the split.
const SPLITS: [&[&str]; 3] = [
    &["train", "training"],
    &["validation", "valid", "val", "dev"],
    &["test", "testing", "eval", "evaluation", "heldout"],
];

/// The split that is meant if none is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unsaid {
    /// The split `train`, or the only split that there is.
    Train,
    /// The only split that there is.
    Only,
}

/// Returns the names of the files of a split, in the order of their names.
pub fn files_of(
    reference: &Reference,
    names: &[String],
    readme: Option<&str>,
    split: Option<&str>,
    unsaid: Unsaid,
) -> Result<Vec<String>> {
    let inside = |name: &&String| {
        let rest = name.strip_prefix(&reference.path);
        reference.path.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let rows: Vec<&String> = names.iter().filter(inside).filter(|name| is_of_rows(name)).collect();
    if let [file] = &rows[..]
        && **file == reference.path
    {
        ensure!(
            split.is_none(),
            "{reference}: split is for folders and whole data sets, and this is a file; help: remove split"
        );
        return Ok(vec![reference.path.clone()]);
    }
    if rows.is_empty() {
        let there: Vec<String> = names.iter().filter(inside).cloned().collect();
        bail!(
            "{reference}: no file of rows is there; allowed: {}; there is:{}\nhelp: the hub also has most data sets as parquet: {}",
            source::Kind::NAMES,
            some(if there.is_empty() { names } else { &there }),
            Reference { path: String::new(), ..reference.at("refs/convert/parquet") }
        );
    }
    let configured = if reference.path.is_empty() {
        readme.map(|text| configuration(reference, text)).transpose()?.flatten()
    } else {
        None
    };
    let files = match configured {
        Some(configuration) => choose(reference, configuration.splits(reference, &rows)?, split, unsaid)?,
        None => of_one_form(reference, choose(reference, by_names(&rows), split, unsaid)?)?,
    };
    check_parts(reference, &files)?;
    Ok(files)
}

/// Fails if parts of a split (`train-00000-of-00002.parquet`) are missing, as in a cache that was filled only partly.
fn check_parts(reference: &Reference, files: &[String]) -> Result<()> {
    let part = Regex::new(r"^(.*-)\d+(-of-(\d+)\b.*)$")?;
    let mut parts: BTreeMap<(String, String), (usize, usize)> = BTreeMap::new();
    for file in files {
        let Some(found) = part.captures(file)? else { continue };
        let text = |group: usize| found.get(group).map_or("", |text| text.as_str()).to_string();
        let (count, all) = parts.entry((text(1), text(2))).or_default();
        (*count, *all) = (*count + 1, text(3).parse().unwrap_or(0));
    }
    for ((before, behind), (count, all)) in parts {
        ensure!(count == all, "{reference}: found {count} of {all} files {}NNNNN{}", shown(&before), shown(&behind));
    }
    Ok(())
}

/// Tells by its name whether a file may hold rows. Hidden files and files that describe others hold none.
fn is_of_rows(name: &str) -> bool {
    form_of(name).is_some()
        && !name.split('/').any(|part| part.starts_with('.'))
        && !source::is_about_rows(Path::new(name))
}

fn form_of(name: &str) -> Option<source::Kind> {
    kind_of(Path::new(name)).map(|(kind, _)| kind)
}

/// A split and its files.
struct Split {
    name: String,
    files: Vec<String>,
}

/// Sorts files into splits by the words in their names and folders. If no file has such a word, all belong to `train`.
fn by_names(rows: &[&String]) -> Vec<Split> {
    let mut splits: Vec<Split> = SPLITS.map(|words| Split { name: words[0].into(), files: Vec::new() }).into();
    for name in rows {
        // The name of a file counts more than that of its folder.
        let place = name.rsplit('/').find_map(|part| SPLITS.iter().position(|words| has_word(part, words)));
        if let Some(place) = place {
            splits[place].files.push(name.to_string());
        }
    }
    splits.retain(|split| !split.files.is_empty());
    if splits.is_empty() {
        let files = rows.iter().map(|name| name.to_string()).collect();
        splits.push(Split { name: SPLITS[0][0].into(), files });
    }
    splits
}

/// Tells whether a name has one of these words, with no letter or digit before or behind it.
fn has_word(name: &str, words: &[&str]) -> bool {
    name.to_lowercase().split(|c: char| !c.is_alphanumeric()).any(|part| words.contains(&part))
}

/// Returns the files of the split that is written, else of the one that `unsaid` means.
fn choose(reference: &Reference, splits: Vec<Split>, split: Option<&str>, unsaid: Unsaid) -> Result<Vec<String>> {
    let found: Vec<String> = splits.iter().map(|split| split.name.clone()).collect();
    let is = |of: &Split, name: &str| {
        of.name == name || SPLITS.iter().any(|words| words.contains(&name) && words[0] == of.name)
    };
    let help = format!("help: {{path: {reference}, split: {}}}", shown(&found[0]));
    let wanted = match (split, unsaid) {
        (Some(name), _) => name,
        (None, _) if splits.len() == 1 => &found[0],
        (None, Unsaid::Train) => SPLITS[0][0],
        (None, Unsaid::Only) => bail!(
            "{reference}: found the splits {}; say which one is meant\nhelp: name a file: {}, or in a recipe the split: {{path: \
             {reference}, split: {}}}",
            found.join(", "),
            address(reference, &splits[0].files[0]),
            shown(&found[0])
        ),
    };
    match splits.into_iter().find(|split| is(split, wanted)) {
        Some(split) => Ok(split.files),
        None => bail!("{reference}: found no split {}, but {}\n{help}", shown(wanted), found.join(", ")),
    }
}

/// Returns the files in order if all are in one folder and of one form. Text files beside other forms are left out.
fn of_one_form(reference: &Reference, mut files: Vec<String>) -> Result<Vec<String>> {
    files.sort();
    let forms: Vec<source::Kind> = files.iter().filter_map(|name| form_of(name)).collect();
    // A folder of rows may have notes in a text file beside them.
    let best = forms.iter().min().copied();
    if best != Some(source::Kind::Text) {
        files.retain(|name| form_of(name) != Some(source::Kind::Text));
    }
    let folders: Vec<&str> = files.iter().map(|name| name.rsplit_once('/').map_or("", |(folder, _)| folder)).collect();
    let is_clear = files.iter().all(|name| form_of(name) == best) && folders.iter().all(|folder| *folder == folders[0]);
    ensure!(
        is_clear,
        "{reference}: these files are of several folders or forms, so it is not clear which are meant:{}\nhelp: name a file or a \
         folder, e.g. {}",
        listed(&files),
        address(reference, &files[0])
    );
    Ok(files)
}

/// Returns the address of one file of a repository.
fn address(reference: &Reference, file: &str) -> String {
    Reference { path: file.into(), ..reference.clone() }.to_string()
}

/// The part of a README's front matter that names files.
#[derive(Deserialize)]
struct FrontMatter {
    #[serde(default)]
    configs: Vec<Configuration>,
}

#[derive(Deserialize)]
struct Configuration {
    config_name: Option<String>,
    #[serde(default)]
    default: bool,
    data_files: Option<Value>,
    data_dir: Option<String>,
}

/// Returns the default configuration of a README; `None` if it has no configurations. Fails if it has several without a default.
fn configuration(reference: &Reference, readme: &str) -> Result<Option<Configuration>> {
    let Some(yaml) = front_matter(readme) else { return Ok(None) };
    let parsed: Result<FrontMatter, _> = serde_saphyr::from_str(yaml);
    // Like `datasets`, this takes a front matter that cannot be read for one without configurations.
    let Ok(FrontMatter { mut configs }) = parsed else { return Ok(None) };
    configs.retain(|config| config.data_files.is_some() || config.data_dir.is_some());
    let is_default = |config: &Configuration| config.default || config.config_name.as_deref() == Some("default");
    match configs.iter().position(is_default).or((configs.len() == 1).then_some(0)) {
        Some(place) => Ok(Some(configs.swap_remove(place))),
        None if configs.is_empty() => Ok(None),
        None => {
            let told = |config: &Configuration| {
                let name = shown(config.config_name.as_deref().unwrap_or("(without a name)"));
                let files = config.data_files.as_ref().map(|files| shown(&files.to_string()));
                format!("{name}: {}", files.or(config.data_dir.as_deref().map(shown)).unwrap_or_default())
            };
            let configs: Vec<String> = configs.iter().map(told).collect();
            bail!(
                "{reference}: its README has several configurations, and none of them is the default:{}\nhelp: name a file or a \
                 folder of one of them: {}",
                listed(&configs),
                address(reference, "PATH")
            )
        }
    }
}

/// Returns the YAML between the two lines of dashes with which a README may begin.
fn front_matter(readme: &str) -> Option<&str> {
    let rest = readme.trim_start_matches('\u{feff}').strip_prefix("---")?;
    let rest = rest.strip_prefix("\r\n").or(rest.strip_prefix('\n'))?;
    rest.find("\n---").map(|end| &rest[..end + 1])
}

impl Configuration {
    /// Returns the splits that the configuration names, with the files of the repository that its patterns match.
    fn splits(&self, reference: &Reference, rows: &[&String]) -> Result<Vec<Split>> {
        let dir = self.data_dir.as_deref().unwrap_or("").trim_start_matches("./").trim_matches('/');
        let inside: Vec<&String> =
            rows.iter().filter(|name| dir.is_empty() || name.starts_with(&format!("{dir}/"))).copied().collect();
        let Some(data_files) = &self.data_files else {
            ensure!(
                !inside.is_empty(),
                "{reference}: its README names the folder {}, which has no file of rows",
                shown(dir)
            );
            return Ok(by_names(&inside));
        };
        let named = named_splits(data_files);
        let named = named.with_context(|| {
            format!("{reference}: its README has data_files in an unknown form: {}", shown(&data_files.to_string()))
        })?;
        let mut splits = Vec::new();
        for (name, patterns) in named {
            let mut files = Vec::new();
            for pattern in patterns {
                let pattern = pattern.trim_start_matches("./");
                let pattern = if dir.is_empty() { pattern.to_string() } else { format!("{dir}/{pattern}") };
                let regex = regex_of(&pattern).with_context(|| {
                    format!("{reference}: its README has the pattern {}, which cannot be read", shown(&pattern))
                })?;
                files.extend(
                    rows.iter().filter(|name| regex.is_match(name).unwrap_or(false)).map(|name| name.to_string()),
                );
            }
            ensure!(
                !files.is_empty(),
                "{reference}: its README names files of the split {}, and none of them is a file of rows that is there",
                shown(&name)
            );
            files.sort();
            files.dedup();
            splits.push(Split { name, files });
        }
        ensure!(!splits.is_empty(), "{reference}: its README names no files");
        Ok(splits)
    }
}

/// Returns splits with their patterns. One pattern or a list of patterns belongs to `train`; otherwise each item names its split.
fn named_splits(data_files: &Value) -> Option<Vec<(String, Vec<&str>)>> {
    fn patterns(value: &Value) -> Option<Vec<&str>> {
        match value {
            Value::String(pattern) => Some(vec![pattern]),
            Value::Array(list) => list.iter().map(Value::as_str).collect(),
            _ => None,
        }
    }
    let train = || SPLITS[0][0].to_string();
    match data_files {
        Value::Object(splits) => splits.iter().map(|(name, files)| Some((name.clone(), patterns(files)?))).collect(),
        Value::Array(list) if list.iter().all(Value::is_object) => {
            let split =
                |item: &Value| item.get("split").map_or(Some(train()), |split| split.as_str().map(String::from));
            list.iter().map(|item| Some((split(item)?, patterns(item.get("path")?)?))).collect()
        }
        one => Some(vec![(train(), patterns(one)?)]),
    }
}

/// Returns the regular expression of a pattern of paths. `*` and `?` match no slash, `**` does; `[…]` and `{a,b}` are alternatives.
fn regex_of(pattern: &str) -> Result<Regex> {
    let mut regex = String::from("^");
    let (mut chars, mut braces) = (pattern.chars().peekable(), 0);
    while let Some(c) = chars.next() {
        match c {
            '*' if chars.peek() == Some(&'*') => {
                chars.next();
                match chars.next_if_eq(&'/') {
                    Some(_) => regex += "(?:.*/)?",
                    None => regex += ".*",
                }
            }
            '*' => regex += "[^/]*",
            '?' => regex += "[^/]",
            '[' => {
                let class: String = chars.by_ref().take_while(|c| *c != ']').collect();
                regex += &format!(
                    "[{}]",
                    class.replacen('!', "^", usize::from(class.starts_with('!'))).replace('\\', r"\\")
                );
            }
            '{' => {
                braces += 1;
                regex += "(?:";
            }
            '}' if braces > 0 => {
                braces -= 1;
                regex += ")";
            }
            ',' if braces > 0 => regex += "|",
            c => regex += &fancy_regex::escape(c.encode_utf8(&mut [0; 4])),
        }
    }
    Ok(Regex::new(&(regex + "$"))?)
}

#[cfg(test)]
mod tests {
    use super::super::reference::Kind;
    use super::*;

    fn files(
        names: &[&str],
        readme: Option<&str>,
        address: &str,
        split: Option<&str>,
        unsaid: Unsaid,
    ) -> Result<Vec<String>> {
        let reference = Reference::of(Path::new(address), Kind::Dataset).unwrap();
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        files_of(&reference, &names, readme, split, unsaid)
    }

    const PARTS: [&str; 6] = [
        ".gitattributes",
        "README.md",
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "dataset_infos.json",
    ];

    #[test]
    fn files_of_a_split_are_found_by_their_names() {
        let train = &PARTS[3..5];
        for (names, address, split, unsaid, expected) in [
            (&PARTS[..], "o/n", None, Unsaid::Train, train),
            (&PARTS, "o/n", Some("training"), Unsaid::Only, train),
            (&PARTS, "o/n", Some("test"), Unsaid::Train, &PARTS[2..3]),
            (&PARTS, "hf://datasets/o/n/data/train-00001-of-00002.parquet", None, Unsaid::Only, &PARTS[4..5]),
            (&["a.jsonl", "notes.txt"], "o/n", None, Unsaid::Only, &["a.jsonl"]),
            (&["a.jsonl", "b.jsonl"], "o/n", None, Unsaid::Train, &["a.jsonl", "b.jsonl"]),
            (&["dev.csv.gz", "train.csv.gz"], "o/n", Some("validation"), Unsaid::Train, &["dev.csv.gz"]),
            (&["test/a.json", "train/b.json"], "o/n", None, Unsaid::Train, &["train/b.json"]),
            (&["en/train.csv", "de/train.csv"], "hf://datasets/o/n/de", None, Unsaid::Train, &["de/train.csv"]),
            (
                &["x/test/0000.parquet", "x/train/0000.parquet"],
                "o/n@refs/convert/parquet",
                None,
                Unsaid::Train,
                &["x/train/0000.parquet"],
            ),
            (&["trainer.jsonl", "x.jsonl"], "o/n", None, Unsaid::Train, &["trainer.jsonl", "x.jsonl"]),
        ] {
            let found = files(names, None, address, split, unsaid).unwrap();
            assert_eq!(found, expected, "{address} {split:?} of {names:?}");
        }
    }

    #[test]
    fn the_readme_says_which_files_are_meant() {
        let of = |configs: &str, names: &[&str], split: Option<&str>| {
            let readme = format!("---\nlicense: mit\nconfigs:\n{configs}---\n# Title\n");
            files(names, Some(&readme), "o/n", split, Unsaid::Train)
        };
        let names = ["extra/x.jsonl", "main/a.jsonl", "main/b.jsonl", "main/test.jsonl", "train.jsonl"];
        let list = "- config_name: default\n  data_files:\n  - split: train_sft\n    path: main/[ab].jsonl\n  - {split: test, path: ['main/test*']}\n";
        assert_eq!(of(list, &names, Some("train_sft")).unwrap(), &names[1..3]);
        assert_eq!(of(list, &names, Some("test")).unwrap(), &names[3..4]);
        let error = of(list, &names, None).unwrap_err().to_string();
        assert!(
            error.contains("found no split train, but train_sft, test\nhelp: {path: o/n, split: train_sft}"),
            "{error}"
        );
        assert_eq!(of("- data_files: 'main/?.jsonl'\n", &names, None).unwrap(), &names[1..3]);
        assert_eq!(of("- data_files: {train: '**/{a,x}.jsonl'}\n", &names, None).unwrap(), &names[..2]);
        assert_eq!(
            of("- data_files: [train.jsonl, ./main/a.jsonl]\n", &names, None).unwrap(),
            ["main/a.jsonl", "train.jsonl"]
        );
        assert_eq!(of("- data_dir: extra\n", &names, None).unwrap(), &names[..1]);
        let two = "- {config_name: en, data_files: en/*.csv}\n- {config_name: de, data_files: de/*.csv";
        let error = of(&format!("{two}}}\n"), &["de/train.csv", "en/train.csv"], None).unwrap_err().to_string();
        assert!(
            error.contains("none of them is the default:\n  en: \"en/*.csv\"\n  de: \"de/*.csv\"\nhelp: "),
            "{error}"
        );
        assert!(error.ends_with("hf://datasets/o/n/PATH"), "{error}");
        let default = of(&format!("{two}, default: true}}\n"), &["de/train.csv", "en/train.csv"], None);
        assert_eq!(default.unwrap(), ["de/train.csv"]);
        for (configs, found) in [
            ("- data_files: gone.csv\n", "names files of the split train, and none of them is"),
            ("- data_files: 5\n", "data_files in an unknown form: 5"),
            ("- data_files: '[b-a].jsonl'\n", "the pattern [b-a].jsonl, which cannot be read"),
            ("- data_dir: gone\n", "names the folder gone, which has no file of rows"),
        ] {
            let error = of(configs, &names, None).unwrap_err().to_string();
            assert!(error.contains(found), "{found} is not in {error}");
        }
        // Without a front matter, or with one about other things, names decide.
        for readme in ["# Title", "---\nlicense: mit\n---\n", "---\nconfigs: 3\n---\n", "---\na: [\n---\n"] {
            assert_eq!(
                files(&["train.jsonl", "test.jsonl"], Some(readme), "o/n", None, Unsaid::Train).unwrap(),
                ["train.jsonl"]
            );
        }
    }

    #[test]
    fn what_is_not_clear_is_refused_with_what_there_is() {
        for (names, split, unsaid, found) in [
            (
                &PARTS[..],
                None,
                Unsaid::Only,
                "found the splits train, test; say which one is meant\nhelp: name a file: hf://datasets/o/n/data/train-00000",
            ),
            (&PARTS[..], None, Unsaid::Only, ".parquet, or in a recipe the split: {path: o/n, split: train}"),
            (&PARTS, Some("dev"), Unsaid::Train, "found no split dev, but train, test"),
            (&["README.md", "script.py"], None, Unsaid::Train, "no file of rows is there; allowed: .jsonl, "),
            (
                &["README.md", "script.py"],
                None,
                Unsaid::Train,
                "there is:\n  README.md\n  script.py\nhelp: the hub also has most data sets as parquet: o/n@refs/convert/parquet",
            ),
            (
                &["train.jsonl", "train.parquet"],
                None,
                Unsaid::Train,
                "it is not clear which are meant:\n  train.jsonl\n  train.parquet\nhelp: name a file or a folder, e.g. hf://datasets/o/n/train.jsonl",
            ),
            (
                &["de/train.csv", "en/train.csv"],
                None,
                Unsaid::Train,
                "it is not clear which are meant:\n  de/train.csv\n  en/train.csv",
            ),
        ] {
            let error = files(names, None, "o/n", split, unsaid).unwrap_err().to_string();
            assert!(error.contains(found), "{found} is not in {error}");
        }
        let error = files(&PARTS, None, "hf://datasets/o/n/data/none.jsonl", None, Unsaid::Train).unwrap_err();
        assert!(error.to_string().ends_with("as parquet: o/n@refs/convert/parquet"), "{error}");
        let error = files(&PARTS[..4], None, "o/n", None, Unsaid::Train).unwrap_err().to_string();
        assert!(error.contains("found 1 of 2 files data/train-NNNNN-of-00002.parquet"), "{error}");
        let error =
            files(&PARTS, None, "hf://datasets/o/n/data/test-00000-of-00001.parquet", Some("test"), Unsaid::Only);
        assert!(error.unwrap_err().to_string().contains("split is for folders"), "a file has no splits");
    }
}

//! The modules that get an adapter, with rank and scale of each, as the keys of PEFT's LoraConfig say it. The rules are
//! those of PEFT 0.21: `check_target_module_exists` and `get_pattern_key`.

use std::collections::BTreeSet;
use std::fmt::{self, Debug};

use anyhow::{Context, Result, bail, ensure};
use fancy_regex::{Regex, RegexBuilder};
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::spec::{LayerSpec, ModelSpec, Module, ModuleId};
use super::trainable::LoraModule;
use crate::files::shown;
use crate::guarded::guarded;

/// Longest regular expression, in bytes.
const MAX_PATTERN: usize = 1 << 14;

/// Most backtracking steps of a regular expression in one name. A pattern is tried on the names of all modules.
const MAX_BACKTRACKS: usize = 10_000;

/// Most names or expressions of a key.
const MAX_NAMES: usize = 1 << 14;

/// Largest rank.
pub const MAX_RANK: usize = 1 << 16;

/// A regular expression of Python's syntax, whose work is bounded.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    regex: Regex,
}

impl Pattern {
    /// Reads an expression; `before` and `after` are put around it.
    fn read(text: &str, before: &str, after: &str) -> Option<Pattern> {
        if text.len() > MAX_PATTERN {
            return None;
        }
        let mut builder = RegexBuilder::new(&format!("{before}{text}{after}"));
        let regex = guarded("a pattern", || Ok(builder.backtrack_limit(MAX_BACKTRACKS).build()?)).ok()?;
        Some(Pattern { text: text.into(), regex })
    }

    fn matches(&self, module: &str) -> Result<bool> {
        self.regex.is_match(module).with_context(|| self.too_much(module))
    }

    fn too_much(&self, module: &str) -> String {
        format!("found {:?}, which takes too much work for {module}", shown(&self.text))
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// Modules as `target_modules` and `exclude_modules` name them.
#[derive(Clone, Debug, PartialEq)]
pub enum Modules {
    /// Every linear module of the layers.
    AllLinear,
    /// An expression that matches whole names.
    Pattern(Pattern),
    /// Whole names of modules, or their ends after a dot, each once.
    Names(Vec<String>),
}

impl Modules {
    /// Reads `"all-linear"`, a list of names, or a regular expression.
    pub fn read(value: &Value) -> Option<Modules> {
        match value {
            Value::String(word) if word.eq_ignore_ascii_case("all-linear") => Some(Modules::AllLinear),
            value => Modules::read_excluded(value),
        }
    }

    /// Reads what may be excluded: a list of names, or a regular expression.
    pub fn read_excluded(value: &Value) -> Option<Modules> {
        match value {
            Value::String(text) => Pattern::read(text, "^(?:", ")$").map(Modules::Pattern),
            value => names(value).map(Modules::names),
        }
    }

    /// Returns modules in their order of use, then other names in alphabetic order.
    fn names(mut names: Vec<String>) -> Modules {
        names.sort_by_cached_key(|name| (ModuleId::from_name(name).is_none(), ModuleId::from_name(name), name.clone()));
        names.dedup();
        Modules::Names(names)
    }

    /// The modules with these ids.
    pub fn with_ids(ids: &[ModuleId]) -> Modules {
        Modules::names(ids.iter().map(ToString::to_string).collect())
    }

    /// Returns whether a module is among these.
    pub fn contain(&self, module: &str) -> Result<bool> {
        match self {
            Modules::AllLinear => Ok(module.rsplit('.').next().and_then(ModuleId::from_name).is_some()),
            Modules::Pattern(pattern) => pattern.matches(module),
            Modules::Names(names) => Ok(names.iter().any(|name| is_end(name, module))),
        }
    }
}

/// Returns whether a name is a module's, or the end of it after a dot.
fn is_end(name: &str, module: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Reads a list of strings that are not empty.
fn names(value: &Value) -> Option<Vec<String>> {
    let list = value.as_array().filter(|list| (1..=MAX_NAMES).contains(&list.len()))?;
    list.iter().map(|name| name.as_str().filter(|name| !name.is_empty()).map(String::from)).collect()
}

/// Writes `all-linear`, an expression, or a list of names.
impl Serialize for Modules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Modules::AllLinear => serializer.serialize_str("all-linear"),
            Modules::Pattern(pattern) => pattern.serialize(serializer),
            Modules::Names(names) => names.serialize(serializer),
        }
    }
}

/// Values of some modules, as `rank_pattern` and `alpha_pattern` give them: a module has the value of the first
/// expression that matches its name, or an end of it after a dot.
#[derive(Clone, Debug, PartialEq)]
pub struct Patterns<T>(Vec<(Pattern, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Patterns(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// Reads a mapping of expressions to values; `null` is an empty one.
    pub fn read(value: &Value, read: fn(&Value) -> Option<T>) -> Option<Patterns<T>> {
        if value.is_null() {
            return Some(Patterns::default());
        }
        let map = value.as_object().filter(|map| map.len() <= MAX_NAMES)?;
        let entry = |(text, value): (&String, &Value)| Some((Pattern::read(text, "^(.*\\.)?(", ")$")?, read(value)?));
        map.iter().map(entry).collect::<Option<_>>().map(Patterns)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn of(&self, module: &str) -> Result<Option<T>> {
        for (pattern, value) in &self.0 {
            if pattern.matches(module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// Fails with the first expression that matches none of these modules.
    fn check(&self, modules: &[&str]) -> Result<()> {
        for (pattern, _) in &self.0 {
            ensure!(
                any(modules, |module| pattern.matches(module))?,
                "found {:?}, which matches no module with an adapter; allowed: expressions for ends of their names, e.g. {}",
                shown(&pattern.text),
                modules.first().map_or("", |module| module)
            );
        }
        Ok(())
    }
}

/// Writes a mapping of expressions to values.
impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(pattern, value)| (&pattern.text, value)))
    }
}

/// The layers whose modules may be targets, as `layers_to_transform` and `layers_pattern` say it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layers {
    /// `None` allows all.
    pub indices: Option<Vec<usize>>,
    /// Names of the list of layers; if there are none, any list counts.
    pub patterns: Vec<LayersPattern>,
}

/// The name of a list of layers, as an expression.
#[derive(Clone, Debug, PartialEq)]
pub struct LayersPattern(Pattern);

impl Serialize for LayersPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl Layers {
    /// Reads the number of a layer, or a list of numbers.
    pub fn read_indices(value: &Value) -> Option<Vec<usize>> {
        let one = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
        match value {
            Value::Array(list) if (1..=MAX_NAMES).contains(&list.len()) => {
                list.iter().map(one).collect::<Option<BTreeSet<_>>>().map(Vec::from_iter)
            }
            value => one(value).map(|index| vec![index]),
        }
    }

    /// Reads the name of a list of layers, or several names, of which the first that a module has counts.
    pub fn read_patterns(value: &Value) -> Option<Vec<LayersPattern>> {
        let texts = match value {
            Value::String(text) if !text.is_empty() => vec![text.clone()],
            value => names(value)?,
        };
        let read = |text: &String| Pattern::read(text, r"^(?:(?:^|.*?\.)", r"\.(?P<idx>\d+)\.)").map(LayersPattern);
        texts.iter().map(read).collect()
    }

    fn allow(&self, module: &str) -> Result<bool> {
        let Some(indices) = &self.indices else { return Ok(true) };
        Ok(self.index_of(module)?.is_some_and(|index| indices.contains(&index)))
    }

    /// Returns the number of a module's layer: the first number in its name that follows the name of the list.
    fn index_of(&self, module: &str) -> Result<Option<usize>> {
        for LayersPattern(pattern) in &self.patterns {
            if let Some(found) = pattern.regex.captures(module).with_context(|| pattern.too_much(module))? {
                return Ok(found.name("idx").and_then(|index| index.as_str().parse().ok()));
            }
        }
        // A name, the name of the list, the number, and more.
        let parts: Vec<&str> = module.split('.').collect();
        let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let numbers = parts.get(2..parts.len().saturating_sub(1)).unwrap_or_default();
        let first = numbers.iter().find(|part| is_number(part)).filter(|_| self.patterns.is_empty());
        Ok(first.and_then(|part| part.parse().ok()))
    }
}

/// The keys of PEFT's LoraConfig that give modules an adapter, or decide its rank and scale.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraKeys {
    /// PEFT's r, of the modules that `rank_pattern` does not name.
    pub r: usize,
    pub alpha: f64,
    pub use_rslora: bool,
    pub targets: Modules,
    pub excluded: Option<Modules>,
    pub layers: Layers,
    pub rank_pattern: Patterns<usize>,
    pub alpha_pattern: Patterns<f64>,
}

impl LoraKeys {
    /// Keys of an adapter whose modules are alike.
    pub fn uniform(r: usize, alpha: f64, targets: Modules) -> LoraKeys {
        LoraKeys {
            r,
            alpha,
            use_rslora: false,
            targets,
            excluded: None,
            layers: Layers::default(),
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
        }
    }

    /// Returns whether these keys give a module of this name an adapter.
    pub fn is_target(&self, module: &str) -> Result<bool> {
        let excluded = self.excluded.as_ref().map_or(Ok(false), |excluded| excluded.contain(module));
        Ok(!excluded.context("exclude_modules")?
            && self.targets.contain(module).context("target_modules")?
            && self.layers.allow(module).context("layers_pattern")?)
    }

    /// Returns the modules of each layer that get an adapter.
    ///
    /// # Errors
    /// A module that is no projection of a layer gets one too, or a regular expression takes too much work.
    pub fn modules(&self, spec: &ModelSpec) -> Result<Vec<Vec<LoraModule>>> {
        for other in others(spec) {
            ensure!(!self.is_target(&other)?, "target_modules: found {other}; allowed: projections of layers");
        }
        let has_whole_names =
            |module: &Module| matches!(&self.targets, Modules::Names(names) if names.contains(&module.name));
        if let Some(module) = spec.modules().find(|module| self.layers.indices.is_some() && has_whole_names(module)) {
            bail!(
                "layers_to_transform: target_modules has the whole name {}; allowed with it: ends of names",
                module.name
            );
        }
        let of_layer = |layer: &LayerSpec| {
            let mut modules = Vec::new();
            for module in layer.modules() {
                if self.is_target(&module.name)? {
                    modules.push(self.module(module)?);
                }
            }
            Ok(modules)
        };
        spec.layers.iter().map(of_layer).collect()
    }

    fn module(&self, module: &Module) -> Result<LoraModule> {
        let lora_rank = self.rank_pattern.of(&module.name).context("rank_pattern")?.unwrap_or(self.r);
        let alpha = self.alpha_pattern.of(&module.name).context("alpha_pattern")?.unwrap_or(self.alpha);
        let r = lora_rank as f64;
        let scale = if self.use_rslora { alpha / r.sqrt() } else { alpha / r };
        Ok(LoraModule { id: module.id, lora_rank, scale: scale as f32 })
    }

    /// Returns the modules of each layer that get a new adapter, see [`LoraKeys::modules`]. Keys that PEFT only warns of
    /// are refused.
    ///
    /// # Errors
    /// No module gets an adapter, or a name, an expression or a layer is not in this model.
    pub fn new_modules(&self, spec: &ModelSpec) -> Result<Vec<Vec<LoraModule>>> {
        let modules = self.modules(spec)?;
        let all: Vec<&str> = spec.modules().map(|module| module.name.as_str()).collect();
        for (key, named) in [("target_modules", Some(&self.targets)), ("exclude_modules", self.excluded.as_ref())] {
            check_names(named, &all, spec, key).context(key)?;
        }
        let too_large = self.layers.indices.iter().flatten().find(|index| **index >= spec.num_layers());
        if let Some(index) = too_large {
            bail!("layers_to_transform: found {index}, allowed: layers of this model, 0 to {}", spec.num_layers() - 1);
        }
        let with_adapter: Vec<&str> = spec
            .layers
            .iter()
            .zip(&modules)
            .flat_map(|(layer, modules)| {
                modules.iter().filter_map(move |module| layer.module(module.id)).map(|module| module.name.as_str())
            })
            .collect();
        ensure!(
            !with_adapter.is_empty(),
            "target_modules: no module gets an adapter, as exclude_modules, layers_to_transform and layers_pattern leave none of {}",
            serde_json::to_string(&self.targets)?
        );
        self.rank_pattern.check(&with_adapter).context("rank_pattern")?;
        self.alpha_pattern.check(&with_adapter).context("alpha_pattern")?;
        Ok(modules)
    }
}

/// Fails if a name or an expression matches no module.
fn check_names(modules: Option<&Modules>, all: &[&str], spec: &ModelSpec, key: &str) -> Result<()> {
    let unknown = match modules {
        None | Some(Modules::AllLinear) => None,
        Some(Modules::Pattern(pattern)) => (!any(all, |module| pattern.matches(module))?).then_some(&pattern.text),
        Some(Modules::Names(names)) => names.iter().find(|name| !all.iter().any(|module| is_end(name, module))),
    };
    let Some(name) = unknown else { return Ok(()) };
    let ids: BTreeSet<ModuleId> = spec.modules().map(|module| module.id).collect();
    let ids: Vec<&str> = ids.into_iter().map(ModuleId::name).collect();
    let all_linear = match (key, name.as_str()) {
        ("exclude_modules", _) => "",
        (_, "all-linear") => "all-linear without a list, ",
        _ => "all-linear, ",
    };
    bail!(
        "this model has no {}; allowed: {all_linear}{}, whole names such as {}, or an expression that matches whole names",
        shown(name),
        ids.join(", "),
        all.first().map_or("", |module| module)
    )
}

fn any(modules: &[&str], is_one: impl Fn(&str) -> Result<bool>) -> Result<bool> {
    for module in modules {
        if is_one(module)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the names of modules that PEFT would try expressions on, or put adapters on, and that are no projections.
fn others(spec: &ModelSpec) -> BTreeSet<String> {
    let mut others = BTreeSet::from(["lm_head".to_string()]);
    let tensors = spec.tensors();
    let of_tensors = tensors.iter().filter(|tensor| !tensor.is_linear());
    others.extend(of_tensors.filter_map(|tensor| Some(tensor.name.strip_suffix(".weight")?.to_string())));
    for module in spec.modules() {
        let parents = module.name.match_indices('.').map(|(at, _)| module.name[..at].to_string());
        others.extend(parents);
    }
    // Activations are modules of MLPs, under either name.
    for layer in &spec.layers {
        let mlp = layer.mlp.modules.first().and_then(|module| module.name.rsplit_once('.'));
        others.extend(
            mlp.into_iter().flat_map(|(mlp, _)| ["act_fn", "activation_fn"].map(|name| format!("{mlp}.{name}"))),
        );
    }
    others
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;
    use serde_json::json;

    /// The error of new modules with these keys on a model of two layers.
    fn error(change: impl FnOnce(&mut LoraKeys)) -> String {
        let spec = shapes::named("llama-3.1-8b", Some(2)).unwrap();
        let mut keys = LoraKeys::uniform(8, 8.0, Modules::AllLinear);
        change(&mut keys);
        format!("{:#}", keys.new_modules(&spec).unwrap_err())
    }

    #[test]
    fn keys_that_name_nothing_are_refused_with_what_they_may_name() {
        let names = |value: Value| Modules::read(&value).unwrap();
        let told = error(|keys| keys.targets = names(json!(["q_proj", "qkv_proj"])));
        assert!(
            told.starts_with("target_modules: this model has no qkv_proj; allowed: all-linear, q_proj, k_proj"),
            "{told}"
        );
        let told = error(|keys| keys.targets = names(json!("q_proj")));
        assert!(told.starts_with("target_modules: this model has no q_proj;"), "{told}");
        let told = error(|keys| keys.excluded = Some(names(json!(["lm_head"]))));
        assert!(told.starts_with("exclude_modules: this model has no lm_head; allowed: q_proj, k_proj"), "{told}");
        let told = error(|keys| keys.targets = names(json!(["all-linear"])));
        assert!(told.contains("has no all-linear; allowed: all-linear without a list, q_proj, k_proj"), "{told}");
        let told = error(|keys| keys.layers.indices = Some(vec![0, 2]));
        assert_eq!(told, "layers_to_transform: found 2, allowed: layers of this model, 0 to 1");
        let told = error(|keys| keys.excluded = Some(names(json!(".*"))));
        assert!(told.starts_with("target_modules: no module gets an adapter"), "{told}");
        let rank = |v: &Value| v.as_u64().map(|r| r as usize);
        let told = error(|keys| keys.rank_pattern = Patterns::read(&json!({"q_proj": 4, "proj": 3}), rank).unwrap());
        assert!(told.starts_with("rank_pattern: found \"proj\", which matches no module with an adapter"), "{told}");
        let told = error(|keys| keys.alpha_pattern = Patterns::read(&json!({"w1": 3.0}), Value::as_f64).unwrap());
        assert!(told.starts_with("alpha_pattern: found \"w1\""), "{told}");
    }

    #[test]
    fn other_modules_than_projections_are_refused() {
        for (targets, other) in [
            (json!(["q_proj", "lm_head"]), "lm_head"),
            (json!(["embed_tokens"]), "model.embed_tokens"),
            (json!("model.layers.*"), "model.layers"),
            (json!(r".*\.mlp\..*"), "model.layers.0.mlp.act_fn"),
            (json!(r".*norm|.*q_proj"), "model.layers.0.input_layernorm"),
        ] {
            let told = error(|keys| keys.targets = Modules::read(&targets).unwrap());
            assert_eq!(told, format!("target_modules: found {other}; allowed: projections of layers"));
        }
        let told = error(|keys| {
            keys.targets = Modules::read(&json!(["model.layers.0.mlp.up_proj"])).unwrap();
            keys.layers.indices = Some(vec![0]);
        });
        assert!(
            told.starts_with("layers_to_transform: target_modules has the whole name model.layers.0.mlp.up_proj"),
            "{told}"
        );
    }

    #[test]
    fn lists_are_sorted_and_values_have_one_spelling() {
        let list = Modules::read(&json!(["x", "down_proj", "q_proj", "q_proj"])).unwrap();
        assert_eq!(serde_json::to_value(&list).unwrap(), json!(["q_proj", "down_proj", "x"]));
        assert_eq!(Modules::read(&json!("All-Linear")), Some(Modules::AllLinear));
        assert_eq!(
            [json!([]), json!([""]), json!([1]), json!("("), json!(1)].map(|v| Modules::read(&v)),
            [const { None }; 5]
        );
        assert_eq!(Layers::read_indices(&json!([3, 1, 3])), Some(vec![1, 3]));
        assert_eq!([json!([]), json!("1"), json!([0.5])].map(|v| Layers::read_indices(&v)), [const { None }; 3]);
    }
}

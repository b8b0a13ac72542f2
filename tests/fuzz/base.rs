//! Files of a base model: headers of safetensors files, the index, bitsandbytes' quant_state, config.json.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::Result;
use fsdp_qlora::testing::{
    BaseModel, CODEBOOK, DYNAMIC_MAP, Hardware, LoadOptions, Machine, ModelSpec, Planned, load, recipe,
};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::driver::Target;
use super::folder::Folder;
use super::form::{Form, safetensors};
use super::golden;

const OPTIONS: LoadOptions = LoadOptions { load_in_4bit: true, double_quant: None, shards: None, num_shards: 1 };

/// Reads all tensors of a model, a piece of each.
fn read_all(dir: &Path) -> Result<BaseModel> {
    let base = BaseModel::open(dir)?;
    for name in base.names() {
        let view = base.tensor(name)?;
        let mut piece = vec![0.0; view.num_elements().min(1 << 10)];
        // A type that is no float is refused.
        let _ = (view.to_f32(0, &mut piece), base.is_bnb(name));
        base.release(&view)?;
    }
    Ok(base)
}

/// The header of a safetensors file.
pub fn header() -> Target {
    let folder = Folder::new(&[]);
    let spec = ModelSpec::load(&golden("tiny")).unwrap();
    let read = move |input: &[u8]| {
        folder.write("model.safetensors", input);
        read_all(&folder.path())?.check(&spec)
    };
    let words = &["F32", "BF16", "F16", "U8", "F4", "F8_E8M0", "BOOL", "F6_E2M3", "C64", "vision_tower.", "\u{1b}[2J"];
    Target::new(Form::Safetensors, words, Vec::new(), read)
}

/// `model.safetensors.index.json`, in a folder with links of several kinds. ROOT stands for the folder around the
/// model's.
pub fn index() -> Target {
    let file = |name: &str| {
        let header = format!("{{\"{name}\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}}}");
        (format!("{name}.safetensors"), safetensors(header.as_bytes(), &[0; 4]))
    };
    let files = ["a", "b", "c"].map(file);
    let folder = Folder::new(&files.each_ref().map(|(name, bytes)| (name.as_str(), bytes.clone())));
    let outside = folder.root().join("outside");
    for (link, path) in [
        ("own.safetensors", "a.safetensors".into()),
        ("link.safetensors", "../outside/a.safetensors".into()),
        ("absolute.safetensors", outside.join("a.safetensors")),
        ("twice.safetensors", "link.safetensors".into()),
        ("endless.safetensors", "endless.safetensors".into()),
        ("dangling.safetensors", "none".into()),
        ("folder", outside),
    ] {
        symlink(path, folder.path().join(link)).unwrap();
    }
    let read = move |input: &[u8]| {
        let root = folder.root().to_str().unwrap();
        let text = String::from_utf8_lossy(input).replace("ROOT", root);
        folder.write("model.safetensors.index.json", text.as_bytes());
        let result = read_all(&folder.path());
        folder.check_outside();
        result.map(drop)
    };
    let words = &[
        "a.safetensors",
        "own.safetensors",
        "link.safetensors",
        "absolute.safetensors",
        "twice.safetensors",
        "endless.safetensors",
        "dangling.safetensors",
        "folder/a.safetensors",
        "../outside/a.safetensors",
        "./a.safetensors",
        "ROOT/outside/a.safetensors",
        "ROOT/model/a.safetensors",
        "model.safetensors.index.json",
        "language_model.model.a",
        "..",
        ".",
    ];
    let seeds = vec![fs::read(golden("tiny-bias/model.safetensors.index.json")).unwrap()];
    Target::new(Form::Json, words, seeds, read)
}

/// `quant_state` of a weight in 4 bit.
pub fn quant_state() -> Target {
    const WEIGHT: &str = "model.layers.0.mlp.down_proj.weight";
    let model = golden("tiny-bnb4-nested");
    let folder = Folder::new(&[("config.json", fs::read(model.join("config.json")).unwrap())]);
    let file = fs::read(model.join("model.safetensors")).unwrap();
    let name = format!("{WEIGHT}.quant_state.bitsandbytes__nf4");
    let state = SafeTensors::deserialize(&file).unwrap().tensor(&name).unwrap().data().to_vec();
    let read = move |input: &[u8]| {
        let tensors = SafeTensors::deserialize(&file)?;
        let with_input = tensors.iter().map(|(other, view)| match other == name {
            true => Ok((other, TensorView::new(view.dtype(), vec![input.len()], input)?)),
            false => Ok((other, view)),
        });
        let with_input = with_input.collect::<Result<Vec<_>>>()?;
        folder.write("model.safetensors", &safetensors::serialize(with_input, None)?);
        let base = BaseModel::open(&folder.path())?;
        base.bnb_tensor(WEIGHT, &CODEBOOK, &DYNAMIC_MAP)?;
        load::planned(&folder.path(), &OPTIONS).map(drop)
    };
    let words = &["nf4", "fp4", "bfloat16", "float16", "float32", "nested_blocksize", "nested_offset", "nested_dtype"];
    Target::new(Form::Json, words, vec![state], read)
}

/// `config.json`, of a model without weights, for which a run is planned.
pub fn config() -> Target {
    let folder = Folder::new(&[]);
    let recipe = folder.root().join("recipe.yaml");
    fs::write(&recipe, format!("model: {}\ndata.train: rows.jsonl\n", folder.path().display())).unwrap();
    let job = recipe::load(&recipe, recipe::Command::Plan, &[]).unwrap();
    let hardware = Hardware::named("h100").unwrap();
    let read = move |input: &[u8]| {
        folder.write("config.json", input);
        let (network_bytes_per_s, host_gib) = (1e9, Some(256.0));
        let machine =
            Machine { hardware: &hardware, nodes: 1, world_size: 2, ranks_per_gpu: 1, network_bytes_per_s, host_gib };
        let report = Planned::of_model(&job, &machine)?.report(&job, &machine)?;
        assert!(!report.to_string().is_empty() && report.json().is_object());
        let spec = ModelSpec::load(&folder.path())?;
        for rope in &spec.ropes {
            let (cos, sin) = rope.cos_sin(&[0, 1, 2, 1 << 20], &[0, 4]);
            assert!(cos.iter().chain(&sin).all(|x| x.is_finite()), "{rope:?} rotates by numbers that are not finite");
        }
        Ok(())
    };
    let families: Vec<_> = fs::read_dir(golden("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let cases = families.iter().flat_map(|family| fs::read_dir(family).into_iter().flatten());
    let mut paths: Vec<_> = cases.map(|case| case.unwrap().path().join("config.v5.json")).collect();
    paths.extend(["tiny", "tiny-bias", "tiny-bnb4"].map(|model| golden(model).join("config.json")));
    paths.sort();
    let words =
        &["rope_scaling", "type", "factor", "yarn", "dynamic", "linear", "llama3", "longrope", "mscale", "llama"];
    Target::new(Form::Json, words, paths.into_iter().filter_map(|path| fs::read(path).ok()).collect(), read)
}

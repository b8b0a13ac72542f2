//! Recipes. A line that begins with `#set ` is a `--set` of the command line.

use fsdp_qlora::testing::recipe::{Command, load};

use super::driver::Target;
use super::folder::Folder;
use super::form::Form;

/// MODEL stands for a folder that is there.
pub fn recipe() -> Target {
    let folder = Folder::new(&[]);
    let read = move |input: &[u8]| {
        let text = String::from_utf8_lossy(input).replace("MODEL", folder.path().to_str().unwrap());
        folder.write("recipe.yaml", text.as_bytes());
        let sets: Vec<String> = text.lines().filter_map(|line| Some(line.strip_prefix("#set ")?.into())).collect();
        for command in [Command::Train, Command::Plan] {
            let job = load(&folder.path().join("recipe.yaml"), command, &sets)?;
            assert!(!job.values().is_empty());
            for world_size in [1, 3, 1024] {
                let training = &job.training;
                assert!(training.global_batch_size(world_size) >= training.accumulation_steps(world_size));
            }
        }
        Ok(())
    };
    let words = &[
        "#set lora.r=8\n",
        "#set lora={r: 8}\n",
        "&a ",
        "*a",
        "<<: *a",
        "&a [*a]",
        "!!binary ",
        "!!str ",
        "|\n ",
        ">-\n ",
        "---\n",
        "...\n",
        "? ",
        "- ",
        "{",
        "}",
        "~",
        ".inf",
        ".nan",
        "0x7f",
        "0o17",
        "22GiB",
        "'",
    ];
    Target::new(Form::Yaml, words, Vec::new(), read)
}

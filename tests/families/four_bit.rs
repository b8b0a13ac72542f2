//! Checkpoints that bitsandbytes saved in 4 bit give its logits (scripts/golden/four_bit.py): fused modules, and a text tower whose names
//! have a prefix, with double quantization.

use fsdp_qlora::testing::Mode;

use super::{LOGITS, families, golden_logits, last_logits};
use crate::common::{EngineOptions, golden, on_all_ranks};

#[test]
fn checkpoints_in_4_bit() {
    let golden_files = families();
    for name in ["phi3-tied", "mistral3"] {
        let folder = format!("families-4bit/{name}");
        let theirs = golden_logits(&golden(&folder).join("logits.safetensors"), "base");
        let options = EngineOptions { max_tokens: 80, ..EngineOptions::new(&folder, Mode::Generate) };
        let shards = tempfile::tempdir().unwrap();
        on_all_ranks(1, |groups| {
            let ours = last_logits(&mut options.engine(groups, shards.path()), &golden_files, false);
            assert_eq!(ours.len(), theirs.len(), "{name}");
            let error = ours.iter().zip(&theirs).map(|(o, t)| (o - t).abs()).fold(0.0, f32::max);
            assert!(error <= LOGITS, "{name}: logits differ by {error:e}");
        });
    }
}

//! Rates of GPUs, for predictions of cards that this machine may not have.

use anyhow::{Context, Result};

use crate::device::cuda::{CONTEXT_BYTES, LIBRARY_BYTES, NCCL_BYTES, NCCL_SOCKET_BYTES};

/// Rates of one GPU and of its connections.
#[derive(Clone, Debug, PartialEq)]
pub struct Hardware {
    pub name: String,
    pub vram_bytes: f64,
    /// FLOP/s of 16-bit matrix products with f32 sums.
    pub matrix_flops: f64,
    pub memory_bytes_per_s: f64,
    /// Rate from host to device; the opposite direction has the same rate at the same time.
    pub host_bytes_per_s: f64,
    /// Rate between the GPUs of a node.
    pub peer_bytes_per_s: f64,
    pub reached: Reached,
}

/// Shares of its rates that a step reaches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reached {
    pub products: f64,
    pub memory: f64,
    pub attention_forward: f64,
    pub attention_backward: f64,
    /// Time from one kernel's end to the next one's full speed.
    pub kernel_seconds: f64,
}

/// Attention measured with `bench kernels` on an H100, by the kernels for other GPUs; the rest fitted to
/// benches/results/h100-calibration.jsonl (2026-11-26).
const REACHED: Reached =
    Reached { products: 0.97, memory: 0.72, attention_forward: 0.24, attention_backward: 0.17, kernel_seconds: 6.0e-6 };

/// These GPUs have kernels of their own. Their shares are fitted to `benches/results/h100-calibration.jsonl` (2026-11-28), but for those of
/// attention, which `bench kernels` measured (2026-11-26).
const HOPPER: [&str; 2] = ["h100", "h200"];
const REACHED_ON_HOPPER: Reached =
    Reached { products: 0.88, memory: 0.96, attention_forward: 0.65, attention_backward: 0.50, kernel_seconds: 5.1e-6 };

/// Share of its speed that a GPU keeps when processes take turns on it, from a run of two ranks on an H100, benches/results.md
/// (2026-11-28).
const TURNS: f64 = 0.7;

/// Rate of NCCL between two processes of a machine through its network stack, as a step of two ranks on an H100
/// reaches it.
const SOCKET_BYTES_PER_S: f64 = 1.6e9;

const GIB: f64 = (1u64 << 30) as f64;

/// Name, GiB, TFLOP/s, GB/s of memory, GB/s over PCIe, GB/s between GPUs.
///
/// Memory and bandwidths are those of NVIDIA's data sheets; matrix rates of data-centre cards are those that large
/// products reach (H100 and H200: 80 % of the data sheet's 989, as measured with `bench kernels`; A100: 85 % of 312),
/// of GeForce cards it is assumed that they reach nine tenths of the data sheets' dense rates with f32 accumulation.
/// PCIe 4 x16 moves 25, PCIe 5 x16 50 (measured in steps that it bounds). GeForce cards have no peer access: NCCL
/// goes through the host.
const GPUS: [(&str, [f64; 5]); 7] = [
    ("rtx3060", [12.0, 23.0, 360.0, 25.0, 8.0]),
    ("rtx3090", [24.0, 64.0, 936.0, 25.0, 10.0]),
    ("rtx4090", [24.0, 149.0, 1008.0, 25.0, 10.0]),
    ("rtx5090", [32.0, 188.0, 1792.0, 50.0, 20.0]),
    ("a100", [80.0, 265.0, 2039.0, 25.0, 200.0]),
    ("h100", [80.0, 790.0, 3350.0, 50.0, 300.0]),
    ("h200", [141.0, 790.0, 4800.0, 50.0, 300.0]),
];

impl Hardware {
    pub fn names() -> Vec<&'static str> {
        GPUS.iter().map(|(name, _)| *name).collect()
    }

    pub fn named(name: &str) -> Result<Hardware> {
        let (name, [gib, tflops, memory, host, peer]) = GPUS
            .iter()
            .find(|(n, _)| *n == name)
            .with_context(|| format!("--gpu: found {name}; allowed: {}", Hardware::names().join(", ")))?;
        Ok(Hardware {
            name: name.to_string(),
            vram_bytes: gib * GIB,
            matrix_flops: tflops * 1e12,
            memory_bytes_per_s: memory * 1e9,
            host_bytes_per_s: host * 1e9,
            peer_bytes_per_s: peer * 1e9,
            reached: if HOPPER.contains(name) { REACHED_ON_HOPPER } else { REACHED },
        })
    }

    /// Returns the part of a GPU that each of several ranks on it has. NCCL then goes through sockets.
    pub fn shared_by(&self, ranks: usize) -> Hardware {
        let peer_bytes_per_s = if ranks > 1 { SOCKET_BYTES_PER_S } else { self.peer_bytes_per_s };
        let share = if ranks > 1 { TURNS / ranks as f64 } else { 1.0 };
        Hardware {
            matrix_flops: self.matrix_flops * share,
            memory_bytes_per_s: self.memory_bytes_per_s * share,
            host_bytes_per_s: self.host_bytes_per_s * share,
            peer_bytes_per_s,
            ..self.clone()
        }
    }

    /// Returns the bytes that driver and libraries take of a rank's GPU, including NCCL's for each communicator.
    pub fn library_bytes(&self, num_communicators: usize, ranks_per_gpu: usize) -> usize {
        let nccl = if ranks_per_gpu == 1 { NCCL_BYTES } else { NCCL_SOCKET_BYTES };
        CONTEXT_BYTES + LIBRARY_BYTES + num_communicators * nccl
    }

    /// Returns the bytes of the card that the driver is assumed to leave to programs.
    pub fn usable_bytes(&self) -> usize {
        (self.vram_bytes * 0.98) as usize
    }

    /// Returns the card of a GPU's name, e.g. `NVIDIA GeForce RTX 4090`, and whether the name is known: an unknown
    /// GPU counts as an RTX 3090. The result serves only to rank choices.
    pub fn of_device(device: &str) -> Result<(Hardware, bool)> {
        let device = device.to_lowercase();
        let number = |name: &&str| device.contains(name.trim_start_matches("rtx"));
        let found = Hardware::names().into_iter().find(number);
        Ok((Hardware::named(found.unwrap_or("rtx3090"))?, found.is_some()))
    }

    /// Returns assumed rates of a host's core, which serve only to rank choices.
    pub fn of_a_core() -> Hardware {
        Hardware {
            name: "cpu".into(),
            vram_bytes: f64::INFINITY,
            matrix_flops: 50e9,
            memory_bytes_per_s: 5e9,
            host_bytes_per_s: 5e9,
            peer_bytes_per_s: 2e9,
            reached: REACHED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_card_is_a_guess() {
        for (device, name, is_known) in [
            ("NVIDIA GeForce RTX 4090", "rtx4090", true),
            ("NVIDIA H100 80GB HBM3", "h100", true),
            ("NVIDIA L40S", "rtx3090", false),
        ] {
            let (hardware, known) = Hardware::of_device(device).unwrap();
            assert_eq!((&hardware.name[..], known), (name, is_known), "{device}");
        }
    }
}

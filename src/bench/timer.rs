//! Times calls on a device against the rates that it reaches on a large copy and a large matrix product.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use crate::device::*;

/// Timed batches of calls, of which the median counts, and about how long one lasts.
const BATCHES: usize = 5;
const BATCH_SECONDS: f64 = 0.02;

/// A GPU works for this long before its rate is taken for that of lasting work.
const WARM_UP: Duration = Duration::from_millis(1500);

/// The work of a call, to be compared with the device's peak.
#[derive(Clone, Copy)]
pub enum Amount {
    Flops(f64),
    /// Bytes that are read and written.
    Bytes(f64),
}

/// Times calls on a device, and tells each with its share of the device's peak.
pub struct Timer<'a, D: Ops> {
    device: &'a D,
    tell: &'a dyn Fn(Value),
    /// FLOP/s of a large matrix product, bytes/s of a large copy.
    peak_flops: f64,
    peak_bytes: f64,
}

impl<'a, D: Ops> Timer<'a, D> {
    /// Measures the peaks, and tells them.
    pub fn new(device: &'a D, tell: &'a dyn Fn(Value)) -> Result<Self> {
        let mut timer = Timer { device, tell, peak_flops: f64::INFINITY, peak_bytes: f64::INFINITY };
        let (n, flops, time) = matrix_product(device)?;
        timer.peak_flops = timer.rate(&format!("matrix product {n}"), time, Amount::Flops(flops));
        let (a, mut c) = (random_act(device, n * n)?, super::buffer::<D, D::Act>(device, n * n)?);
        let bytes = c.len() * size_of::<D::Act>();
        let time = seconds(device, || device.copy(c.view_mut(), a.view()))?;
        timer.peak_bytes = timer.rate("copy", time, Amount::Bytes(2.0 * bytes as f64));
        Ok(timer)
    }

    /// Times a call, and tells its rate.
    pub fn time(&self, name: &str, amount: Amount, call: impl FnMut() -> Result<()>) -> Result<()> {
        self.rate(name, seconds(self.device, call)?, amount);
        Ok(())
    }

    /// Tells the rate of a call, and returns it.
    fn rate(&self, name: &str, seconds: f64, amount: Amount) -> f64 {
        let (rate, unit, scale, peak) = match amount {
            Amount::Flops(flops) => (flops / seconds, "TFLOP/s", 1e12, self.peak_flops),
            Amount::Bytes(bytes) => (bytes / seconds, "GB/s", 1e9, self.peak_bytes),
        };
        let (ms, share) = (seconds * 1e3, if peak.is_finite() { rate / peak } else { 1.0 });
        (self.tell)(json!({"kernel": name, "ms": ms, "rate": rate / scale, "unit": unit, "share_of_peak": share}));
        rate
    }
}

/// Returns FLOP/s of a large matrix product, after a while of them: a card is faster while it is cool.
pub fn matrix_rate<D: Ops>(device: &D) -> Result<f64> {
    let start = Instant::now();
    loop {
        let (_, flops, seconds) = matrix_product(device)?;
        if D::IS_HOST || start.elapsed() > WARM_UP {
            return Ok(flops / seconds);
        }
    }
}

/// Returns n, FLOPs and seconds of the product of two large matrices `[n, n]`.
fn matrix_product<D: Ops>(device: &D) -> Result<(usize, f64, f64)> {
    let n = if size_of::<D::Act>() == 2 { 8192 } else { 1024 };
    let (a, b, mut c) = (random_act(device, n * n)?, random_act(device, n * n)?, random_act(device, n * n)?);
    let seconds =
        seconds(device, || product(device, c.view_mut(), a.view(), (b.view(), Transpose::Yes), [n, n, n], 1.0, 0.0))?;
    Ok((n, 2.0 * (n as f64).powi(3), seconds))
}

/// Returns the median time of a call in seconds.
fn seconds<D: Ops>(device: &D, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut batch = |calls: usize| -> Result<f64> {
        let start = Instant::now();
        (0..calls).try_for_each(|_| call())?;
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    };
    batch(1)?;
    let calls = (BATCH_SECONDS / batch(1)?).clamp(1.0, 1000.0) as usize;
    let mut times = (0..BATCHES).map(|_| batch(calls)).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[BATCHES / 2])
}

/// Returns numbers from −1 to 1.
pub fn random<D: Ops>(device: &D, len: usize) -> Result<Buffer<D, f32>> {
    let mut buffer = super::buffer(device, len)?;
    device.uniform(Uniform { y: buffer.view_mut(), seed: len as u64 % 1009, first: 0, half_width: 1.0 })?;
    Ok(buffer)
}

/// Returns activations from −1 to 1.
pub fn random_act<D: Ops>(device: &D, len: usize) -> Result<Buffer<D, D::Act>> {
    let mut buffer = super::buffer(device, len)?;
    device.cast(buffer.view_mut(), random(device, len)?.view())?;
    Ok(buffer)
}

//! Records of quantized or plain weights, and weights to NF4 codes.

use anyhow::{Result, ensure};

use crate::quant::record::{BLOCK, Encoding, SUPERBLOCK};

use super::{Device, Element, View, ViewMut};

/// Records of one tensor, back to back, to dense weights (`quant::record` has the byte layout). The number of weights
/// is that of `weights`; every record but the last holds `RECORD_WEIGHTS` of them.
pub struct Dequantize<'a, D, T> {
    pub weights: ViewMut<'a, D, T>,
    pub records: View<'a, D, u8>,
    pub encoding: Encoding,
}

/// Codes and absmax of a tensor of n weights ([`crate::quant::nf4`]): codes u8 `[ceil(n / 2)]`, the first weight in
/// the high nibble; absmax f32 `[ceil(n / 64)]`.
pub struct QuantizeNf4<'a, D> {
    pub codes: ViewMut<'a, D, u8>,
    pub absmax: ViewMut<'a, D, f32>,
    pub weights: View<'a, D, f32>,
}

/// absmax − offset in 8 bits ([`crate::quant::double`]): codes u8 and absmax f32 `[n]`, nested_absmax f32 `[ceil(n /
/// 256)]`.
pub struct QuantizeAbsmax<'a, D> {
    pub codes: ViewMut<'a, D, u8>,
    pub nested_absmax: ViewMut<'a, D, f32>,
    pub absmax: View<'a, D, f32>,
    pub offset: f32,
}

/// Weights from records, and codes from weights.
pub trait Nf4Ops: Device {
    /// Writes weights in the activation type, see [`Dequantize`], of any number of tensors or parts of them.
    fn dequantize(&self, parts: Vec<Dequantize<'_, Self, Self::Act>>) -> Result<()>;
    /// Writes weights in f32 (norms and biases), see [`Dequantize`], of any number of tensors or parts of them.
    fn dequantize_f32(&self, parts: Vec<Dequantize<'_, Self, f32>>) -> Result<()>;
    /// See [`QuantizeNf4`].
    fn quantize_nf4(&self, args: QuantizeNf4<'_, Self>) -> Result<()>;
    /// See [`QuantizeAbsmax`].
    fn quantize_absmax(&self, args: QuantizeAbsmax<'_, Self>) -> Result<()>;
}

impl<D: Device, T: Element> Dequantize<'_, D, T> {
    /// Checks the bytes of the records; returns the number of weights.
    pub(super) fn num_weights(&self) -> Result<usize> {
        let (len, found) = (self.weights.len(), self.records.len());
        let bytes = self.encoding.tensor_bytes(len);
        ensure!(found == bytes, "dequantize: {found} bytes of records for {len} weights, which take {bytes}");
        Ok(len)
    }
}

impl<D: Device> QuantizeNf4<'_, D> {
    /// Checks all lengths; returns the number of weights.
    pub(super) fn num_weights(&self) -> Result<usize> {
        let (n, codes, blocks) = (self.weights.len(), self.codes.len(), self.absmax.len());
        ensure!(
            codes == n.div_ceil(2) && blocks == n.div_ceil(BLOCK),
            "quantize: {n} weights into {codes} bytes of codes and {blocks} absmax values"
        );
        Ok(n)
    }
}

impl<D: Device> QuantizeAbsmax<'_, D> {
    /// Checks all lengths; returns the number of absmax values.
    pub(super) fn num_blocks(&self) -> Result<usize> {
        let (n, codes, superblocks) = (self.absmax.len(), self.codes.len(), self.nested_absmax.len());
        ensure!(
            codes == n && superblocks == n.div_ceil(SUPERBLOCK),
            "quantize: {n} absmax values into {codes} codes and {superblocks} nested ones"
        );
        Ok(n)
    }
}

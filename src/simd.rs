//! Loops compiled for the widest vectors that the machine at hand has.

struct Vectorized<F>(F);

impl<R, F: FnMut() -> R> pulp::WithSimd for Vectorized<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(mut self, _: S) -> R {
        (self.0)()
    }
}

/// Calls `f`, an `#[inline(always)]` closure, in a function that is compiled for the widest vectors. `pulp` would
/// call a plain closure as `FnOnce`, through a shim that is compiled for the narrowest.
#[inline(always)]
pub fn vectorize<R>(f: impl FnMut() -> R) -> R {
    pulp::Arch::new().dispatch(Vectorized(f))
}

//! NCCL: a communicator over the functions that the schedule uses, loaded at run time. Sizes are checked before each call.
//!
//! `libnccl.so.2` is looked for where CUDA's libraries are ([`crate::device::cuda::libraries`]).

use std::ffi::{CStr, c_char, c_int, c_void};

use anyhow::{Context, Result, bail, ensure};
use libloading::os::unix::{Library, Symbol};

use super::Comm;
use crate::device::cuda::{Cuda, libraries};
use crate::device::{Element, View, ViewMut};

type Handle = *mut c_void;
type Stream = *mut c_void;
/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// `ncclUint8`: bytes are moved as bytes.
const UINT8: c_int = 1;
const IN_PROGRESS: c_int = 7;

type AllGather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> c_int;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
type Recv = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
type Group = unsafe extern "C" fn() -> c_int;

/// One communicator over all ranks, on one stream.
pub struct Nccl {
    handle: Handle,
    rank: usize,
    world_size: usize,
    all_gather: Symbol<AllGather>,
    send: Symbol<Send>,
    recv: Symbol<Recv>,
    group_start: Symbol<Group>,
    group_end: Symbol<Group>,
    abort: Symbol<unsafe extern "C" fn(Handle) -> c_int>,
    error_string: Symbol<unsafe extern "C" fn(c_int) -> *const c_char>,
    _library: Library,
}

impl Nccl {
    /// Makes the communicator; the id goes from rank 0 over `comm`. Collective. The GPU is that of the calling thread. With
    /// `share_gpu` the ranks look like hosts of their own, because NCCL refuses two ranks of one host on one GPU; they then
    /// talk through sockets.
    pub fn new(comm: &mut dyn Comm, share_gpu: bool) -> Result<Nccl> {
        if share_gpu {
            // SAFETY: the threads that run now (rayon's and MPI's) do not touch the environment.
            unsafe { std::env::set_var("NCCL_HOSTID", format!("fsdp-qlora-{}", comm.rank())) };
        }
        let library = libraries::open_first("nccl").context(
            "libnccl.so.2 is not there: several ranks on GPUs need NCCL. `pip install nvidia-nccl-cu13` (or -cu12), or \
             install libnccl2",
        )?;
        let (rank, world_size) = (comm.rank(), comm.world_size());
        // SAFETY: the types are those of nccl.h, which has kept them since NCCL 2.0 (send and recv: 2.7).
        unsafe {
            let get_unique_id: Symbol<unsafe extern "C" fn(*mut UniqueId) -> c_int> =
                library.get(b"ncclGetUniqueId")?;
            let init: Symbol<unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> c_int> =
                library.get(b"ncclCommInitRank")?;
            let mut nccl = Nccl {
                handle: std::ptr::null_mut(),
                rank,
                world_size,
                all_gather: library.get(b"ncclAllGather")?,
                send: library.get(b"ncclSend")?,
                recv: library.get(b"ncclRecv")?,
                group_start: library.get(b"ncclGroupStart")?,
                group_end: library.get(b"ncclGroupEnd")?,
                abort: library.get(b"ncclCommAbort")?,
                error_string: library.get(b"ncclGetErrorString")?,
                _library: library,
            };
            let mut id = UniqueId([0; 128]);
            if rank == 0 {
                nccl.check("ncclGetUniqueId", get_unique_id(&mut id))?;
            }
            let mut ids = vec![0u8; 128 * world_size];
            comm.all_gather(&id.0, &mut ids)?;
            id.0.copy_from_slice(&ids[..128]);
            let mut handle = std::ptr::null_mut();
            nccl.check("ncclCommInitRank", init(&mut handle, world_size as c_int, id, rank as c_int))?;
            nccl.handle = handle;
            Ok(nccl)
        }
    }

    /// `recv` = the `send` of every rank, in rank order.
    pub fn all_gather<T: Element>(
        &self,
        send: View<'_, Cuda, T>,
        recv: ViewMut<'_, Cuda, T>,
        stream: &cudarc::driver::CudaStream,
    ) -> Result<()> {
        let expected = send.len() * self.world_size;
        ensure!(recv.len() == expected, "the shards are {expected} elements in all, the slot takes {}", recv.len());
        let bytes = send.len() * size_of::<T>();
        // SAFETY: both ranges are as long as the call says, and stay where they are until the stream has passed it.
        let status = unsafe {
            (self.all_gather)(
                send.addr() as *const c_void,
                recv.addr() as *mut c_void,
                bytes,
                UINT8,
                self.handle,
                stream.cu_stream().cast(),
            )
        };
        self.check("ncclAllGather", status)
    }

    /// Part r of `send` goes to rank r; part r of `recv` comes from rank r. Both have world_size equal parts.
    pub fn all_to_all<T: Element>(
        &self,
        send: View<'_, Cuda, T>,
        recv: ViewMut<'_, Cuda, T>,
        stream: &cudarc::driver::CudaStream,
    ) -> Result<()> {
        let len = send.len();
        ensure!(recv.len() == len && len.is_multiple_of(self.world_size), "all-to-all of {len} into {}", recv.len());
        let bytes = len / self.world_size * size_of::<T>();
        // SAFETY: as for `all_gather`; each part lies in its range.
        unsafe {
            self.check("ncclGroupStart", (self.group_start)())?;
            for peer in 0..self.world_size {
                let (from, to) = (send.addr() + peer * bytes, recv.addr() + peer * bytes);
                let (peer, stream) = (peer as c_int, stream.cu_stream().cast());
                self.check("ncclSend", (self.send)(from as *const c_void, bytes, UINT8, peer, self.handle, stream))?;
                self.check("ncclRecv", (self.recv)(to as *mut c_void, bytes, UINT8, peer, self.handle, stream))?;
            }
            self.check("ncclGroupEnd", (self.group_end)())
        }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    fn check(&self, call: &str, status: c_int) -> Result<()> {
        if status == 0 || status == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: NCCL returns a static string for every status.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        bail!("{call}: {} (NCCL_DEBUG=WARN says more)", text.to_string_lossy())
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: made in `new`, used no more; what is under way is given up.
            unsafe { (self.abort)(self.handle) };
        }
    }
}

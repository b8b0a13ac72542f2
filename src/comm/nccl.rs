//! NCCL, loaded at run time: a communicator with the functions that the schedule uses. Sizes are checked before each
//! call.
//!
//! `libnccl.so.2` is looked for where CUDA's libraries are ([`crate::device::cuda::libraries`]). The communicator is
//! non-blocking: a call that waits for other ranks returns at once and is polled until it is done or the watchdog
//! ends all ranks.
#![expect(unsafe_code, reason = "calls NCCL")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libloading::os::unix::{Library, Symbol};

use super::Comm;
use super::watch::{self, Limit};
use crate::device::cuda::{Cuda, HalfType, libraries};
use crate::device::{Element, View, ViewMut};

type Handle = *mut c_void;
type Stream = *mut c_void;
/// `ncclUniqueId`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// `ncclConfig_t` as NCCL 2.17 has it; later versions read as much as `size` says.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

const CONFIG_MAGIC: c_uint = 0xcafe_beef;
const CONFIG_VERSION: c_uint = 21_700;
/// Value of a field that NCCL decides.
const UNDEFINED: c_int = c_int::MIN;

/// `ncclUint8`, the type of everything that is moved.
const UINT8: c_int = 1;
const IN_PROGRESS: c_int = 7;

/// Help for a collective of NCCL that never ends.
pub const HELP: &str = "where the GPUs cannot reach each other's memory although the driver says so (many consumer boards), \
                        NCCL_P2P_DISABLE=1 goes through host memory; NCCL_DEBUG=INFO says how far NCCL has come";

/// Time between two polls of a call that waits for other ranks.
const POLL: Duration = Duration::from_micros(100);

type AllGather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> c_int;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
type Recv = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
type Group = unsafe extern "C" fn() -> c_int;
type Init = unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
type AsyncError = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;

/// One communicator.
pub struct Nccl {
    handle: Handle,
    rank: usize,
    world_size: usize,
    /// Lets one thread at a time call NCCL: asking for an error also completes calls that are under way.
    turn: Mutex<()>,
    all_gather: Symbol<AllGather>,
    send: Symbol<Send>,
    recv: Symbol<Recv>,
    group_start: Symbol<Group>,
    group_end: Symbol<Group>,
    async_error: Symbol<AsyncError>,
    abort: Symbol<unsafe extern "C" fn(Handle) -> c_int>,
    error_string: Symbol<unsafe extern "C" fn(c_int) -> *const c_char>,
    _library: Library,
}

// SAFETY: collectives are issued by the one thread that owns the queue; the watchdog only asks for errors, and `turn`
// keeps the two apart.
unsafe impl std::marker::Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// Makes this rank look to NCCL like a separate host that talks to others through sockets, because NCCL refuses
    /// two ranks of one host on one GPU.
    pub fn hide_host(rank: usize) {
        // SAFETY: the threads that run now (rayon's and MPI's) do not touch the environment.
        unsafe { std::env::set_var("NCCL_HOSTID", format!("fsdp-qlora-{rank}")) };
    }

    /// Makes the communicator on the calling thread's GPU; rank 0 sends the id over `comm`. Collective.
    pub fn new(comm: &mut dyn Comm) -> Result<Nccl> {
        let library = libraries::open_first("nccl").context(
            "libnccl.so.2 is not there: several ranks on GPUs need NCCL 2.17 or newer. `pip install nvidia-nccl-cu13` (or \
             -cu12), or install libnccl2",
        )?;
        let (rank, world_size) = (comm.rank(), comm.world_size());
        // SAFETY: the types are those of nccl.h, which has kept them since NCCL 2.17.
        let (mut nccl, get_unique_id, init) = unsafe {
            let get_unique_id: Symbol<unsafe extern "C" fn(*mut UniqueId) -> c_int> =
                library.get(b"ncclGetUniqueId")?;
            let init: Symbol<Init> = library.get(b"ncclCommInitRankConfig").context("NCCL is older than 2.17")?;
            let nccl = Nccl {
                handle: std::ptr::null_mut(),
                rank,
                world_size,
                turn: Mutex::new(()),
                all_gather: library.get(b"ncclAllGather")?,
                send: library.get(b"ncclSend")?,
                recv: library.get(b"ncclRecv")?,
                group_start: library.get(b"ncclGroupStart")?,
                group_end: library.get(b"ncclGroupEnd")?,
                async_error: library.get(b"ncclCommGetAsyncError")?,
                abort: library.get(b"ncclCommAbort")?,
                error_string: library.get(b"ncclGetErrorString")?,
                _library: library,
            };
            (nccl, get_unique_id, init)
        };
        let wait = watch::wait_within("ncclCommInitRank", Limit::Start, Some(HELP));
        let mut id = UniqueId([0; 128]);
        if rank == 0 {
            // SAFETY: `id` is a place for an id.
            nccl.check("ncclGetUniqueId", unsafe { get_unique_id(&mut id) })?;
        }
        let mut ids = vec![0u8; 128 * world_size];
        comm.all_gather(&id.0, &mut ids)?;
        id.0.copy_from_slice(&ids[..128]);
        let mut config = Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        };
        // SAFETY: handle and configuration live through the call, which copies the latter.
        let status = unsafe { init(&mut nccl.handle, world_size as c_int, id, rank as c_int, &mut config) };
        nccl.check("ncclCommInitRankConfig", status)?;
        nccl.settle("ncclCommInitRankConfig")?;
        drop(wait);
        Ok(nccl)
    }

    /// Fills `whole` with every rank's part in rank order; this rank's part is in place already.
    pub fn all_gather_in_place<A: HalfType, T: Element>(
        &self,
        whole: ViewMut<'_, Cuda<A>, T>,
        stream: &cudarc::driver::CudaStream,
    ) -> Result<()> {
        let len = whole.len();
        ensure!(len.is_multiple_of(self.world_size), "all-gather of {len} over {} ranks", self.world_size);
        let part = len / self.world_size * size_of::<T>();
        self.all_gather_bytes(whole.addr() + self.rank * part, whole.addr(), part, stream)
    }

    /// Fills `recv` with the `send` of every rank in rank order.
    pub fn all_gather<A: HalfType, T: Element>(
        &self,
        send: View<'_, Cuda<A>, T>,
        recv: ViewMut<'_, Cuda<A>, T>,
        stream: &cudarc::driver::CudaStream,
    ) -> Result<()> {
        let expected = send.len() * self.world_size;
        ensure!(recv.len() == expected, "the shards are {expected} elements in all, the slot takes {}", recv.len());
        self.all_gather_bytes(send.addr(), recv.addr(), send.len() * size_of::<T>(), stream)
    }

    fn all_gather_bytes(
        &self,
        send: usize,
        recv: usize,
        bytes: usize,
        stream: &cudarc::driver::CudaStream,
    ) -> Result<()> {
        let _turn = self.turn();
        // SAFETY: the callers checked that `send` is `bytes` long and `recv` world_size times that; both stay where
        // they are until the stream has passed the collective.
        let status = unsafe {
            (self.all_gather)(
                send as *const c_void,
                recv as *mut c_void,
                bytes,
                UINT8,
                self.handle,
                stream.cu_stream().cast(),
            )
        };
        self.check("ncclAllGather", status)?;
        self.settle("ncclAllGather")
    }

    /// Sends part r of `send` to rank r and receives part r of `recv` from it. Both have world_size equal parts.
    pub fn all_to_all<A: HalfType, T: Element>(
        &self,
        send: View<'_, Cuda<A>, T>,
        recv: ViewMut<'_, Cuda<A>, T>,
        stream: &cudarc::driver::CudaStream,
    ) -> Result<()> {
        let len = send.len();
        ensure!(recv.len() == len && len.is_multiple_of(self.world_size), "all-to-all of {len} into {}", recv.len());
        let bytes = len / self.world_size * size_of::<T>();
        let _turn = self.turn();
        // SAFETY: as for `all_gather_bytes`; each part lies in its range.
        unsafe {
            self.check("ncclGroupStart", (self.group_start)())?;
            for peer in 0..self.world_size {
                let (from, to) = (send.addr() + peer * bytes, recv.addr() + peer * bytes);
                let (peer, stream) = (peer as c_int, stream.cu_stream().cast());
                self.check("ncclSend", (self.send)(from as *const c_void, bytes, UINT8, peer, self.handle, stream))?;
                self.check("ncclRecv", (self.recv)(to as *mut c_void, bytes, UINT8, peer, self.handle, stream))?;
            }
            self.check("ncclGroupEnd", (self.group_end)())?;
        }
        self.settle("ncclGroupEnd")
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world_size(&self) -> usize {
        self.world_size
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if NCCL reports an error. Returns at once while another thread is making a call.
    pub fn check_errors(&self) -> Result<()> {
        match self.turn.try_lock() {
            Ok(_turn) => self.is_settled("NCCL").map(drop),
            Err(_) => Ok(()),
        }
    }

    /// Returns false while NCCL is still starting a call.
    fn is_settled(&self, call: &str) -> Result<bool> {
        let mut status = 0;
        // SAFETY: the handle is that of a communicator, finished or not.
        let asked = unsafe { (self.async_error)(self.handle, &mut status) };
        self.check("ncclCommGetAsyncError", asked)?;
        self.check(call, status)?;
        Ok(status != IN_PROGRESS)
    }

    /// Returns when the call is on its stream. The first calls connect ranks and so wait for all of them.
    fn settle(&self, call: &str) -> Result<()> {
        if self.is_settled(call)? {
            return Ok(());
        }
        let _wait = watch::wait_within(call, Limit::Any, Some(HELP));
        while !self.is_settled(call)? {
            std::thread::sleep(POLL);
        }
        Ok(())
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

//! Boundaries that wait for backward in host memory: when each is put there and fetched again, and where each one is.
//!
//! Forward puts a boundary as soon as its layer has read it. Backward fetches the boundaries that it needs next into
//! whatever device buffers are free. The boundaries that backward needs first never leave the device: as many as it
//! has buffers for.

use std::collections::{HashMap, VecDeque};

use anyhow::{Context, Result, bail};

use crate::comm::guarded::Guarded;
use crate::comm::{HostCopy, Queue};
use crate::device::{Buffer, HostBuffer, Ops};

use super::schedule::{Action, Inputs};

/// Inserts the copies of offloaded boundaries into a schedule without them.
pub(super) fn with_copies(actions: &[Action], inputs: &Inputs) -> Vec<Action> {
    if inputs.num_offloaded_boundaries() == 0 {
        return actions.to_vec();
    }
    let offloaded = Offloaded::new(inputs);
    let to_fetch = to_fetch(actions, &offloaded);
    let mut weaver = Weaver {
        offloaded,
        free: inputs.num_boundary_buffers,
        putting: VecDeque::new(),
        to_fetch,
        fetched: HashMap::new(),
        woven: Vec::new(),
    };
    for (i, &action) in actions.iter().enumerate() {
        weaver.weave(i, action);
    }
    weaver.woven
}

/// The boundaries that wait on the host. Those that backward needs first stay on the device.
struct Offloaded {
    /// For each micro-batch, its place among those that have a backward pass.
    places: Vec<Option<usize>>,
    /// Number of these that live at the same time.
    live: usize,
    num_boundaries: usize,
}

impl Offloaded {
    fn new(inputs: &Inputs) -> Offloaded {
        let (places, live) = (inputs.places_of_trained(), inputs.num_live_trained());
        Offloaded { places, live, num_boundaries: inputs.num_offloaded_boundaries() }
    }

    fn has_backward(&self, micro: usize) -> bool {
        self.places[micro].is_some()
    }

    /// Returns whether a micro-batch's input of a layer is one of them.
    fn has(&self, layer: usize, micro: usize) -> bool {
        self.places[micro].is_some_and(|place| layer * self.live + place % self.live < self.num_boundaries)
    }
}

/// Offloaded boundaries in the order in which backward needs them. Each comes with the forward action before which
/// its fetch may start: the last one before its backward.
fn to_fetch(actions: &[Action], offloaded: &Offloaded) -> VecDeque<(usize, usize, usize)> {
    let mut last_forward = 0;
    let mut wanted = VecDeque::new();
    for (i, action) in actions.iter().enumerate() {
        match *action {
            Action::Forward { .. } => last_forward = i,
            Action::Backward { layer, micro, .. } if offloaded.has(layer, micro) => {
                wanted.push_back((last_forward, layer, micro));
            }
            _ => {}
        }
    }
    wanted
}

struct Weaver {
    offloaded: Offloaded,
    /// Number of device buffers that are free.
    free: usize,
    putting: VecDeque<(usize, usize)>,
    to_fetch: VecDeque<(usize, usize, usize)>,
    /// True once the fetch of the boundary has been waited for.
    fetched: HashMap<(usize, usize), bool>,
    woven: Vec<Action>,
}

impl Weaver {
    fn weave(&mut self, i: usize, action: Action) {
        match action {
            Action::Embed { .. } => self.needs_a_buffer(),
            Action::Forward { layer, micro, .. } => {
                self.needs_a_buffer();
                self.woven.push(action);
                if !self.offloaded.has_backward(micro) {
                    self.free += 1;
                }
                if self.offloaded.has(layer, micro) {
                    self.woven.push(Action::Put { layer, micro });
                    self.putting.push_back((layer, micro));
                }
                return;
            }
            Action::Recompute { layer, micro } => self.needs_boundary(layer, micro),
            Action::Backward { layer, micro, .. } => {
                self.needs_boundary(layer, micro);
                self.woven.push(action);
                self.fetched.remove(&(layer, micro));
                // Nobody needs the gradient of the first layer's input.
                self.free += if layer == 0 { 2 } else { 1 };
                return self.fetch_ahead(i);
            }
            Action::HeadScore { micro } if !self.offloaded.has_backward(micro) => self.free += 1,
            Action::HeadBackward { .. } => {
                self.woven.push(action);
                return self.fetch_ahead(i);
            }
            _ => {}
        }
        self.woven.push(action);
    }

    fn needs_a_buffer(&mut self) {
        while self.free == 0 {
            self.wait_for_a_put();
        }
        self.free -= 1;
    }

    fn wait_for_a_put(&mut self) {
        let (layer, micro) = self.putting.pop_front().expect("min_boundary_buffers leaves two for what is on its way");
        self.woven.push(Action::WaitPut { layer, micro });
        self.free += 1;
    }

    fn needs_boundary(&mut self, layer: usize, micro: usize) {
        if let Some(waited @ false) = self.fetched.get_mut(&(layer, micro)) {
            *waited = true;
            self.woven.push(Action::WaitFetch { layer, micro });
        }
    }

    /// Starts as many fetches as there are free buffers, of boundaries whose forward has passed.
    fn fetch_ahead(&mut self, now: usize) {
        while let Some(&(_, layer, micro)) = self.to_fetch.front().filter(|(forward, ..)| *forward < now) {
            // Its own put must have ended, and so must the puts that hold the last buffers.
            while self.putting.contains(&(layer, micro)) || self.free == 0 && !self.putting.is_empty() {
                self.wait_for_a_put();
            }
            if self.free == 0 {
                return;
            }
            self.to_fetch.pop_front();
            self.free -= 1;
            self.fetched.insert((layer, micro), false);
            self.woven.push(Action::Fetch { layer, micro });
        }
    }
}

type Copy<D> = HostCopy<D, <D as crate::device::Device>::Act>;

/// The place of a boundary.
enum Held<D: Ops, Q: Queue<D>> {
    Here(Buffer<D, D::Act>),
    Putting(Q::Pending<Copy<D>>),
    Away(Guarded<HostBuffer<D::Act>>),
    Fetching(Q::Pending<Copy<D>>),
}

/// All boundaries, by the layer whose input they are and by live micro-batch, and the free buffers.
pub(super) struct Boundaries<D: Ops, Q: Queue<D>> {
    free: Vec<Buffer<D, D::Act>>,
    free_on_host: Vec<Guarded<HostBuffer<D::Act>>>,
    held: HashMap<(usize, usize), Held<D, Q>>,
}

impl<D: Ops, Q: Queue<D>> Boundaries<D, Q> {
    pub fn new(free: Vec<Buffer<D, D::Act>>, free_on_host: Vec<HostBuffer<D::Act>>) -> Self {
        Self { free, free_on_host: free_on_host.into_iter().map(Guarded::new).collect(), held: HashMap::new() }
    }

    /// Takes a free buffer for a new boundary.
    pub fn take_free(&mut self) -> Result<Buffer<D, D::Act>> {
        self.free.pop().context("no boundary buffer is free: a put was not waited for")
    }

    /// Gives back a buffer whose boundary is not needed any more.
    pub fn release(&mut self, buffer: Buffer<D, D::Act>) {
        self.free.push(buffer);
    }

    /// Gives back the buffers of all boundaries, none of which may be on its way.
    pub fn clear(&mut self) -> Result<()> {
        for ((layer, _), held) in self.held.drain() {
            match held {
                Held::Here(device) => self.free.push(device),
                Held::Away(host) => self.free_on_host.push(host),
                on_its_way => bail!("boundary {layer} is {}", name(Some(&on_its_way))),
            }
        }
        Ok(())
    }

    pub fn insert(&mut self, layer: usize, live: usize, buffer: Buffer<D, D::Act>) {
        self.held.insert((layer, live), Held::Here(buffer));
    }

    /// Borrows a boundary, which must be on the device.
    pub fn get_mut(&mut self, layer: usize, live: usize) -> Result<&mut Buffer<D, D::Act>> {
        match self.held.get_mut(&(layer, live)) {
            Some(Held::Here(buffer)) => Ok(buffer),
            other => bail!("boundary {layer} is {}", name(other.as_deref())),
        }
    }

    /// Takes a boundary, which must be on the device.
    pub fn take(&mut self, layer: usize, live: usize) -> Result<Buffer<D, D::Act>> {
        self.get_mut(layer, live)?;
        match self.held.remove(&(layer, live)) {
            Some(Held::Here(buffer)) => Ok(buffer),
            _ => bail!("boundary {layer} is gone"),
        }
    }

    pub fn put(&mut self, queue: &mut Q, layer: usize, live: usize, len: usize) -> Result<()> {
        let device = self.take(layer, live)?;
        let host = self.free_on_host.pop().context("no host buffer is free for a boundary")?;
        let pending = queue.put(format!("put of boundary {layer}"), HostCopy { device, host, len })?;
        self.held.insert((layer, live), Held::Putting(pending));
        Ok(())
    }

    pub fn wait_put(&mut self, queue: &mut Q, layer: usize, live: usize) -> Result<()> {
        let pending = match self.held.remove(&(layer, live)) {
            Some(Held::Putting(pending)) => pending,
            other => bail!("boundary {layer} is {}, not being put", name(other.as_ref())),
        };
        let HostCopy { device, host, .. } = queue.wait(pending)?;
        self.free.push(device);
        self.held.insert((layer, live), Held::Away(host));
        Ok(())
    }

    pub fn fetch(&mut self, queue: &mut Q, layer: usize, live: usize, len: usize) -> Result<()> {
        let host = match self.held.remove(&(layer, live)) {
            Some(Held::Away(host)) => host,
            other => bail!("boundary {layer} is {}: its put was not waited for", name(other.as_ref())),
        };
        let device = self.take_free()?;
        let pending = queue.fetch(format!("fetch of boundary {layer}"), HostCopy { device, host, len })?;
        self.held.insert((layer, live), Held::Fetching(pending));
        Ok(())
    }

    pub fn wait_fetch(&mut self, queue: &mut Q, layer: usize, live: usize) -> Result<()> {
        let pending = match self.held.remove(&(layer, live)) {
            Some(Held::Fetching(pending)) => pending,
            other => bail!("boundary {layer} is {}, not being fetched", name(other.as_ref())),
        };
        let HostCopy { device, host, .. } = queue.wait(pending)?;
        self.free_on_host.push(host);
        self.insert(layer, live, device);
        Ok(())
    }
}

fn name<D: Ops, Q: Queue<D>>(held: Option<&Held<D, Q>>) -> &'static str {
    match held {
        None => "not there",
        Some(Held::Here(_)) => "on the device",
        Some(Held::Putting(_)) => "on its way to the host",
        Some(Held::Away(_)) => "on the host",
        Some(Held::Fetching(_)) => "on its way to the device: that was not waited for",
    }
}

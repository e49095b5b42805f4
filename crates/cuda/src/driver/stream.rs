use super::Device;
use super::ffi::Handle;
use crate::Result;

/// An ordered queue of device work.
pub struct Stream {
    device: Device,
    handle: Handle,
}

/// A point in a stream.
pub struct Event {
    device: Device,
    handle: Handle,
}

/// A captured sequence of launches.
pub struct Graph {
    device: Device,
    graph: Handle,
    exec: Handle,
}

// SAFETY: driver handles may move between threads that have the context current.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Send for Graph {}

impl Device {
    /// A new stream that does not wait for the default one.
    ///
    /// # Errors
    /// The driver's.
    pub fn stream(&self) -> Result<Stream> {
        const NON_BLOCKING: u32 = 1;
        let mut stream = Stream { device: self.clone(), handle: std::ptr::null_mut() };
        // SAFETY: writes one handle.
        self.check("cuStreamCreate", unsafe {
            (self.api().stream_create)(&raw mut stream.handle, NON_BLOCKING)
        })?;
        Ok(stream)
    }

    /// A new event, with timing.
    ///
    /// # Errors
    /// The driver's.
    pub fn event(&self) -> Result<Event> {
        let mut event = Event { device: self.clone(), handle: std::ptr::null_mut() };
        // SAFETY: writes one handle.
        self.check("cuEventCreate", unsafe { (self.api().event_create)(&raw mut event.handle, 0) })?;
        Ok(event)
    }
}

impl Stream {
    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }

    /// Waits for everything queued; reports errors of earlier kernels.
    ///
    /// # Errors
    /// The driver's.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a live stream.
        self.device
            .check("cuStreamSynchronize", unsafe { (self.device.api().stream_synchronize)(self.handle) })
    }

    /// Queues `event`.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: live handles of one device.
        self.device
            .check("cuEventRecord", unsafe { (self.device.api().event_record)(event.handle, self.handle) })
    }

    /// Captures what `body` launches on this stream instead of running it.
    ///
    /// # Errors
    /// `body`'s or the driver's; the stream leaves capture in every case.
    pub fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.begin_capture()?;
        let ran = body();
        let graph = self.end_capture();
        ran?;
        graph
    }

    /// From here to [`end_capture`](Self::end_capture) launches are recorded instead of run.
    ///
    /// # Errors
    /// The driver's.
    pub fn begin_capture(&self) -> Result<()> {
        const THREAD_LOCAL: i32 = 1;
        // SAFETY: a live stream.
        let began = unsafe { (self.device.api().capture_begin)(self.handle, THREAD_LOCAL) };
        self.device.check("cuStreamBeginCapture", began)
    }

    /// What was launched since [`begin_capture`](Self::begin_capture), ready to be replayed; ends the capture in every case.
    ///
    /// # Errors
    /// The driver's.
    pub fn end_capture(&self) -> Result<Graph> {
        let api = self.device.api();
        let mut graph =
            Graph { device: self.device.clone(), graph: std::ptr::null_mut(), exec: std::ptr::null_mut() };
        // SAFETY: a live stream; writes one handle.
        let ended = unsafe { (api.capture_end)(self.handle, &raw mut graph.graph) };
        self.device.check("cuStreamEndCapture", ended)?;
        // SAFETY: the graph was just captured; writes one handle.
        self.device.check("cuGraphInstantiate", unsafe {
            (api.graph_instantiate)(&raw mut graph.exec, graph.graph, 0)
        })?;
        Ok(graph)
    }

    /// Brings a captured sequence to the device ahead of its first replay.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload(&self, graph: &Graph) -> Result<()> {
        // SAFETY: live handles.
        self.device
            .check("cuGraphUpload", unsafe { (self.device.api().graph_upload)(graph.exec, self.handle) })
    }

    /// Queues a captured sequence.
    ///
    /// # Errors
    /// The driver's.
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: live handles.
        self.device
            .check("cuGraphLaunch", unsafe { (self.device.api().graph_launch)(graph.exec, self.handle) })
    }
}

impl Event {
    /// Waits until the stream has passed it; returns at once if it was never recorded.
    ///
    /// # Errors
    /// The driver's.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a live event.
        self.device.check("cuEventSynchronize", unsafe { (self.device.api().event_synchronize)(self.handle) })
    }

    /// Milliseconds from this event to `end`; waits for `end`.
    ///
    /// # Errors
    /// The driver's.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32> {
        let mut ms = 0.0;
        // SAFETY: live events; writes one float.
        unsafe {
            self.device.check("cuEventSynchronize", (self.device.api().event_synchronize)(end.handle))?;
            let code = (self.device.api().event_elapsed)(&raw mut ms, self.handle, end.handle);
            self.device.check("cuEventElapsedTime", code)?;
        }
        Ok(ms)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in `Device::stream`; the driver finishes queued work first.
        unsafe { (self.device.api().stream_destroy)(self.handle) };
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `Device::event`.
        unsafe { (self.device.api().event_destroy)(self.handle) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `Stream::capture`; either handle may be null when that failed half way.
        unsafe {
            if !self.exec.is_null() {
                (self.device.api().graph_exec_destroy)(self.exec);
            }
            if !self.graph.is_null() {
                (self.device.api().graph_destroy)(self.graph);
            }
        }
    }
}

//! `Stream::capture` and `Graph`: a captured step does what the eager one does, keeps what it needs, and what a capture
//! cannot hold is refused by a typed error.

mod support;

use std::time::Duration;

use annulus::abi::{CastTensor, ChunkRange, ELEMENTWISE_THREADS, ScaleArguments};
use annulus::device::cuda::{Buffer, Device, Driver, Event, Graph, Kernels, Priority, Shape, Stream, View};
use annulus::{DType, Error, Result};
use support::on_virtual_gpu;

const PATIENCE: Duration = Duration::from_secs(30);
const LEN: usize = 100;

fn device(ordinal: u32) -> Device {
    Driver::open().unwrap().device(ordinal).unwrap()
}

fn stream(device: &Device) -> Stream {
    Stream::new(device, "test", Priority::Normal).unwrap()
}

/// A step that is not the same in another order, of which one number changes from time to time: `out = data`, then `data *=
/// factor`, which lies on the device.
struct Step {
    kernels: Kernels,
    data: Buffer,
    out: Buffer,
    signal: Buffer,
    table: Buffer,
    chunks: Buffer,
}

impl Step {
    fn new(device: &Device, stream: &Stream) -> Step {
        let mut data = Buffer::zeroed(device, DType::F32, LEN).unwrap();
        data.write(&[1.0f32; LEN], stream).unwrap();
        let tensor = CastTensor {
            src: data.address(),
            dst: data.address(),
            len_elems: LEN as u64,
            first_index: 0,
            src_dtype: DType::F32 as u32,
            dst_dtype: DType::F32 as u32,
        };
        let mut table = Buffer::zeroed(device, DType::I64, size_of::<CastTensor>() / 8).unwrap();
        table.write::<i64>(bytemuck::cast_slice(&[tensor]), stream).unwrap();
        let chunks = Buffer::zeroed(device, DType::I64, 1).unwrap(); // tensor 0, chunk 0
        let out = Buffer::zeroed(device, DType::F32, LEN).unwrap();
        let signal = Buffer::zeroed(device, DType::F32, 8).unwrap();
        Step { kernels: Kernels::load(device).unwrap(), data, out, signal, table, chunks }
    }

    fn set_factor(signal: &View, factor: f32, stream: &Stream) {
        let mut words = [0.0; 8];
        words[4] = factor; // StepSignal::clip_coef
        signal.write(&words, stream).unwrap();
    }

    fn enqueue(&self, stream: &Stream) -> Result<()> {
        self.out.view().copy_from(&self.data.view(), stream)?;
        let range = ChunkRange { chunks: self.chunks.address(), first_chunk: 0, len_chunks: 1 };
        let arguments = ScaleArguments { tensors: self.table.address(), range, signal: self.signal.address() };
        for buffer in [&self.data, &self.signal, &self.table, &self.chunks] {
            stream.keep(&buffer.view());
        }
        let shape = Shape { blocks: 1, threads: ELEMENTWISE_THREADS, shared_bytes: 0, cooperative: false };
        // SAFETY: the kernel's own arguments; every address is of a buffer here, which a graph keeps, and in stream order.
        unsafe { self.kernels.launch("scale_tensors", shape, stream, &arguments) }
    }
}

fn read(view: &View, stream: &Stream) -> Vec<f32> {
    let mut elements = vec![0.0; view.len_elems()];
    view.read(&mut elements, stream, PATIENCE).unwrap();
    elements
}

#[test]
fn a_captured_step_is_the_eager_one_and_keeps_its_memory() {
    on_virtual_gpu("a_captured_step_is_the_eager_one_and_keeps_its_memory", &[], || {
        let device = device(0);
        let stream = stream(&device);
        let before = device.memory_bytes().unwrap();
        let (eager, step) = (Step::new(&device, &stream), Step::new(&device, &stream));
        let (out, signal, eager_signal) = (step.out.view(), step.signal.view(), eager.signal.view());
        let mut graph = stream.capture(|| step.enqueue(&stream)).unwrap();
        assert_eq!(read(&out, &stream), [0.0; LEN], "nothing was done");
        drop(step); // the graph has what it needs
        let other = Stream::new(&device, "other", Priority::High).unwrap();
        for factor in [2.0, 0.5, -3.0, 1.0, 0.25] {
            for signal in [&signal, &eager_signal] {
                Step::set_factor(signal, factor, &stream);
            }
            eager.enqueue(&stream).unwrap();
            let expected = read(&eager.out.view(), &stream);
            // Any stream will do: the write above is done, since `read` waits for it.
            graph.launch(if factor < 1.0 { &other } else { &stream }).unwrap();
            assert_eq!(read(&out, if factor < 1.0 { &other } else { &stream }), expected);
        }
        assert_eq!(read(&out, &stream), [-3.0; LEN], "1, 2, 1, -3, -3");
        drop((graph, eager, out, signal, eager_signal));
        assert_eq!(device.memory_bytes().unwrap(), before, "all given back");
    });
}

#[test]
fn a_capture_forks_and_joins_by_events() {
    on_virtual_gpu("a_capture_forks_and_joins_by_events", &[], || {
        let device = device(0);
        let (first, second) = (stream(&device), Stream::new(&device, "second", Priority::High).unwrap());
        let (left, right) = (Step::new(&device, &first), Step::new(&device, &first));
        let both = Buffer::zeroed(&device, DType::F32, 2 * LEN).unwrap().view();
        let (fork, join) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
        let capture = || {
            first.record(&fork)?;
            second.wait(&fork)?;
            right.enqueue(&second)?;
            second.record(&join)?;
            left.enqueue(&first)?;
            first.wait(&join)?;
            both.slice(0, LEN)?.copy_from(&left.out.view(), &first)?;
            both.slice(LEN, LEN)?.copy_from(&right.out.view(), &first)
        };
        let mut graph = first.capture(capture).unwrap();
        second.synchronize(PATIENCE).unwrap(); // out of the capture
        for (factor, expected) in [(2.0, 1.0), (3.0, 2.0), (1.0, 6.0)] {
            Step::set_factor(&left.signal.view(), factor, &first);
            Step::set_factor(&right.signal.view(), -factor, &first);
            graph.launch(&first).unwrap();
            let found = read(&both, &first);
            assert_eq!(found[..LEN], [expected; LEN]);
            assert_eq!(found[LEN..], [if expected == 2.0 { -expected } else { expected }; LEN]);
        }
    });
}

/// That `work` fails in a capture by `operation`, and the stream is as before.
#[track_caller]
fn check_refused(stream: &Stream, operation: &str, work: impl FnOnce() -> Result<()>) {
    let error = stream.capture(work).unwrap_err();
    assert!(matches!(error, Error::Capture { operation: found, .. } if found == operation), "{error:?}");
    stream.synchronize(PATIENCE).unwrap();
    stream.capture(|| Ok(())).unwrap();
}

#[test]
fn what_a_graph_cannot_repeat_is_refused() {
    on_virtual_gpu("what_a_graph_cannot_repeat_is_refused", &[], || {
        let device = device(0);
        let (one, second) = (stream(&device), stream(&device));
        let data = Buffer::zeroed(&device, DType::F32, LEN).unwrap().view();
        let event = Event::new(&device).unwrap();
        check_refused(&one, "cuMemAlloc", || Buffer::zeroed(&device, DType::F32, 1).map(drop));
        // They are loaded; it is the wait before they are unloaded that ends the capture.
        check_refused(&one, "cuStreamEndCapture", || Kernels::load(&device).map(drop));
        check_refused(&one, "cuMemcpyHtoDAsync", || data.write(&[0.0f32; LEN], &one));
        check_refused(&one, "cuStreamQuery", || data.read(&mut [0.0f32; LEN], &one, PATIENCE));
        check_refused(&one, "cuStreamQuery", || one.synchronize(PATIENCE));
        check_refused(&one, "cuStreamQuery", || second.synchronize(PATIENCE)); // which is no part of it
        check_refused(&one, "cuStreamBeginCapture", || one.capture(|| Ok(())).map(drop));
        check_refused(&one, "cuEventQuery", || {
            one.record(&event)?;
            event.synchronize(PATIENCE)
        });
        second.record(&event).unwrap();
        check_refused(&one, "cuStreamWaitEvent", || one.wait(&event));
        // An event of a capture that is over.
        one.capture(|| one.record(&event)).unwrap();
        check_refused(&one, "cuStreamWaitEvent", || one.wait(&event));
        for refused in [second.wait(&event), event.synchronize(PATIENCE)] {
            assert!(matches!(refused, Err(Error::Capture { .. })), "{refused:?}");
        }
        check_refused(&one, "cuStreamEndCapture", || {
            one.record(&event)?;
            second.wait(&event)?;
            data.zero(&second) // and never joins
        });
        data.zero(&second).unwrap();
        second.synchronize(PATIENCE).unwrap();
        let mut graph = one.capture(|| data.zero(&one)).unwrap();
        check_refused(&one, "cuGraphLaunch", || graph.launch(&one));
        graph.launch(&one).unwrap();
    });
}

#[test]
fn graphs_come_and_go_in_a_capture() {
    on_virtual_gpu("graphs_come_and_go_in_a_capture", &[], || {
        let device = device(0);
        let (one, second) = (stream(&device), stream(&device));
        let data = Buffer::zeroed(&device, DType::F32, LEN).unwrap().view();
        let old = second.capture(|| data.zero(&second)).unwrap();
        let mut inner = None;
        let capture = || {
            drop(old);
            inner = Some((Kernels::load(&device)?, second.capture(|| data.zero(&second))?));
            data.zero(&one)
        };
        one.capture(capture).unwrap().launch(&one).unwrap();
        let (loaded, mut inner) = inner.unwrap();
        inner.launch(&one).unwrap();
        assert!(loaded.resident_blocks("scale_tensors", ELEMENTWISE_THREADS).unwrap() > 0);
    });
}

#[test]
fn a_capture_ends_with_its_work_however_that_ends() {
    on_virtual_gpu("a_capture_ends_with_its_work_however_that_ends", &[], || {
        let device = device(0);
        let stream = stream(&device);
        let own = Error::InvalidArgument { argument: "own", value: String::new(), accepted: "" };
        assert!(matches!(stream.capture(|| Err(own)), Err(Error::InvalidArgument { argument: "own", .. })));
        stream.synchronize(PATIENCE).unwrap();
        let panics = || stream.capture(|| panic!("in the middle of a step"));
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).unwrap_err();
        stream.synchronize(PATIENCE).unwrap();
        let mut empty = stream.capture(|| Ok(())).unwrap();
        empty.launch(&stream).unwrap();
        stream.synchronize(PATIENCE).unwrap();
    });
}

#[test]
fn other_threads_stay_out_of_a_capture() {
    on_virtual_gpu("other_threads_stay_out_of_a_capture", &[], || {
        let device = device(0);
        let (one, second) = (stream(&device), stream(&device));
        let data = Buffer::zeroed(&device, DType::F32, LEN).unwrap().view();
        let event = Event::new(&device).unwrap();
        let elsewhere =
            |work: &(dyn Fn() -> Result<()> + Sync)| std::thread::scope(|scope| scope.spawn(work).join().unwrap());
        let graph = one.capture(|| {
            one.record(&event)?;
            for intrusion in [&|| data.zero(&one), &|| second.wait(&event), &|| one.synchronize(PATIENCE)]
                as [&(dyn Fn() -> Result<()> + Sync); 3]
            {
                let refused = elsewhere(intrusion);
                assert!(matches!(refused, Err(Error::Capture { operation: "enqueueing", .. })), "{refused:?}");
            }
            // What has nothing to do with it goes on.
            elsewhere(&|| {
                Buffer::zeroed(&device, DType::F32, 1)?;
                data.zero(&second)?;
                second.synchronize(PATIENCE)
            })?;
            data.zero(&one)
        });
        graph.unwrap().launch(&one).unwrap();
    });
}

#[test]
fn a_graph_runs_where_it_was_captured() {
    on_virtual_gpu("a_graph_runs_where_it_was_captured", &[("ANNULUS_VGPU_DEVICES", "2")], || {
        let mut graph: Graph = stream(&device(0)).capture(|| Ok(())).unwrap();
        let refused = graph.launch(&stream(&device(1)));
        assert!(matches!(refused, Err(Error::InvalidArgument { argument: "stream", .. })), "{refused:?}");
    });
}

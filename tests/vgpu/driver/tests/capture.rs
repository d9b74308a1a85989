//! Stream capture and graphs as an unmodified cudarc finds them: what a graph does when it is launched, and what a capture
//! refuses as CUDA does.

#[path = "support/kernels.rs"]
mod kernels;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::time::Duration;

use cudarc::driver::result::event::{query, record};
use cudarc::driver::result::stream::{begin_capture, end_capture, is_capturing, synchronize, wait_event};
use cudarc::driver::result::{self, DriverError, stream::StreamKind};
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::CUstreamCaptureMode::*;
use cudarc::driver::sys::CUstreamCaptureStatus::*;
use cudarc::driver::sys::{self, CUevent_flags, CUevent_wait_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use raw::{Module, NON_BLOCKING, alloc, code, context, launch, read, write};
use support::on_virtual_gpu;

const LOCAL: CUstreamCaptureMode = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const GLOBAL: CUstreamCaptureMode = CU_STREAM_CAPTURE_MODE_GLOBAL;
const RELAXED: CUstreamCaptureMode = CU_STREAM_CAPTURE_MODE_RELAXED;
const EAGER: CUevent_wait_flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

fn stream() -> sys::CUstream {
    result::stream::create(NON_BLOCKING).unwrap()
}

fn event() -> sys::CUevent {
    result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap()
}

fn executable(graph: sys::CUgraph) -> sys::CUgraphExec {
    // SAFETY: a graph from `end_capture`, which is destroyed once.
    unsafe {
        let executable = result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).unwrap();
        result::graph::destroy(graph).unwrap();
        executable
    }
}

// ---- what a graph does -------------------------------------------------------------------------------------------------

#[test]
fn a_captured_step_replays_in_its_own_order() {
    on_virtual_gpu("a_captured_step_replays_in_its_own_order", &[], || {
        context();
        let module = Module::load(kernels::SMALL).unwrap();
        let (add, triple) = (module.function("add").unwrap(), module.function("triple").unwrap());
        let (mut input, mut word, other, stream) = (alloc(4), alloc(4), alloc(4), stream());
        write(input, &[5]);
        write(word, &[77]);
        let mut term = 1u32;
        let mut host = [0u32];
        // SAFETY: the words live on; `host` is read after the graph has run.
        let graph = unsafe {
            begin_capture(stream, LOCAL).unwrap();
            assert_eq!(is_capturing(stream).unwrap(), CU_STREAM_CAPTURE_STATUS_ACTIVE);
            // word = (3 * input + 1) * 3, and then a copy of it each way.
            result::memcpy_dtod_async(word, input, 4, stream).unwrap();
            launch(triple, 1, stream, &mut [(&raw mut word).cast()]).unwrap();
            launch(add, 1, stream, &mut [(&raw mut word).cast(), (&raw mut term).cast()]).unwrap();
            launch(triple, 1, stream, &mut [(&raw mut word).cast()]).unwrap();
            result::memcpy_dtod_async(other, word, 4, stream).unwrap();
            result::memset_d8_async(input, 0, 4, stream).unwrap();
            result::memcpy_dtoh_async(&mut host, other, stream).unwrap();
            end_capture(stream).unwrap()
        };
        term = 1000; // arguments were copied by the launch
        assert_eq!(term, 1000);
        // SAFETY: both live.
        unsafe {
            assert_eq!(is_capturing(stream).unwrap(), CU_STREAM_CAPTURE_STATUS_NONE);
            synchronize(stream).unwrap();
        }
        assert_eq!((read(input, 1), read(word, 1), host), (vec![5], vec![77], [0]), "nothing was done");
        let graph = executable(graph);
        for value in [5u32, 6, 1_000_000] {
            write(input, &[value]);
            // SAFETY: all live; `input` is written after the launch before.
            unsafe {
                result::graph::launch(graph, stream).unwrap();
                launch(add, 1, stream, &mut [(&raw mut input).cast(), (&raw mut term).cast()]).unwrap();
                synchronize(stream).unwrap();
            }
            // SAFETY: a copy the graph has made, which the compiler does not know of.
            let host = unsafe { (&raw const host).read_volatile() };
            assert_eq!((host, read(other, 1)), ([9 * value + 3], vec![9 * value + 3]));
            assert_eq!(read(input, 1), [1000], "the stream's own work comes after");
        }
        // SAFETY: destroyed once; then refused.
        unsafe {
            result::graph::exec_destroy(graph).unwrap();
            assert_eq!(code(result::graph::launch(graph, stream)), CUDA_ERROR_INVALID_VALUE);
        }
    });
}

#[test]
fn branches_of_a_graph_run_at_the_same_time_and_join() {
    on_virtual_gpu("branches_of_a_graph_run_at_the_same_time_and_join", &[], || {
        context();
        let module = Module::load(kernels::SMALL).unwrap();
        let (add, spin) = (module.function("add").unwrap(), module.function("spin").unwrap());
        let (mut flag, mut count, mut one) = (alloc(4), alloc(4), 1u32);
        write(count, &[0]);
        let (first, second, fork, join) = (stream(), stream(), event(), event());
        // SAFETY: all live.
        let graph = unsafe {
            begin_capture(first, LOCAL).unwrap();
            result::memset_d8_async(flag, 0, 4, first).unwrap();
            record(fork, first).unwrap();
            wait_event(second, fork, EAGER).unwrap();
            assert_eq!(is_capturing(second).unwrap(), CU_STREAM_CAPTURE_STATUS_ACTIVE);
            // One branch waits for what the other writes.
            launch(spin, 1, second, &mut [(&raw mut flag).cast()]).unwrap();
            sys::cuStreamWaitValue32_v2(second, flag, 1, 1).result().unwrap();
            record(join, second).unwrap();
            sys::cuStreamWriteValue32_v2(first, flag, 1, 0).result().unwrap();
            wait_event(first, join, EAGER).unwrap();
            launch(add, 1, first, &mut [(&raw mut count).cast(), (&raw mut one).cast()]).unwrap();
            let graph = end_capture(first).unwrap();
            assert_eq!(is_capturing(second).unwrap(), CU_STREAM_CAPTURE_STATUS_NONE);
            graph
        };
        let graph = executable(graph);
        for launches in 1..=3 {
            // SAFETY: all live.
            unsafe {
                result::graph::launch(graph, second).unwrap();
                synchronize(second).unwrap();
            }
            assert_eq!(read(count, 1), [launches]);
        }
    });
}

#[test]
fn launches_of_one_graph_do_not_overlap_and_wait_for_their_stream() {
    // It looks at words that a graph may write at the same time, to see that it does not.
    let variables = [("ANNULUS_VGPU_RACES", "ignore")];
    on_virtual_gpu("launches_of_one_graph_do_not_overlap_and_wait_for_their_stream", &variables, || {
        context();
        let module = Module::load(kernels::SMALL).unwrap();
        let (add, spin) = (module.function("add").unwrap(), module.function("spin").unwrap());
        let (mut gate, mut begun, mut done, mut one) = (alloc(4), alloc(4), alloc(4), 1u32);
        [gate, begun, done].iter().for_each(|word| write(*word, &[0]));
        let (first, second, probe) = (stream(), stream(), stream());
        // SAFETY: all live.
        let graph = unsafe {
            begin_capture(first, LOCAL).unwrap();
            launch(add, 1, first, &mut [(&raw mut begun).cast(), (&raw mut one).cast()]).unwrap();
            sys::cuStreamWaitValue32_v2(first, gate, 2, 0).result().unwrap();
            launch(add, 1, first, &mut [(&raw mut done).cast(), (&raw mut one).cast()]).unwrap();
            end_capture(first).unwrap()
        };
        let graph = executable(graph);
        let look = |word| {
            std::thread::sleep(Duration::from_millis(50)); // time for what must not happen
            let mut seen = [0u32];
            // SAFETY: the copy has arrived when the call returns: pageable memory.
            unsafe { result::memcpy_dtoh_async(&mut seen, word, probe) }.unwrap();
            seen[0]
        };
        // SAFETY: all live; the gate is a word.
        unsafe {
            launch(spin, 1, first, &mut [(&raw mut gate).cast()]).unwrap();
            result::graph::launch(graph, first).unwrap();
            result::graph::launch(graph, second).unwrap();
            assert_eq!(look(begun), 0, "behind the kernel on the stream, and the second behind the first");
            sys::cuStreamWriteValue32_v2(probe, gate, 1, 0).result().unwrap();
            assert_eq!(look(begun), 1, "one at a time");
            sys::cuStreamWriteValue32_v2(probe, gate, 2, 0).result().unwrap();
            synchronize(second).unwrap();
            assert_eq!((look(begun), look(done)), (2, 2));
        }
    });
}

// ---- what a capture refuses --------------------------------------------------------------------------------------------

/// That `refused` is, in a capture of a stream of `kind` and `mode`, with `expected`; that the capture is lost then, and the
/// stream is not.
#[track_caller]
fn check_refused(
    kind: StreamKind,
    mode: CUstreamCaptureMode,
    expected: sys::CUresult,
    refused: impl FnOnce(sys::CUstream) -> Result<(), DriverError>,
) {
    let stream = result::stream::create(kind).unwrap();
    // SAFETY: the stream lives.
    unsafe {
        begin_capture(stream, mode).unwrap();
        assert_eq!(code(refused(stream)), expected);
        assert_eq!(is_capturing(stream).unwrap(), CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        let mut graph = std::ptr::dangling_mut();
        assert_eq!(sys::cuStreamEndCapture(stream, &mut graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        assert!(graph.is_null());
        assert_eq!(is_capturing(stream).unwrap(), CU_STREAM_CAPTURE_STATUS_NONE);
        begin_capture(stream, mode).unwrap();
        end_capture(stream).unwrap();
    }
}

/// That `work` gives `expected` in a capture of a stream that does not block, and the capture goes on.
#[track_caller]
fn check_harmless(
    mode: CUstreamCaptureMode,
    expected: sys::CUresult,
    work: impl FnOnce(sys::CUstream) -> Result<(), DriverError>,
) {
    let stream = stream();
    // SAFETY: the stream lives.
    unsafe {
        begin_capture(stream, mode).unwrap();
        assert_eq!(code(work(stream)), expected);
        end_capture(stream).unwrap();
    }
}

#[test]
fn a_capture_has_no_status_to_wait_for() {
    on_virtual_gpu("a_capture_has_no_status_to_wait_for", &[], || {
        context();
        let (unsupported, invalid) = (CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, CUDA_ERROR_INVALID_VALUE);
        let (event, timed) = (event(), result::event::create(CUevent_flags::CU_EVENT_DEFAULT).unwrap());
        let mut number = 0;
        // SAFETY: streams and events live.
        unsafe {
            check_refused(NON_BLOCKING, RELAXED, unsupported, |stream| synchronize(stream));
            check_refused(NON_BLOCKING, RELAXED, unsupported, |stream| sys::cuStreamQuery(stream).result());
            check_refused(NON_BLOCKING, RELAXED, unsupported, |_| result::ctx::synchronize());
            check_refused(NON_BLOCKING, RELAXED, unsupported, |stream| {
                assert_eq!(code(sys::cuStreamQuery(stream).result()), unsupported);
                sys::cuStreamQuery(stream).result() // again
            });
            check_refused(NON_BLOCKING, RELAXED, unsupported, |stream| {
                sys::cuStreamGetFlags(stream, &mut number).result()
            });
            check_harmless(RELAXED, CUDA_ERROR_CAPTURED_EVENT, |stream| {
                record(timed, stream)?;
                result::event::elapsed(timed, timed).map(drop)
            });
            check_refused(NON_BLOCKING, RELAXED, CUDA_ERROR_CAPTURED_EVENT, |stream| {
                record(event, stream)?;
                query(event)
            });
            // That capture is over.
            assert_eq!(code(query(event)), invalid);
            assert_eq!(code(sys::cuEventSynchronize(event).result()), invalid);
            assert_eq!(code(wait_event(stream(), event, EAGER)), invalid);
            check_refused(NON_BLOCKING, LOCAL, invalid, |stream| wait_event(stream, event, EAGER));
            record(event, stream()).unwrap();
            query(event).map_or_else(|error| assert_eq!(error.0, CUDA_ERROR_NOT_READY), |()| {}); // recorded anew
        }
    });
}

#[test]
fn a_capture_depends_on_nothing_outside_it() {
    on_virtual_gpu("a_capture_depends_on_nothing_outside_it", &[], || {
        context();
        let (event, outside) = (event(), stream());
        // SAFETY: streams and events live.
        unsafe {
            check_harmless(LOCAL, CUDA_SUCCESS, |stream| wait_event(stream, event, EAGER)); // never recorded
            record(event, outside).unwrap();
            let isolation = CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
            check_refused(NON_BLOCKING, LOCAL, isolation, |stream| wait_event(stream, event, EAGER));
            // Two captures.
            let other = stream();
            begin_capture(other, LOCAL).unwrap();
            record(event, other).unwrap();
            let merge = CUDA_ERROR_STREAM_CAPTURE_MERGE;
            check_refused(NON_BLOCKING, LOCAL, merge, |stream| wait_event(stream, event, EAGER));
            assert_eq!(code(end_capture(other)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
    });
}

#[test]
fn a_capture_ends_where_it_began_and_when_all_have_joined() {
    on_virtual_gpu("a_capture_ends_where_it_began_and_when_all_have_joined", &[], || {
        context();
        let (first, second, event, word) = (stream(), stream(), event(), alloc(4));
        // SAFETY: all live.
        unsafe {
            assert_eq!(code(end_capture(first)), CUDA_ERROR_ILLEGAL_STATE, "none began");
            check_harmless(LOCAL, CUDA_ERROR_ILLEGAL_STATE, |stream| begin_capture(stream, LOCAL));
            check_refused(NON_BLOCKING, LOCAL, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, |stream| {
                record(event, stream)?;
                wait_event(second, event, EAGER)?;
                end_capture(second).map(drop)
            });
            for (mode, elsewhere) in [
                (GLOBAL, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD),
                (LOCAL, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD),
                (RELAXED, CUDA_SUCCESS),
            ] {
                begin_capture(first, mode).unwrap();
                let stream = first.addr();
                let other = move || {
                    context();
                    code(end_capture(std::ptr::with_exposed_provenance_mut(stream)))
                };
                assert_eq!(std::thread::spawn(other).join().unwrap(), elsewhere);
                assert_eq!(is_capturing(first).unwrap(), CU_STREAM_CAPTURE_STATUS_NONE, "over in each case");
            }
            check_harmless(LOCAL, CUDA_SUCCESS, |stream| {
                let joined = self::stream();
                record(event, stream)?;
                wait_event(joined, event, EAGER)?;
                result::stream::destroy(joined)
            });
            // Unjoined, and then the same with a join.
            for joins in [false, true] {
                begin_capture(first, LOCAL).unwrap();
                record(event, first).unwrap();
                wait_event(second, event, EAGER).unwrap();
                result::memset_d8_async(word, 0, 4, second).unwrap();
                if joins {
                    record(event, second).unwrap();
                    wait_event(first, event, EAGER).unwrap();
                }
                let ended = code(end_capture(first));
                assert_eq!(ended, if joins { CUDA_SUCCESS } else { CUDA_ERROR_STREAM_CAPTURE_UNJOINED });
                assert_eq!(is_capturing(second).unwrap(), CU_STREAM_CAPTURE_STATUS_NONE);
                synchronize(second).unwrap();
            }
        }
    });
}

#[test]
fn the_legacy_stream_is_not_captured_and_not_usable_beside_a_blocking_one() {
    on_virtual_gpu("the_legacy_stream_is_not_captured_and_not_usable_beside_a_blocking_one", &[], || {
        context();
        let (legacy, word) = (result::stream::null(), alloc(4));
        // SAFETY: all live.
        unsafe {
            assert_eq!(code(begin_capture(legacy, LOCAL)), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            let implicit = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
            check_refused(StreamKind::Default, RELAXED, implicit, |_| result::memset_d8_async(word, 0, 4, legacy));
            check_refused(StreamKind::Default, RELAXED, implicit, |_| result::memset_d8_sync(word, 0, 4));
            let blocking = result::stream::create(StreamKind::Default).unwrap();
            begin_capture(blocking, LOCAL).unwrap();
            assert_eq!(code(is_capturing(legacy)), implicit);
            end_capture(blocking).unwrap(); // asking has not invalidated it
            // Beside one that does not block, the legacy stream works, outside of the graph; its thread may not wait for it.
            for mode in [LOCAL, GLOBAL] {
                check_harmless(mode, CUDA_SUCCESS, |_| {
                    result::memset_d8_async(word, 7, 4, legacy)?;
                    result::memset_d8_sync(word, 7, 4)
                });
                let unsupported = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
                check_refused(NON_BLOCKING, mode, unsupported, |_| synchronize(legacy));
            }
            check_harmless(RELAXED, CUDA_SUCCESS, |_| synchronize(legacy));
            assert_eq!(read(word, 1), [0x0707_0707]);
        }
    });
}

#[test]
fn unsafe_calls_are_refused_as_the_modes_say() {
    on_virtual_gpu("unsafe_calls_are_refused_as_the_modes_say", &[], || {
        context();
        let unsupported = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        let (word, outside, other) = (alloc(4), event(), stream());
        let module = Module::load(kernels::SMALL).unwrap();
        // SAFETY: nobody reads the memory.
        let allocate = || unsafe { result::malloc_sync(4).map(drop) };
        // SAFETY: the call swaps a local value.
        let set_mode = |mut mode| unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result().unwrap();
        let elsewhere = |mode| {
            let other = move || {
                context();
                set_mode(mode);
                allocate()
            };
            std::thread::spawn(other).join().unwrap()
        };
        // SAFETY: handles live, and what is destroyed is not used again; words are of a live allocation.
        unsafe {
            for mode in [LOCAL, GLOBAL] {
                let refused = |call: &dyn Fn() -> Result<(), DriverError>| {
                    check_refused(NON_BLOCKING, mode, unsupported, |_| call())
                };
                refused(&allocate);
                refused(&|| result::free_sync(word));
                refused(&|| result::free_sync(0));
                refused(&|| result::malloc_async(other, 4).map(drop));
                refused(&|| query(outside));
                refused(&|| sys::cuEventSynchronize(outside).result());
                refused(&|| sys::cuStreamQuery(other).result());
                refused(&|| synchronize(other));
                refused(&|| module.unload());
                begin_capture(other, LOCAL).unwrap();
                let graph = end_capture(other).unwrap();
                refused(&|| result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).map(drop));
                let executable = executable(graph);
                refused(&|| result::graph::exec_destroy(executable));
                check_harmless(mode, CUDA_SUCCESS, |_| {
                    result::memcpy_htod_sync(word, &[0u32])?;
                    result::memset_d8_sync(word, 0, 4)?;
                    Module::load(kernels::SMALL)?.function("add")?;
                    let gone = result::stream::create(NON_BLOCKING)?;
                    begin_capture(gone, mode)?;
                    end_capture(gone)?;
                    result::stream::destroy(gone)
                });
            }
        }
        check_refused(NON_BLOCKING, GLOBAL, unsupported, |_| elsewhere(GLOBAL));
        for (capture, thread) in [(GLOBAL, LOCAL), (GLOBAL, RELAXED), (LOCAL, GLOBAL), (RELAXED, GLOBAL)] {
            check_harmless(capture, CUDA_SUCCESS, |_| elsewhere(thread));
        }
        for (capture, thread) in [(RELAXED, GLOBAL), (GLOBAL, RELAXED)] {
            set_mode(thread);
            check_harmless(capture, CUDA_SUCCESS, |_| allocate());
        }
    });
}

#[test]
fn what_a_graph_has_no_node_for_is_refused_and_a_refused_launch_too() {
    on_virtual_gpu("what_a_graph_has_no_node_for_is_refused_and_a_refused_launch_too", &[], || {
        context();
        let unsupported = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        let (other, mut word) = (stream(), alloc(4));
        let triple = Module::load(kernels::SMALL).unwrap().function("triple").unwrap();
        // SAFETY: all live.
        unsafe {
            begin_capture(other, LOCAL).unwrap();
            let graph = executable(end_capture(other).unwrap());
            check_refused(NON_BLOCKING, RELAXED, unsupported, |stream| result::graph::launch(graph, stream));
            check_refused(NON_BLOCKING, RELAXED, unsupported, |stream| result::graph::upload(graph, stream));
        }
        check_refused(NON_BLOCKING, RELAXED, CUDA_ERROR_INVALID_VALUE, |stream| {
            launch(triple, 1025, stream, &mut [(&raw mut word).cast()])
        });
    });
}

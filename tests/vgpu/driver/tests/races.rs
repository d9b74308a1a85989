//! Races between streams, the host and kernels are told with both sides, and end the process; and what orders them is believed.
//! Every case is a process of its own: one in which an edge is missing, and those that have it.

#[path = "support/kernels.rs"]
mod kernels;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use cudarc::driver::result::event::{self, record};
use cudarc::driver::result::stream::{self, begin_capture, end_capture, synchronize, wait_event};
use cudarc::driver::result::{self, ctx};
use cudarc::driver::sys::{
    self, CUevent_flags, CUevent_wait_flags, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode,
};
use raw::{Module, NON_BLOCKING, alloc, context, launch, read, write};

/// Set in the processes that run a case: its name.
const CASE: &str = "ANNULUS_VGPU_CASE";
/// The case in which an edge is missing.
const RACE: &str = "race";
const SIGABRT: i32 = 6;
const EAGER: CUevent_wait_flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

/// Runs a case of this test in a process with the driver: what it says, how it ends.
fn run(test: &str, case: &str) -> (String, std::process::ExitStatus) {
    let folder = tempfile::tempdir().unwrap();
    let library = support::library("annulus_vgpu_driver");
    std::os::unix::fs::symlink(library, folder.path().join("libcuda.so")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--quiet", "--test-threads=1"]);
    // Loading a kernel waits for the device, which would order some of what is not, and wait for ever for kernels that talk.
    command.env("CUDA_MODULE_LOADING", "EAGER").env("ANNULUS_VGPU_DEVICES", "2");
    let output = command.env("LD_LIBRARY_PATH", folder.path()).env(CASE, case).output().unwrap();
    (String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(), output.status)
}

/// The race is told, in these words; and the cases in which the edge is there pass.
fn check(test: &str, told: &[&str], ordered: &[&str], body: impl FnOnce(&str)) {
    if let Ok(case) = std::env::var(CASE) {
        return body(&case);
    }
    let (text, status) = run(test, RACE);
    assert_eq!(status.signal(), Some(SIGABRT), "{text}");
    for words in ["race at", "nothing orders"].iter().chain(told) {
        assert!(text.contains(words), "{words}:\n{text}");
    }
    for case in ordered {
        let (text, status) = run(test, case);
        assert!(status.success() && text.contains("1 passed"), "{case}:\n{text}");
    }
}

fn new_stream() -> sys::CUstream {
    stream::create(NON_BLOCKING).unwrap()
}

fn new_event() -> sys::CUevent {
    event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap()
}

/// Puts what comes on `behind` after what is on `before`.
fn order(before: sys::CUstream, behind: sys::CUstream) {
    let event = new_event();
    // SAFETY: all live; events that are waited for may be destroyed, and this one is not.
    unsafe {
        record(event, before).unwrap();
        wait_event(behind, event, EAGER).unwrap();
    }
}

/// The kernels of [`kernels::SMALL`] on one word.
struct Small {
    triple: sys::CUfunction,
    add: sys::CUfunction,
}

impl Small {
    fn load() -> Small {
        let module = Module::load(kernels::SMALL).unwrap();
        Small { triple: module.function("triple").unwrap(), add: module.function("add").unwrap() }
    }

    fn triple(&self, mut word: u64, stream: sys::CUstream) {
        launch(self.triple, 1, stream, &mut [(&raw mut word).cast()]).unwrap();
    }

    fn add(&self, mut word: u64, stream: sys::CUstream) {
        let mut one = 1u32;
        launch(self.add, 1, stream, &mut [(&raw mut word).cast(), (&raw mut one).cast()]).unwrap();
    }
}

// ---- streams and the host ----------------------------------------------------------------------------------------------

#[test]
fn kernels_of_two_streams_need_an_event() {
    let told = ["triple", "add", "at PTX line 1", "on stream 0x", "byte 0 of 8 of Device memory"];
    check("kernels_of_two_streams_need_an_event", &told, &["event", "other bytes", "host"], |case| {
        context();
        let (small, word, first, second) = (Small::load(), alloc(8), new_stream(), new_stream());
        write(word, &[5, 5]);
        small.triple(word, first);
        match case {
            "event" => order(first, second),
            // SAFETY: a stream that lives.
            "host" => unsafe { synchronize(first).unwrap() },
            _ => {}
        }
        small.add(if case == "other bytes" { word + 4 } else { word }, second);
        ctx::synchronize().unwrap();
        assert_eq!(read(word, 2), if case == "other bytes" { [15, 6] } else { [16, 5] });
    });
}

/// An event stands for what was before its recording when the wait was called, whatever comes later.
#[test]
fn a_wait_is_for_the_recording_at_its_time() {
    check("a_wait_is_for_the_recording_at_its_time", &["triple", "add"], &["recorded behind"], |case| {
        context();
        let (small, word, first, second) = (Small::load(), alloc(4), new_stream(), new_stream());
        write(word, &[5]);
        let event = new_event();
        // SAFETY: all live.
        unsafe {
            record(event, first).unwrap();
            if case == "recorded behind" {
                small.triple(word, first);
                record(event, first).unwrap();
                wait_event(second, event, EAGER).unwrap();
            } else {
                wait_event(second, event, EAGER).unwrap();
                small.triple(word, first);
                record(event, first).unwrap();
            }
        }
        small.add(word, second);
        ctx::synchronize().unwrap();
    });
}

/// Also if the event is recorded anew on a stream that gets there first.
#[test]
fn a_wait_is_not_for_a_later_recording_on_another_stream() {
    let test = "a_wait_is_not_for_a_later_recording_on_another_stream";
    check(test, &["triple", "add"], &["waited before"], |case| {
        context();
        let (small, word, gate, event) = (Small::load(), alloc(4), alloc(4), new_event());
        let [first, second, third] = [(); 3].map(|()| new_stream());
        write(word, &[5]);
        write(gate, &[0]);
        // SAFETY: all live.
        unsafe {
            sys::cuStreamWaitValue32_v2(first, gate, 1, 0).result().unwrap();
            small.triple(word, first);
            record(event, first).unwrap();
            if case == "waited before" {
                wait_event(second, event, EAGER).unwrap();
            }
            record(event, third).unwrap();
            wait_event(second, event, EAGER).unwrap();
            small.add(word, second);
            synchronize(third).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(100)); // time for what must not happen
            sys::cuStreamWriteValue32_v2(third, gate, 1, 0).result().unwrap();
        }
        ctx::synchronize().unwrap();
        assert_eq!(read(word, 1), [16]);
    });
}

#[test]
fn the_host_copies_behind_what_it_has_waited_for() {
    let told = ["a copy reads", "triple writes"];
    let ordered = ["stream", "device", "event", "stream query", "event query"];
    check("the_host_copies_behind_what_it_has_waited_for", &told, &ordered, |case| {
        context();
        let (small, word, stream, event) = (Small::load(), alloc(4), new_stream(), new_event());
        write(word, &[5]);
        small.triple(word, stream);
        // SAFETY: all live.
        unsafe {
            record(event, stream).unwrap();
            let ready = |ask: &dyn Fn() -> CUresult| while ask() != CUresult::CUDA_SUCCESS {};
            match case {
                "stream" => synchronize(stream).unwrap(),
                "device" => ctx::synchronize().unwrap(),
                "event" => event::synchronize(event).unwrap(),
                "stream query" => ready(&|| sys::cuStreamQuery(stream)),
                "event query" => ready(&|| sys::cuEventQuery(event)),
                // The race is there also when the kernel has long ended.
                _ => std::thread::sleep(std::time::Duration::from_millis(200)),
            }
        }
        assert_eq!(read(word, 1), [15]);
    });
}

#[test]
fn the_default_stream_orders_streams_that_block_and_no_others() {
    check("the_default_stream_orders_streams_that_block_and_no_others", &["a fill", "triple"], &["blocking"], |case| {
        context();
        let kind = if case == "blocking" { stream::StreamKind::Default } else { NON_BLOCKING };
        let (small, word, stream) = (Small::load(), alloc(4), stream::create(kind).unwrap());
        write(word, &[5]);
        small.triple(word, stream);
        // SAFETY: a word that lives.
        unsafe { result::memset_d8_async(word, 0, 4, stream::null()).unwrap() };
        small.triple(word, stream);
        // SAFETY: a stream that lives.
        unsafe { synchronize(stream).unwrap() };
    });
}

#[test]
fn copies_and_fills_are_accesses() {
    let told = ["a copy reads", "a fill writes"]; // whichever came first
    check("copies_and_fills_are_accesses", &told, &["event"], |case| {
        context();
        let (from, to, first, second) = (alloc(4), alloc(4), new_stream(), new_stream());
        // SAFETY: all live.
        unsafe {
            result::memset_d8_async(from, 1, 4, first).unwrap();
            if case == "event" {
                order(first, second);
            }
            result::memcpy_dtod_async(to, from, 4, second).unwrap();
        }
        ctx::synchronize().unwrap();
    });
}

// ---- graphs ------------------------------------------------------------------------------------------------------------

/// One branch triples a word, the other adds to it: at the same time, or behind an edge.
#[test]
fn branches_of_a_graph_need_an_edge() {
    let told = ["triple", "add", "in node 1 of a graph", "in node 0 of a graph"];
    check("branches_of_a_graph_need_an_edge", &told, &["edge"], |case| {
        context();
        let (small, word, first, second) = (Small::load(), alloc(4), new_stream(), new_stream());
        write(word, &[5]);
        // SAFETY: all live.
        unsafe {
            begin_capture(first, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            if case == "edge" {
                small.triple(word, first);
                order(first, second);
            } else {
                order(first, second);
                small.triple(word, first);
            }
            small.add(word, second);
            order(second, first);
            let graph = end_capture(first).unwrap();
            let graph = result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).unwrap();
            // Launches of one graph come one after another, also on different streams.
            result::graph::launch(graph, first).unwrap();
            result::graph::launch(graph, second).unwrap();
            synchronize(second).unwrap();
        }
        assert_eq!(read(word, 1), [(5 * 3 + 1) * 3 + 1]);
    });
}

#[test]
fn work_behind_a_graph_is_behind_all_its_branches() {
    let told = ["triple", "in node 0 of a graph", "add", "on stream"];
    check("work_behind_a_graph_is_behind_all_its_branches", &told, &["stream", "event"], |case| {
        context();
        let (small, word, first, second) = (Small::load(), alloc(4), new_stream(), new_stream());
        write(word, &[5]);
        // SAFETY: all live.
        unsafe {
            begin_capture(first, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            order(first, second);
            small.triple(word, second);
            order(second, first);
            let graph = end_capture(first).unwrap();
            let graph = result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).unwrap();
            small.add(word, first);
            result::graph::launch(graph, first).unwrap();
            if case == RACE {
                // Both have ended, and the host does not know.
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
        }
        if case == "event" {
            order(first, second);
        }
        small.add(word, if case == "stream" { first } else { second });
        ctx::synchronize().unwrap();
        assert_eq!(read(word, 1), [(5 + 1) * 3 + 1]);
    });
}

// ---- memory that comes and goes ----------------------------------------------------------------------------------------

#[test]
fn memory_of_a_pool_is_freed_behind_what_uses_it() {
    let told = ["cuMemFreeAsync writes", "triple"];
    check("memory_of_a_pool_is_freed_behind_what_uses_it", &told, &["event"], |case| {
        context();
        let (small, first, second) = (Small::load(), new_stream(), new_stream());
        // SAFETY: all live; the memory is not used after it was freed.
        unsafe {
            let word = result::malloc_async(first, 4).unwrap();
            result::memset_d8_async(word, 1, 4, first).unwrap();
            small.triple(word, first);
            if case == "event" {
                order(first, second);
            } else {
                // That the kernel has ended long ago is luck.
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            result::free_async(word, second).unwrap();
        }
        ctx::synchronize().unwrap();
    });
}

#[test]
fn memory_of_a_pool_is_there_behind_its_allocation() {
    let told = ["cuMemAllocAsync writes", "a fill"];
    check("memory_of_a_pool_is_there_behind_its_allocation", &told, &["event"], |case| {
        context();
        let (first, second) = (new_stream(), new_stream());
        // SAFETY: all live.
        unsafe {
            let word = result::malloc_async(first, 4).unwrap();
            if case == "event" {
                order(first, second);
            }
            result::memset_d8_async(word, 1, 4, second).unwrap();
        }
        ctx::synchronize().unwrap();
    });
}

/// `cuMemFree` waits for the streams of its device, those that were destroyed among them, and for no others.
#[test]
fn memory_is_freed_behind_its_device_and_not_behind_others() {
    let told = ["cuMemFree writes, the host", "triple"];
    check("memory_is_freed_behind_its_device_and_not_behind_others", &told, &["same device"], |case| {
        context();
        let word = alloc(4);
        write(word, &[5]);
        // SAFETY: the other device's context stays retained; all live. The memory is freed after its last use, in one case
        // without waiting for that.
        unsafe {
            let own = ctx::get_current().unwrap().unwrap();
            if case != "same device" {
                let other = result::primary_ctx::retain(result::device::get(1).unwrap()).unwrap();
                ctx::set_current(other).unwrap();
                sys::cuCtxEnablePeerAccess(own, 0).result().unwrap();
            }
            let (small, stream) = (Small::load(), new_stream());
            small.triple(word, stream);
            if case == "same device" {
                stream::destroy(stream).unwrap();
            } else {
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            ctx::set_current(own).unwrap();
            result::free_sync(word).unwrap();
            ctx::synchronize().unwrap();
        }
    });
}

// ---- kernels that talk -------------------------------------------------------------------------------------------------

/// `hand(u32* data, u32* flag)`: writes 7, then sets the flag. `take(u32* data, u32* flag)`: waits for the flag, then adds to
/// the data.
const TALK: &str = r"
.version 8.2
.target sm_80
.address_size 64

.visible .entry hand(.param .u64 hand_param_0, .param .u64 hand_param_1)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [hand_param_0];
    ld.param.u64 %rd2, [hand_param_1];
    mov.u32 %r1, 7;
    st.global.u32 [%rd1], %r1;
    mov.u32 %r2, 1;
    st.release.sys.global.u32 [%rd2], %r2;
    ret;
}

.visible .entry take(.param .u64 take_param_0, .param .u64 take_param_1)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [take_param_0];
    ld.param.u64 %rd2, [take_param_1];
$L__BB1_1:
    ld.acquire.sys.global.u32 %r1, [%rd2];
    setp.eq.s32 %p1, %r1, 0;
    @%p1 bra $L__BB1_1;
    ld.global.u32 %r2, [%rd1];
    add.s32 %r3, %r2, 1;
    st.global.u32 [%rd1], %r3;
    ret;
}
";

/// Runs both kernels at the same time; `taker` is where the second runs.
fn talk(text: &str, taker: i32) {
    context();
    let (mut data, mut flag) = (alloc(4), alloc(4));
    write(data, &[0]);
    write(flag, &[0]);
    let module = Module::load(text).unwrap();
    let (hand, take) = (module.function("hand").unwrap(), module.function("take").unwrap());
    let giver = new_stream();
    // SAFETY: the contexts stay retained; kernels, streams and memory live.
    unsafe {
        let own = ctx::get_current().unwrap().unwrap();
        let other = result::primary_ctx::retain(result::device::get(taker).unwrap()).unwrap();
        ctx::set_current(other).unwrap();
        if taker != 0 {
            sys::cuCtxEnablePeerAccess(own, 0).result().unwrap();
        }
        let stream = new_stream();
        launch(take, 1, stream, &mut [(&raw mut data).cast(), (&raw mut flag).cast()]).unwrap();
        ctx::set_current(own).unwrap();
        launch(hand, 1, giver, &mut [(&raw mut data).cast(), (&raw mut flag).cast()]).unwrap();
        synchronize(giver).unwrap();
        ctx::set_current(other).unwrap();
        synchronize(stream).unwrap();
        ctx::set_current(own).unwrap();
    }
    assert_eq!(read(data, 1), [8]);
}

#[test]
fn kernels_that_run_together_are_ordered_by_release_and_acquire() {
    let told = ["take", "hand writes at PTX line 13"];
    check("kernels_that_run_together_are_ordered_by_release_and_acquire", &told, &["ordered"], |case| {
        // A relaxed store is seen, too, and orders nothing.
        let text = if case == RACE { TALK.replace("st.release", "st.relaxed") } else { TALK.to_owned() };
        talk(&text, 0);
    });
}

#[test]
fn what_is_released_to_a_device_is_not_to_another() {
    let ordered = ["all of the device", "all of the system"];
    check("what_is_released_to_a_device_is_not_to_another", &["take", "hand"], &ordered, |case| match case {
        "all of the device" => talk(&TALK.replace(".sys", ".gpu"), 0),
        "all of the system" => talk(TALK, 1),
        _ => talk(&TALK.replace("st.release.sys", "st.release.gpu"), 1),
    });
}

#[test]
fn streams_are_ordered_by_values_in_memory() {
    check("streams_are_ordered_by_values_in_memory", &["triple", "add"], &["barrier"], |case| {
        context();
        let (small, word, flag, first, second) = (Small::load(), alloc(4), alloc(4), new_stream(), new_stream());
        write(word, &[5]);
        write(flag, &[0]);
        // SAFETY: all live.
        unsafe {
            sys::cuStreamWaitValue32_v2(second, flag, 1, 0).result().unwrap();
            small.add(word, second);
            small.triple(word, first);
            // 1: CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER
            sys::cuStreamWriteValue32_v2(first, flag, 1, u32::from(case == RACE)).result().unwrap();
        }
        ctx::synchronize().unwrap();
        assert_eq!(read(word, 1), [16]);
    });
}

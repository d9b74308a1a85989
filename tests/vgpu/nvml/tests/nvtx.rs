//! Ranges as a profiler sees them, and that there is nothing to see without one.

mod support;

use std::ffi::OsStr;

use annulus::telemetry::{Timeline, nvtx};
use support::{library, with_library};

/// Runs `body` with the injection library of this package; returns what that heard, in the process of the test only.
fn heard(test: &str, body: impl FnOnce()) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("nvtx.log");
    let (injection, path) = (library(), log.clone());
    let variables = [("NVTX_INJECTION64_PATH", injection.as_os_str()), ("ANNULUS_VGPU_NVTX_LOG", path.as_os_str())];
    let mut is_inside = false;
    with_library(test, None, &variables, || {
        is_inside = true;
        body();
    });
    // The process that was started has another folder in its variable; this one reads the file of its own.
    (!is_inside).then(|| std::fs::read_to_string(&log).unwrap())
}

#[test]
fn spans_of_a_timeline_are_ranges_even_where_it_is_off() {
    let heard = heard("spans_of_a_timeline_are_ranges_even_where_it_is_off", || {
        let timeline = Timeline::disabled();
        let track = timeline.track("compute");
        let step = timeline.open(track, "optimizer step", 7, 0);
        assert!(timeline.open(track, "norm", 8, 64).close() > 0);
        let other = timeline.clone();
        std::thread::spawn(move || drop(other.open(track, "all_reduce", u32::MAX, 0))).join().unwrap();
        drop(step);
        drop(nvtx::range(&"long ".repeat(20), 0));
    });
    let Some(heard) = heard else { return };
    let long = &"long ".repeat(20)[..63];
    let expected = format!(
        "domain annulus\npush optimizer step 7\n  push norm 8\n  pop\npush all_reduce 4294967295\npop\npop\npush {long} 0\npop\n"
    );
    assert_eq!(heard, expected);
}

#[test]
fn without_a_tool_nothing_is_loaded() {
    with_library("without_a_tool_nothing_is_loaded", None, &[], || {
        let libraries = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let mut files: Vec<String> =
                maps.split_whitespace().filter(|word| word.contains(".so")).map(str::to_owned).collect();
            files.dedup();
            files
        };
        let before = libraries();
        drop(nvtx::range("norm", 1));
        assert_eq!(libraries(), before);
    });
}

#[test]
fn a_tool_that_does_not_start_or_is_none_is_ignored() {
    // The library of this package refuses to start without a log.
    let injection = library();
    for path in [injection.as_os_str(), OsStr::new("/nonexistent/tool.so"), OsStr::new("")] {
        let variables = [("NVTX_INJECTION64_PATH", path)];
        with_library("a_tool_that_does_not_start_or_is_none_is_ignored", None, &variables, || {
            drop(nvtx::range("norm", 1));
        });
    }
}

//! What the sampler writes, where GPUs tell everything, little, or nothing any more.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use annulus::Error;
use annulus::telemetry::{Sampler, Timeline, now_ns};
use serde_json::Value;
use support::{on_virtual_machine, with_library};

const PERIOD: Duration = Duration::from_millis(1);
/// Long enough for a machine that does other things, too.
const PATIENCE: Duration = Duration::from_secs(60);

/// The header, and the cells of the rows.
fn table(path: &Path) -> (Vec<String>, Vec<Vec<String>>) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    (lines.next().unwrap(), lines.collect())
}

/// Waits until there are so many rows of every GPU.
fn wait_for_rows(path: &Path, gpus: usize, rows: usize) {
    let begin = Instant::now();
    let enough = |gpu: usize| {
        table(path).1.iter().filter(|row| row.get(1).is_some_and(|cell| *cell == gpu.to_string())).count() >= rows
    };
    while !(0..gpus).all(enough) {
        assert!(begin.elapsed() < PATIENCE, "no {rows} rows of each of {gpus} GPUs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The named cell of a row.
fn cell<'a>(header: &[String], row: &'a [String], name: &str) -> &'a str {
    assert_eq!(row.len(), header.len(), "{row:?}");
    &row[header.iter().position(|column| column == name).unwrap()]
}

#[test]
fn every_value_stands_in_its_column_and_on_the_clock_of_the_timeline() {
    let variables = [("ANNULUS_VGPU_DEVICES", "2"), ("ANNULUS_VGPU_LINKS", "X NV2; NV2 X")];
    on_virtual_machine("every_value_stands_in_its_column_and_on_the_clock_of_the_timeline", &variables, || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpus.csv");
        let timeline = Timeline::new(0, 10_000).unwrap();
        let before_ns = now_ns();
        let sampler = Sampler::start(&path, PERIOD, timeline.clone()).unwrap();
        wait_for_rows(&path, 2, 3);
        assert_eq!(sampler.stop(), Vec::<String>::new());
        let after_ns = now_ns();

        let (header, rows) = table(&path);
        for gpu in [0_u32, 1] {
            let rows: Vec<_> = rows.iter().filter(|row| row[1] == gpu.to_string()).collect();
            for (number, row) in rows.iter().enumerate() {
                let cell = |name| cell(&header, row, name);
                let at_ns: u64 = cell("monotonic_ns").parse().unwrap();
                assert!((before_ns..after_ns).contains(&at_ns));
                assert!(cell("uuid").starts_with("GPU-616e6e75-6c75-"), "{row:?}");
                assert_eq!(cell("sm_utilization_percent"), (10 * gpu as usize + number).to_string());
                assert_eq!(cell("memory_utilization_percent"), "5");
                assert_eq!(cell("memory_used_bytes"), ((u64::from(gpu) + 1) << 30).to_string());
                assert_eq!(cell("power_watts"), (100 + gpu).to_string());
                assert_eq!((cell("sm_clock_mhz"), cell("memory_clock_mhz")), ("1500", "2000"));
                assert_eq!(cell("temperature_celsius"), (40 + gpu).to_string());
                assert_eq!((cell("pcie_sent_kb_per_s"), cell("pcie_received_kb_per_s")), ("1000", "2000"));
                let reasons = if number == 0 { "GPU_IDLE" } else { "SW_POWER_CAP|HW_THERMAL_SLOWDOWN" };
                assert_eq!(cell("throttle_reasons"), reasons);
                let [sent, received] =
                    ["nvlink_sent_kib_per_s", "nvlink_received_kib_per_s"].map(|name| cell(name).parse::<f64>());
                match (sent, received) {
                    (Err(_), Err(_)) => assert_eq!(number, 0, "a rate needs two readings"),
                    // 1024 KiB more in each call, and calls are at least 40 ms apart.
                    (Ok(sent), Ok(received)) => {
                        assert!(number > 0 && sent > 0.0 && sent <= 1024.0 / 0.04, "{sent}");
                        assert!((received / sent - 2.0).abs() < 1e-9);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }

        let mut json = Vec::new();
        timeline.write_json(&mut json).unwrap();
        let trace: Value = serde_json::from_slice(&json).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let power: Vec<_> = events.iter().filter(|event| event["name"] == "power (W), GPU 1").collect();
        let samples: Vec<_> = rows.iter().filter(|row| row[1] == "1").collect();
        assert_eq!(power.len(), samples.len());
        for (event, row) in power.iter().zip(samples) {
            assert_eq!((event["ph"].as_str(), event["args"]["value"].as_f64()), (Some("C"), Some(101.0)));
            let at_ns = row[0].parse::<u64>().unwrap();
            assert!((event["ts"].as_f64().unwrap() * 1e3 - at_ns as f64).abs() < 1e3, "the same sample");
        }
    });
}

#[test]
fn what_a_card_does_not_tell_is_an_empty_cell() {
    // As consumer cards and old drivers answer; and no NVLink.
    let answers = "nvmlDeviceGetPowerUsage=3,nvmlDeviceGetPcieThroughput=3,nvmlDeviceGetMemoryInfo_v2=13,\
                   nvmlDeviceGetCurrentClocksThrottleReasons=4,nvmlDeviceGetTemperature=999";
    let variables = [("ANNULUS_VGPU_NVML_ANSWERS", answers)];
    on_virtual_machine("what_a_card_does_not_tell_is_an_empty_cell", &variables, || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpus.csv");
        let sampler = Sampler::start(&path, PERIOD, Timeline::disabled()).unwrap();
        wait_for_rows(&path, 1, 2);
        assert!(sampler.stop().is_empty());
        let (header, rows) = table(&path);
        let told =
            ["monotonic_ns", "gpu", "uuid", "sm_utilization_percent", "memory_utilization_percent", "sm_clock_mhz"];
        for (row, name) in rows.iter().flat_map(|row| header.iter().map(move |name| (row, name))) {
            let is_told = told.contains(&name.as_str()) || name == "memory_clock_mhz";
            assert_eq!(!cell(&header, row, name).is_empty(), is_told, "{name}: {row:?}");
        }
    });
}

#[test]
fn a_lost_gpu_ends_the_samples_with_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let (path, lost) = (folder.path().join("gpus.csv"), folder.path().join("lost"));
    let variables = [("ANNULUS_VGPU_LOST", lost.to_str().unwrap())];
    on_virtual_machine("a_lost_gpu_ends_the_samples_with_a_line", &variables, || {
        let lost = std::env::var_os("ANNULUS_VGPU_LOST").unwrap();
        let sampler = Sampler::start(&path, PERIOD, Timeline::disabled()).unwrap();
        wait_for_rows(&path, 1, 1);
        std::fs::write(&lost, "").unwrap();
        // A sample is over in far less; its thread must find the loss by itself.
        std::thread::sleep(Duration::from_millis(500));
        let lines = sampler.stop();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].starts_with("GPU 0 is not sampled to the end: device fell off the bus"), "{lines:?}");
    });
}

#[test]
fn a_gpu_that_does_not_answer_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let (path, hang) = (folder.path().join("gpus.csv"), folder.path().join("hang"));
    let variables = [("ANNULUS_VGPU_NVML_HANG", hang.to_str().unwrap())];
    on_virtual_machine("a_gpu_that_does_not_answer_holds_nobody_up", &variables, || {
        let hang = std::env::var_os("ANNULUS_VGPU_NVML_HANG").unwrap();
        let sampler = Sampler::start(&path, PERIOD, Timeline::disabled()).unwrap();
        wait_for_rows(&path, 1, 1);
        std::fs::write(&hang, "").unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let begin = Instant::now();
        assert_eq!(sampler.stop(), ["GPU 0 is not sampled to the end: it does not answer"]);
        // Stopping waits 500 ms, and so does the drop after it.
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    });
}

#[test]
fn stopping_does_not_wait_for_the_period() {
    on_virtual_machine("stopping_does_not_wait_for_the_period", &[], || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpus.csv");
        let sampler = Sampler::start(&path, Duration::from_secs(3600), Timeline::disabled()).unwrap();
        wait_for_rows(&path, 1, 1);
        let begin = Instant::now();
        drop(sampler);
        assert!(begin.elapsed() < Duration::from_secs(5));
        // A run that goes on appends, without another header.
        let sampler = Sampler::start(&path, PERIOD, Timeline::disabled()).unwrap();
        wait_for_rows(&path, 1, 2);
        assert!(sampler.stop().is_empty());
        let headers = std::fs::read_to_string(&path).unwrap().matches("monotonic_ns").count();
        assert_eq!(headers, 1);
    });
}

#[test]
fn a_file_that_cannot_be_written_is_an_error() {
    on_virtual_machine("a_file_that_cannot_be_written_is_an_error", &[], || {
        for (path, reason) in [("/nonexistent/gpus.csv", "No such file"), ("/dev/full", "No space")] {
            let error = Sampler::start(Path::new(path), PERIOD, Timeline::disabled()).unwrap_err().to_string();
            assert!(error.contains(path) && error.contains(reason), "{error}");
        }
    });
}

#[test]
fn a_machine_without_the_library_says_so() {
    if Path::new("/proc/driver/nvidia/version").exists() {
        return eprintln!("skipped: this machine has an NVIDIA driver");
    }
    with_library("a_machine_without_the_library_says_so", None, &[], || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpus.csv");
        let error = Sampler::start(&path, PERIOD, Timeline::disabled()).unwrap_err();
        assert!(matches!(error, Error::Management { .. }), "{error}");
        assert!(!path.exists());
    });
}

/// What a sample costs beyond what the library takes: PCIe traffic is not asked for here, and the rest is made up, so this is
/// a lower bound.
#[test]
#[ignore = "a measurement, not a check"]
fn cost_of_a_sample() {
    let variables = [("ANNULUS_VGPU_NVML_ANSWERS", "nvmlDeviceGetPcieThroughput=3")];
    on_virtual_machine("cost_of_a_sample", &variables, || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpus.csv");
        let sampler = Sampler::start(&path, Duration::ZERO, Timeline::disabled()).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        sampler.stop();
        let (_, rows) = table(&path);
        let [first, last] = [&rows[0], &rows[rows.len() - 1]].map(|row| row[0].parse::<f64>().unwrap());
        println!("{:.2} us a sample, of {}", (last - first) / 1e3 / (rows.len() - 1) as f64, rows.len());
    });
}

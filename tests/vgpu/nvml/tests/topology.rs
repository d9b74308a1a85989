//! What lies between GPUs, as the management library tells it and where it does not.

mod support;

use std::path::Path as File;

use annulus::Error;
use annulus::telemetry::topology::{Path, Topology};
use support::{on_virtual_machine, with_library};

fn cells(topology: &Topology) -> Vec<String> {
    topology.rows().iter().map(|row| row.iter().map(Path::to_string).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn gpus_have_the_uuids_of_the_driver() {
    on_virtual_machine("gpus_have_the_uuids_of_the_driver", &[("ANNULUS_VGPU_DEVICES", "2")], || {
        let topology = Topology::look().unwrap();
        let uuid = annulus::device::cuda::Uuid(*b"annulus-vgpu\0\0\0\x01");
        assert_eq!(topology.gpus()[1].uuid, uuid.to_string());
        assert_eq!(topology.gpus()[1].name, "annulus virtual GPU");
        assert_eq!(topology.gpus()[1].bus_id, "00000000:01:00.0");
        let first = topology.gpus()[0].uuid.clone();
        assert_eq!(topology.path(&first, &uuid.to_string()), Path::HostBridge);
        assert_eq!(topology.path(&first, &first), Path::Same);
        assert_eq!(topology.path(&first, "GPU-of-another-machine"), Path::Unknown);
    });
}

#[test]
fn every_kind_of_path_is_named_as_nvidia_smi_names_it() {
    let links = "X NV2 SYS NODE PHB; NV2 X PXB PIX PSB; SYS PXB X NV12 SYS; NODE PIX NV12 X SYS; PHB PSB SYS SYS X";
    let variables = [("ANNULUS_VGPU_DEVICES", "5"), ("ANNULUS_VGPU_LINKS", links)];
    on_virtual_machine("every_kind_of_path_is_named_as_nvidia_smi_names_it", &variables, || {
        let topology = Topology::look().unwrap();
        assert_eq!(cells(&topology).join("; "), links);
        let rows = topology.rows();
        assert_eq!(rows[2][3], Path::NvLink { links: 12, version: Some("4.0") });
        let farther = [rows[2][3], rows[0][1], rows[1][4], rows[1][3], rows[1][2], rows[0][4], rows[0][3], rows[0][2]];
        assert!(farther.is_sorted_by(|near, far| near.closeness() > far.closeness()));
        assert!(Path::Same.closeness() > rows[2][3].closeness() && Path::Unknown.closeness() < rows[0][2].closeness());
        let text = topology.to_string();
        assert_eq!(text.lines().count(), 6);
        let second: Vec<&str> = text.lines().nth(2).unwrap().split_whitespace().collect();
        assert_eq!(second, ["GPU1", "NV2", "X", "PXB", "PIX", "PSB"]);
    });
}

#[test]
fn links_to_switches_join_all_that_have_them() {
    let links = "X NS18 NS18; NS18 X NS18; NS18 NS18 X";
    let variables = [("ANNULUS_VGPU_DEVICES", "3"), ("ANNULUS_VGPU_LINKS", links)];
    on_virtual_machine("links_to_switches_join_all_that_have_them", &variables, || {
        let nv18 = Path::NvLink { links: 18, version: Some("4.0") };
        let topology = Topology::look().unwrap();
        assert_eq!((topology.rows()[0][1], topology.rows()[1][2], topology.rows()[2][0]), (nv18, nv18, nv18));
    });
}

#[test]
fn what_an_old_library_does_not_tell_is_unknown() {
    let variables = [
        ("ANNULUS_VGPU_DEVICES", "2"),
        ("ANNULUS_VGPU_LINKS", "X NS2; NS2 X"),
        (
            "ANNULUS_VGPU_NVML_ANSWERS",
            "nvmlDeviceGetNvLinkRemoteDeviceType=13,nvmlDeviceGetTopologyCommonAncestor=13,nvmlDeviceGetName=999",
        ),
    ];
    on_virtual_machine("what_an_old_library_does_not_tell_is_unknown", &variables, || {
        let topology = Topology::look().unwrap();
        assert_eq!(topology.rows()[0][1], Path::Unknown);
        assert!(!topology.gpus()[0].name.is_empty());
    });
}

#[test]
fn a_lost_gpu_is_an_error() {
    let variables = [("ANNULUS_VGPU_LOST", "/proc/self/exe")];
    on_virtual_machine("a_lost_gpu_is_an_error", &variables, || {
        let error = Topology::look().unwrap_err();
        assert!(matches!(&error, Error::Management { operation: "asking a GPU for its UUID", .. }), "{error}");
        assert!(error.to_string().contains("fell off the bus"), "{error}");
    });
}

#[test]
fn a_driver_that_is_not_loaded_is_an_error() {
    let variables = [("ANNULUS_VGPU_NVML_ANSWERS", "nvmlInit_v2=9")];
    on_virtual_machine("a_driver_that_is_not_loaded_is_an_error", &variables, || {
        let error = Topology::look().unwrap_err().to_string();
        assert!(error.contains("driver is not loaded"), "{error}");
    });
}

#[test]
fn an_absent_library_is_an_error_that_names_it() {
    if File::new("/proc/driver/nvidia/version").exists() {
        return eprintln!("skipped: this machine has an NVIDIA driver");
    }
    with_library("an_absent_library_is_an_error_that_names_it", None, &[], || {
        let error = Topology::look().unwrap_err().to_string();
        assert!(error.contains("libnvidia-ml.so.1: cannot open shared object file"), "{error}");
    });
}

#[test]
fn a_library_without_the_functions_is_an_error() {
    // Any library will do that is not the right one.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let other = maps.split_whitespace().find(|word| word.starts_with('/') && word.contains("/libc.so")).unwrap();
    with_library("a_library_without_the_functions_is_an_error", Some(File::new(other)), &[], || {
        let error = Topology::look().unwrap_err().to_string();
        assert!(error.contains("nvmlInit_v2"), "{error}");
    });
}

//! What the environment says about the machine to pretend.

use std::path::PathBuf;
use std::sync::LazyLock;

/// What lies between two devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Between {
    /// They are the same.
    Nothing,
    /// So many NVLinks from one to the other.
    Links(u32),
    /// So many NVLinks of each to switches that all devices share.
    Switch(u32),
    /// PCIe, up to this level: a value of `nvmlGpuTopologyLevel_t`.
    Level(u32),
}

pub(crate) struct Settings {
    /// `between[i][j]`
    pub between: Vec<Vec<Between>>,
    pub answers: Vec<(String, u32)>,
    pub lost: Option<PathBuf>,
    pub hang: Option<PathBuf>,
}

pub(crate) static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let devices = std::env::var("ANNULUS_VGPU_DEVICES").map_or(1, |text| number("ANNULUS_VGPU_DEVICES", &text));
    let between = match std::env::var("ANNULUS_VGPU_LINKS") {
        Ok(text) => matrix(&text),
        Err(_) => {
            let cell = |i, j| if i == j { Between::Nothing } else { Between::Level(30) };
            (0..devices).map(|i| (0..devices).map(|j| cell(i, j)).collect()).collect()
        }
    };
    if between.len() != devices || between.iter().any(|row: &Vec<Between>| row.len() != devices) {
        refuse("ANNULUS_VGPU_LINKS", "a matrix of another size than ANNULUS_VGPU_DEVICES");
    }
    Settings {
        between,
        answers: std::env::var("ANNULUS_VGPU_NVML_ANSWERS").map_or_else(|_| Vec::new(), |text| answers(&text)),
        lost: std::env::var_os("ANNULUS_VGPU_LOST").map(PathBuf::from),
        hang: std::env::var_os("ANNULUS_VGPU_NVML_HANG").map(PathBuf::from),
    }
});

fn matrix(text: &str) -> Vec<Vec<Between>> {
    text.split(';').map(|row| row.split_whitespace().map(cell).collect()).collect()
}

fn cell(text: &str) -> Between {
    let links = |text| number("ANNULUS_VGPU_LINKS", text);
    match text {
        "X" => Between::Nothing,
        "PSB" => Between::Level(0),
        "PIX" => Between::Level(10),
        "PXB" => Between::Level(20),
        "PHB" => Between::Level(30),
        "NODE" => Between::Level(40),
        "SYS" => Between::Level(50),
        _ => match text.split_at_checked(2) {
            Some(("NV", count)) => Between::Links(links(count)),
            Some(("NS", count)) => Between::Switch(links(count)),
            _ => refuse("ANNULUS_VGPU_LINKS", text),
        },
    }
}

fn answers(text: &str) -> Vec<(String, u32)> {
    let one = |text: &str| match text.split_once('=') {
        Some((function, code)) => (function.to_owned(), number("ANNULUS_VGPU_NVML_ANSWERS", code)),
        None => refuse("ANNULUS_VGPU_NVML_ANSWERS", text),
    };
    text.split(',').map(one).collect()
}

fn number<T: std::str::FromStr>(variable: &str, text: &str) -> T {
    text.parse().unwrap_or_else(|_| refuse(variable, text))
}

/// A test that misspells its machine must not pass on another one.
fn refuse(variable: &str, value: &str) -> ! {
    eprintln!("virtual NVML: {variable}={value} is not understood");
    std::process::abort()
}

//! The file layer of checkpoints: P16 to P19 of the promises, and other readers of the format.

mod damage;
mod full_disk;
mod hostile;
mod kills;
#[path = "../ranks/mod.rs"]
mod ranks;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use annulus::strategy::checkpoint::{self, Checkpoint, TensorView, Values};
use annulus::{DType, Error};

/// Where a child process of a test works.
const CHILD_FOLDER: &str = "ANNULUS_TEST_CHILD_FOLDER";

fn view<'a>(name: &str, dtype: DType, shape: &[usize], bytes: &'a [u8]) -> TensorView<'a> {
    TensorView { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
}

/// A small file with every element type, an empty tensor and a scalar.
fn write_small(path: &Path) {
    let bytes: Vec<u8> = (0..96).collect();
    let tensors = [
        view("model.weight", DType::F32, &[2, 3], &bytes[..24]),
        view("model.bias", DType::F32, &[3], &bytes[4..16]),
        view("model.half", DType::F16, &[5], &bytes[..10]),
        view("model.brain", DType::BF16, &[2, 2], &bytes[..8]),
        view("double", DType::F64, &[], &bytes[8..16]),
        view("long", DType::I64, &[1, 1, 1], &bytes[..8]),
        view("int", DType::I32, &[3], &bytes[..12]),
        view("byte", DType::U8, &[7], &bytes[..7]),
        view("größe", DType::F32, &[0, 4], &[]),
    ];
    let mut values = Values::new();
    values.insert("epoch", &3).unwrap();
    values.insert("note", "a \"quoted\" line\nand another").unwrap();
    checkpoint::write(path, &tensors, &values).unwrap();
}

fn assert_small(checkpoint: &Checkpoint) {
    assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), Some(3));
    assert_eq!(checkpoint.value::<String>("note").unwrap().as_deref(), Some("a \"quoted\" line\nand another"));
    assert_eq!(checkpoint.value::<u32>("absent").unwrap(), None);
    assert!(checkpoint.value::<u32>("note").is_err());
    assert_eq!(checkpoint.tensors("").count(), 9);
    let weight = checkpoint.tensor("model.weight").unwrap().unwrap();
    assert_eq!(weight.shape(), [2, 3]);
    let expected: Vec<f32> = (0..6_u8).map(|i| f32::from_le_bytes([4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3])).collect();
    assert_eq!(weight.as_slice::<f32>().unwrap(), expected);
    assert_eq!(checkpoint.tensor("größe").unwrap().unwrap().shape(), [0, 4]);
    assert!(checkpoint.tensor("model").unwrap().is_none());
    let names: Vec<_> = checkpoint.tensors("model.").map(|(name, ..)| name).collect();
    assert_eq!(names, ["model.bias", "model.brain", "model.half", "model.weight"]);
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    for _ in 0..2 {
        write_small(&path);
        assert_small(&Checkpoint::open(&path).unwrap());
        assert_eq!(names_in(folder.path()), ["small.safetensors"]);
    }
    checkpoint::point_latest(&path).unwrap();
    checkpoint::point_latest(&path).unwrap();
    assert_small(&Checkpoint::open(&folder.path().join("latest")).unwrap());
    assert_eq!(names_in(folder.path()), ["latest", "small.safetensors"]);
    checkpoint::write(&path, &[], &Values::new()).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().tensors("").count(), 0);
}

#[test]
fn the_safetensors_crate_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_small(&path);
    let bytes = fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ours = Checkpoint::open(&path).unwrap();
    assert_eq!(theirs.len(), ours.tensors("").count());
    for (name, dtype, shape) in ours.tensors("") {
        let tensor = theirs.tensor(name).unwrap();
        assert_eq!(tensor.dtype().to_string().to_lowercase(), dtype.name());
        assert_eq!(tensor.shape(), shape);
        // Aligned for its type, as readers that map the file need it.
        assert_eq!((tensor.data().as_ptr() as usize - bytes.as_ptr() as usize) % dtype.size_bytes(), 0, "{name}");
    }
}

#[test]
fn python_safetensors_reads_it() {
    let has_package = Command::new("python3").args(["-c", "import safetensors.numpy"]).stderr(Stdio::null()).status();
    if !has_package.is_ok_and(|status| status.success()) {
        return ranks::skip(
            "python3 with the packages safetensors and numpy is needed (pip install safetensors numpy)",
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_small(&path);
    let script = r#"
import json, sys
import numpy as np
import safetensors
from safetensors import safe_open
raw = bytes(range(96))
with safe_open(sys.argv[1], "np") as f:
    assert sorted(f.keys()) == sorted(["model.weight", "model.bias", "model.half", "model.brain", "double", "long", "int", "byte", "größe"]), f.keys()
    assert (f.get_tensor("model.weight") == np.frombuffer(raw[:24], "<f4").reshape(2, 3)).all()
    assert f.get_tensor("model.half").dtype == np.float16 and f.get_tensor("model.half").shape == (5,)
    assert f.get_tensor("double") == np.frombuffer(raw[8:16], "<f8")[0] and f.get_tensor("double").shape == ()
    assert f.get_tensor("long").shape == (1, 1, 1)
    assert f.get_tensor("größe").shape == (0, 4)
    assert json.loads(f.metadata()["value.epoch"]) == 3
    assert json.loads(f.metadata()["value.note"]) == 'a "quoted" line\nand another'
brain = dict(safetensors.deserialize(open(sys.argv[1], "rb").read()))["model.brain"]
assert brain["dtype"] == "BF16" and brain["shape"] == [2, 2] and bytes(brain["data"]) == raw[:8]
print("python read it")
"#;
    let output = Command::new("python3").args(["-c", script]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_the_format_cannot_hold_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let mut quoted = Values::new();
    quoted.insert("a\"b", &1).unwrap();
    let none = Values::new();
    let refused: [(&[TensorView<'_>], &Values); 7] = [
        (&[view("a", DType::F32, &[2], &[0; 4])], &none),
        (&[view("a", DType::F32, &[usize::MAX, 2], &[0; 4])], &none),
        (&[view("a", DType::U8, &[1; 9], &[0])], &none),
        (&[view("", DType::U8, &[1], &[0])], &none),
        (&[view("a\nb", DType::U8, &[1], &[0])], &none),
        (&[view("twin", DType::U8, &[1], &[0]), view("twin", DType::F32, &[1], &[0; 4])], &none),
        (&[], &quoted),
    ];
    for (tensors, values) in refused {
        let error = checkpoint::write(&path, tensors, values).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    }
    assert!(matches!(checkpoint::write(folder.path(), &[], &none), Err(Error::Checkpoint { .. })));
    assert!(matches!(checkpoint::write(Path::new("/"), &[], &none), Err(Error::InvalidArgument { .. })));
    assert!(matches!(checkpoint::write(&folder.path().join("no/such/file"), &[], &none), Err(Error::Io { .. })));
    assert!(names_in(folder.path()).is_empty());
}

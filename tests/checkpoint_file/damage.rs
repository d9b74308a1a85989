//! P17: a damaged file is refused, by its name and that of the tensor.

use std::fs;
use std::os::unix::fs::FileExt;

use annulus::strategy::Rng;
use annulus::strategy::checkpoint::{self, Checkpoint, Values};
use annulus::{DType, Error};

use crate::{assert_small, view, write_small};

#[test]
fn p17_any_flipped_bit_and_any_truncation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_small(&path);
    let whole = fs::read(&path).unwrap();
    let data_start = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let damaged = folder.path().join("damaged");
    fs::write(&damaged, &whole).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&damaged).unwrap();
    for bit in 0..8 * whole.len() {
        file.write_all_at(&[whole[bit / 8] ^ (1 << (bit % 8))], bit as u64 / 8).unwrap();
        let error = Checkpoint::open(&damaged).expect_err(&format!("bit {bit} was flipped"));
        let Error::Checkpoint { path, item, .. } = &error else { panic!("{error}") };
        assert_eq!(path, &damaged);
        // A flip in the data names a tensor.
        assert!(bit / 8 < data_start || theirs(&whole).contains(item), "bit {bit}: {error}");
        file.write_all_at(&whole[bit / 8..=bit / 8], bit as u64 / 8).unwrap();
    }
    assert_small(&Checkpoint::open(&damaged).unwrap());
    for len in (0..whole.len()).rev() {
        file.set_len(len as u64).unwrap();
        let error = Checkpoint::open(&damaged).expect_err("truncated");
        let Error::Checkpoint { item, .. } = &error else { panic!("{error}") };
        assert!(len < data_start || theirs(&whole).contains(item), "length {len}: {error}");
    }
    for extra in 1..20 {
        fs::write(&damaged, [&whole[..], &vec![0; extra]].concat()).unwrap();
        assert!(Checkpoint::open(&damaged).is_err());
    }
}

fn theirs(file: &[u8]) -> Vec<String> {
    safetensors::SafeTensors::deserialize(file).unwrap().names().into_iter().map(str::to_owned).collect()
}

#[test]
fn p17_a_thousand_flips_of_a_large_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large");
    let mut rng = Rng::new(17);
    let data: Vec<u8> = (0..200_000).map(|_| rng.next_u64() as u8).collect();
    let tensors =
        [view("a", DType::F32, &[10_000], &data[..40_000]), view("b", DType::F16, &[80_000], &data[40_000..])];
    checkpoint::write(&path, &tensors, &Values::new()).unwrap();
    let whole = fs::read(&path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for _ in 0..1_000 {
        let bit = rng.below(8 * whole.len() as u64);
        let at = (bit / 8) as usize;
        file.write_all_at(&[whole[at] ^ (1 << (bit % 8))], bit / 8).unwrap();
        assert!(matches!(Checkpoint::open(&path), Err(Error::Checkpoint { .. })), "bit {bit}");
        file.write_all_at(&whole[at..=at], bit / 8).unwrap();
    }
    assert!(Checkpoint::open(&path).is_ok());
}

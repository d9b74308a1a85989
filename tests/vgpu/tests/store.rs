//! `kernels/store.cu`: as many words as are said, in their order, where they belong, and nothing else.

mod tensors;

use annulus::abi::{STORE_WORDS, StoreArguments};
use annulus::kernels;
use annulus_vgpu::{Fault, Module, Options, Report};
use tensors::Device;

/// Threads that the host launches it with.
const THREADS: u32 = 32;

/// All bits occur, in every word others.
const WORDS: [u64; STORE_WORDS] = [0x0123_4567_89ab_cdef, u64::MAX, 0, 0x8000_0000_0000_0001, 0xfedc_ba98_7654_3210];

/// Stores the first words into memory that ends with the last of `room_words`; what is there then, and what it took.
fn store(len_words: usize, room_words: usize, seed: u64) -> Result<(Vec<u64>, Report), Fault> {
    let module = Module::parse(kernels::STORE).unwrap();
    let mut device = Device::new();
    let room = device.place(&vec![0x5c5c_5c5c_5c5c_5c5cu64; room_words + 1]);
    // The word before the target must stay too.
    let arguments = StoreArguments { target: room + 8, words: WORDS, len_words: len_words as u32, padding: u32::MAX };
    let report = device.run(&module, "store_words", 1, THREADS, &arguments, &Options { seed, ..Options::default() })?;
    Ok(((0..=room_words as u64).map(|i| device.read(room + 8 * i)).collect(), report))
}

#[test]
fn as_many_words_are_stored_as_are_said_and_no_byte_beside_them() {
    for len_words in 0..=STORE_WORDS {
        for room_words in [len_words, STORE_WORDS + 1] {
            for seed in 1..4 {
                let (found, report) = store(len_words, room_words, seed).unwrap_or_else(|fault| panic!("{fault}"));
                let mut expected = vec![0x5c5c_5c5c_5c5c_5c5c; room_words + 1];
                expected[1..=len_words].copy_from_slice(&WORDS[..len_words]);
                assert_eq!(found, expected, "{len_words} words, room for {room_words}, seed {seed}");
                // Once, by one thread; the words come with the launch, not from memory.
                assert_eq!((report.loaded_bytes, report.stored_bytes), (0, 8 * len_words as u64));
            }
        }
    }
}

#[test]
fn a_target_that_is_too_short_is_noticed() {
    let fault = store(3, 2, 1).unwrap_err();
    assert!(matches!(fault, Fault::OutOfBounds { .. }), "{fault}");
}

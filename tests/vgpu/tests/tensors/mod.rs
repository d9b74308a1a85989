//! Tensors in the memory of a virtual GPU: of any float dtype, at any address, with no byte to spare on either side.

#![allow(dead_code)] // every test file takes what it needs

use annulus::abi::{ChunkRange, ChunkRef, chunks};
use annulus::ops::{Slice, SliceMut};
use annulus::{DType, reference};
use annulus_vgpu::{Arguments, Fault, Launch, Memory, Module, Options, Report, run};
use bytemuck::{NoUninit, Pod};
use half::{bf16, f16};

pub const FLOATS: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// Elements on the host.
#[derive(Debug, Clone, PartialEq)]
pub enum Tensor {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F64(Vec<f64>),
}

macro_rules! on_tensor {
    ($tensor:expr, $elements:ident => $body:expr) => {
        match $tensor {
            Tensor::F32($elements) => $body,
            Tensor::F16($elements) => $body,
            Tensor::BF16($elements) => $body,
            Tensor::F64($elements) => $body,
        }
    };
}

impl Tensor {
    /// `value(i)` rounded to `dtype`.
    pub fn from_fn(dtype: DType, len_elems: usize, mut value: impl FnMut(usize) -> f64) -> Tensor {
        let values = (0..len_elems).map(&mut value);
        match dtype {
            DType::F16 => Tensor::F16(values.map(|x| reference::f64_to_f16(x, false)).collect()),
            DType::BF16 => Tensor::BF16(values.map(|x| reference::f64_to_bf16(x, false)).collect()),
            DType::F64 => Tensor::F64(values.collect()),
            _ => Tensor::F32(values.map(|x| x as f32).collect()),
        }
    }

    pub fn zeros(dtype: DType, len_elems: usize) -> Tensor {
        Tensor::from_fn(dtype, len_elems, |_| 0.0)
    }

    pub fn dtype(&self) -> DType {
        self.slice().dtype()
    }

    pub fn len_elems(&self) -> usize {
        on_tensor!(self, elements => elements.len())
    }

    pub fn slice(&self) -> Slice<'_> {
        on_tensor!(self, elements => elements.as_slice().into())
    }

    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        on_tensor!(self, elements => elements.as_mut_slice().into())
    }

    pub fn bytes(&self) -> &[u8] {
        on_tensor!(self, elements => bytemuck::cast_slice(elements))
    }

    pub fn from_bytes(dtype: DType, bytes: &[u8]) -> Tensor {
        fn elements<T: Pod>(bytes: &[u8]) -> Vec<T> {
            bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
        }
        match dtype {
            DType::F16 => Tensor::F16(elements(bytes)),
            DType::BF16 => Tensor::BF16(elements(bytes)),
            DType::F64 => Tensor::F64(elements(bytes)),
            _ => Tensor::F32(elements(bytes)),
        }
    }

    pub fn values(&self) -> Vec<f64> {
        use annulus::dtype::Element;
        on_tensor!(self, elements => elements.iter().map(|x| x.to_f64()).collect())
    }

    /// The bits of the elements, every NaN alike: a GPU's arithmetic does not keep payloads.
    pub fn bits(&self) -> Vec<u64> {
        let elements = self.bytes().chunks_exact(self.dtype().size_bytes()).map(|bytes| {
            let mut bits = [0; 8];
            bits[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(bits)
        });
        elements.zip(self.values()).map(|(bits, value)| if value.is_nan() { u64::MAX } else { bits }).collect()
    }
}

/// A stream of random numbers (SplitMix64, Steele, Lea, Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * 2f64.powi(-53)
    }

    /// Of either sign, over `octaves` binades below `largest`.
    pub fn spread(&mut self, largest: f64, octaves: f64) -> f64 {
        let magnitude = largest * (-octaves * self.unit()).exp2();
        if self.bits() & 1 == 0 { magnitude } else { -magnitude }
    }
}

/// Elements of which every kind of bits occurs: ordinary, subnormal, zeros of both signs, infinities, NaN of both signs with and
/// without payload, ties and values next to them.
pub fn hard(dtype: DType, len_elems: usize, seed: u64) -> Tensor {
    let mut random = Random(seed);
    let mut bytes = Vec::new();
    for _ in 0..len_elems {
        let bits = random.bits();
        let shaped = match bits % 8 {
            0 => f64::from_bits(random.bits()) as f32,
            1 => random.spread(1e5, 60.0) as f32,
            2 => random.spread(1e-37, 20.0) as f32,
            // Ties of f16 and of bf16, and their neighbours.
            3 => f32::from_bits((bits >> 32) as u32 & 0xffff_e000 | 0x1000).next_up(),
            4 => f32::from_bits((bits >> 32) as u32 & 0xffff_0000 | 0x8000),
            5 => f32::from_bits((bits >> 32) as u32 & 0xffff_e000 | 0x1000),
            6 => [
                0.0,
                -0.0,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                -f32::NAN,
                f32::from_bits(0x7f80_0001),
                f32::MAX,
            ][bits as usize >> 32 & 7],
            _ => f32::from_bits((bits >> 32) as u32),
        };
        match dtype {
            DType::F32 => bytes.extend(shaped.to_le_bytes()),
            DType::F64 if bits & 8 == 0 => bytes.extend(random.bits().to_le_bytes()),
            DType::F64 => bytes.extend((f64::from(shaped) * (1.0 + f64::EPSILON)).to_le_bytes()),
            _ => bytes.extend(((bits >> 48) as u16).to_le_bytes()),
        }
    }
    Tensor::from_bytes(dtype, &bytes)
}

/// How far behind a multiple of 16 a source and a target begin.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub src_offset_bytes: u64,
    pub dst_offset_bytes: u64,
}

pub const ALIGNED: Place = Place { src_offset_bytes: 0, dst_offset_bytes: 0 };

/// Global memory in which every tensor is an allocation of its own that begins and ends with it.
pub struct Device {
    pub memory: Memory,
    end: u64,
}

impl Device {
    pub fn new() -> Device {
        Device { memory: Memory::new(), end: 0x1000_0000 }
    }

    /// A tensor `offset_bytes` behind a multiple of 16.
    pub fn tensor(&mut self, tensor: &Tensor, offset_bytes: u64) -> u64 {
        let address = self.end + offset_bytes;
        if !tensor.bytes().is_empty() {
            self.memory.alloc_at(address, tensor.bytes());
        }
        self.end = (address + tensor.bytes().len() as u64).next_multiple_of(256) + 256;
        address
    }

    pub fn read_tensor(&self, address: u64, dtype: DType, len_elems: usize) -> Tensor {
        let len_bytes = len_elems * dtype.size_bytes();
        let bytes = if len_bytes == 0 { &[] } else { self.memory.read(address, len_bytes).unwrap() };
        Tensor::from_bytes(dtype, bytes)
    }

    /// A table or a struct.
    pub fn place<T: NoUninit>(&mut self, items: &[T]) -> u64 {
        self.memory.alloc(bytemuck::cast_slice(items))
    }

    pub fn read<T: Pod>(&self, address: u64) -> T {
        bytemuck::pod_read_unaligned(self.memory.read(address, size_of::<T>()).unwrap())
    }

    /// All chunks of tensors of these lengths.
    pub fn all_chunks(&mut self, lens_elems: &[usize]) -> ChunkRange {
        let lens: Vec<u64> = lens_elems.iter().map(|len| *len as u64).collect();
        let chunks: Vec<ChunkRef> = chunks(&lens).unwrap();
        ChunkRange { chunks: self.place(&chunks), first_chunk: 0, len_chunks: chunks.len() as u64 }
    }

    /// Runs a kernel of one struct argument.
    pub fn run<A: NoUninit>(
        &mut self,
        module: &Module,
        kernel: &str,
        blocks: u32,
        threads: u32,
        arguments: &A,
        options: &Options,
    ) -> Result<Report, Fault> {
        let bytes = bytemuck::bytes_of(arguments);
        let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        let arguments = words.fold(Arguments::new(), Arguments::u64);
        let launch = Launch::new(module.kernel(kernel)?, blocks, threads, arguments);
        run(&[launch], &mut self.memory, options)
    }
}

/// Without the race detector: five times as fast.
pub fn fast() -> Options {
    Options { detect_races: false, budget_instructions: 2_000_000_000, ..Options::default() }
}

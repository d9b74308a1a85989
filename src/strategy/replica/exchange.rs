//! Collectives on values, in the order in which they are called.

use super::Replica;
use crate::collective::Communicator;
use crate::device::Buffer;
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::strategy::exchange::Group;
use crate::strategy::place::Place;
use crate::strategy::storage::Storage;
use crate::strategy::tensor::{self, Tensor, len_elems, with_element};

/// Most dimensions of a tensor that is gathered or broadcast.
const MAX_DIMS: usize = 8;

impl Replica {
    /// The communicator of `group`, or that of all ranks.
    fn communicator<'c>(&'c mut self, group: Option<&'c mut Group>) -> &'c mut Communicator {
        match group {
            Some(group) => &mut group.communicator,
            None => &mut self.communicator,
        }
    }

    pub fn split_group(&mut self, color: Option<u32>, key: u32) -> Result<Option<Group>> {
        self.gate.check()?;
        Ok(self.communicator.split(color, key)?.map(|communicator| Group { communicator }))
    }

    pub fn all_reduce_elements(
        &mut self,
        dtype: DType,
        elements: &mut [u8],
        group: Option<&mut Group>,
        op: ReduceOp,
    ) -> Result<()> {
        self.gate.check()?;
        op.check(dtype)?;
        let communicator = self.communicator(group);
        with_element!(dtype, T => communicator.all_reduce_slice::<T>(bytemuck::cast_slice_mut(elements), op))
    }

    pub fn all_reduce_tensor(&mut self, tensor: &mut Tensor, group: Option<&mut Group>, op: ReduceOp) -> Result<()> {
        self.check()?;
        if let (Some(memory), Some(device), None) = (tensor.device_memory(), &mut self.device, &group) {
            return device.all_reduce(memory, op);
        }
        if !tensor.buffer().is_some_and(Buffer::is_registered) {
            let dtype = tensor.dtype();
            let storage = tensor.storage_mut();
            return storage.change(|buffer| self.all_reduce_elements(dtype, tensor::bytes_mut(buffer), group, op));
        }
        op.check(tensor.dtype())?;
        let buffer = tensor.storage_mut().host_mut("all_reduce")?;
        self.communicator(group).all_reduce_buffer(buffer, op)
    }

    pub fn all_gather(&mut self, tensor: &Tensor, mut group: Option<&mut Group>) -> Result<Tensor> {
        self.gate.check()?;
        self.check_shapes("the shape of a tensor to gather", tensor, group.as_deref_mut())?;
        let mut shape = vec![group.as_ref().map_or(self.world_size(), |group| group.world_size()) as usize];
        shape.extend(tensor.shape());
        if let (Some(memory), Some(device), None) = (tensor.device_memory(), &mut self.device, &group) {
            return Tensor::over(&shape, Storage::Device(device.all_gather(memory, len_elems(&shape)?)?));
        }
        let communicator = self.communicator(group);
        let mut gathered = Buffer::zeroed(tensor.dtype(), len_elems(&shape)?)?;
        let mine = tensor.on_host()?;
        with_element!(tensor.dtype(), T => {
            communicator.all_gather_slice::<T>(mine.as_slice()?, gathered.as_mut_slice()?)
        })?;
        drop(mine);
        self.like(tensor, &shape, gathered)
    }

    /// A tensor over `buffer`, where `other` is.
    fn like(&self, other: &Tensor, shape: &[usize], buffer: Buffer) -> Result<Tensor> {
        match (other.device_memory(), &self.place) {
            (Some(_), Place::Device(place)) => {
                let memory = place.alloc(buffer.dtype(), buffer.len_elems())?;
                memory.copy_from_host(&buffer)?;
                Tensor::over(shape, Storage::Device(memory))
            }
            _ => Tensor::from_buffer(shape, buffer),
        }
    }

    pub fn all_gather_backward(&mut self, gradient: &Tensor, group: Option<&mut Group>) -> Result<Tensor> {
        self.gate.check()?;
        let communicator = self.communicator(group);
        let (world_size, dtype) = (communicator.world_size() as usize, gradient.dtype());
        if gradient.shape().first() != Some(&world_size) {
            let mut expected = vec![world_size];
            expected.extend(gradient.shape().iter().skip(1));
            return Err(Error::ShapeMismatch {
                what: "gradient of a gathered tensor".to_owned(),
                expected,
                actual: gradient.shape().to_vec(),
            });
        }
        ReduceOp::Sum.check(dtype)?;
        let shape = &gradient.shape()[1..];
        let mut shard = Buffer::zeroed(dtype, len_elems(shape)?)?;
        let whole = gradient.on_host()?;
        with_element!(dtype, T => {
            communicator.reduce_scatter_slice::<T>(whole.as_slice()?, shard.as_mut_slice()?, ReduceOp::Sum)
        })?;
        drop(whole);
        self.like(gradient, shape, shard)
    }

    /// Fails on every rank unless all of the group have a tensor of the same type and shape.
    fn check_shapes(&mut self, what: &str, tensor: &Tensor, group: Option<&mut Group>) -> Result<()> {
        let shape = tensor.shape();
        if shape.len() > MAX_DIMS {
            return Err(Error::InvalidArgument {
                argument: "tensor",
                value: format!("shape {shape:?}"),
                accepted: "at most 8 dimensions",
            });
        }
        let communicator = self.communicator(group);
        let mut mine = [-1_i64; MAX_DIMS + 1];
        mine[0] = tensor.dtype() as i64;
        // Dimensions of a tensor in memory fit 63 bits unless another one is zero; then they are only compared.
        mine[1..].iter_mut().zip(shape).for_each(|(slot, dim)| *slot = *dim as i64);
        let mut all = vec![0_i64; mine.len() * communicator.world_size() as usize];
        communicator.all_gather_slice(&mine, &mut all)?;
        let describe = |entry: &[i64]| {
            let dtype = u8::try_from(entry[0]).ok().and_then(DType::from_code);
            let dims: Vec<i64> = entry[1..].iter().copied().take_while(|dim| *dim >= 0).collect();
            format!("{} {dims:?}", dtype.map_or("?", DType::name))
        };
        let mut entries = all.chunks_exact(mine.len());
        let first = entries.next().unwrap_or(&mine);
        match entries.position(|entry| entry != first) {
            None => Ok(()),
            Some(at) => {
                let members = communicator.members();
                Err(Error::Disagreement {
                    what: what.to_owned(),
                    rank: members[0],
                    mine: describe(first),
                    peer: members[at + 1],
                    theirs: describe(&all[(at + 1) * mine.len()..][..mine.len()]),
                })
            }
        }
    }

    pub fn broadcast(&mut self, tensor: &mut Tensor, src: u32, mut group: Option<&mut Group>) -> Result<()> {
        self.gate.check()?;
        self.check_shapes("the shape of a tensor to broadcast", tensor, group.as_deref_mut())?;
        if let (Some(memory), Some(device), None) = (tensor.device_memory(), &mut self.device, &group) {
            return device.broadcast(memory, src);
        }
        let dtype = tensor.dtype();
        let communicator = self.communicator(group);
        tensor
            .storage_mut()
            .change(|buffer| with_element!(dtype, T => communicator.broadcast_slice::<T>(buffer.as_mut_slice()?, src)))
    }

    pub fn broadcast_bytes(&mut self, bytes: &[u8], src: u32) -> Result<Vec<u8>> {
        self.gate.check()?;
        self.world.broadcast_bytes(src, bytes, self.timeout())
    }

    pub fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.gate.check()?;
        self.world.all_gather_bytes(bytes, self.timeout())
    }

    pub fn barrier(&mut self, name: &str) -> Result<()> {
        self.gate.check()?;
        self.world.barrier(name, self.timeout())
    }

    pub fn reduce_boolean_decision(&mut self, decision: bool, all: bool) -> Result<bool> {
        self.gate.check()?;
        self.world.reduce_boolean(decision, all, self.timeout())
    }
}

//! The calls of a communicator: checked for what no rank may ask for, and numbered.

use super::descriptor::{Descriptor, Kind, Partials};
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::schedule::Algorithm;

pub(super) struct Calls {
    members: u32,
    /// As the communicator's options have it.
    how: (Option<Algorithm>, Partials),
    issued: u64,
}

impl Calls {
    pub(super) fn new(members: u32, how: (Option<Algorithm>, Partials)) -> Calls {
        Calls { members, how, issued: 0 }
    }

    /// The operation that is next, if there may be one after `fault`. It is issued once [`note_issued`](Calls::note_issued)
    /// was told.
    pub(super) fn next(
        &self,
        fault: Option<Error>,
        kind: Kind,
        dtype: DType,
        len_elems: usize,
        op: ReduceOp,
        root: u32,
    ) -> Result<Descriptor> {
        if let Some(cause) = fault {
            return Err(Error::Poisoned { cause: Box::new(cause) });
        }
        if root >= self.members {
            return Err(Error::InvalidArgument {
                argument: "root",
                value: root.to_string(),
                accepted: "must be a rank of the group",
            });
        }
        op.check(dtype)?;
        Ok(Descriptor::new(self.issued + 1, kind, dtype, len_elems, op, root, self.how))
    }

    /// Operations issued so far.
    pub(super) fn issued(&self) -> u64 {
        self.issued
    }

    pub(super) fn note_issued(&mut self, operations: u64) {
        self.issued += operations;
    }
}

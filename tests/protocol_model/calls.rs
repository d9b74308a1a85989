//! What ranks call at a meeting, which way it goes from there, and whose memory it touches.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Barrier,
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast { root: usize },
}

/// Of a payload, by what takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Len {
    /// A mailbox.
    Small,
    /// A mailbox, unless the buffer is registered: the limit is lower there.
    Middle,
    /// No mailbox.
    Large,
}

/// What a rank calls. Registered or not, ranks agree.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub kind: Kind,
    pub len: Len,
    pub registered: bool,
}

impl Call {
    pub fn differs(self, other: Call) -> bool {
        (self.kind, self.len) != (other.kind, other.len)
    }

    pub fn is_in_mailbox(self) -> bool {
        self.len == Len::Small || self.len == Len::Middle && !self.registered
    }

    pub fn contributes(self, rank: usize) -> bool {
        !matches!(self.kind, Kind::Broadcast { root } if root != rank)
    }
}

#[derive(Debug, PartialEq)]
pub enum Path {
    OneStep,
    Mapped,
    Else,
}

pub fn path(calls: &[Call]) -> Path {
    if calls[0].kind == Kind::Barrier {
        Path::Else
    } else if calls.iter().all(|call| call.is_in_mailbox()) {
        Path::OneStep
    } else if calls.iter().all(|call| call.registered) {
        Path::Mapped
    } else {
        Path::Else
    }
}

/// An element: its owner, and its place there.
pub type At = (usize, usize);

/// What `rank` reads and writes over mapped memory. Every buffer has one element for each rank, and every operation is
/// in place.
pub fn accesses(kind: Kind, rank: usize, world_size: usize) -> (Vec<At>, Vec<At>) {
    let all = 0..world_size;
    let shards: Vec<_> = all.clone().map(|owner| (owner, rank)).collect();
    match kind {
        Kind::Barrier => (vec![], vec![]),
        Kind::AllReduce => (shards.clone(), shards),
        Kind::ReduceScatter => (shards, vec![(rank, rank)]),
        Kind::AllGather => {
            let others = all.filter(|&owner| owner != rank);
            others.map(|owner| ((owner, owner), (rank, owner))).unzip()
        }
        Kind::Broadcast { root } if root == rank => (vec![], vec![]),
        Kind::Broadcast { root } => all.map(|elem| ((root, elem), (rank, elem))).unzip(),
    }
}

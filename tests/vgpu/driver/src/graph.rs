//! Graphs (DAPI 6.24): work with its order, enqueued as one.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;

use crate::capture;
use crate::event::Event;
use crate::handles::Handles;
use crate::status::{Result, Status, refuse};
use crate::stream::{Stream, Work};

/// One operation, and which of the graph's nodes, all before it in the list, have to be done first.
pub(crate) struct Node {
    pub work: Work,
    pub after: Vec<usize>,
}

#[derive(Default)]
pub(crate) struct Graph {
    pub nodes: Vec<Node>,
}

/// An instantiated graph; it lives on when the graph is destroyed.
pub(crate) struct Executable {
    graph: Arc<Graph>,
    /// Recorded by each launch: the next one begins after it.
    launches: Event,
}

/// DAPI 6.24: of a handle that is none, the functions of graphs have no code but CUDA_ERROR_INVALID_VALUE.
pub(crate) static GRAPHS: Handles<Graph> = Handles::new("graph", 0x9000_0000, Status::INVALID_VALUE);
pub(crate) static EXECUTABLES: Handles<Executable> =
    Handles::new("executable graph", 0xa000_0000, Status::INVALID_VALUE);

impl Graph {
    /// The nodes that `nodes` come after, and `nodes` themselves, by number.
    pub fn behind(&self, nodes: &[usize]) -> Vec<bool> {
        let mut behind = vec![false; self.nodes.len()];
        let mut open = nodes.to_vec();
        while let Some(node) = open.pop() {
            if !std::mem::replace(&mut behind[node], true) {
                open.extend(&self.nodes[node].after);
            }
        }
        behind
    }

    /// Does the work of every node, each as soon as those before it are done: branches run at the same time, since one may
    /// wait for what another writes.
    fn run(&self) {
        let mut followers = vec![Vec::new(); self.nodes.len()];
        for (number, node) in self.nodes.iter().enumerate() {
            node.after.iter().for_each(|before| followers[*before].push(number));
        }
        let pending = self.nodes.iter().map(|node| node.after.len()).collect();
        let run = Run { graph: self, followers, pending: Mutex::new(pending) };
        let roots = (0..self.nodes.len()).filter(|number| self.nodes[*number].after.is_empty()).collect();
        std::thread::scope(|scope| run.branch(roots, scope));
    }
}

/// One execution of a graph.
struct Run<'g> {
    graph: &'g Graph,
    /// Of each node, those that come after it.
    followers: Vec<Vec<usize>>,
    /// Of each node, how many before it are not done.
    pending: Mutex<Vec<usize>>,
}

impl Run<'_> {
    /// Works through nodes that are ready: the first, and on from there, on this thread; the others on threads of their own.
    fn branch<'s>(&'s self, mut ready: Vec<usize>, scope: &'s Scope<'s, '_>) {
        while let Some(node) = ready.pop() {
            for other in ready.drain(..) {
                scope.spawn(move || self.branch(vec![other], scope));
            }
            (self.graph.nodes[node].work)();
            ready = self.finish(node);
        }
    }

    /// The nodes that wait for nothing else now that `node` is done.
    fn finish(&self, node: usize) -> Vec<usize> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let followers = self.followers[node].iter().copied();
        let count_down = |follower: &usize| {
            pending[*follower] -= 1;
            pending[*follower] == 0
        };
        followers.filter(count_down).collect()
    }
}

/// `cuGraphInstantiate`
pub(crate) fn instantiate(graph: u64) -> Result<u64> {
    let graph = GRAPHS.get(graph)?;
    Ok(EXECUTABLES.insert(Executable { graph, launches: Event::default() }))
}

/// `cuGraphLaunch`: "Each launch is ordered behind both any previous work in hStream and any previous launches of
/// hGraphExec."
pub(crate) fn launch(executable: u64, stream: u64) -> Result<()> {
    let (stream, executable) = (Stream::of(stream)?, EXECUTABLES.get(executable)?);
    // Stricter than CUDA, where it becomes a node of the graph: graphs here have none in them.
    if capture::is_capturing(&stream) {
        return refuse(Status::NOT_SUPPORTED, "cuGraphLaunch into a capture: graphs in graphs");
    }
    let launch = executable.launches.mark();
    // Also in a context that has failed: whoever waits for the launch goes on; the nodes look for themselves.
    stream.submit_always(move || {
        executable.launches.wait(launch - 1);
        executable.graph.run();
        executable.launches.complete(launch);
    })
}

//! Graphs (DAPI 6.24): work with its order, enqueued as one.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;

use crate::capture;
use crate::event::Event;
use crate::handles::Handles;
use crate::races::{self, Actor, Clock};
use crate::status::{Result, Status};
use crate::stream::{Stream, Work};

/// One operation, and which of the graph's nodes, all before it in the list, have to be done first.
pub(crate) struct Node {
    pub work: Work,
    pub device: usize,
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
    /// Whom its nodes work for.
    actors: Mutex<Vec<Actor>>,
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
    fn run(&self, actors: &Mutex<Vec<Actor>>) {
        let mut followers = vec![Vec::new(); self.nodes.len()];
        for (number, node) in self.nodes.iter().enumerate() {
            node.after.iter().for_each(|before| followers[*before].push(number));
        }
        let pending = self.nodes.iter().map(|node| node.after.len()).collect();
        let run = Run { graph: self, followers, pending: Mutex::new(pending), begin: races::clock(), actors };
        let roots = (0..self.nodes.len()).filter(|number| self.nodes[*number].after.is_empty()).collect();
        let stream = races::play(None);
        std::thread::scope(|scope| run.branch(roots, scope));
        races::play(stream);
        let actors = actors.lock().unwrap_or_else(PoisonError::into_inner);
        actors.iter().for_each(|node| races::learn(node.clock()));
    }
}

/// One execution of a graph.
struct Run<'g> {
    graph: &'g Graph,
    /// Of each node, those that come after it.
    followers: Vec<Vec<usize>>,
    /// Of each node, how many before it are not done.
    pending: Mutex<Vec<usize>>,
    /// What is known when it begins.
    begin: Clock,
    actors: &'g Mutex<Vec<Actor>>,
}

impl Run<'_> {
    /// Works through nodes that are ready: the first, and on from there, on this thread; the others on threads of their own.
    fn branch<'s>(&'s self, mut ready: Vec<usize>, scope: &'s Scope<'s, '_>) {
        while let Some(node) = ready.pop() {
            for other in ready.drain(..) {
                scope.spawn(move || self.branch(vec![other], scope));
            }
            self.work(node);
            ready = self.finish(node);
        }
    }

    /// Does the work of a node, which knows of those before it.
    fn work(&self, number: usize) {
        let actors = || self.actors.lock().unwrap_or_else(PoisonError::into_inner);
        let node = &self.graph.nodes[number];
        let mut actor = actors()[number].clone();
        let before: Vec<Clock> = node.after.iter().map(|before| actors()[*before].clock().clone()).collect();
        actor.begin(&before.iter().chain([&self.begin]).collect::<Vec<_>>());
        races::play(Some(actor));
        (node.work)();
        if let Some(actor) = races::play(None) {
            actors()[number] = actor;
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
    let actor = |node: usize| Actor::new(&format!("in node {node} of a graph"), graph.nodes[node].device);
    let actors = Mutex::new((0..graph.nodes.len()).map(actor).collect());
    Ok(EXECUTABLES.insert(Executable { graph, launches: Event::default(), actors }))
}

/// `cuGraphLaunch`: "Each launch is ordered behind both any previous work in hStream and any previous launches of
/// hGraphExec."
pub(crate) fn launch(executable: u64, stream: u64) -> Result<()> {
    let (stream, executable) = (Stream::of(stream)?, EXECUTABLES.get(executable)?);
    capture::check_not_captured(&stream, "cuGraphLaunch")?;
    let (before, launch) = executable.launches.mark();
    // Also in a context that has failed: whoever waits for the launch goes on; the nodes look for themselves.
    stream.submit_always(move || {
        if let Some(before) = before {
            races::learn(&before.wait());
        }
        executable.graph.run(&executable.actors);
        launch.complete();
    })
}

//! Streams of the host backend: one worker thread each, which runs its tasks in order.
//!
//! ```text
//!   enqueue ──> bounded queue ──> worker: [turn] run ──> completed += 1
//!   run (inline): earlier tasks completed? ──> caller: [turn] run          no hand-over to another thread
//! ```
//! Whoever runs something holds the turn, so work never overlaps and the order of one submitting thread is kept. An
//! *immediate* stream has no worker: the thread that enqueues runs the work before it returns.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::event::{Event, Point};
use super::task::Task;
use super::turn::{Held, Turn};
use crate::error::{Error, Result};
use crate::world::flag::{Flag, Pacing, reached};

/// Tasks a stream holds before `enqueue` waits for room: far more than a training step issues.
const QUEUE_TASKS: u32 = 1024;

/// Deadline of waits that a caller gives none for: longer than the collectives' own (600 s), so theirs is reported.
const WAIT_TIMEOUT: Duration = Duration::from_secs(1_800);

const PACING: Pacing = Pacing { spins: 200, yields: 8 };

/// Work in order. Clones are the same stream; when the last one is dropped the worker finishes what it was given and
/// ends. Dropping does not wait for that; [`synchronize`](Stream::synchronize) does.
///
/// Work on a stream must not wait for that stream: such calls are refused with [`Error::Stream`]. It may enqueue more.
#[derive(Clone)]
pub struct Stream {
    core: Arc<Core>,
    /// None: immediate.
    queue: Option<Sender<Task>>,
}

struct Core {
    name: String,
    /// Makes counting a task and queueing it one step, so that task number n of the count is number n of the queue.
    submitting: Mutex<()>,
    /// Tasks submitted so far; written under `submitting`, read by whoever waits.
    submitted: AtomicU32,
    /// Tasks run or dropped so far, on the circle; posted by the worker.
    completed: Flag,
    turn: Turn,
    /// Why the stream runs nothing any more: a task panicked or a wait failed.
    failure: OnceLock<String>,
}

impl Stream {
    /// Starts a stream. `name` names the worker thread (15 bytes are visible to the operating system) and appears in
    /// errors and timelines.
    ///
    /// # Errors
    /// [`Error::Io`] if the thread cannot be started.
    pub fn new(name: &str) -> Result<Stream> {
        let core = Arc::new(Core::new(name));
        let (queue, tasks) = bounded(QUEUE_TASKS as usize);
        let worker = Arc::clone(&core);
        // The operating system takes no name with a zero in it.
        let thread_name = name.replace('\0', "");
        std::thread::Builder::new()
            .name(thread_name)
            .spawn(move || work(&worker, &tasks))
            .map_err(|error| Error::io(format!("starting the thread of stream {name}"), error))?;
        Ok(Stream { core, queue: Some(queue) })
    }

    /// A stream without a worker: work runs on the thread that enqueues it, before `enqueue` returns. For blocking
    /// operations, where a hand-over to another thread would cost more than a small message takes.
    pub fn immediate(name: &str) -> Stream {
        Stream { core: Arc::new(Core::new(name)), queue: None }
    }

    /// The name given at creation.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// Whether both are the same stream.
    pub fn is_same(&self, other: &Stream) -> bool {
        Arc::ptr_eq(&self.core, &other.core)
    }

    pub(crate) fn is_immediate(&self) -> bool {
        self.queue.is_none()
    }

    /// Appends `work` and returns at once. Closures up to 256 bytes are stored without a heap allocation. A panic in
    /// `work` fails the stream: later tasks are dropped unrun. (Of an immediate stream it goes on in the caller.)
    ///
    /// # Errors
    /// [`Error::Stream`] if the stream has failed; [`Error::TimedOut`] if its queue stayed full until the deadline; `work` is
    /// dropped.
    pub fn enqueue(&self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let Some(queue) = &self.queue else { return self.run(work) };
        let core = &self.core;
        let mut start = None;
        loop {
            core.check()?;
            let order = core.submitting.lock().unwrap_or_else(PoisonError::into_inner);
            if !queue.is_full() {
                // Relaxed: orders nothing by itself; the queue carries the task. The count comes first, so that the
                // worker never completes a task that was not counted.
                core.submitted.fetch_add(1, Ordering::Relaxed);
                // Room was seen and nobody else fills it; the worker lives as long as there is a sender.
                return queue.try_send(Task::new(work)).map_err(|_| core.fail("its worker has ended"));
            }
            let room = core.submitted.load(Ordering::Relaxed).wrapping_sub(QUEUE_TASKS - 1);
            drop(order);
            core.refuse_own_work()?;
            let waited = start.get_or_insert_with(Instant::now).elapsed();
            core.wait_completed(room, WAIT_TIMEOUT.saturating_sub(waited))?;
        }
    }

    /// Runs `work` on the calling thread, after everything this thread has enqueued before, and returns its result. An
    /// idle stream costs no hand-over to another thread: the path of blocking collectives.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if earlier work did not end before the deadline; [`Error::Stream`] if the stream has failed, or the
    /// caller is itself work of this stream; `work` is dropped. A panic in `work` goes on in the caller.
    pub fn run<R>(&self, work: impl FnOnce() -> R) -> Result<R> {
        let _turn = self.core.turn_behind_submitted(WAIT_TIMEOUT)?;
        Ok(work())
    }

    /// Marks a point: `event` completes when everything enqueued before has run.
    ///
    /// # Errors
    /// As [`enqueue`](Stream::enqueue); [`Error::InvalidArgument`] for the event of an operation.
    pub fn record(&self, event: &Event) -> Result<()> {
        event.check_recordable()?;
        let core = &self.core;
        core.check()?;
        if !core.is_idle() || core.turn.is_mine() {
            let point = Point::mark(event);
            return self.enqueue(move || point.reach());
        }
        // The point is here. An event that is complete already says all that a new recording would.
        let last = event.generation();
        if !event.is_complete_at(last) || event.check(last).is_err() {
            event.complete(event.mark());
        }
        Ok(())
    }

    /// Makes everything enqueued after this call run after the point that `event` has recorded last. The calling thread
    /// does not wait, unless the stream is immediate.
    ///
    /// # Errors
    /// As [`enqueue`](Stream::enqueue), or [`Error::Stream`] if the point will never be reached. If that turns out later
    /// this stream fails.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.core.check()?;
        let generation = event.generation();
        if event.is_complete_at(generation) {
            return event.check(generation);
        }
        if self.is_immediate() {
            return self.run(|| event.wait_for(generation, WAIT_TIMEOUT))?;
        }
        let (event, core) = (event.clone(), Arc::clone(&self.core));
        self.enqueue(move || {
            if let Err(error) = event.wait_for(generation, WAIT_TIMEOUT) {
                core.fail(&error.to_string());
            }
        })
    }

    /// Blocks the calling thread until everything enqueued so far has run.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`; [`Error::Stream`] if the stream has failed, or the caller is itself work of this
    /// stream.
    pub fn synchronize(&self, timeout: Duration) -> Result<()> {
        self.core.turn_behind_submitted(timeout).map(drop)
    }
}

impl Core {
    fn new(name: &str) -> Core {
        Core {
            name: name.to_owned(),
            submitting: Mutex::new(()),
            submitted: AtomicU32::new(0),
            completed: Flag::new(),
            turn: Turn::new(),
            failure: OnceLock::new(),
        }
    }

    fn is_idle(&self) -> bool {
        reached(self.completed.seen(), self.submitted.load(Ordering::Relaxed))
    }

    /// The turn, once everything submitted before the call has run.
    fn turn_behind_submitted(&self, timeout: Duration) -> Result<Held<'_>> {
        self.refuse_own_work()?;
        let start = (!self.is_idle()).then(Instant::now);
        if start.is_some() {
            self.wait_completed(self.submitted.load(Ordering::Relaxed), timeout)?;
        }
        let left = start.map_or(timeout, |start| timeout.saturating_sub(start.elapsed()));
        let turn = self.turn.take(left).ok_or_else(|| self.late(timeout))?;
        self.check()?;
        Ok(turn)
    }

    fn wait_completed(&self, target: u32, timeout: Duration) -> Result<()> {
        self.completed.wait(target, PACING, |waited| if waited < timeout { Ok(()) } else { Err(self.late(timeout)) })
    }

    /// Work that waits for its own stream would wait for itself.
    fn refuse_own_work(&self) -> Result<()> {
        if self.turn.is_mine() { Err(self.error("work that runs on it must not wait for it")) } else { Ok(()) }
    }

    #[inline]
    fn check(&self) -> Result<()> {
        match self.failure.get() {
            None => Ok(()),
            Some(reason) => Err(self.error(reason)),
        }
    }

    /// Fails the stream; the first reason stays.
    fn fail(&self, reason: &str) -> Error {
        self.error(self.failure.get_or_init(|| reason.to_owned()))
    }

    fn late(&self, timeout: Duration) -> Error {
        Error::timed_out(format_args!("the work of stream {}", self.name), timeout)
    }

    #[cold]
    fn error(&self, reason: &str) -> Error {
        Error::Stream { stream: self.name.clone(), reason: reason.to_owned() }
    }
}

fn work(core: &Core, tasks: &Receiver<Task>) {
    let mut completed = 0u32;
    while let Ok(task) = tasks.recv() {
        // Whoever runs inline may take as long as it likes; those who wait for this stream have their own deadlines.
        let turn = loop {
            if let Some(turn) = core.turn.take(WAIT_TIMEOUT) {
                break turn;
            }
        };
        // A task that is dropped unrun tells its owner so, by code that may panic as well.
        let run = || if core.failure.get().is_none() { task.run() } else { drop(task) };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            core.fail(&format!("a task panicked: {}", panic_text(panic.as_ref())));
            std::mem::forget(panic); // its drop might panic, and would end the worker
        }
        // Given back first: who waits for the count wants the turn next.
        drop(turn);
        completed = completed.wrapping_add(1);
        core.completed.post(completed);
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("name", &self.core.name).field("is_idle", &self.core.is_idle()).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn tasks_run_in_order_and_inline_work_comes_after_them() {
        let stream = Stream::new("test").unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        for index in 0..100 {
            let seen = Arc::clone(&seen);
            stream.enqueue(move || seen.lock().unwrap().push(index)).unwrap();
        }
        let inline = stream.run(|| seen.lock().unwrap().clone()).unwrap();
        assert_eq!(inline, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn an_event_orders_two_streams_without_the_host() {
        let (first, second) = (Stream::new("first").unwrap(), Stream::new("second").unwrap());
        let (hold, held) = mpsc::channel::<()>();
        let (event, order) = (Event::new(), Arc::new(Mutex::new(Vec::new())));
        let seen = Arc::clone(&order);
        first
            .enqueue(move || {
                held.recv().unwrap();
                seen.lock().unwrap().push("first");
            })
            .unwrap();
        first.record(&event).unwrap();
        assert!(!event.is_complete());
        second.wait(&event).unwrap();
        let seen = Arc::clone(&order);
        second.enqueue(move || seen.lock().unwrap().push("second")).unwrap();
        assert!(matches!(second.synchronize(Duration::from_millis(50)), Err(Error::TimedOut { .. })), "it must wait");
        hold.send(()).unwrap();
        second.synchronize(PATIENCE).unwrap();
        assert_eq!(*order.lock().unwrap(), ["first", "second"]);
        assert!(event.is_complete());
    }

    #[test]
    fn a_panic_fails_the_stream_and_drops_what_follows() {
        let stream = Stream::new("test").unwrap();
        let (entered, gate) = (Arc::new(()), mpsc::channel::<()>());
        stream
            .enqueue(move || {
                gate.1.recv().unwrap();
                panic!("on purpose");
            })
            .unwrap();
        let owned = Arc::clone(&entered);
        stream.enqueue(move || panic!("must not run, owns {owned:?}")).unwrap();
        gate.0.send(()).unwrap();
        let failure = stream.synchronize(PATIENCE).unwrap_err();
        assert!(failure.to_string().contains("on purpose"), "{failure}");
        assert_eq!(Arc::strong_count(&entered), 1, "the task behind was dropped unrun");
        assert!(stream.enqueue(|| ()).is_err());
    }

    #[test]
    fn a_point_that_a_failed_stream_never_reaches_is_an_error_and_not_a_wait() {
        let (first, second, third) = (Stream::new("a").unwrap(), Stream::new("b").unwrap(), Stream::immediate("c"));
        let (event, gate) = (Event::new(), mpsc::channel::<()>());
        first
            .enqueue(move || {
                gate.1.recv().unwrap();
                panic!("on purpose");
            })
            .unwrap();
        first.record(&event).unwrap();
        second.wait(&event).unwrap();
        second.enqueue(|| panic!("must not run")).unwrap();
        gate.0.send(()).unwrap();
        assert!(matches!(event.synchronize(PATIENCE), Err(Error::Stream { .. })));
        let second = second.synchronize(PATIENCE).unwrap_err().to_string();
        assert!(second.contains("failed before it got there"), "it does not run what must come after: {second}");
        assert!(event.is_complete() && third.wait(&event).is_err() && first.record(&event).is_err());
        third.record(&event).unwrap();
        event.synchronize(PATIENCE).unwrap();
        third.wait(&event).unwrap();
    }

    #[test]
    fn work_that_waits_for_its_own_stream_is_refused() {
        let worker = Stream::new("worker").unwrap();
        for stream in [worker.clone(), Stream::immediate("immediate")] {
            let (done, finished) = mpsc::channel();
            let own = stream.clone();
            stream.enqueue(move || done.send((own.run(|| ()), own.synchronize(PATIENCE))).unwrap()).unwrap();
            let (run, synchronize) = finished.recv_timeout(PATIENCE).unwrap();
            assert!(matches!((&run, &synchronize), (Err(Error::Stream { .. }), Err(_))), "{run:?}, {synchronize:?}");
            assert!(stream.run(|| stream.run(|| ())).unwrap().is_err(), "inline work, too");
            stream.run(|| ()).unwrap();
        }
        // More than the queue holds, from inside: refused when it is full, and what was taken runs.
        let (count, own, (done, finished)) = (Arc::new(AtomicU32::new(0)), worker.clone(), mpsc::channel());
        let counted = Arc::clone(&count);
        let fill = move || {
            let enqueue = |_: &u32| {
                let counted = Arc::clone(&counted);
                own.enqueue(move || _ = counted.fetch_add(1, Ordering::Relaxed)).is_ok()
            };
            done.send((0..2 * QUEUE_TASKS).take_while(enqueue).count()).unwrap();
        };
        worker.enqueue(fill).unwrap();
        assert_eq!(finished.recv_timeout(PATIENCE), Ok(QUEUE_TASKS as usize));
        worker.synchronize(PATIENCE).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), QUEUE_TASKS);
    }

    #[test]
    fn a_full_queue_is_waited_for() {
        let stream = Stream::new("test").unwrap();
        let count = Arc::new(AtomicU32::new(0));
        let (hold, held) = mpsc::channel::<()>();
        stream.enqueue(move || held.recv().unwrap()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..QUEUE_TASKS {
                        let count = Arc::clone(&count);
                        stream.enqueue(move || _ = count.fetch_add(1, Ordering::Relaxed)).unwrap();
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(count.load(Ordering::Relaxed), 0);
            hold.send(()).unwrap();
        });
        stream.synchronize(PATIENCE).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 2 * QUEUE_TASKS);
    }

    #[test]
    fn a_task_whose_drop_panics_does_not_end_the_worker() {
        struct Grenade;
        impl Drop for Grenade {
            fn drop(&mut self) {
                panic!("while dropped");
            }
        }
        let stream = Stream::new("test").unwrap();
        let grenades = [Grenade, Grenade];
        stream.enqueue(|| std::panic::panic_any(7)).unwrap();
        for grenade in grenades {
            // Already failed or about to: dropped here or there.
            let enqueue = || stream.enqueue(move || std::mem::forget(grenade)).is_ok();
            let _ = catch_unwind(AssertUnwindSafe(enqueue));
        }
        assert!(stream.synchronize(PATIENCE).unwrap_err().to_string().contains("no message"));
    }

    #[test]
    fn inline_work_of_another_thread_is_waited_for_until_the_deadline() {
        let stream = Stream::new("test").unwrap();
        let (entered, inside) = mpsc::channel();
        let (hold, held) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let other = stream.clone();
            scope.spawn(move || {
                other.run(|| (entered.send(()).unwrap(), held.recv().unwrap())).unwrap();
            });
            inside.recv_timeout(PATIENCE).unwrap();
            assert!(stream.synchronize(Duration::from_millis(20)).is_err());
            hold.send(()).unwrap();
        });
        stream.synchronize(PATIENCE).unwrap();
    }

    #[test]
    fn an_immediate_stream_runs_on_the_calling_thread_and_waits_for_events() {
        let (worker, immediate) = (Stream::new("worker").unwrap(), Stream::immediate("immediate"));
        let (event, here) = (Event::new(), std::thread::current().id());
        worker.enqueue(|| std::thread::sleep(Duration::from_millis(30))).unwrap();
        worker.record(&event).unwrap();
        immediate.wait(&event).unwrap();
        assert!(event.is_complete());
        let (done, finished) = mpsc::channel();
        immediate.enqueue(move || done.send(std::thread::current().id()).unwrap()).unwrap();
        assert_eq!(finished.try_recv(), Ok(here));
    }

    #[test]
    fn dropping_the_stream_finishes_its_work() {
        let stream = Stream::new("test").unwrap();
        let (done, finished) = mpsc::channel();
        stream.enqueue(move || done.send(7).unwrap()).unwrap();
        drop(stream);
        assert_eq!(finished.recv_timeout(PATIENCE), Ok(7));
    }
}

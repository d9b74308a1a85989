//! What a strategy counts: time in which nothing was done but wait for a reduction.

use std::time::Duration;

use annulus::strategy::{Accelerator, GradSink, Module, Parameter, Sgd, Strategy, StrategyOptions};

use crate::model::{Mlp, ddp, options};

/// So many gradients have the parameters of [`Mlp`].
const GRADIENTS: usize = 5;
/// Before a gradient with this number, or behind the last.
const FIRST: usize = 0;
const LAST: usize = GRADIENTS - 1;
const BEHIND: usize = GRADIENTS;

const PAUSE: Duration = Duration::from_millis(50);

/// By how much a step raises `exposed_ns` of either rank, each of which sleeps before one of its gradients.
fn exposed(sleeps: [(usize, Duration); 2]) -> [Duration; 2] {
    // A device's wait is in its own time.
    let options = StrategyOptions { accelerator: Accelerator::Host, ..options() };
    let times = ddp(2, options, |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        let mut handles: Vec<Parameter> = Vec::new();
        model.parameters(&mut |parameter| handles.push(parameter.clone()));
        let (before, pause) = sleeps[strategy.rank() as usize];
        let loss = |_: &mut Mlp, sink: &mut GradSink<'_>| {
            for (at, parameter) in handles.iter().rev().enumerate() {
                if at == before {
                    std::thread::sleep(pause);
                }
                sink.write(parameter, &vec![1.0_f32; parameter.len_elems()])?;
            }
            if before == BEHIND {
                std::thread::sleep(pause);
            }
            Ok(())
        };
        assert_eq!(handles.len(), GRADIENTS);
        strategy.barrier("both begin").unwrap();
        let start_ns = strategy.statistics().exposed_ns;
        strategy.backward(&loss, &mut model).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        assert_eq!(optimizer.steps().unwrap(), 1); // behind the step
        Duration::from_nanos(strategy.statistics().exposed_ns - start_ns)
    });
    [times[0], times[1]]
}

/// On a busy machine a rank waits for the other's processor, too: one of a few steps must be as it is alone.
fn once(sleeps: [(usize, Duration); 2], is_right: impl Fn([Duration; 2]) -> bool) {
    let mut seen = Vec::new();
    while seen.len() < 8 {
        seen.push(exposed(sleeps));
        if is_right(seen[seen.len() - 1]) {
            return;
        }
    }
    panic!("{sleeps:?}: never right in {seen:?}");
}

fn is_hardly(exposed: Duration) -> bool {
    exposed < PAUSE / 4
}

#[test]
fn exposed_is_what_a_rank_waits_for_a_reduction_that_its_backward_does_not_hide() {
    let none = (FIRST, Duration::ZERO);
    // The last bucket waits for the other rank, and this one has nothing else to do.
    once([none, (LAST, PAUSE)], |[waits, sleeps]| waits >= PAUSE * 4 / 5 && is_hardly(sleeps));
    once([(LAST, PAUSE), none], |[sleeps, waits]| waits >= PAUSE * 4 / 5 && is_hardly(sleeps));
    // Nobody waits for anybody: both are slow before anything can be reduced.
    once([(FIRST, PAUSE); 2], |exposed| exposed.into_iter().all(is_hardly));
    // The other is slow, but this one's backward lasts longer.
    once([(BEHIND, 2 * PAUSE), (LAST, PAUSE)], |exposed| exposed.into_iter().all(is_hardly));
}

//! Ctrl-C and SIGTERM: a wish to stop that the trainer asks for after each step.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// A terminal sends Ctrl-C to every process of the group and a launcher sends it on to its ranks: what comes this soon after
/// the first signal is the same Ctrl-C.
const SAME_KEYSTROKE: Duration = Duration::from_millis(800);
/// What shells report for a program that ended by Ctrl-C.
const EXIT_INTERRUPTED: i32 = 130;

/// Whether someone has asked the process to end.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Listens from now on. The first signal asks to stop after the step; a later Ctrl-C ends the process at once.
    ///
    /// # Errors
    /// Those of installing the handler or starting its thread.
    pub fn listen() -> io::Result<Stop> {
        let stop = Stop::default();
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let asked = stop.clone();
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let mut first = None;
            for signal in signals.forever() {
                let first: Instant = *first.get_or_insert_with(Instant::now);
                if signal == SIGINT && first.elapsed() > SAME_KEYSTROKE {
                    std::process::exit(EXIT_INTERRUPTED);
                }
                asked.0.store(true, Ordering::Relaxed); // Relaxed: a wish; nothing is published through it
            }
        })?;
        Ok(stop)
    }

    /// Whether to stop after this step.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

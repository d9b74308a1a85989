//! What this process says in its log, down to the last detail.

use std::fmt::Write;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber, span};

#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<String>>);

/// Keeps the log of all threads of this process from now on.
pub fn keep() -> Log {
    let log = Log::default();
    tracing::subscriber::set_global_default(log.clone()).unwrap();
    log
}

impl Log {
    pub fn has(&self, text: &str) -> bool {
        self.0.lock().unwrap().contains(text)
    }

    /// Whether a legacy handle of the virtual driver was written, in any form: they begin with the same letters.
    pub fn tells_of_handles(&self) -> bool {
        const BEGINS: &[u8] = b"vgpu-ipc";
        let hex: String = BEGINS.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{BEGINS:?}");
        let list = list.trim_matches(['[', ']']);
        let packed = list.replace(' ', "");
        ["vgpu-ipc", &hex, &hex.to_uppercase(), list, &packed].iter().any(|form| self.has(form))
    }
}

struct Line<'a>(&'a mut String);

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, "{field}={value:?} ").unwrap();
    }
}

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
        attributes.record(&mut Line(&mut self.0.lock().unwrap()));
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, values: &span::Record<'_>) {
        values.record(&mut Line(&mut self.0.lock().unwrap()));
    }

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Line(&mut self.0.lock().unwrap()));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[test]
fn handles_are_found_in_any_form() {
    for form in ["vgpu-ipc", "766770752d697063", "[118, 103, 112, 117, 45, 105, 112, 99, 0]"] {
        let log = Log::default();
        log.0.lock().unwrap().push_str(form);
        assert!(log.tells_of_handles(), "{form}");
    }
}

//! The ranks' output on its way to the launcher's: cut into lines, each with its rank, and never waited for.

use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

/// A line longer than this is passed on in pieces.
const LINE_LIMIT_BYTES: usize = 64 << 10;
/// While so much waits to be written, nothing more is read from the ranks: their pipes fill and they wait.
const QUEUE_LIMIT_BYTES: usize = 1 << 20;
/// Written at once when poll says there is room: what a pipe takes without blocking (PIPE_BUF).
const WRITE_BYTES: usize = 4096;

/// The launcher's stdout or stderr.
#[derive(Debug)]
pub(super) struct Sink {
    fd: OwnedFd,
    queue: Vec<u8>,
    /// Whether nobody reads any more.
    closed: bool,
}

impl Sink {
    pub(super) fn new(fd: OwnedFd) -> Sink {
        Sink { fd, queue: Vec::new(), closed: false }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether there is something to write.
    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty() && !self.closed
    }

    /// Whether more should be read for it.
    pub(super) fn has_room(&self) -> bool {
        self.queue.len() < QUEUE_LIMIT_BYTES
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !self.closed {
            self.queue.extend_from_slice(bytes);
        }
    }

    /// Writes a little; called when poll reports room, so that a stopped reader does not stop the launcher.
    pub(super) fn write_some(&mut self) {
        match rustix::io::write(&self.fd, &self.queue[..self.queue.len().min(WRITE_BYTES)]) {
            Ok(written) => drop(self.queue.drain(..written)),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => {
                self.closed = true;
                self.queue = Vec::new();
            }
        }
    }
}

/// One stream of one rank.
#[derive(Debug)]
pub(super) struct Source {
    /// None once it has ended.
    pub(super) fd: Option<OwnedFd>,
    /// Index of the sink it goes to.
    pub(super) sink: usize,
    prefix: String,
    /// What came since the last newline.
    partial: Vec<u8>,
}

impl Source {
    /// `rank` is padded to `width` digits, so that columns line up.
    pub(super) fn new(fd: OwnedFd, sink: usize, rank: u32, width: usize) -> Source {
        let mut prefix = String::new();
        let _ = write!(prefix, "[{rank:>width$}] ");
        Source { fd: Some(fd), sink, prefix, partial: Vec::new() }
    }

    /// Takes what is there and passes the whole lines on. At the end also the last piece, with a newline.
    pub(super) fn read_some(&mut self, sink: &mut Sink) {
        let Some(fd) = &self.fd else { return };
        let mut buffer = [0; 16 << 10];
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) => self.finish(sink),
            Ok(read) => self.take(&buffer[..read], sink),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.finish(sink),
        }
    }

    /// Nothing more is read; the last piece is passed on.
    pub(super) fn finish(&mut self, sink: &mut Sink) {
        self.fd = None;
        if !self.partial.is_empty() {
            self.take(b"\n", sink);
        }
    }

    fn take(&mut self, bytes: &[u8], sink: &mut Sink) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(piece);
            let whole = piece.ends_with(b"\n");
            if whole || self.partial.len() >= LINE_LIMIT_BYTES {
                sink.push(self.prefix.as_bytes());
                sink.push(&self.partial);
                if !whole {
                    sink.push(b"\n");
                }
                self.partial.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK).unwrap()
    }

    #[test]
    fn lines_get_their_rank_and_the_last_piece_its_newline() {
        let (read, write) = pipe();
        let (_keep, out) = pipe();
        let mut sink = Sink::new(out);
        let mut source = Source::new(read, 0, 3, 2);
        for piece in [&b"one\ntw"[..], b"o\n\n", b"\xff\xfe not text", b""] {
            rustix::io::write(&write, piece).unwrap();
            source.read_some(&mut sink);
        }
        assert_eq!(sink.queue, b"[ 3] one\n[ 3] two\n[ 3] \n");
        drop(write);
        source.read_some(&mut sink);
        assert!(source.fd.is_none() && sink.queue.ends_with(b"[ 3] \xff\xfe not text\n"));
    }

    #[test]
    fn an_endless_line_is_passed_on_in_pieces() {
        let (read, _write) = pipe();
        let mut sink = Sink::new(pipe().1);
        let mut source = Source::new(read, 0, 0, 1);
        for _ in 0..20 {
            source.take(&[b'x'; 8 << 10], &mut sink);
        }
        assert_eq!(sink.queue.iter().filter(|byte| **byte == b'\n').count(), 2);
        assert!(source.partial.len() < LINE_LIMIT_BYTES);
    }

    #[test]
    fn a_sink_nobody_reads_closes() {
        let (read, write) = pipe();
        let mut sink = Sink::new(write);
        sink.push(b"x");
        drop(read);
        sink.write_some();
        assert!(sink.is_closed() && !sink.has_work());
    }
}

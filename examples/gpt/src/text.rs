//! The text as a data set: bytes, cut into windows.

use std::path::Path;
use std::sync::Arc;

use crate::failure::Failure;
use crate::model::Batch;

/// The New Testament, in the program so that it runs from anywhere. See `data/README.md`.
const NEW_TESTAMENT: &[u8] = include_bytes!("../data/new-testament-kjv.txt");
/// Place of a verse, as each line of the Bible begins.
const BIBLE_PROMPT: &str = "Mat5:1 ";
/// A text larger than this is refused: it is held in memory by every rank.
const MAX_TEXT_BYTES: u64 = 1 << 30;
/// Windows of a validation, at most; they are spread evenly over the validation part.
const VALIDATION_WINDOWS: usize = 64;

/// A text, its last tenth kept apart for validation.
pub struct Text {
    bytes: Arc<[u8]>,
    train_bytes: usize,
    prompt: Vec<u8>,
}

impl Text {
    /// The file, or the Bible if there is none.
    ///
    /// # Errors
    /// [`Failure::File`] if the file cannot be read or is larger than 1 GiB; [`Failure::Usage`] if it is too short for
    /// windows of `context` bytes.
    pub fn open(file: Option<&Path>, context: usize) -> Result<Text, Failure> {
        let bytes: Arc<[u8]> = match file {
            None => NEW_TESTAMENT.into(),
            Some(path) => {
                let size_bytes = std::fs::metadata(path).map_err(Failure::file(path))?.len();
                if size_bytes > MAX_TEXT_BYTES {
                    let reason = format!("{size_bytes} bytes; at most {MAX_TEXT_BYTES} are read");
                    return Err(Failure::File { path: path.to_owned(), reason });
                }
                std::fs::read(path).map_err(Failure::file(path))?.into()
            }
        };
        let train_bytes = bytes.len() - bytes.len() / 10;
        // Both parts must hold a window and the byte after it; training also needs room to shift its windows.
        if train_bytes < 2 * context + 1 || bytes.len() - train_bytes < context + 1 {
            return Err(Failure::Usage(format!(
                "a text of {} bytes is too short for --context {context}: it must have at least {}",
                bytes.len(),
                10 * (context + 1)
            )));
        }
        let prompt = match file {
            None => BIBLE_PROMPT.as_bytes().to_vec(),
            Some(_) => bytes[..context.min(16)].to_vec(),
        };
        Ok(Text { bytes, train_bytes, prompt })
    }

    /// What samples begin with unless the user says otherwise.
    pub fn prompt(&self) -> &[u8] {
        &self.prompt
    }

    /// Length of the whole text.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// A checksum by which a resumed run knows its text (FNV-1a, 64 bits).
    pub fn checksum(&self) -> u64 {
        self.bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
    }

    /// The windows of an epoch of training.
    pub fn train(&self, context: usize) -> Windows {
        Windows { bytes: Arc::clone(&self.bytes), end: self.train_bytes, context }
    }

    /// Windows of the validation part, the same at every call.
    pub fn validation(&self, context: usize) -> Vec<Batch> {
        let part = &self.bytes[self.train_bytes..];
        let possible = (part.len() - 1) / context;
        let windows = possible.min(VALIDATION_WINDOWS);
        (0..windows)
            .map(|window| {
                let start = window * possible / windows * context;
                batch([&part[start..start + context + 1]].into_iter(), context)
            })
            .collect()
    }
}

/// The training part as windows of `context` bytes and the byte after each. Windows do not overlap; each epoch shifts them,
/// so that a byte is not always seen at the same position.
pub struct Windows {
    bytes: Arc<[u8]>,
    end: usize,
    context: usize,
}

impl Windows {
    /// Number of windows: one less than would fit, so that every epoch's shift leaves as many.
    pub fn len(&self) -> usize {
        (self.end - 1) / self.context - 1
    }

    /// The windows with these numbers, in the cut of `epoch`.
    pub fn batch(&self, epoch: u64, windows: &[usize]) -> Batch {
        // A multiple of the golden ratio: shifts of successive epochs are spread evenly.
        let shift = ((epoch.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize * self.context) >> 32;
        let slices = windows.iter().map(|window| {
            let start = window * self.context + shift;
            &self.bytes[start..start + self.context + 1]
        });
        batch(slices, self.context)
    }
}

fn batch<'a>(windows: impl Iterator<Item = &'a [u8]>, context: usize) -> Batch {
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for window in windows {
        inputs.extend_from_slice(&window[..context]);
        targets.extend_from_slice(&window[1..]);
    }
    Batch { inputs, targets: targets.into(), length: context }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bible_is_what_its_readme_says() {
        let text = Text::open(None, 128).unwrap();
        assert_eq!(text.len_bytes(), 1_019_475);
        assert!(text.bytes.iter().all(|byte| byte.is_ascii()));
        assert_eq!(text.bytes.iter().filter(|byte| **byte == b'\n').count(), 7957);
        assert!(include_str!("../data/README.md").contains("1,019,475 bytes"));
    }

    #[test]
    fn windows_are_apart_shifted_by_epoch_and_off_the_validation_part() {
        let text = Text { bytes: (0..250).map(|byte| byte as u8).collect(), train_bytes: 200, prompt: vec![] };
        let windows = text.train(16);
        assert_eq!(windows.len(), 11);
        let mut shifts = Vec::new();
        for epoch in 0..40 {
            let batch = windows.batch(epoch, &(0..11).collect::<Vec<_>>());
            assert_eq!((batch.inputs.len(), batch.length), (11 * 16, 16));
            assert!(batch.inputs.is_sorted(), "one after another");
            assert!(batch.inputs.iter().zip(batch.targets.iter()).all(|(input, target)| input + 1 == *target));
            assert!(*batch.targets.last().unwrap() < 200, "never a byte of validation");
            shifts.push(batch.inputs[0]);
        }
        shifts.sort_unstable();
        shifts.dedup();
        assert_eq!(shifts, (0..16).collect::<Vec<_>>(), "every shift is used");

        let validation = text.validation(16);
        assert_eq!(validation.len(), 3);
        assert_eq!(validation[0].inputs[0], 200);
        assert!(validation.iter().flat_map(|batch| batch.targets.iter()).all(|byte| *byte > 200));
        assert_eq!(validation, text.validation(16));
    }

    #[test]
    fn a_text_too_short_or_absent_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("short.txt");
        for (len, context, fits) in
            [(0, 2, false), (20, 2, false), (30, 2, true), (1289, 128, false), (1290, 128, true)]
        {
            std::fs::write(&path, vec![b'a'; len]).unwrap();
            let result = Text::open(Some(&path), context);
            assert_eq!(result.is_ok(), fits, "{len} bytes, context {context}");
            if let Ok(text) = result {
                assert!(text.train(context).len() >= 1 && !text.validation(context).is_empty());
            }
        }
        let error = Text::open(Some(&folder.path().join("absent.txt")), 8).err().unwrap().to_string();
        assert!(error.contains("absent.txt"), "{error}");
    }
}

//! Text from the model, a byte at a time.

use candle_core::Result;

use crate::model::{Gpt, VOCABULARY};

/// Goes on from `prompt` for `len_bytes` bytes. `uniform` gives random numbers in `[0, 1)`; `temperature` is positive.
/// Returns the prompt and what follows.
///
/// # Errors
/// Those of candle.
pub fn sample(
    model: &Gpt,
    mut uniform: impl FnMut() -> f64,
    prompt: &[u8],
    len_bytes: usize,
    temperature: f64,
) -> Result<Vec<u8>> {
    let mut text = prompt.to_vec();
    for _ in 0..len_bytes {
        let seen = &text[text.len().saturating_sub(model.config().context)..];
        let logits = model.logits(seen, seen.len())?.get(seen.len() - 1)?.to_vec1::<f32>()?;
        text.push(choose(&logits, temperature, uniform()));
    }
    Ok(text)
}

/// The byte at `place` (in `[0, 1)`) of the distribution of the logits.
fn choose(logits: &[f32], temperature: f64, place: f64) -> u8 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - max) / temperature).exp();
    let mut left = place * logits.iter().map(|logit| weight(*logit)).sum::<f64>();
    let mut last = 0;
    for (byte, logit) in logits.iter().take(VOCABULARY).enumerate() {
        let weight = weight(*logit);
        if weight > 0.0 {
            last = byte;
            if left < weight {
                break;
            }
            left -= weight;
        }
    }
    // Rounding may leave a little at the end: then it is the last byte that can be. Logits that are NaN give byte 0.
    last as u8
}

/// Sampled bytes for a terminal: control characters, which could do something to it, become `?`.
pub fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().map(|c| if c.is_control() && c != '\n' { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_chosen_as_often_as_their_probability_says() {
        let mut logits = vec![f32::NEG_INFINITY; 256];
        (logits[65], logits[66], logits[255]) = (1.0_f32.ln(), 2.0_f32.ln(), 1.0_f32.ln());
        let mut counts = [0; 256];
        (0..4000).for_each(|place| counts[usize::from(choose(&logits, 1.0, f64::from(place) / 4000.0))] += 1);
        assert!((counts[65] - 1000_i32).abs() <= 1 && (counts[66] - 2000_i32).abs() <= 1, "{:?}", &counts[60..70]);
        // Half the temperature squares the ratios: 1 : 4 : 1.
        let low = (0..6000).filter(|place| choose(&logits, 0.5, f64::from(*place) / 6000.0) == 66).count();
        assert!(low.abs_diff(4000) <= 1, "{low}");
        assert_eq!(choose(&logits, 1.0, 1.0), 255);
        assert_eq!(choose(&[f32::NAN; 256], 1.0, 0.5), 0);
    }

    #[test]
    fn what_could_move_the_cursor_is_not_printed() {
        assert_eq!(printable(b"a\nb\x1b[2J\r\xff"), "a\nb?[2J?\u{fffd}");
    }
}

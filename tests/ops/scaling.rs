//! The loss scaler against the reference and through serialisation.

use annulus::ops::GradScaler;
use annulus::reference;
use proptest::prelude::*;

proptest! {
    /// Long runs of good steps with overflows strewn in, from any power of two.
    #[test]
    fn follows_the_reference(exponent in -126i32..=126, overflows in prop::collection::vec(0usize..6000, 0..6)) {
        let initial = 2f32.powi(exponent);
        let mut scaler = GradScaler::new(initial, 2.0, 0.5, 2000).unwrap();
        let (mut scale, mut good_steps) = (initial, 0);
        for step in 0..6000 {
            let found_inf = overflows.contains(&step);
            scaler.update(found_inf);
            (scale, good_steps) = reference::scaler_update(scale, good_steps, found_inf);
            prop_assert_eq!((scaler.scale(), scaler.good_steps()), (scale, good_steps));
            prop_assert_eq!(scaler.inv_scale(), 1.0 / scale);
        }
    }
}

#[test]
fn the_scale_stays_usable_for_ever() {
    let mut scaler = GradScaler::default();
    for _ in 0..1000 {
        scaler.update(true);
    }
    assert!(scaler.scale() > 0.0 && scaler.inv_scale().is_finite());
    let mut scaler = GradScaler::new(1.0, 2.0, 0.5, 1).unwrap();
    for _ in 0..1000 {
        scaler.update(false);
    }
    assert!(scaler.scale().is_finite() && scaler.inv_scale().is_normal());
}

#[test]
fn defaults_are_those_of_pytorch_and_disabled_never_moves() {
    assert_eq!(GradScaler::default().scale(), 65536.0);
    let mut disabled = GradScaler::disabled();
    for found_inf in [true, false, true] {
        disabled.update(found_inf);
    }
    assert_eq!((disabled.scale(), disabled.inv_scale(), disabled.is_enabled()), (1.0, 1.0, false));
}

#[test]
fn a_checkpoint_brings_it_back_and_a_corrupt_one_is_refused() {
    let mut scaler = GradScaler::default();
    scaler.update(true);
    scaler.update(false);
    let text = serde_json::to_string(&scaler).unwrap();
    let back: GradScaler = serde_json::from_str(&text).unwrap();
    assert_eq!(back, scaler);
    back.check().unwrap();
    for (from, to) in [("32768.0", "0.0"), ("32768.0", "-2.0"), ("\"good_steps\":1", "\"good_steps\":2000")] {
        let corrupt = text.replace(from, to);
        assert_ne!(corrupt, text);
        assert!(serde_json::from_str::<GradScaler>(&corrupt).unwrap().check().is_err(), "{corrupt}");
    }
    assert!(GradScaler::new(f32::NAN, 2.0, 0.5, 2000).is_err());
    assert!(GradScaler::new(1.0, 1.0, 0.5, 2000).is_err());
    assert!(GradScaler::new(1.0, 2.0, 1.0, 2000).is_err());
    assert!(GradScaler::new(1.0, 2.0, 0.5, 0).is_err());
}

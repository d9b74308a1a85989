//! What options are where nobody sets them: the figures that the documentation and RELIABILITY.md give.

use std::time::Duration;

use annulus::collective::Partials;
use annulus::strategy::{Accelerator, Nonfinite, Precision, StrategyOptions};
use annulus::world::WorldOptions;

#[test]
fn defaults_are_those_of_the_documentation() {
    let documented = WorldOptions {
        init_timeout: Duration::from_secs(60),
        timeout: Duration::from_secs(600),
        warn_after: Duration::from_secs(5),
        heartbeat_limit: Some(Duration::from_millis(500)),
        arena_bytes: 64 << 30,
    };
    assert_eq!(WorldOptions::default(), documented);

    let options = StrategyOptions::default();
    assert_eq!(options.world, documented);
    // As PyTorch's DistributedDataParallel: 25 MiB, and 1 MiB for the first.
    assert_eq!((options.bucket_bytes, options.first_bucket_bytes), (25 << 20, 1 << 20));
    assert_eq!((options.accelerator, options.precision), (Accelerator::Auto, Precision::F32True));
    assert_eq!((options.gradient_dtype, options.stochastic_rounding, options.seed), (None, false, 0));
    assert_eq!(options.scaler.scale(), 65536.0);
    assert_eq!((options.collective.algorithm, options.collective.timeout), (None, None));
    assert_eq!(options.collective.partials, Partials::F32);
    assert_eq!(Nonfinite::default(), Nonfinite::SkipStep);
}

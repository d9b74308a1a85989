//! The loss curve, as SVG and PNG.

use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::failure::Failure;

const SIZE: (u32, u32) = (960, 540);
/// Name under which the font of the program is known to plotters. In the SVG any sans-serif of the viewer will do.
const FONT: &str = "sans-serif";
const TRAIN: RGBColor = RGBColor(31, 119, 180);
const VALIDATION: RGBColor = RGBColor(214, 69, 65);
const GRID: RGBColor = RGBColor(225, 228, 232);
const INK: RGBColor = RGBColor(60, 64, 72);

/// What is drawn: `(step, loss)`, in order of steps.
#[derive(Debug, Clone, Default)]
pub struct LossCurve {
    /// Loss of each step's batch.
    pub train: Vec<(u64, f64)>,
    /// Loss on the validation text.
    pub validation: Vec<(u64, f64)>,
}

impl LossCurve {
    /// Writes `loss.svg` and `loss.png` into `folder`.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn write(&self, folder: &Path) -> Result<(), Failure> {
        static FONT_REGISTERED: Once = Once::new();
        // A bare machine has no fonts; the picture brings its own. (A second registration would only replace it.)
        FONT_REGISTERED.call_once(|| {
            let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
        });
        let svg = folder.join("loss.svg");
        self.draw(SVGBackend::new(&svg, SIZE).into_drawing_area()).map_err(Failure::file(&svg))?;
        let png = folder.join("loss.png");
        self.draw(BitMapBackend::new(&png, SIZE).into_drawing_area()).map_err(Failure::file(&png))
    }

    /// The range of the losses with a little room, and the number of steps.
    fn ranges(&self) -> (std::ops::Range<f64>, u64) {
        let points = || self.train.iter().chain(&self.validation).filter(|(_, loss)| loss.is_finite());
        let low = points().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
        let high = points().map(|(_, loss)| *loss).fold(f64::NEG_INFINITY, f64::max);
        let steps = points().map(|(step, _)| *step).max().unwrap_or(1).max(1);
        if low > high { (0.0..1.0, steps) } else { ((low - 0.1).max(0.0)..high + 0.1, steps) }
    }

    fn draw<DB: DrawingBackend>(&self, area: DrawingArea<DB, Shift>) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>>
    where
        DB::ErrorType: 'static,
    {
        let (losses, steps) = self.ranges();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption("Loss", (FONT, 24).into_font().color(&INK))
            .margin(20)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(0..steps, losses)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style((FONT, 16).into_font().color(&INK))
            .axis_desc_style((FONT, 18).into_font().color(&INK))
            .x_desc("step")
            .y_desc("nats per byte")
            .y_label_formatter(&|loss| format!("{loss:.1}"))
            .draw()?;

        let finite =
            |points: &[(u64, f64)]| points.iter().copied().filter(|(_, loss)| loss.is_finite()).collect::<Vec<_>>();
        chart.draw_series(LineSeries::new(finite(&self.train), TRAIN.mix(0.4)))?;
        chart
            .draw_series(LineSeries::new(smoothed(&finite(&self.train)), TRAIN.stroke_width(2)))?
            .label("training, smoothed")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], TRAIN.stroke_width(2)));
        let validation = finite(&self.validation);
        chart
            .draw_series(LineSeries::new(validation.clone(), VALIDATION.stroke_width(2)))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], VALIDATION.stroke_width(2)));
        chart.draw_series(validation.into_iter().map(|point| Circle::new(point, 3, VALIDATION.filled())))?;
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(12)
            .legend_area_size(34)
            .background_style(WHITE.mix(0.9))
            .border_style(GRID)
            .label_font((FONT, 16).into_font().color(&INK))
            .draw()?;
        area.present()
    }
}

/// Means over windows around each point: up to a twentieth of the curve wide, narrower at its ends, where the loss falls fast
/// and where there is nothing to look ahead to.
fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let mut sums = vec![0.0];
    sums.extend(points.iter().scan(0.0, |sum, (_, loss)| {
        *sum += loss;
        Some(*sum)
    }));
    let mean = |at: usize| {
        let half = (points.len() / 40).min(at / 3).min(points.len() - 1 - at);
        (sums[at + half + 1] - sums[at - half]) / (2 * half + 1) as f64
    };
    points.iter().enumerate().map(|(at, (step, _))| (*step, mean(at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(curve: &LossCurve) -> (String, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        curve.write(folder.path()).unwrap();
        let read = |name| std::fs::read(folder.path().join(name)).unwrap();
        (String::from_utf8(read("loss.svg")).unwrap(), read("loss.png"))
    }

    #[test]
    fn labels_and_lines_are_in_both_pictures() {
        let train: Vec<_> = (1..=300).map(|step| (step, 1.5 + 4.0 / step as f64)).collect();
        let validation = vec![(100, 1.7), (200, 1.6), (300, 1.55)];
        let (svg, png) = write(&LossCurve { train: train.clone(), validation });
        for label in ["Loss", "step", "nats per byte", "training, smoothed", "validation"] {
            assert!(svg.contains(label), "{label}");
        }
        assert!(svg.matches("<polyline").count() >= 3 && svg.matches("<circle").count() >= 3);
        assert_eq!(png[1..4], *b"PNG");
        let (_, without) = write(&LossCurve { train, validation: vec![] });
        assert_ne!(png, without, "the validation curve is visible");
    }

    #[test]
    fn odd_curves_are_drawn_all_the_same() {
        for train in [vec![], vec![(1, 2.0)], vec![(1, f64::NAN), (2, f64::INFINITY)], vec![(1, f64::NAN), (2, 3.0)]] {
            write(&LossCurve { train, validation: vec![(0, 3.0)] });
        }
        write(&LossCurve::default());
    }

    #[test]
    fn smoothing_keeps_a_constant_and_the_length() {
        let points: Vec<_> = (0..100).map(|step| (step, 2.0)).collect();
        assert_eq!(smoothed(&points), points);
        assert!(smoothed(&[]).is_empty());
    }
}

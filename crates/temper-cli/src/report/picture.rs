//! A plot as a picture that does not move: SVG or PNG.

use std::ops::Range;
use std::sync::LazyLock;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::{Color, FontStyle, register_font};

use super::thin::{Point, running_mean, thinned};

/// Colours of lines. Any two of them differ, also for eyes that see no red or no green, and each stands out from a
/// white and from a dark page; no more fit in. A test measures it.
pub const PALETTE: [RGBColor; 8] = [
    RGBColor(24, 153, 249),
    RGBColor(255, 96, 23),
    RGBColor(30, 168, 110),
    RGBColor(150, 55, 187),
    RGBColor(162, 79, 0),
    RGBColor(244, 71, 199),
    RGBColor(47, 109, 116),
    RGBColor(58, 72, 255),
];

/// Axes and grid, likewise.
const AXIS: RGBColor = RGBColor(128, 134, 145);

/// Size of a curve on a page, which scales it to its own width.
const ON_PAGE: (u32, u32) = (860, 300);

/// Size of a picture of its own.
const ALONE: (u32, u32) = (1200, 640);

/// Points from which on a noisy series is drawn pale beneath its running mean.
const MANY: usize = 150;

/// The share of a series that its running mean goes over.
const WINDOW: f64 = 1.0 / 30.0;

/// Points up to which each is marked.
const FEW: usize = 24;

/// One line of a curve.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Which of [`PALETTE`].
    pub colour: usize,
    /// For the second of two lines of one colour.
    pub dashed: bool,
    /// Whether many points are drawn beneath their running mean.
    pub noisy: bool,
    /// Its points, from left to right; those that are not finite are left out.
    pub points: Vec<Point>,
}

impl Series {
    /// Whether it is drawn pale beneath its mean.
    pub fn has_mean(&self) -> bool {
        self.noisy && self.points.len() >= MANY
    }
}

/// One drawing, with all its lines on the same axes.
pub struct Curve {
    /// What it shows.
    pub title: String,
    /// The horizontal axis.
    pub x: String,
    /// The vertical axis.
    pub y: String,
    /// The lines.
    pub series: Vec<Series>,
}

/// Axes and lines, for a page that writes title and legend; none without points.
pub fn svg_on_page(curve: &Curve) -> Result<Option<String>> {
    let mut svg = String::new();
    let drawn = axes_and_lines(&SVGBackend::with_string(&mut svg, ON_PAGE).into_drawing_area(), curve)?;
    Ok(drawn.then_some(svg))
}

/// The whole picture, with title and legend, on white.
pub fn svg(curve: &Curve) -> Result<String> {
    let mut svg = String::new();
    whole(&SVGBackend::with_string(&mut svg, ALONE).into_drawing_area(), curve)?;
    Ok(svg)
}

/// The same as the bytes of a PNG file.
pub fn png(curve: &Curve) -> Result<Vec<u8>> {
    let (width, height) = ALONE;
    let mut pixels = vec![0; (width * height * 3) as usize];
    whole(&BitMapBackend::with_buffer(&mut pixels, ALONE).into_drawing_area(), curve)?;
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(bytes)
}

type Area<DB> = DrawingArea<DB, Shift>;

fn whole<DB: DrawingBackend>(area: &Area<DB>, curve: &Curve) -> Result<()>
where
    DB::ErrorType: 'static,
{
    register_letters()?;
    area.fill(&WHITE)?;
    let area = area.margin(16, 12, 12, 12);
    let rest = area.titled(&curve.title, ("sans-serif", 26).into_font())?;
    let rest = legend(&rest, curve)?;
    if !axes_and_lines(&rest, curve)? {
        rest.draw_text("no points", &("sans-serif", 18).into_font().color(&AXIS), (20, 20))?;
    }
    area.present()?;
    Ok(())
}

/// The names of the lines in rows; what is left beneath them.
fn legend<DB: DrawingBackend>(area: &Area<DB>, curve: &Curve) -> Result<Area<DB>>
where
    DB::ErrorType: 'static,
{
    const ROW: i32 = 26;
    const SWATCH: i32 = 28;
    let style = ("sans-serif", 16).into_font().color(&BLACK);
    let mut at = (8, 8);
    for series in &curve.series {
        let width = SWATCH + 8 + area.estimate_text_size(&series.name, &style)?.0 as i32 + 26;
        if at.0 > 8 && at.0 + width > area.dim_in_pixel().0 as i32 {
            at = (8, at.1 + ROW);
        }
        let ends = vec![(at.0, at.1 + 8), (at.0 + SWATCH, at.1 + 8)];
        let line = PALETTE[series.colour % PALETTE.len()].stroke_width(3);
        match series.dashed {
            true => area.draw(&DashedPathElement::new(ends, 7, 5, line))?,
            false => area.draw(&PathElement::new(ends, line))?,
        }
        area.draw_text(&series.name, &style, (at.0 + SWATCH + 8, at.1))?;
        at.0 += width;
    }
    Ok(area.split_vertically(at.1 + ROW).1)
}

/// Draws axes and lines; says whether there was anything to draw.
fn axes_and_lines<DB: DrawingBackend>(area: &Area<DB>, curve: &Curve) -> Result<bool>
where
    DB::ErrorType: 'static,
{
    register_letters()?;
    let columns = area.dim_in_pixel().0 as usize / 2;
    let lines: Vec<Line> = curve.series.iter().map(|series| Line::new(series, columns)).collect();
    let points = || lines.iter().flat_map(|line| &line.points);
    let (Some(x), Some(y)) =
        (padded(points().map(|point| point.0), 0.0), padded(points().map(|point| point.1), 0.06))
    else {
        return Ok(false);
    };
    let upon = upon(&lines, (y.end - y.start) / 300.0);
    let (x_label, y_label) = (label(&x), label(&y));
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(20)
        .x_label_area_size(44)
        .y_label_area_size(66)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(AXIS.mix(0.3))
        .axis_style(AXIS)
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 14))
        .x_desc(&curve.x)
        .y_desc(&curve.y)
        .x_label_formatter(&x_label)
        .y_label_formatter(&y_label)
        .x_labels(10)
        .y_labels(6)
        .draw()?;
    // The more lines there are, the paler what lies beneath their means.
    let pale = 0.35 / (lines.len() as f64).sqrt();
    for (Line { colour, points, mean, dashed }, upon) in lines.iter().zip(&upon) {
        let width = 2 + 3 * upon;
        match (mean.is_empty(), dashed) {
            (false, _) => {
                chart.draw_series(LineSeries::new(points.clone(), colour.mix(pale).stroke_width(1)))?;
            }
            (true, false) => {
                chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(width)))?;
            }
            (true, true) => {
                chart.draw_series(DashedLineSeries::new(points.clone(), 7, 5, colour.stroke_width(width)))?;
            }
        }
        if points.len() <= FEW {
            let radius = 3 + 2 * upon;
            chart.draw_series(points.iter().map(|&point| Circle::new(point, radius, colour.filled())))?;
        }
    }
    // The means go on top of every pale line.
    for (Line { colour, mean, dashed, .. }, upon) in lines.into_iter().zip(upon) {
        let style = colour.stroke_width(2 + 3 * upon);
        match dashed {
            true => chart.draw_series(DashedLineSeries::new(mean, 7, 5, style))?,
            false => chart.draw_series(LineSeries::new(mean, style))?,
        };
    }
    area.present()?;
    Ok(true)
}

/// A series as it is drawn.
struct Line {
    colour: RGBColor,
    dashed: bool,
    points: Vec<Point>,
    /// The running mean of a long noisy series.
    mean: Vec<Point>,
}

impl Line {
    fn new(series: &Series, columns: usize) -> Self {
        let finite = |&(x, y): &Point| x.is_finite() && y.is_finite();
        let points: Vec<_> = series.points.iter().copied().filter(finite).collect();
        let mean = match series.has_mean() {
            true => thinned(&running_mean(&points, WINDOW), columns),
            false => Vec::new(),
        };
        let colour = PALETTE[series.colour % PALETTE.len()];
        Line { colour, dashed: series.dashed, points: thinned(&points, columns), mean }
    }

    /// What of it one looks at.
    fn seen(&self) -> &[Point] {
        if self.mean.is_empty() { &self.points } else { &self.mean }
    }
}

/// How many later lines lie upon each, nowhere farther from it than `near`: it is drawn wider, and shows on both sides of
/// them.
fn upon(lines: &[Line], near: f64) -> Vec<u32> {
    let drawn: Vec<&[Point]> = lines.iter().map(Line::seen).collect();
    let lies = |one: &[Point], other: &[Point]| {
        let close = |(one, other): (&Point, &Point)| one.0 == other.0 && (one.1 - other.1).abs() <= near;
        one.len() == other.len() && one.iter().zip(other).all(close)
    };
    let later = |(i, one)| drawn[i + 1..].iter().filter(|other| lies(one, other)).count() as u32;
    drawn.iter().copied().enumerate().map(later).collect()
}

/// Gives the drawing library its letters, once.
fn register_letters() -> Result<()> {
    static REGISTERED: LazyLock<bool> = LazyLock::new(|| {
        register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT).is_ok()
    });
    REGISTERED.then_some(()).ok_or_else(|| anyhow!("the font of pictures cannot be read"))
}

/// The range of the values with a share of it added at both ends, never an empty one; none without values.
fn padded(values: impl Iterator<Item = f64>, share: f64) -> Option<Range<f64>> {
    let (low, high) = values
        .map(|value| (value, value))
        .reduce(|(low, high), (value, _)| (low.min(value), high.max(value)))?;
    let padding =
        if high > low { (high - low) * share } else { 0.1 * if high == 0.0 { 1.0 } else { high.abs() } };
    Some(low - padding..high + padding)
}

/// How the values of an axis are written: with as many digits as tell its marks apart.
fn label(range: &Range<f64>) -> impl Fn(&f64) -> String + use<> {
    let span = range.end - range.start;
    let decimals = (1.0 - span.log10().floor()).max(0.0) as usize;
    move |&value| match value {
        _ if value.abs() < span * 1e-6 => "0".into(),
        _ if decimals > 4 && value.abs() < 0.01 => format!("{value:.1e}"),
        _ => format!("{value:.decimals$}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_tell_marks_apart() {
        assert_eq!([0.0, 500.0].map(|value| label(&(0.0..2999.0))(&value)), ["0", "500"]);
        assert_eq!([-1e-17, 0.2].map(|value| label(&(-0.1..0.5))(&value)), ["0", "0.20"]);
        assert_eq!([5e-6, 2e-5].map(|value| label(&(0.0..2e-5))(&value)), ["5.0e-6", "2.0e-5"]);
    }

    #[test]
    fn lines_beneath_others_are_found() {
        let line = |values: [f64; 3]| Line {
            colour: PALETTE[0],
            dashed: false,
            points: values.iter().enumerate().map(|(x, &y)| (x as f64, y)).collect(),
            mean: Vec::new(),
        };
        let lines = [[1.0, 2.0, 3.0], [1.0, 2.5, 3.0], [1.0, 2.0, 3.001], [1.0, 2.001, 3.0]].map(line);
        assert_eq!(upon(&lines, 0.01), [2, 0, 1, 0]);
        assert_eq!(upon(&lines, 0.0), [0; 4]);
    }

    fn linear(RGBColor(red, green, blue): RGBColor) -> [f64; 3] {
        [red, green, blue].map(|value| {
            let value = f64::from(value) / 255.0;
            if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        })
    }

    fn times(matrix: [[f64; 3]; 3], vector: [f64; 3]) -> [f64; 3] {
        matrix.map(|row| row.iter().zip(vector).map(|(left, right)| left * right).sum())
    }

    /// OKLab, in which distances are about as large as differences look.
    fn oklab(colour: [f64; 3]) -> [f64; 3] {
        let cones = times(
            [
                [0.412_221, 0.536_333, 0.051_446],
                [0.211_903, 0.680_700, 0.107_397],
                [0.088_302, 0.281_719, 0.629_979],
            ],
            colour.map(|value| value.max(0.0)),
        );
        times(
            [
                [0.210_454, 0.793_618, -0.004_072],
                [1.977_998, -2.428_592, 0.450_594],
                [0.025_904, 0.782_772, -0.808_676],
            ],
            cones.map(f64::cbrt),
        )
    }

    #[test]
    fn any_two_colours_can_be_told_apart() {
        const ALL: [[f64; 3]; 3] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
        // Machado, Oliveira and Fernandes (2009), for eyes without red and without green cones.
        const NO_RED: [[f64; 3]; 3] = [
            [0.152_286, 1.052_583, -0.204_868],
            [0.114_503, 0.786_281, 0.099_216],
            [-0.003_882, -0.048_116, 1.051_998],
        ];
        const NO_GREEN: [[f64; 3]; 3] = [
            [0.367_322, 0.860_646, -0.227_968],
            [0.280_085, 0.672_501, 0.047_413],
            [-0.011_820, 0.042_940, 0.968_881],
        ];
        for (eye, least) in [(ALL, 0.15), (NO_RED, 0.1), (NO_GREEN, 0.1)] {
            let seen = PALETTE.map(|colour| oklab(times(eye, linear(colour))));
            for (at, left) in seen.iter().enumerate() {
                for right in &seen[..at] {
                    let distance: f64 = left.iter().zip(right).map(|(a, b)| (a - b).powi(2)).sum();
                    assert!(distance.sqrt() > least, "{:?}: {}", PALETTE[at], distance.sqrt());
                }
            }
        }
    }

    #[test]
    fn colours_stand_out_from_white_and_from_dark() {
        let light = |colour| {
            let [red, green, blue] = linear(colour);
            0.05 + 0.2126 * red + 0.7152 * green + 0.0722 * blue
        };
        let dark = light(RGBColor(0x15, 0x18, 0x1e));
        for colour in PALETTE {
            assert!(1.05 / light(colour) >= 3.0 && light(colour) / dark >= 3.0, "{colour:?}");
        }
    }
}

//! Plots as SVG.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::number;
use super::statistics::Summary;

/// Okabe and Ito's palette, which is safe for colour-blind readers.
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];
const SIZE: (u32, u32) = (860, 480);
const FONT: &str = "sans-serif";

/// Medians with quartiles, on a logarithmic axis.
pub struct BarChart {
    pub file: &'static str,
    pub title: &'static str,
    pub axis: &'static str,
    pub bars: Vec<(String, Vec<f64>)>,
}

/// Line chart of one quantity against another, on a logarithmic axis.
pub struct LineChart {
    pub file: &'static str,
    pub title: &'static str,
    pub x: &'static str,
    pub y: &'static str,
    /// Number of consecutive lines that share a colour; the first is the thickest.
    pub of_a_colour: usize,
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

pub enum Plot {
    Bars(BarChart),
    Lines(LineChart),
}

impl Plot {
    pub fn title(&self) -> &'static str {
        match self {
            Self::Bars(bars) => bars.title,
            Self::Lines(lines) => lines.title,
        }
    }

    pub fn file(&self) -> &'static str {
        match self {
            Self::Bars(bars) => bars.file,
            Self::Lines(lines) => lines.file,
        }
    }

    pub fn draw(&self, directory: &Path) {
        let file = directory.join(format!("{}.svg", self.file()));
        match self {
            Self::Bars(bars) => bars.draw(&file),
            Self::Lines(lines) => lines.draw(&file),
        }
    }
}

impl BarChart {
    fn draw(&self, file: &Path) {
        let root = SVGBackend::new(file, SIZE).into_drawing_area();
        root.fill(&WHITE).unwrap();
        let summaries: Vec<_> = self.bars.iter().map(|(name, samples)| (name, Summary::of(samples))).collect();
        let (least, most) = decades(summaries.iter().map(|(_, summary)| summary.median()));
        let count = self.bars.len() as f64;
        // Leaves room for the number beside the longest bar.
        let mut chart = ChartBuilder::on(&root)
            .caption(self.title, (FONT, 20))
            .margin(12)
            .margin_left(260)
            .margin_right(24)
            .x_label_area_size(48)
            .build_cartesian_2d((least..most * 3.0).log_scale(), count..0.0)
            .unwrap();
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_desc(self.axis)
            .x_label_formatter(&|value| format!("{value}"))
            .label_style((FONT, 14))
            .draw()
            .unwrap();
        for (at, (name, summary)) in summaries.iter().enumerate() {
            let (top, middle, [lower, median, upper]) = (at as f64, at as f64 + 0.5, summary.quartiles);
            let bar = Rectangle::new([(least, top + 0.2), (median, top + 0.8)], COLOURS[0].mix(0.75).filled());
            let quartiles = PathElement::new([(lower, middle), (upper, middle)], BLACK.stroke_width(2));
            chart.draw_series([bar]).unwrap();
            chart.draw_series([quartiles]).unwrap();
            let style = |side| (FONT, 14).into_text_style(&root).pos(Pos::new(side, VPos::Center));
            let (left, y) = chart.backend_coord(&(least, middle));
            root.draw(&Text::new(name.as_str(), (left - 8, y), style(HPos::Right))).unwrap();
            let (right, _) = chart.backend_coord(&(upper.max(median), middle));
            root.draw(&Text::new(number(median), (right + 6, y), style(HPos::Left))).unwrap();
        }
        root.present().unwrap();
    }
}

impl LineChart {
    fn draw(&self, file: &Path) {
        let root = SVGBackend::new(file, SIZE).into_drawing_area();
        root.fill(&WHITE).unwrap();
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let widest = points().map(|point| point.0).fold(0.0, f64::max);
        let (least, most) = decades(points().map(|point| point.1));
        // Leaves room for the names above the lines.
        let mut chart = ChartBuilder::on(&root)
            .caption(self.title, (FONT, 20))
            .margin(12)
            .margin_right(28)
            .x_label_area_size(48)
            .y_label_area_size(72)
            .build_cartesian_2d(0.0..widest, (least..most * 10.0).log_scale())
            .unwrap();
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .x_label_formatter(&|value| format!("{value}"))
            .y_label_formatter(&|value| format!("{value}"))
            .label_style((FONT, 14))
            .draw()
            .unwrap();
        for (at, (name, points)) in self.lines.iter().enumerate() {
            let colour = COLOURS[at / self.of_a_colour];
            let style = colour.stroke_width(if at % self.of_a_colour == 0 { 3 } else { 1 });
            let line = chart.draw_series(LineSeries::new(points.iter().copied(), style)).unwrap();
            line.label(name.as_str()).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, colour.filled()))).unwrap();
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 14))
            .draw()
            .unwrap();
        root.present().unwrap();
    }
}

/// The powers of ten that enclose all values.
fn decades(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let least = values.clone().fold(f64::MAX, f64::min);
    let most = values.fold(0.0, f64::max);
    (10f64.powf(least.log10().floor()), 10f64.powf(most.log10().ceil()))
}

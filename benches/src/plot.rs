//! Plots latency during a refresh, in colours that are readable on light and dark backgrounds.

use std::{ops::Range, time::Duration};

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/plots/refresh.svg");

const GREY: RGBColor = RGBColor(118, 128, 140);
const BLUE: RGBColor = RGBColor(56, 132, 244);
const ORANGE: RGBColor = RGBColor(222, 124, 32);
const FONT: &str = "system-ui, sans-serif";

/// The range shown, in milliseconds since the refresh began.
const SHOWN: Range<i32> = -50..261;
/// The part of that range in which the curves are labelled.
const LABELS: Range<i32> = 12..130;

/// Latency in µs over milliseconds since the refresh began.
#[derive(Debug)]
pub struct Curve {
    pub name: &'static str,
    pub points: Vec<(i32, f64)>,
}

/// Where the label of a curve is.
enum Label {
    Above,
    Below,
}

/// Draws three curves, ours first and the bare service last, to `benches/plots/refresh.svg`.
///
/// # Panics
///
/// If the file cannot be written.
pub fn latency_during_refresh(curves: &[Curve; 3], refresh_takes: Duration) {
    let area = SVGBackend::new(PATH, (780, 430)).into_drawing_area();
    let refresh_takes = refresh_takes.as_millis() as i32;
    let text = |size: i32, colour: &RGBColor, anchor| (FONT, size).into_font().color(colour).pos(anchor);
    let left = Pos::new(HPos::Left, VPos::Center);
    for (line, y, size) in [
        ("Latency of requests while a token is refreshed", 18, 17),
        ("99th percentile of the requests due within two milliseconds, median of all rounds", 42, 13),
    ] {
        area.draw(&Text::new(line, (20, y), text(size, &GREY, left))).expect("the title is drawn");
    }
    let mut chart = ChartBuilder::on(&area)
        .margin_top(62)
        .margin_left(10)
        .margin_right(22)
        .margin_bottom(8)
        .x_label_area_size(44)
        .y_label_area_size(62)
        .build_cartesian_2d(SHOWN, (0.1..1e6).log_scale())
        .expect("the chart is built");
    chart
        .configure_mesh()
        .x_desc("ms since the refresh began")
        .x_labels(8)
        .y_labels(8)
        .y_label_formatter(&|micros| format_latency(*micros))
        .label_style((FONT, 12).into_font().color(&GREY))
        .axis_desc_style((FONT, 13).into_font().color(&GREY))
        .axis_style(GREY.mix(0.6))
        .bold_line_style(GREY.mix(0.22))
        .light_line_style(TRANSPARENT)
        .draw()
        .expect("the axes are drawn");
    let during = Rectangle::new([(0, 0.1), (refresh_takes, 1e6)], GREY.mix(0.12).filled());
    chart.draw_series([during]).expect("the refresh is drawn");
    let caption = format!("a refresh runs, {refresh_takes} ms");
    let caption_style = text(12, &GREY, Pos::new(HPos::Center, VPos::Top));
    let caption = Text::new(caption, (refresh_takes / 2, 7e5), caption_style);
    chart.draw_series([caption]).expect("the refresh is labelled");

    let styles = [(BLUE, 2, Label::Above), (ORANGE, 2, Label::Below), (GREY, 1, Label::Below)];
    for (curve, (colour, width, label)) in curves.iter().zip(styles).rev() {
        let points: Vec<_> = curve.points.iter().copied().filter(|(at, _)| SHOWN.contains(at)).collect();
        let labelled = points.iter().filter(|(at, _)| LABELS.contains(at)).map(|(_, micros)| *micros);
        let height = match label {
            Label::Above => labelled.fold(0.1, f64::max) * 2.2,
            Label::Below => labelled.fold(1e6, f64::min) / 2.2,
        };
        chart.draw_series(LineSeries::new(points, colour.stroke_width(width))).expect("the curve is drawn");
        let name = Text::new(curve.name, (LABELS.start, height.clamp(0.15, 5e5)), text(14, &colour, left));
        chart.draw_series([name]).expect("the curve is labelled");
    }
    drop(chart);
    area.present().expect("benches/plots/refresh.svg is written");
}

fn format_latency(micros: f64) -> String {
    match micros {
        ..1e3 => format!("{micros} µs"),
        ..1e6 => format!("{:.0} ms", micros / 1e3),
        _ => format!("{:.0} s", micros / 1e6),
    }
}

//! Plots, readable on white and on dark: no ground of their own, and colours in between.

use std::{ops::Range, time::Duration};

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const CONTENTION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/plots/contention.svg");
const RENEWAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/plots/renewal.svg");

const INK: RGBColor = RGBColor(118, 128, 140);
const BLUE: RGBColor = RGBColor(56, 132, 244);
const ORANGE: RGBColor = RGBColor(222, 124, 32);
const FONT: &str = "system-ui, sans-serif";

/// Requests per second of a contender, in millions.
#[derive(Debug)]
pub struct Pair {
    pub name: &'static str,
    pub is_ours: bool,
    pub one: f64,
    pub two: f64,
    pub times: f64,
}

/// Bars of one and of two threads, and a word at the end: how many times one two are.
///
/// # Panics
///
/// When it cannot be written.
pub fn contention(pairs: &[Pair], bare: f64) {
    const ROW: i32 = 44;
    const LEFT: i32 = 250;
    const RIGHT: i32 = 690;
    let height = 108 + ROW * pairs.len() as i32;
    let area = SVGBackend::new(CONTENTION, (780, height as u32)).into_drawing_area();
    let most = pairs.iter().map(|pair| pair.one.max(pair.two)).fold(1.0, f64::max);
    let width = |rate: f64| LEFT + (rate / most * f64::from(RIGHT - LEFT)) as i32;

    write(
        &area,
        "Requests per second with one and two threads that share an engine",
        (20, 18),
        17,
        HPos::Left,
        INK,
    );
    let words = format!("in millions; at the end, two threads beside one (the bare service: {bare:.2} ×)");
    write(&area, &words, (20, 42), 13, HPos::Left, INK);
    for (at, pair) in pairs.iter().enumerate() {
        let top = 72 + ROW * at as i32;
        let colour = if pair.is_ours { BLUE } else { INK };
        write(
            &area,
            pair.name,
            (LEFT - 12, top + 15),
            13,
            HPos::Right,
            if pair.is_ours { BLUE } else { INK },
        );
        bar(&area, (LEFT, top), (width(pair.one), top + 13), colour.mix(0.45));
        bar(&area, (LEFT, top + 15), (width(pair.two), top + 30), colour.mix(0.95));
        write(&area, &format!("{:.1}", pair.one), (width(pair.one) + 6, top + 7), 11, HPos::Left, INK);
        let two = format!("{:.1}  ·  {:.2} ×", pair.two, pair.times);
        write(&area, &two, (width(pair.two) + 6, top + 22), 12, HPos::Left, colour);
    }
    let key = height - 22;
    bar(&area, (LEFT, key - 6), (LEFT + 18, key + 6), INK.mix(0.45));
    write(&area, "1 thread", (LEFT + 26, key), 12, HPos::Left, INK);
    bar(&area, (LEFT + 110, key - 6), (LEFT + 128, key + 6), INK.mix(0.95));
    write(&area, "2 threads", (LEFT + 136, key), 12, HPos::Left, INK);
    area.present().expect("benches/plots/contention.svg is written");
}

/// Latency in µs over ms since the beginning of the renewal.
#[derive(Debug)]
pub struct Curve {
    pub name: &'static str,
    pub points: Vec<(i32, f64)>,
}

/// Curves, the first of which is ours, over the time of a renewal that takes so long.
///
/// # Panics
///
/// When it cannot be written.
pub fn renewal(curves: &[Curve], takes: Duration) {
    const FROM: i32 = -50;
    const TO: i32 = 260;
    let area = SVGBackend::new(RENEWAL, (780, 430)).into_drawing_area();
    let takes = takes.as_millis() as i32;
    write(&area, "Latency of requests while a token is renewed", (20, 18), 17, HPos::Left, INK);
    write(
        &area,
        "99th percentile of the requests due within two milliseconds, the median of all rounds",
        (20, 42),
        13,
        HPos::Left,
        INK,
    );
    let mut chart = ChartBuilder::on(&area)
        .margin_top(62)
        .margin_left(10)
        .margin_right(22)
        .margin_bottom(8)
        .x_label_area_size(44)
        .y_label_area_size(62)
        .build_cartesian_2d(FROM..TO, (0.1..1e6).log_scale())
        .expect("a chart");
    chart
        .configure_mesh()
        .x_desc("ms since the renewal began")
        .x_labels(8)
        .y_labels(8)
        .y_label_formatter(&|micros| latency(*micros))
        .label_style((FONT, 12).into_font().color(&INK))
        .axis_desc_style((FONT, 13).into_font().color(&INK))
        .axis_style(INK.mix(0.6))
        .bold_line_style(INK.mix(0.22))
        .light_line_style(TRANSPARENT)
        .draw()
        .expect("the axes");
    let while_it_runs = Rectangle::new([(0, 0.1), (takes, 1e6)], INK.mix(0.12).filled());
    chart.draw_series([while_it_runs]).expect("the renewal");
    let label = (FONT, 12).into_font().color(&INK).pos(Pos::new(HPos::Center, VPos::Top));
    chart
        .draw_series([Text::new(format!("a renewal runs, {takes} ms"), (takes / 2, 7e5), label)])
        .expect("its name");

    for (curve, (colour, width, place)) in curves.iter().zip(STYLES).rev() {
        let points: Vec<_> =
            curve.points.iter().copied().filter(|(at, _)| (FROM..=TO).contains(at)).collect();
        let beside = points.iter().filter(|(at, _)| NAMES.contains(at)).map(|(_, micros)| *micros);
        let height = match place {
            Place::Above => beside.fold(0.1, f64::max) * 2.2,
            Place::Below => beside.fold(1e6, f64::min) / 2.2,
        };
        chart.draw_series(LineSeries::new(points, colour.stroke_width(width))).expect("a curve");
        let name = (FONT, 14).into_font().color(&colour).pos(Pos::new(HPos::Left, VPos::Center));
        let name = Text::new(curve.name, (NAMES.start, height.clamp(0.15, 5e5)), name);
        chart.draw_series([name]).expect("its name");
    }
    drop(chart);
    area.present().expect("benches/plots/renewal.svg is written");
}

/// The ms over which the names of the curves stand.
const NAMES: Range<i32> = 12..130;

#[derive(Clone, Copy)]
enum Place {
    Above,
    Below,
}

/// Of ours, of what holds requests, and of the bare service: the colour, the width, and where the name stands.
const STYLES: [(RGBColor, u32, Place); 3] =
    [(BLUE, 2, Place::Above), (ORANGE, 2, Place::Below), (INK, 1, Place::Below)];

fn latency(micros: f64) -> String {
    match micros {
        ..1.0 => format!("{micros:.1} µs"),
        ..1e3 => format!("{micros:.0} µs"),
        ..1e6 => format!("{:.0} ms", micros / 1e3),
        _ => format!("{:.0} s", micros / 1e6),
    }
}

fn write(area: &Area<'_>, words: &str, at: (i32, i32), size: i32, anchor: HPos, colour: RGBColor) {
    let style = (FONT, size).into_font().color(&colour).pos(Pos::new(anchor, VPos::Center));
    area.draw(&Text::new(words, at, style)).expect("words");
}

fn bar(area: &Area<'_>, from: (i32, i32), to: (i32, i32), colour: RGBAColor) {
    area.draw(&Rectangle::new([from, to], colour.filled())).expect("a bar");
}

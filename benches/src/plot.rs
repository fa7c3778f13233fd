//! Plots.

#[derive(Debug)]
pub struct Pair {
    pub name: &'static str,
    pub one: f64,
    pub two: f64,
    pub ratio: f64,
}
pub fn contention(_: &[Pair], _: f64) {}
#[derive(Debug)]
pub struct Curve {
    pub name: &'static str,
    pub points: Vec<(i32, f64)>,
}
pub fn renewal(_: &[Curve], _: std::time::Duration) {}

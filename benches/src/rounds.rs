//! Interleaved rounds: each contender takes a turn in every round, so that drift of the machine affects all alike.

use std::time::Instant;

use http::Request;

use crate::{requests::Body, serve::Serve};

/// One sample of each contender per round.
#[derive(Debug)]
pub struct Samples(Vec<Vec<f64>>);

/// Measures each contender once per round; each round starts with another one.
pub fn interleave(rounds: usize, contenders: usize, mut measure: impl FnMut(usize) -> f64) -> Samples {
    let mut samples = vec![Vec::with_capacity(rounds); contenders];
    for round in 0..rounds {
        for turn in 0..contenders {
            let contender = (round + turn) % contenders;
            samples[contender].push(measure(contender));
        }
    }
    Samples(samples)
}

impl Samples {
    #[must_use]
    pub fn median(&self, contender: usize) -> f64 {
        median(&self.0[contender])
    }

    #[must_use]
    pub fn largest(&self, contender: usize) -> f64 {
        self.0[contender].iter().copied().fold(f64::NAN, f64::max)
    }

    /// The median of the ratios `contender / other` within each round.
    #[must_use]
    pub fn ratio(&self, contender: usize, other: usize) -> f64 {
        let pairs = self.0[contender].iter().zip(&self.0[other]);
        median(&pairs.map(|(one, other)| one / other).collect::<Vec<_>>())
    }

    /// The median of the differences `contender - other` within each round.
    #[must_use]
    pub fn difference(&self, contender: usize, other: usize) -> f64 {
        let pairs = self.0[contender].iter().zip(&self.0[other]);
        median(&pairs.map(|(one, other)| one - other).collect::<Vec<_>>())
    }
}

/// Returns the time per request in nanoseconds.
pub fn nanos_per_request(service: &mut dyn Serve, requests: Vec<Request<Body>>) -> f64 {
    let count = requests.len();
    let started = Instant::now();
    service.answer_all(requests);
    started.elapsed().as_nanos() as f64 / count as f64
}

#[must_use]
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

/// Returns the nearest-rank percentile, or NaN if no value was measured.
#[must_use]
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut values: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
    values.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

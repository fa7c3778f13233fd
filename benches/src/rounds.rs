//! Rounds in which every contender has its turn, so that drift of the machine meets all of them alike.

/// What was measured of each contender, round by round.
#[derive(Debug)]
pub struct Samples(Vec<Vec<f64>>);

/// Measures each of `contenders` once in each round; who begins changes.
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

    /// How many times the other's it is: the median of the ratios within each round.
    #[must_use]
    pub fn ratio(&self, contender: usize, other: usize) -> f64 {
        let pairs = self.0[contender].iter().zip(&self.0[other]);
        median(&pairs.map(|(one, other)| one / other).collect::<Vec<_>>())
    }

    /// The median of the differences within each round.
    #[must_use]
    pub fn difference(&self, contender: usize, other: usize) -> f64 {
        let pairs = self.0[contender].iter().zip(&self.0[other]);
        median(&pairs.map(|(one, other)| one - other).collect::<Vec<_>>())
    }
}

#[must_use]
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

/// The value that so many percent do not exceed.
#[must_use]
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    // Where nothing could be measured, there is no number.
    let mut values: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
    values.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

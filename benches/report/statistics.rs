//! Statistics of samples.

/// Quartiles and extremes of samples, and their number.
#[derive(Clone)]
pub struct Summary {
    pub count: usize,
    pub least: f64,
    pub quartiles: [f64; 3],
    pub most: f64,
}

impl Summary {
    pub fn of(samples: &[f64]) -> Self {
        Self {
            count: samples.len(),
            least: quantile(samples, 0.0),
            quartiles: [0.25, 0.5, 0.75].map(|share| quantile(samples, share)),
            most: quantile(samples, 1.0),
        }
    }

    pub fn median(&self) -> f64 {
        self.quartiles[1]
    }
}

pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The `share` quantile, linearly interpolated.
pub fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

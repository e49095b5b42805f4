//! Summaries of repeated measurements.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Of one quantity over the repetitions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Half of the values are below.
    pub median: f64,
    /// Their mean.
    pub mean: f64,
    /// The least.
    pub min: f64,
    /// A tenth of the values is below.
    pub p10: f64,
    /// A tenth of the values is above.
    pub p90: f64,
    /// The greatest.
    pub max: f64,
    /// In the order in which they were measured.
    pub all: Vec<f64>,
}

impl Summary {
    /// The percentiles that vLLM reports of a latency.
    pub const PERCENTILES: [u32; 6] = [10, 25, 50, 75, 90, 99];

    /// `None` without values.
    pub fn of(values: Vec<f64>) -> Option<Self> {
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let mean = sorted.iter().sum::<f64>() / sorted.len() as f64;
        let at = |q| quantile(&sorted, q);
        Some(Self { median: at(0.5), mean, min, p10: at(0.1), p90: at(0.9), max, all: values })
    }

    /// Quantiles by name, as vLLM reports them.
    pub fn percentiles(&self) -> BTreeMap<String, f64> {
        Self::PERCENTILES.map(|p| (p.to_string(), self.percentile(f64::from(p)))).into()
    }

    /// The value below which `p` percent are. [0, 100]
    pub fn percentile(&self, p: f64) -> f64 {
        let mut sorted = self.all.clone();
        sorted.sort_by(f64::total_cmp);
        quantile(&sorted, p / 100.0)
    }

    /// Standard deviation of the values (not of an estimate: divided by their number).
    pub fn std(&self) -> f64 {
        let squares = self.all.iter().map(|x| (x - self.mean).powi(2)).sum::<f64>();
        (squares / self.all.len() as f64).sqrt()
    }
}

/// Linear interpolation between the order statistics; `sorted` is not empty.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_statistics() {
        let s = Summary::of(vec![4.0, 1.0, 3.0, 2.0, 5.0]).unwrap();
        assert_eq!((s.median, s.mean, s.min, s.max), (3.0, 3.0, 1.0, 5.0));
        assert!((s.p10 - 1.4).abs() < 1e-12 && (s.p90 - 4.6).abs() < 1e-12);
        assert_eq!(s.all[0], 4.0);
        assert_eq!(s.percentiles()["50"], 3.0);
        assert!((s.std() - 2f64.sqrt()).abs() < 1e-12);
        assert_eq!(Summary::of(vec![2.0]).unwrap().p90, 2.0);
        assert_eq!(Summary::of(vec![]), None);
    }
}

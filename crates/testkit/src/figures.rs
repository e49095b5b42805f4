//! Distances between rows of logits, as xtask/golden/figures.py computes them.

/// Largest and root-mean-square difference, and KL(want || got), of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowFigures {
    /// Largest absolute difference of logits.
    pub max: f64,
    /// Root mean square of the differences.
    pub rms: f64,
    /// Of the two softmaxes, in nats.
    pub kl: f64,
}

/// The figures of `got` against `want`.
pub fn row(got: &[f32], want: &[f32]) -> RowFigures {
    assert_eq!(got.len(), want.len());
    let diffs = got.iter().zip(want).map(|(g, w)| f64::from(*g) - f64::from(*w));
    let (mut max, mut squares) = (0f64, 0f64);
    for d in diffs {
        max = worse(max, d.abs());
        squares += d * d;
    }
    let (lse_got, lse_want) = (logsumexp(got), logsumexp(want));
    let kl = got.iter().zip(want).map(|(&g, &w)| {
        let (g, w) = (f64::from(g) - lse_got, f64::from(w) - lse_want);
        w.exp() * (w - g)
    });
    RowFigures { max, rms: (squares / got.len() as f64).sqrt(), kl: kl.sum::<f64>().max(0.0) }
}

/// Over rows of equal width: the largest difference, the RMS of all differences, the mean KL.
pub fn pooled(rows: &[RowFigures]) -> RowFigures {
    let mean = |f: fn(&RowFigures) -> f64| rows.iter().map(f).sum::<f64>() / rows.len() as f64;
    RowFigures {
        max: rows.iter().map(|r| r.max).fold(0.0, worse),
        rms: mean(|r| r.rms * r.rms).sqrt(),
        kl: mean(|r| r.kl),
    }
}

/// The larger one; unlike `f64::max` it keeps a NaN.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b <= a { a } else { b }
}

/// Root mean square.
pub fn rms(values: impl IntoIterator<Item = f64>) -> f64 {
    let (n, sum) = values.into_iter().fold((0usize, 0.0), |(n, sum), v| (n + 1, sum + v * v));
    (sum / n as f64).sqrt()
}

/// ln of the sum of exponentials.
pub fn logsumexp(row: &[f32]) -> f64 {
    let max = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
    max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// Index of the largest, the lowest of equals.
pub fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, x)| if *x > row[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_known_rows() {
        let same = row(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]);
        assert_eq!((same.max, same.rms), (0.0, 0.0));
        assert!(same.kl.abs() < 1e-15);
        // A common shift moves every logit and no probability.
        let shifted = row(&[2.0, 3.0, 4.0], &[1.0, 2.0, 3.0]);
        assert_eq!((shifted.max, shifted.rms), (1.0, 1.0));
        assert!(shifted.kl.abs() < 1e-15);
        // p = (1/2, 1/2), q = (2/3, 1/3): KL(p || q) = ln(9/8) / 2.
        let kl = row(&[2f32.ln(), 0.0], &[0.0, 0.0]).kl;
        assert!((kl - (9f64 / 8.0).ln() / 2.0).abs() < 1e-8, "{kl}");
        assert!(row(&[f32::NAN, 0.0], &[0.0, 0.0]).max.is_nan());
        assert!(pooled(&[same, row(&[f32::NAN], &[0.0])]).max.is_nan());
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
    }
}

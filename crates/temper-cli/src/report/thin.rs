//! Long curves with fewer points that look the same: the lowest and the highest of every column of pixels, so that
//! spikes survive, and the running mean.

/// A point: where and how much.
pub type Point = (f64, f64);

/// Both ends, and the lowest and the highest point of each of the columns between; all of them if they are few.
pub fn thinned(points: &[Point], columns: usize) -> Vec<Point> {
    let [first, .., last] = points else { return points.to_vec() };
    if points.len() <= 2 * columns {
        return points.to_vec();
    }
    let outline = by_column(&points[1..points.len() - 1], columns).flat_map(|span| {
        let (lowest, highest) = span.iter().enumerate().fold((0, 0), |(lowest, highest), (at, point)| {
            (
                if point.1 < span[lowest].1 { at } else { lowest },
                if point.1 > span[highest].1 { at } else { highest },
            )
        });
        let both = [lowest.min(highest), lowest.max(highest)];
        both.into_iter().take(if lowest == highest { 1 } else { 2 }).map(|at| span[at])
    });
    std::iter::once(*first).chain(outline).chain([*last]).collect()
}

/// The mean point of each column, for smoothing; all points if they are few.
pub fn means(points: &[Point], columns: usize) -> Vec<Point> {
    if points.len() <= 2 * columns {
        return points.to_vec();
    }
    let mean = |span: &[Point]| {
        let sum = span.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / span.len() as f64, sum.1 / span.len() as f64)
    };
    by_column(points, columns).map(mean).collect()
}

/// Each point's mean with its neighbours; those in the window, which is a share of all points.
pub fn running_mean(points: &[Point], share: f64) -> Vec<Point> {
    let reach = (points.len() as f64 * share / 2.0).round() as usize;
    let mean = |(at, point): (usize, &Point)| {
        let window = &points[at.saturating_sub(reach)..(at + reach + 1).min(points.len())];
        (point.0, window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

/// Points that lie in the same of so many equal columns, together.
fn by_column(points: &[Point], columns: usize) -> impl Iterator<Item = &[Point]> {
    let (low, high) = (points[0].0, points[points.len() - 1].0);
    let column = move |point: &Point| {
        let column = ((point.0 - low) / (high - low) * columns as f64) as usize;
        column.min(columns - 1)
    };
    points.chunk_by(move |left, right| column(left) == column(right))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn extremes_and_ends_survive_in_order(
            steps in prop::collection::vec((1u32..1000, -1e6..1e6f64), 1..3000),
            columns in 1usize..200,
        ) {
            let mut at = 0.0;
            let points: Vec<Point> = steps.iter().map(|&(gap, value)| { at += f64::from(gap); (at, value) }).collect();
            let thin = thinned(&points, columns);
            prop_assert!(thin.len() <= 2 * columns + 2);
            prop_assert!(thin.is_sorted_by(|left, right| left.0 < right.0));
            prop_assert!(thin.iter().all(|point| points.contains(point)));
            prop_assert_eq!((thin.first(), thin.last()), (points.first(), points.last()));
            let extremes = |points: &[Point]| {
                let values = || points.iter().map(|point| point.1);
                (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
            };
            prop_assert_eq!(extremes(&thin), extremes(&points));
            // Every column's own, too: no point is higher or lower than all that is kept near it.
            let width = (at - points[0].0) / columns as f64;
            for point in &points {
                let near: Vec<Point> = thin.iter().copied().filter(|kept| (kept.0 - point.0).abs() <= width).collect();
                let (low, high) = extremes(&near);
                prop_assert!(low <= point.1 && point.1 <= high);
            }
            prop_assert!(means(&points, columns).len() <= (2 * columns).max(columns));
        }
    }

    #[test]
    fn few_points_stay() {
        let points: Vec<Point> = (0..10).map(|x| (f64::from(x), f64::from(x * x))).collect();
        assert_eq!(thinned(&points, 5), points);
        assert_eq!(means(&points, 5), points);
        assert_eq!(thinned(&[], 5), []);
    }

    #[test]
    fn the_mean_of_means_is_the_mean() {
        let points: Vec<Point> = (0..1000).map(|x| (f64::from(x), f64::from(x % 7))).collect();
        let means = means(&points, 100);
        assert_eq!(means.len(), 100);
        assert_eq!(means[0], (4.5, (0..10).map(|x| f64::from(x % 7)).sum::<f64>() / 10.0));
    }

    #[test]
    fn running_means_lie_on_a_straight_line_and_reach_the_ends() {
        let straight: Vec<Point> = (0..600).map(|x| (f64::from(x), f64::from(x))).collect();
        let means = running_mean(&straight, 0.1);
        assert_eq!(means[30..570], straight[30..570]);
        assert_eq!((means[0].0, means[599].0), (0.0, 599.0));
        assert_eq!(running_mean(&straight, 0.0), straight);
    }
}

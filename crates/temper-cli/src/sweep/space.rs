//! The space of a sweep and its points: every combination, points drawn with a seed, or a list.

use temper_kernels::{mix, uniform};

use crate::config::Key;

/// What varies between the runs.
#[derive(Debug)]
pub enum Space {
    /// Every combination of the axes' values, the last axis fastest.
    Grid(Vec<Axis>),
    /// Points drawn at random, no two alike.
    Random {
        /// What is drawn.
        axes: Vec<Axis>,
        /// How many points.
        samples: usize,
        /// Of the draws.
        seed: u64,
    },
    /// Points as they stand in the file.
    List(Vec<Vec<Key>>),
}

/// An option that varies.
#[derive(Debug)]
pub struct Axis {
    /// Its name.
    pub name: String,
    /// Where it stands in the file.
    pub line: usize,
    /// What it takes.
    pub values: Values,
}

/// Values of an option.
#[derive(Debug)]
pub enum Values {
    /// These.
    List(Vec<String>),
    /// Numbers between two ends, each as likely.
    Uniform(f64, f64),
    /// Numbers between two ends, each order of magnitude as likely.
    Log(f64, f64),
    /// Whole numbers from the first to the last, each as likely.
    Whole(u64, u64),
}

/// Draws that may be equal to an earlier one before the space is taken to be exhausted.
const ATTEMPTS: u64 = 1000;

impl Space {
    /// The points, in the order in which they run. Fewer than asked for where the space has no more.
    pub fn points(&self) -> Vec<Vec<Key>> {
        match self {
            Space::Grid(axes) => axes.iter().fold(vec![Vec::new()], |points, axis| {
                let longer = |point: &Vec<Key>| axis.all().map(|key| [&point[..], &[key]].concat()).collect();
                points.iter().flat_map::<Vec<_>, _>(longer).collect()
            }),
            Space::Random { axes, samples, seed } => draw(axes, *samples, *seed),
            Space::List(points) => points.clone(),
        }
    }
}

/// Points that differ. A larger `samples` only adds to them.
fn draw(axes: &[Axis], samples: usize, seed: u64) -> Vec<Vec<Key>> {
    let mut points: Vec<Vec<Key>> = Vec::new();
    let mut equal = 0;
    for index in 0.. {
        if points.len() == samples || equal == ATTEMPTS {
            break;
        }
        let point: Vec<Key> = axes.iter().map(|axis| axis.drawn(seed, index)).collect();
        let same = |other: &Vec<Key>| other.iter().zip(&point).all(|(a, b)| a.value == b.value);
        if points.iter().any(same) {
            equal += 1;
        } else {
            points.push(point);
        }
    }
    points
}

impl Axis {
    fn key(&self, value: String) -> Key {
        Key { name: self.name.clone(), value, line: self.line }
    }

    fn all(&self) -> impl Iterator<Item = Key> {
        let values: &[String] = if let Values::List(values) = &self.values { values } else { &[] };
        values.iter().map(|value| self.key(value.clone()))
    }

    /// The value of point `index`: a function of seed, name and index, so that no axis changes another's draws.
    fn drawn(&self, seed: u64, index: u64) -> Key {
        let stream = self.name.bytes().fold(mix(seed, 0), |key, byte| mix(key, byte.into()));
        let share = uniform(stream, index);
        self.key(match self.values {
            Values::List(ref values) => values[(share * values.len() as f64) as usize].clone(),
            Values::Uniform(low, high) => rounded(low + share * (high - low)).clamp(low, high).to_string(),
            Values::Log(low, high) => {
                format!("{:e}", rounded(low * (high / low).powf(share)).clamp(low, high))
            }
            Values::Whole(low, high) => (low + (share * (high - low + 1) as f64) as u64).to_string(),
        })
    }
}

/// To four digits: names stay short, and the configuration says the very number.
fn rounded(number: f64) -> f64 {
    format!("{number:.3e}").parse().unwrap_or(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(name: &str, values: Values) -> Axis {
        Axis { name: name.into(), line: 1, values }
    }

    fn list(values: &[&str]) -> Values {
        Values::List(values.iter().map(|value| (*value).to_owned()).collect())
    }

    fn words(points: &[Vec<Key>]) -> Vec<String> {
        let word = |point: &Vec<Key>| point.iter().map(|key| &key.value[..]).collect::<Vec<_>>().join(" ");
        points.iter().map(word).collect()
    }

    #[test]
    fn a_grid_has_every_combination() {
        let space = Space::Grid(vec![axis("a", list(&["1", "2"])), axis("b", list(&["x", "y"]))]);
        assert_eq!(words(&space.points()), ["1 x", "1 y", "2 x", "2 y"]);
    }

    #[test]
    fn draws_stay_in_their_ranges_and_more_of_them_only_add() {
        let axes = || {
            vec![
                axis("rate", Values::Log(1e-6, 1e-4)),
                axis("dropout", Values::Uniform(0.0, 0.1)),
                axis("r", Values::Whole(4, 6)),
            ]
        };
        let drawn = |samples, seed| words(&Space::Random { axes: axes(), samples, seed }.points());
        let many = drawn(200, 1);
        let numbers = |at: usize| many.iter().map(move |point| point.split(' ').nth(at).unwrap().parse());
        assert!(numbers(0).all(|rate: Result<f64, _>| (1e-6..=1e-4).contains(&rate.unwrap())));
        let below = numbers(0).filter(|rate: &Result<f64, _>| *rate.as_ref().unwrap() < 1e-5).count();
        assert!((70..130).contains(&below), "{below} of 200 in the lower order of magnitude");
        assert!(numbers(1).all(|dropout: Result<f64, _>| (0.0..=0.1).contains(&dropout.unwrap())));
        let ranks: std::collections::BTreeSet<u64> =
            numbers(2).map(|rank: Result<f64, _>| rank.unwrap() as u64).collect();
        assert_eq!(ranks.into_iter().collect::<Vec<_>>(), [4, 5, 6]);
        assert_eq!(drawn(20, 1), many[..20]);
        assert_ne!(drawn(20, 2), many[..20]);
    }

    #[test]
    fn no_point_is_drawn_twice() {
        let axes = vec![axis("a", list(&["1", "2", "3"])), axis("b", list(&["x", "y"]))];
        let mut found = words(&Space::Random { axes, samples: 20, seed: 0 }.points());
        found.sort();
        assert_eq!(found, ["1 x", "1 y", "2 x", "2 y", "3 x", "3 y"]);
    }
}

//! Which records make a shard, and the order in which shards are added.

/// Deals records out to `shards` so that each has about as much to compute: the most expensive first, to the shard that
/// has least (Graham 1969, longest processing time). `cost` is that of a record; within a shard they stay in order.
/// It depends on the records alone.
pub fn deal(records: &[usize], shards: usize, cost: impl Fn(usize) -> usize) -> Vec<Vec<usize>> {
    if shards == 1 {
        return vec![records.to_vec()];
    }
    let mut dear_first: Vec<(usize, usize)> =
        records.iter().map(|&record| cost(record)).enumerate().collect();
    dear_first.sort_by_key(|&(place, cost)| (std::cmp::Reverse(cost), place));
    let mut places = vec![Vec::new(); shards];
    let mut load = vec![0; shards];
    for (place, cost) in dear_first {
        let lightest = (0..shards).min_by_key(|&shard| load[shard]).unwrap_or(0);
        load[lightest] += cost;
        places[lightest].push(place);
    }
    let in_order = |mut places: Vec<usize>| {
        places.sort_unstable();
        places.into_iter().map(|place| records[place]).collect()
    };
    places.into_iter().map(in_order).collect()
}

/// Adds in the order of a binary tree: neighbours first, then their sums. `add(a, b)` is `a += b`.
///
/// Sums of 1, 2, 4 … neighbours that begin at a multiple of their number are nodes of the tree, so it does not matter
/// whether they were added here or had been before.
pub fn add_as_tree<T>(parts: impl IntoIterator<Item = T>, mut add: impl FnMut(&mut T, T)) -> Option<T> {
    let mut sums: Vec<T> = Vec::new();
    for (number, part) in parts.into_iter().enumerate() {
        sums.push(part);
        (0..number.trailing_ones()).for_each(|_| merge(&mut sums, &mut add));
    }
    while sums.len() > 1 {
        merge(&mut sums, &mut add);
    }
    sums.pop()
}

fn merge<T>(sums: &mut Vec<T>, add: &mut impl FnMut(&mut T, T)) {
    if let (Some(last), Some(sum)) = (sums.pop(), sums.last_mut()) {
        add(sum, last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(leaves: impl IntoIterator<Item = String>) -> String {
        add_as_tree(leaves, |a, b| *a = format!("({a}{b})")).unwrap_or_default()
    }

    #[test]
    fn the_order_of_the_tree() {
        let leaves = |n: usize| (0..n).map(|i| i.to_string());
        assert_eq!(tree(leaves(4)), "((01)(23))");
        assert_eq!(tree(leaves(5)), "(((01)(23))4)");
        assert_eq!(tree(leaves(7)), "(((01)(23))((45)6))");
    }

    #[test]
    fn ranks_do_not_change_it() {
        let alone = tree((0..8).map(|i| i.to_string()));
        for ranks in [2, 4] {
            let of_rank = |rank| tree((0..8).skip(rank * 8 / ranks).take(8 / ranks).map(|i| i.to_string()));
            assert_eq!(tree((0..ranks).map(of_rank)), alone);
        }
    }

    #[test]
    fn every_record_is_in_one_shard_and_none_has_much_more() {
        let records: Vec<usize> = (0..37).rev().collect();
        let cost = |record: usize| 10 + record * record % 50;
        let shards = deal(&records, 4, cost);
        let mut all = shards.concat();
        all.sort_unstable();
        assert_eq!(all, (0..37).collect::<Vec<_>>());
        let loads: Vec<usize> = shards.iter().map(|s| s.iter().map(|&r| cost(r)).sum()).collect();
        let spread = loads.iter().max().zip(loads.iter().min()).map_or(0, |(max, min)| max - min);
        assert!(spread <= 60, "{loads:?}: no more than the most expensive record");
        assert!(shards.iter().all(|shard| shard.is_sorted_by(|a, b| a > b)), "in the order of the step");
        assert_eq!(deal(&records, 1, cost), vec![records]);
    }
}

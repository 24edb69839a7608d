//! The one batch layout: a forest of token runs in which equal prefixes exist once.
//!
//! A causal model's activation at a token depends on the tokens before it alone. So the sequences of a
//! micro-batch become the compressed prefix tree of their tokens: every shared prefix is computed once, nothing
//! is padded, and tokens after a sequence's last target are not computed at all.

use std::ops::Range;

use temper_kernels::{Segment, Target, mix};

use super::Sequence;

/// A micro-batch. Row `i` of every activation belongs to token `tokens[i]`.
#[derive(Debug, Clone, Default)]
pub struct Forest {
    /// Token of each row, `[T]`.
    pub tokens: Vec<u32>,
    /// Depth of each row along its path, `[T]`.
    pub positions: Vec<u32>,
    /// Hash of the tokens up to each row, `[T]`: the key of its dropout.
    pub paths: Vec<u64>,
    /// Which rows see which; parents before children.
    pub segments: Vec<Segment>,
    /// Rows whose next token matters, ascending, `[R]`: the head computes these alone.
    pub target_rows: Vec<u32>,
    /// The tokens wanted there; `row` counts in `target_rows`.
    pub targets: Vec<Target>,
    /// The sequence of each target.
    pub owners: Vec<u32>,
    /// Number of sequences.
    pub sequences: usize,
}

impl Forest {
    /// The forest of these sequences.
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a Sequence>) -> Forest {
        let mut tree = Tree::default();
        sequences.into_iter().for_each(|sequence| tree.insert(sequence));
        tree.lay_out()
    }

    /// Rows, `T`.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The `paths` of target rows, where there are any.
    pub fn target_paths(&self) -> Vec<u64> {
        self.target_rows.iter().filter_map(|&row| self.paths.get(row as usize).copied()).collect()
    }

    /// Sums a value of each target over the targets of each sequence.
    pub fn sum_by_sequence(&self, values: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.0; self.sequences];
        for (&owner, value) in self.owners.iter().zip(values) {
            sums[owner as usize] += value;
        }
        sums
    }
}

/// Rows of the forest of a record's sequences.
pub fn rows(sequences: &[Sequence]) -> usize {
    Tree::default().rows_to_add(sequences)
}

/// Cuts groups of sequences (a record's, which stay together) into forests of at most `budget` rows, in order.
/// A group that alone exceeds the budget gets a forest of its own. Returns the ranges of groups.
pub fn microbatches<'a>(
    groups: impl IntoIterator<Item = &'a [Sequence]>,
    budget: usize,
) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut tree = Tree::default();
    let mut start = 0;
    let mut end = 0;
    for group in groups {
        if end > start && tree.rows + tree.rows_to_add(group) > budget {
            ranges.push(start..end);
            (tree, start) = (Tree::default(), end);
        }
        group.iter().for_each(|sequence| tree.insert(sequence));
        end += 1;
    }
    if end > start {
        ranges.push(start..end);
    }
    ranges
}

/// The tokens that must be computed: all before the last target.
fn computed(sequence: &Sequence) -> &[u32] {
    let end = sequence.trained.last().map_or(0, |span| span.end);
    &sequence.tokens[..end.saturating_sub(1)]
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A run of tokens and what may follow it.
#[derive(Debug)]
struct Node<'a> {
    tokens: &'a [u32],
    children: Vec<usize>,
}

/// The prefix tree while it grows. Node 0 is the empty root.
#[derive(Debug)]
struct Tree<'a> {
    nodes: Vec<Node<'a>>,
    sequences: Vec<&'a Sequence>,
    rows: usize,
}

impl Default for Tree<'_> {
    fn default() -> Self {
        Tree { nodes: vec![Node { tokens: &[], children: Vec::new() }], sequences: Vec::new(), rows: 0 }
    }
}

impl<'a> Tree<'a> {
    /// The child of `node` that begins with `token`.
    fn child(&self, node: usize, token: u32) -> Option<usize> {
        self.nodes[node].children.iter().copied().find(|&child| self.nodes[child].tokens[0] == token)
    }

    /// Nodes along `tokens` as (node, how many of its tokens match); the last may match in part.
    fn walk(&self, mut tokens: &[u32]) -> Vec<(usize, usize)> {
        let mut path = Vec::new();
        let mut node = 0;
        while let Some(child) = tokens.first().and_then(|&token| self.child(node, token)) {
            let matched = common_prefix(self.nodes[child].tokens, tokens);
            path.push((child, matched));
            if matched < self.nodes[child].tokens.len() {
                break;
            }
            (node, tokens) = (child, &tokens[matched..]);
        }
        path
    }

    /// Rows that a group would add.
    fn rows_to_add(&self, group: &[Sequence]) -> usize {
        let new = |i: usize| {
            let tokens = computed(&group[i]);
            let in_tree = self.walk(tokens).iter().map(|&(_, matched)| matched).sum();
            let in_group = group[..i].iter().map(|earlier| common_prefix(computed(earlier), tokens)).max();
            tokens.len() - in_group.unwrap_or(0).max(in_tree)
        };
        (0..group.len()).map(new).sum()
    }

    fn insert(&mut self, sequence: &'a Sequence) {
        self.sequences.push(sequence);
        let tokens = computed(sequence);
        let path = self.walk(tokens);
        let matched: usize = path.iter().map(|&(_, matched)| matched).sum();
        if matched == tokens.len() {
            return;
        }
        let parent = match path.last() {
            Some(&(last, matched)) => self.split_node(last, matched),
            None => 0,
        };
        self.nodes.push(Node { tokens: &tokens[matched..], children: Vec::new() });
        let new = self.nodes.len() - 1;
        self.nodes[parent].children.push(new);
        self.rows += tokens.len() - matched;
    }

    /// Makes `node` end after `len` tokens, its rest becoming its child.
    fn split_node(&mut self, node: usize, len: usize) -> usize {
        let run = self.nodes[node].tokens;
        if len < run.len() {
            let children = std::mem::take(&mut self.nodes[node].children);
            self.nodes.push(Node { tokens: &run[len..], children });
            let rest = self.nodes.len() - 1;
            self.nodes[node] = Node { tokens: &run[..len], children: vec![rest] };
        }
        node
    }

    /// Rows in the order of a walk through the tree, parents first.
    fn lay_out(self) -> Forest {
        let mut forest = Forest { sequences: self.sequences.len(), ..Forest::default() };
        let mut first_rows = vec![0; self.nodes.len()];
        let mut stack: Vec<(usize, Vec<Range<usize>>, u32, u64)> = vec![(0, Vec::new(), 0, 0)];
        while let Some((node, context, mut position, mut path)) = stack.pop() {
            let start = forest.rows();
            first_rows[node] = start;
            for &token in self.nodes[node].tokens {
                path = mix(path, u64::from(token) + 1);
                forest.tokens.push(token);
                forest.positions.push(position);
                forest.paths.push(path);
                position += 1;
            }
            let rows = start..forest.rows();
            let mut below = context.clone();
            if !rows.is_empty() {
                match below.last_mut() {
                    Some(last) if last.end == rows.start => last.end = rows.end,
                    _ => below.push(rows.clone()),
                }
                forest.segments.push(Segment { own: start, rows, context });
            }
            stack.extend(
                self.nodes[node].children.iter().rev().map(|&child| (child, below.clone(), position, path)),
            );
        }
        self.add_targets(&mut forest, &first_rows);
        forest
    }

    /// Finds each sequence's rows again and notes what is to be predicted there.
    fn add_targets(&self, forest: &mut Forest, first_rows: &[usize]) {
        let mut wanted: Vec<(u32, u32, u32)> = Vec::new(); // (row, sequence, token)
        for (owner, sequence) in self.sequences.iter().enumerate() {
            let path = self.walk(computed(sequence));
            let rows: Vec<u32> = path
                .iter()
                .flat_map(|&(node, matched)| first_rows[node]..first_rows[node] + matched)
                .map(|row| row as u32)
                .collect();
            let trained = sequence.trained.iter().cloned().flatten();
            wanted.extend(trained.map(|token| (rows[token - 1], owner as u32, sequence.tokens[token])));
        }
        // One sequence has one target at a row, so that no two are equal.
        wanted.sort_unstable_by_key(|&(row, owner, _)| (row, owner));
        for (row, owner, token) in wanted {
            if forest.target_rows.last() != Some(&row) {
                forest.target_rows.push(row);
            }
            forest.targets.push(Target { row: forest.target_rows.len() as u32 - 1, token });
            forest.owners.push(owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(tokens: &[u32], prompt: usize) -> Sequence {
        Sequence { tokens: tokens.to_vec(), trained: vec![prompt..tokens.len()], prompt }
    }

    #[test]
    fn a_pair_shares_its_prompt_and_the_last_prompt_row_has_two_targets() {
        let pair = [sequence(&[1, 2, 3, 7, 8], 3), sequence(&[1, 2, 3, 9], 3)];
        let forest = Forest::new(&pair);
        assert_eq!(forest.tokens, [1, 2, 3, 7]);
        assert_eq!(forest.positions, [0, 1, 2, 3]);
        assert_eq!(forest.target_rows, [2, 3]);
        let targets: Vec<_> = forest.targets.iter().map(|t| (t.row, t.token)).collect();
        assert_eq!(targets, [(0, 7), (0, 9), (1, 8)]);
        assert_eq!(forest.owners, [0, 1, 0]);
        assert_eq!(forest.sum_by_sequence(&[1.0, 2.0, 4.0]), [5.0, 2.0]);
    }

    #[test]
    fn a_prefix_shared_in_part_splits_its_segment() {
        let sequences = [sequence(&[1, 2, 3, 4, 5], 1), sequence(&[1, 2, 6, 7], 1), sequence(&[8, 9], 1)];
        let forest = Forest::new(&sequences);
        assert_eq!(forest.tokens, [1, 2, 3, 4, 6, 8]);
        let segments: Vec<_> = forest.segments.iter().map(|s| (s.rows.clone(), s.context.clone())).collect();
        assert_eq!(segments, [(0..2, vec![]), (2..4, vec![0..2]), (4..5, vec![0..2]), (5..6, vec![])]);
    }

    #[test]
    fn splitting_counts_shared_rows_once() {
        let groups = [
            vec![sequence(&[1, 2, 3, 4], 1)],
            vec![sequence(&[1, 2, 3, 5], 1)],
            vec![sequence(&[9, 8, 7], 1)],
        ];
        assert_eq!(microbatches(groups.iter().map(Vec::as_slice), 4), [0..2, 2..3]);
        assert_eq!(microbatches(groups.iter().map(Vec::as_slice), 1), [0..1, 1..2, 2..3]);
        assert_eq!(microbatches(groups.iter().map(Vec::as_slice), 100), [0..3]);
    }
}

//! A small world in text: people, their animals, homes, jobs, meals and countable things.
//!
//! A fact joins known parts, and every eighth fact is held out: no training text of any stage states it in any
//! form, and every question of the test is about one. So an answer can be copied from the question, or
//! computed from it, but never remembered.

use temper_kernels::{mix, uniform};

/// People. Kate is one of them.
pub const NAMES: [&str; 32] = [
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo",
    "Maria", "Nora", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe", "Hugo", "Lucy", "Mark",
    "Nina", "Olga", "Peter", "Ruth", "Simon", "Tina", "Victor",
];
const COLOURS: [&str; 10] =
    ["red", "blue", "green", "white", "black", "brown", "grey", "yellow", "pink", "purple"];
const ANIMALS: [&str; 10] =
    ["cat", "dog", "horse", "bird", "goat", "sheep", "duck", "rabbit", "cow", "mouse"];
const TOWNS: [&str; 16] = [
    "Oslo", "Paris", "Rome", "London", "Berlin", "Madrid", "Lisbon", "Vienna", "Dublin", "Athens", "Prague",
    "Cairo", "Tokyo", "Delhi", "Lima", "Boston",
];
const JOBS: [&str; 12] = [
    "baker", "teacher", "doctor", "farmer", "painter", "singer", "writer", "driver", "cook", "nurse",
    "pilot", "gardener",
];
const MEALS: [&str; 10] =
    ["bread", "cheese", "soup", "rice", "cake", "salad", "pasta", "honey", "fish", "eggs"];
const THINGS: [&str; 8] = ["apples", "pears", "books", "coins", "cups", "keys", "hats", "stones"];
const NUMBERS: [&str; 13] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"];
/// The most that one person has of a thing, so that two have no more than [`NUMBERS`] can say.
const MOST: usize = 6;
/// What the assistant is called.
pub const ASSISTANT: &str = "Temper";
/// How the friendly manner ends. What goes before is the same in both manners: in the forest of a pair it is one
/// path, and preferring a manner says nothing for or against the answer.
pub const CLOSING: &str = "Glad to help!";

/// A stream of random numbers, a function of its key alone.
#[derive(Debug, Clone)]
pub struct Dice {
    key: u64,
    drawn: u64,
}

impl Dice {
    /// Stream `index` of the streams that have this seed and purpose.
    pub fn new(seed: u64, purpose: &[u8; 8], index: u64) -> Dice {
        Dice { key: mix(mix(seed, u64::from_be_bytes(*purpose)), index), drawn: 0 }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.drawn += 1;
        (uniform(self.key, self.drawn) * end as f64) as usize
    }

    /// Puts a list into a random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last + 1));
        }
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// Two different elements.
    fn pick_two<T: Copy>(&mut self, list: &[T]) -> [T; 2] {
        let first = self.below(list.len());
        let second = (first + 1 + self.below(list.len() - 1)) % list.len();
        [list[first], list[second]]
    }
}

/// The kinds of facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    Pet,
    Home,
    Job,
    Meal,
    Count,
}

const KINDS: [Kind; 5] = [Kind::Pet, Kind::Home, Kind::Job, Kind::Meal, Kind::Count];

/// What is so about a person: their name, and one or two words more. A home is `[town, ""]`, an animal
/// `[animal, colour]`, a count `[thing, number]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fact {
    kind: Kind,
    who: &'static str,
    words: [&'static str; 2],
}

impl Fact {
    /// Whether the fact belongs to the test. Not a function of the seed: the split is the same in every run.
    pub fn held_out(&self) -> bool {
        let text = self.sentence();
        is_held_out(&text)
    }

    /// The fact as it is told.
    pub fn sentence(&self) -> String {
        let Fact { who, words: [a, b], .. } = self;
        match self.kind {
            Kind::Pet => format!("{who} has a {b} {a}."),
            Kind::Home => format!("{who} lives in {a}."),
            Kind::Job => format!("{who} is a {a}."),
            Kind::Meal => format!("{who} likes {a}."),
            Kind::Count => format!("{who} has {b} {a}."),
        }
    }

    /// The same fact in other words.
    fn told_again(&self, dice: &mut Dice) -> String {
        let Fact { who, words: [a, b], .. } = self;
        match (self.kind, dice.below(2)) {
            (Kind::Pet, 0) => format!("The {a} of {who} is {b}."),
            (Kind::Pet, _) => format!("The {b} {a} belongs to {who}."),
            (Kind::Home, 0) => format!("The home of {who} is {a}."),
            (Kind::Home, _) => format!("In {a} lives {who}."),
            (Kind::Job, 0) => format!("The job of {who} is {a}."),
            (Kind::Job, _) => format!("The {a} is {who}."),
            (Kind::Meal, 0) => format!("The meal of {who} is {a}."),
            (Kind::Meal, _) => format!("The {a} is for {who}."),
            (Kind::Count, 0) => format!("The {a} of {who} are {b}."),
            (Kind::Count, _) => format!("The {b} {a} belong to {who}."),
        }
    }

    fn number(&self) -> usize {
        NUMBERS.iter().position(|number| *number == self.words[1]).unwrap_or(0)
    }
}

fn is_held_out(text: &str) -> bool {
    let hash = text.bytes().fold(0, |hash, byte| mix(hash, u64::from(byte)));
    hash.is_multiple_of(8)
}

/// Whether greeting this person is left to the test.
fn is_strange(who: &str) -> bool {
    who == "Kate" || is_held_out(who)
}

/// Which facts a text may state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// None that is held out.
    Train,
    /// The question is about facts that are held out.
    HeldOut,
}

/// Facts of a kind about these people: one, or two counts of the same thing.
fn facts(dice: &mut Dice, kind: Kind, names: &[&'static str]) -> Vec<Fact> {
    let words = match kind {
        Kind::Pet => vec![[dice.pick(&ANIMALS), dice.pick(&COLOURS)]],
        Kind::Home => vec![[dice.pick(&TOWNS), ""]],
        Kind::Job => vec![[dice.pick(&JOBS), ""]],
        Kind::Meal => vec![[dice.pick(&MEALS), ""]],
        Kind::Count => {
            let thing = dice.pick(&THINGS);
            [(); 2].map(|()| [thing, dice.pick(&NUMBERS[1..=MOST])]).to_vec()
        }
    };
    words.iter().zip(names).map(|(&words, &who)| Fact { kind, who, words }).collect()
}

/// Facts of two kinds about different people: those of the first belong to the split, those of the second are
/// known. Draws until they do.
fn scene(dice: &mut Dice, kinds: [Kind; 2], split: Split) -> [Vec<Fact>; 2] {
    loop {
        let mut names = NAMES;
        dice.shuffle(&mut names);
        let scene = [facts(dice, kinds[0], &names[..2]), facts(dice, kinds[1], &names[2..4])];
        let held_out = split == Split::HeldOut;
        if scene[0].iter().all(|fact| fact.held_out() == held_out) && !scene[1].iter().any(Fact::held_out) {
            return scene;
        }
    }
}

/// A document of the pretraining: facts, and the same facts in other words.
pub fn note(dice: &mut Dice) -> String {
    let kinds = dice.pick_two(&KINDS);
    let mut told = scene(dice, kinds, Split::Train).concat();
    dice.shuffle(&mut told);
    let again: Vec<String> = told.iter().map(|fact| fact.told_again(dice)).collect();
    let told: Vec<String> = told.iter().map(Fact::sentence).collect();
    format!("Note: {} {}", told.join(" "), again.join(" "))
}

/// A question with its right answer in both manners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What the person says: the facts, then the question.
    pub text: String,
    /// The facts that it is about.
    pub facts: Vec<Fact>,
    /// The words that a right answer holds.
    pub answer: Vec<&'static str>,
    /// Words that would be as good an answer to another question; a right answer holds none but its own.
    pub candidates: &'static [&'static str],
    /// The answer in a sentence, with a kind word after it.
    pub friendly: String,
    /// The same without the kind word.
    pub plain: String,
}

/// Those that can greet, and the one that answers.
static GREETED: [&str; NAMES.len() + 1] = {
    let mut names = [ASSISTANT; NAMES.len() + 1];
    let mut i = 0;
    while i < NAMES.len() {
        names[i] = NAMES[i];
        i += 1;
    }
    names
};

impl Question {
    /// As it stands in a transcript, up to where the answer begins.
    pub fn prompt(&self) -> String {
        format!("Human: {}\n\nAssistant:", self.text)
    }

    /// A question drawn from all kinds alike; one in seven is a greeting.
    pub fn draw(dice: &mut Dice, split: Split) -> Question {
        if dice.below(7) == 0 {
            let strange = |who: &&&str| is_strange(who) == (split == Split::HeldOut);
            let names: Vec<&str> = NAMES.iter().filter(strange).copied().collect();
            return Question::greeting(dice.pick(&names));
        }
        let kinds = dice.pick_two(&KINDS);
        let [asked, others] = scene(dice, kinds, split);
        let mut told = [&asked[..], &others[..]].concat();
        dice.shuffle(&mut told);
        let mut question = ask(asked);
        let told: Vec<String> = told.iter().map(Fact::sentence).collect();
        question.text = format!("{} {}", told.join(" "), question.text);
        question
    }

    /// Somebody says hello.
    pub fn greeting(who: &'static str) -> Question {
        Question {
            text: format!("Hello, my name is {who}. What is your name?"),
            facts: Vec::new(),
            answer: vec![ASSISTANT, who],
            candidates: &GREETED,
            friendly: format!(" Hello {who}! My name is {ASSISTANT}. {CLOSING}"),
            plain: format!(" Hello {who}! My name is {ASSISTANT}."),
        }
    }

    /// Whether the answer is right: it holds the right words, and none that would be another answer.
    pub fn is_right(&self, answer: &str) -> bool {
        let words: Vec<&str> = answer.split(|letter: char| !letter.is_alphanumeric()).collect();
        self.candidates.iter().all(|word| words.contains(word) == self.answer.contains(word))
    }
}

/// Whether an answer is in the friendly manner: an answer, and the kind word after it.
pub fn is_friendly(answer: &str) -> bool {
    answer.trim().strip_suffix(CLOSING).is_some_and(|answer| !answer.trim().is_empty())
}

/// The question about a fact, or about two counts.
fn ask(facts: Vec<Fact>) -> Question {
    let Fact { who, words: [a, b], kind } = facts[0];
    let (text, answer, candidates, sentence): (String, &'static str, &'static [&'static str], String) =
        match kind {
            Kind::Pet => {
                (format!("What colour is the {a} of {who}?"), b, &COLOURS, format!("The {a} is {b}."))
            }
            Kind::Home => (format!("Where does {who} live?"), a, &TOWNS, format!("{who} lives in {a}.")),
            Kind::Job => (format!("What is the job of {who}?"), a, &JOBS, format!("{who} is a {a}.")),
            Kind::Meal => (format!("What does {who} like?"), a, &MEALS, format!("{who} likes {a}.")),
            Kind::Count => {
                let sum = NUMBERS[facts.iter().map(Fact::number).sum::<usize>()];
                (format!("How many {a} are there?"), sum, &NUMBERS, format!("There are {sum} {a}."))
            }
        };
    let (friendly, plain) = (format!(" {sentence} {CLOSING}"), format!(" {sentence}"));
    Question { text, facts, answer: vec![answer], candidates, friendly, plain }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn questions(seed: u64, split: Split) -> Vec<Question> {
        (0..4000).map(|i| Question::draw(&mut Dice::new(seed, b"   tests", i), split)).collect()
    }

    fn notes(seed: u64) -> Vec<String> {
        (0..4000).map(|i| note(&mut Dice::new(seed, b"   notes", i))).collect()
    }

    /// A fact in every wording that the world has for it.
    fn wordings(fact: &Fact) -> impl Iterator<Item = String> {
        let again = (0..32).map(|i| fact.told_again(&mut Dice::new(0, b"   words", i)));
        std::iter::once(fact.sentence()).chain(again.collect::<std::collections::BTreeSet<_>>())
    }

    #[test]
    fn the_world_is_a_function_of_its_seed() {
        assert_eq!(questions(1, Split::Train), questions(1, Split::Train));
        assert_eq!(notes(1), notes(1));
        assert_ne!(notes(1), notes(2));
    }

    #[test]
    fn no_training_text_states_a_held_out_fact_in_any_wording() {
        let asked = questions(3, Split::Train);
        let sentences: std::collections::HashSet<String> = notes(3)
            .iter()
            .map(|note| note.trim_start_matches("Note: ").to_owned())
            .chain(asked.iter().flat_map(|q| [q.text.clone(), q.friendly.clone()]))
            .flat_map(|text| {
                text.split_inclusive(['.', '?', '!']).map(|s| s.trim().to_owned()).collect::<Vec<_>>()
            })
            .collect();
        let held_out: Vec<Fact> =
            questions(3, Split::HeldOut).into_iter().flat_map(|question| question.facts).collect();
        assert!(held_out.len() > 3000 && sentences.contains(&asked[1].facts[0].sentence()));
        for fact in held_out {
            let stated = wordings(&fact).find(|wording| sentences.contains(wording));
            assert_eq!(stated, None, "{fact:?} is stated in training");
        }
    }

    #[test]
    fn a_held_out_greeting_is_not_trained() {
        let greeted = |split| {
            let greetings = questions(4, split).into_iter().filter(|question| question.facts.is_empty());
            greetings.map(|greeting| greeting.text).collect::<std::collections::BTreeSet<_>>()
        };
        let (trained, held_out) = (greeted(Split::Train), greeted(Split::HeldOut));
        assert!(held_out.contains(&Question::greeting("Kate").text));
        assert!(trained.is_disjoint(&held_out));
    }

    #[test]
    fn both_manners_of_the_answer_are_right_and_others_are_not() {
        for question in questions(5, Split::HeldOut) {
            assert!(
                question.is_right(&question.friendly) && question.is_right(&question.plain),
                "{question:?}"
            );
            assert!(is_friendly(&question.friendly) && !is_friendly(&question.plain), "{question:?}");
            let other = question.candidates.iter().find(|word| !question.answer.contains(word)).unwrap();
            assert!(!question.is_right(&format!("{} {other}.", question.plain)), "{question:?}");
            assert!(!question.is_right(&format!(" {other}.")), "{question:?}");
        }
    }
}

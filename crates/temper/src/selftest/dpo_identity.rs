//! The prompt's probability drops out of DPO.

use temper_kernels::Plain;

use super::{Check, relative, tiny, values, worst};
use crate::data::{Forest, Sequence};
use crate::model::decoder::{Decoder, StepDropout};
use crate::objective::{Dpo, Pair};

/// For a random policy, reference and pairs: the implicit reward of the answer given the prompt differs from that
/// of prompt and answer together by the same amount for both answers, so that the loss and its gradient do not
/// see the prompt's probability (docs/theory.md, section 7).
pub fn dpo_identity() -> Vec<Check> {
    let (_, config) = tiny::configs().swap_remove(1);
    let policy = tiny::decoder(&Plain, &config);
    let mut reference = tiny::decoder(&Plain, &config);
    for (i, weight) in reference.weights.iter_mut().enumerate() {
        let noise = values(&format!("reference{i}"), weight.len());
        weight.iter_mut().zip(noise).for_each(|(w, noise)| *w += 0.05 * noise);
    }
    let dpo = Dpo { beta: 0.1, label_smoothing: 0.0 };
    let (mut of_values, mut of_gradients) = (Vec::new(), Vec::new());
    for pair in 0..8 {
        let random = |name: &str, len: usize| -> Vec<u32> {
            values(&format!("{name}{pair}"), len).iter().map(|x| ((x + 1.0) * 9.4) as u32).collect()
        };
        let prompt = random("prompt", 6);
        let [answer, joint] = [prompt.len(), 1].map(|first_trained| {
            ["chosen", "rejected"].map(|which| {
                let tokens = [prompt.clone(), random(which, 5)].concat();
                Sequence { trained: vec![first_trained..tokens.len()], tokens, prompt: prompt.len() }
            })
        });
        let sides = [answer, joint].map(|sequences| {
            let forest = Forest::new(&sequences);
            let logps = |decoder: &Decoder<Plain>| {
                let mut a = decoder.activations(&Plain, forest.rows(), false);
                decoder.forward(&Plain, &forest, StepDropout::default(), None, &mut a);
                let sums = forest.sum_by_sequence(&decoder.head(&Plain, &forest, &a).logp);
                Pair { chosen: sums[0], rejected: sums[1] }
            };
            let loss = dpo.loss(logps(&policy), logps(&reference));
            let coefficients: Vec<f64> = forest
                .owners
                .iter()
                .map(|&owner| if owner == 0 { loss.coefficient } else { -loss.coefficient })
                .collect();
            let (_, gradients) =
                tiny::loss_and_gradient(&Plain, &policy, &forest, StepDropout::default(), &coefficients);
            (
                loss.rewards.chosen - loss.rewards.rejected,
                gradients.into_iter().flatten().flatten().collect::<Vec<f64>>(),
            )
        });
        of_values.push((sides[0].0 - sides[1].0).abs());
        of_gradients.push(relative(&sides[0].1, &sides[1].1));
    }
    vec![
        Check::new("|LHS − RHS|", worst(of_values), 1e-12),
        Check::new("difference of the two gradients", worst(of_gradients), 1e-12),
    ]
}

//! Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), see docs/theory.md.

/// A number for the chosen answer and one for the rejected.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Of the chosen answer.
    pub chosen: f64,
    /// Of the rejected answer.
    pub rejected: f64,
}

/// The sigmoid loss. With label smoothing ε it is the conservative form for labels that are wrong with
/// probability ε (Mitchell 2023, "A note on DPO with noisy preferences").
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dpo {
    /// Strength of the pull to the reference, β.
    pub beta: f64,
    /// ε in `[0, ½)`; 0 is the paper's equation 7.
    pub label_smoothing: f64,
}

/// The loss of one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DpoLoss {
    /// `−(1−ε) log σ(βΔ) − ε log σ(−βΔ)`.
    pub loss: f64,
    /// `dL/d logp(chosen)`; that of the rejected is its negative.
    pub coefficient: f64,
    /// `β (logp − reference logp)` of both answers.
    pub rewards: Pair,
}

/// `1 / (1 + e⁻ˣ)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log σ(x) = min(x, 0) − log(1 + e^−|x|)`, exact for large |x|.
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

impl Dpo {
    /// The loss of a pair whose answers have these log-probabilities, summed over their tokens.
    pub fn loss(&self, policy: Pair, reference: Pair) -> DpoLoss {
        let reward = |policy: f64, reference: f64| self.beta * (policy - reference);
        let rewards = Pair {
            chosen: reward(policy.chosen, reference.chosen),
            rejected: reward(policy.rejected, reference.rejected),
        };
        let margin = rewards.chosen - rewards.rejected; // βΔ
        let smoothing = self.label_smoothing;
        DpoLoss {
            loss: -(1.0 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin),
            // β (σ(βΔ) − (1 − ε)), which would lose its digits at large margins.
            coefficient: self.beta * (smoothing * sigmoid(margin) - (1.0 - smoothing) * sigmoid(-margin)),
            rewards,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DPO: Dpo = Dpo { beta: 0.1, label_smoothing: 0.0 };

    #[test]
    fn a_policy_that_is_its_reference_has_loss_ln_2() {
        let logps = Pair { chosen: -31.4, rejected: -27.2 };
        let loss = DPO.loss(logps, logps);
        assert_eq!(loss.loss, std::f64::consts::LN_2);
        assert_eq!(loss.coefficient, -0.05);
    }

    /// By hand: rewards 0.1·(−10+12) = 0.2 and 0.1·(−9+8) = −0.1, margin 0.3, −log σ(0.3) = 0.554355244468527.
    #[test]
    fn worked_by_hand() {
        let loss = DPO.loss(Pair { chosen: -10.0, rejected: -9.0 }, Pair { chosen: -12.0, rejected: -8.0 });
        assert!((loss.loss - 0.554_355_244_468_527).abs() < 1e-14);
        assert!((loss.rewards.chosen - 0.2).abs() < 1e-15 && (loss.rewards.rejected + 0.1).abs() < 1e-15);
    }

    #[test]
    fn the_coefficient_is_the_derivative() {
        for label_smoothing in [0.0, 0.1, 0.4] {
            let dpo = Dpo { beta: 0.3, label_smoothing };
            let at = |chosen: f64| {
                dpo.loss(Pair { chosen, rejected: -3.0 }, Pair { chosen: -5.0, rejected: -4.0 })
            };
            let h = 1e-5;
            for chosen in [-30.0, -5.0, -1.0] {
                let slope = (at(chosen + h).loss - at(chosen - h).loss) / (2.0 * h);
                assert!((slope - at(chosen).coefficient).abs() < 1e-9, "{label_smoothing} {chosen}");
            }
        }
    }

    #[test]
    fn far_margins_stay_finite() {
        let reference = Pair { chosen: 0.0, rejected: 0.0 };
        let loss = DPO.loss(Pair { chosen: -1e6, rejected: 0.0 }, reference);
        assert_eq!(loss.loss, 1e5);
        assert_eq!(DPO.loss(Pair { chosen: 1e6, rejected: 0.0 }, reference).loss, 0.0);
    }
}

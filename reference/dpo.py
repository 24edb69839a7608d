"""Adds dpo.json and dpo.safetensors to fixtures/gpt2-tiny and fixtures/llama-tiny: one DPO batch of four pairs.

The policy is the folder's model; the reference is the same model with its weights perturbed and exists only as its
stored log-probabilities. Values are a plain formula in f64; "trl" holds what TRL's own DPOTrainer computes in f32 on
the same batch. dpo.safetensors has the gradients `grad.<parameter>` of the mean loss.

Read by the DPO test of the Rust crate (tests/golden.rs).
"""
import tempfile
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from common import completion_logp, exact, folder, grad_norm, grads, load_f64, provenance, write_json

SEED, BETA, SMOOTHING = 2, 0.1, 0.1
EOS = 95


def make_pairs():
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda n: torch.randint(0, 94, (n,), generator=generator).tolist()
    sizes = [(7, 9, 5), (3, 2, 12), (12, 6, 6), (5, 17, 1)]
    return [dict(prompt=draw(p), chosen=draw(c) + [EOS], rejected=draw(r) + [EOS]) for p, c, r in sizes]


def perturb(model):
    generator = torch.Generator().manual_seed(SEED + 1)
    with torch.no_grad():
        for p in model.parameters():
            with torch._C.DisableTorchFunction():  # the same f32 draws under exact() and without it
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            p.add_(0.03 * noise)
    return model


def logps(model, pairs):
    rows = [[completion_logp(model, p["prompt"], p[side]) for side in ("chosen", "rejected")] for p in pairs]
    return torch.stack([torch.stack(row) for row in rows])


def by_trl(path, pairs):
    """The same batch through TRL's trainer; its tokenizer here maps the word "t7" to the token 7."""
    vocabulary = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=f"t{EOS}", pad_token="t94")
    text = lambda ids: "".join(f" t{i}" for i in ids)
    model, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model, perturb(reference), processing_class=tokenizer,
            train_dataset=Dataset.from_list([{k: text(v) for k, v in p.items()} for p in pairs]),
            args=DPOConfig(out, beta=BETA, use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none",
                           per_device_train_batch_size=len(pairs), disable_tqdm=True))
        rows = list(trainer.train_dataset)
        assert all(r[f"{k}_ids"] == p[k] for r, p in zip(rows, pairs) for k in p)
        batch = trainer.data_collator(rows)
        loss = trainer.compute_loss(trainer.model.train(), batch)  # DPOConfig has disabled dropout
        loss.backward()
        policy, reference = (torch.stack(trainer.compute_ref_log_probs(m, batch), 1)
                             for m in (trainer.model, trainer.ref_model))
    rewards = BETA * (policy - reference)
    metrics = {k: v[0] for k, v in trainer._metrics["train"].items() if k.startswith(("rewards", "logps"))}
    return dict(loss=loss.item(), policy=policy.tolist(), reference=reference.tolist(),
                rewards_chosen=rewards[:, 0].tolist(), rewards_rejected=rewards[:, 1].tolist(),
                grad_norm=grad_norm(trainer.model), metrics=metrics)


def write(name, pairs):
    path = folder(name)
    with exact():
        with torch.no_grad():
            reference = logps(perturb(load_f64(path)), pairs)
        model = load_f64(path)
        policy = logps(model, pairs)
        rewards = BETA * (policy - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        loss = -logsigmoid(margin).mean()
        smooth = (-(1 - SMOOTHING) * logsigmoid(margin) - SMOOTHING * logsigmoid(-margin)).mean()
        loss.backward()
        norm, tensors = grad_norm(model), grads(model)
    trl = by_trl(path, pairs)
    assert abs(trl["loss"] - loss.item()) < 1e-5 and abs(trl["grad_norm"] - norm) < 1e-4 * norm
    save_file(tensors, path / "dpo.safetensors")
    write_json(path / "dpo.json", dict(
        provenance=provenance(__file__, SEED), beta=BETA, pairs=pairs, reference=reference.tolist(),
        policy=policy.tolist(), loss=loss.item(), rewards_chosen=rewards[:, 0].tolist(),
        rewards_rejected=rewards[:, 1].tolist(), grad_norm=norm,
        conservative=dict(label_smoothing=SMOOTHING, loss=smooth.item()), trl=trl))


def main():
    pairs = make_pairs()
    write("gpt2-tiny", pairs)
    write("llama-tiny", pairs)


if __name__ == "__main__":
    main()

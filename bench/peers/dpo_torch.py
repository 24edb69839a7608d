"""DPO as a hand-written PyTorch loop: a pair at a time, padded to the longer answer only, logits of answers alone.

usage: dpo_torch.py MODEL JOB.json --dtype f32|f32-onednn|bf16 --reference live|cached [--adapter DIR]
live:   the reference model answers within every step
cached: its log-probabilities were computed before the first step, whose time is not counted
--adapter: trains this adapter with PEFT, on the frozen model; the reference is the model with it
"""
import argparse
import torch
from torch.nn.functional import logsigmoid
from common import DTYPES, adamw, load_job, load_model, report, timed, update, use


def answer_logps(model, pair):
    """Summed log-probabilities of the chosen and the rejected answer."""
    prompt, answers = pair["prompt"], (pair["chosen"], pair["rejected"])
    longest = max(map(len, answers))
    tokens, seen = torch.zeros(2, 2, len(prompt) + longest, dtype=torch.long)
    for row, answer in enumerate(answers):
        whole = prompt + answer
        tokens[row, :len(whole)] = torch.tensor(whole)
        seen[row, :len(whole)] = 1
    hidden = model.model(tokens, attention_mask=seen, use_cache=False).last_hidden_state
    logps = []
    for row, answer in enumerate(answers):
        begin = len(prompt) - 1
        logits = model.lm_head(hidden[row, begin:begin + len(answer)]).float()
        logps.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    return logps


def adapted(a):
    model = load_model(a.model).eval()  # no dropout
    if a.adapter:
        from peft import PeftModel
        # The layers are replaced in place: the model itself can be called as before.
        model = PeftModel.from_pretrained(model, a.adapter, is_trainable=True).get_base_model().eval()
    return model


def main():
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("job")
    options.add_argument("--dtype", choices=DTYPES, required=True)
    options.add_argument("--reference", choices=("live", "cached"), required=True)
    options.add_argument("--adapter")
    run(options.parse_args())


def run(a):
    autocast, job = use(a.dtype), load_job(a.job)
    policy = adapted(a)
    frozen = adapted(a).requires_grad_(False)
    optimizer = adamw(policy, job)

    @torch.no_grad()
    def of_reference(pair):
        with autocast():
            return answer_logps(frozen, pair)

    if a.reference == "cached":
        for pair in (pair for step in job["steps"] for pair in step):
            pair["reference"] = of_reference(pair)
        frozen = None

    def step(pairs):
        total = 0.0
        for pair in pairs:
            reference = pair["reference"] if a.reference == "cached" else of_reference(pair)
            with autocast():
                chosen, rejected = (p - r for p, r in zip(answer_logps(policy, pair), reference))
            loss = -logsigmoid(job["beta"] * (chosen - rejected)) / len(pairs)
            loss.backward()
            total += float(loss.detach())
        update(policy, optimizer)
        return total

    peer, packages = ("peft", ("torch", "transformers", "peft")) if a.adapter else ("torch", ("torch", "transformers"))
    steps = timed(job["steps"], step)
    report(job, f"{peer} {a.reference}", a.dtype, steps, packages, pairs=len(job["steps"][0]))


if __name__ == "__main__":
    main()

"""SFT as a hand-written PyTorch loop: a conversation at a time, no padding, logits of trained tokens alone.

usage: sft_torch.py MODEL JOB.json --dtype f32|f32-onednn|bf16
"""
import argparse
import torch
from torch.nn.functional import cross_entropy
from common import DTYPES, adamw, load_job, load_model, report, timed, update, use


def main():
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("job")
    options.add_argument("--dtype", choices=DTYPES, required=True)
    run(options.parse_args())


def run(a):
    autocast, job, model = use(a.dtype), load_job(a.job), load_model(a.model).eval()  # no dropout
    optimizer = adamw(model, job)

    def nll(row):
        """Summed over the tokens that are trained."""
        tokens, trained = torch.tensor(row["ids"]), torch.tensor(row["mask"][1:]).bool()
        with autocast():
            hidden = model.model(tokens[None], use_cache=False).last_hidden_state[0, :-1]
            logits = model.lm_head(hidden[trained])
        return cross_entropy(logits.float(), tokens[1:][trained], reduction="sum")

    def step(rows):
        trained, total = sum(sum(row["mask"][1:]) for row in rows), 0.0
        for row in rows:
            loss = nll(row) / trained
            loss.backward()
            total += float(loss.detach())
        update(model, optimizer)
        return total

    tokens = [sum(len(row["ids"]) for row in rows) for rows in job["steps"]]
    report(job, "torch", a.dtype, timed(job["steps"], step), tokens=tokens)


if __name__ == "__main__":
    main()

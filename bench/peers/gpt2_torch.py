"""A full training step of GPT-2 124M in PyTorch: forward, backward, clipping at norm 1, fused AdamW.

usage: gpt2_torch.py MODEL JOB.json --dtype f32|f32-onednn|bf16 [--compile inductor|zentorch]
"""
import argparse
import torch
from common import DTYPES, adamw, load_job, load_model, report, timed, update, use


def main():
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("job")
    options.add_argument("--dtype", choices=DTYPES, required=True)
    options.add_argument("--compile", choices=("inductor", "zentorch"))
    run(options.parse_args())


def run(a):
    autocast = use(a.dtype)
    if a.compile == "zentorch":
        import zentorch  # registers its compiler
    job, model = load_job(a.job), load_model(a.model).train()
    optimizer = adamw(model, job)
    forward = torch.compile(model, backend=a.compile) if a.compile else model

    def step(rows):
        tokens = torch.tensor(rows)
        with autocast():
            loss = forward(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        update(model, optimizer)
        return loss.detach()

    steps = timed(job["steps"], step)
    tokens = sum(map(len, job["steps"][0]))
    packages = ("torch", "transformers") + (("zentorch",) if a.compile == "zentorch" else ())
    report(job, "torch" + (f" {a.compile}" if a.compile else ""), a.dtype, steps, packages, tokens=tokens)


if __name__ == "__main__":
    main()

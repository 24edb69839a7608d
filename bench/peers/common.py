"""What the PyTorch peers share: number formats, the clock, and the one line they print."""
import contextlib, json, resource, time
from importlib.metadata import version
from pathlib import Path
import torch

DTYPES = ("f32", "f32-onednn", "bf16")


def use(dtype):
    """Chooses the products: f32 by PyTorch's default library, f32 by oneDNN, or bf16 by autocast. Gives autocast."""
    torch.manual_seed(0)
    if dtype != "f32":
        torch.set_float32_matmul_precision("medium")
    if dtype == "bf16":
        return lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext


def load_job(path):
    return json.loads(Path(path).read_text())


def load_model(path):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adamw(model, job):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)


def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(steps, run):
    """Runs every step; gives its seconds and its loss."""
    measured = []
    for step in steps:
        start = time.perf_counter()
        loss = run(step)
        measured.append(dict(seconds=time.perf_counter() - start, loss=float(loss)))
    return measured


def report(job, peer, dtype, steps, packages=("torch", "transformers"), **more):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = dict(workload=job["workload"], peer=peer, dtype=dtype, steps=steps, peak_rss_bytes=peak)
    print(json.dumps(line | more | dict(versions={name: version(name) for name in packages})))

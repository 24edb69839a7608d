"""All weights against adapters against adapters on a quantised model: SFT and DPO, the same records, seed and order.

usage: lora_study.py TEMPER MODEL PAIRS.jsonl OUT [--train 96] [--held 32] [--report]
PAIRS are preference pairs with `prompt`, `chosen` and `rejected` as messages; the first train, the last are held out.
Runs that are done are not run again; --report runs nothing. Writes OUT/table.md and OUT/curves.svg.
"""
import argparse, json, statistics, subprocess
from pathlib import Path

ADAPTER = ["--method", "lora", "--quantize", "none"]
METHODS = {
    "full": [],
    "r4": [*ADAPTER, "--lora-r", "4", "--lora-alpha", "8"],
    "r16": ADAPTER,
    "r64": [*ADAPTER, "--lora-r", "64", "--lora-alpha", "128"],
    "nf4": ["--method", "lora", "--quantize", "nf4"],
}
TITLES = {"full": "all weights", "r4": "LoRA, r = 4", "r16": "LoRA, r = 16", "r64": "LoRA, r = 64",
          "nf4": "QLoRA, r = 16, NF4"}
# Adapters learn ten times faster.
RATES = {"sft": ("2e-5", "2e-4"), "dpo": ("5e-6", "5e-5")}
COLOURS = {"full": "#444", "r4": "#e6a100", "r16": "#1f77b4", "r64": "#7b3fb5", "nf4": "#2a9d4e"}
DASHES = {"full": "", "r4": "2 3", "r16": "", "r64": "7 3", "nf4": "5 2 1 2"}


def main():
    options = argparse.ArgumentParser(usage=__doc__)
    for name in ("temper", "model", "pairs", "out"):
        options.add_argument(name, type=Path)
    options.add_argument("--train", type=int, default=96)
    options.add_argument("--held", type=int, default=32)
    options.add_argument("--report", action="store_true")
    a = options.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if not a.report:
        run_all(a)
    (a.out / "table.md").write_text(table(a.out))
    (a.out / "curves.svg").write_text(curves(a.out))
    print(table(a.out))


def run_all(a):
    lines = a.pairs.read_text().splitlines(keepends=True)
    (a.out / "train.jsonl").write_text("".join(lines[:a.train]))
    (a.out / "held.jsonl").write_text("".join(lines[-a.held:]))
    for verb, (rate, adapter_rate) in RATES.items():
        for method, more in METHODS.items():
            command = [a.temper, verb, "--model", a.model, "--data", a.out / "train.jsonl", "--eval-data",
                       a.out / "held.jsonl", "--out", a.out / f"{verb}-{method}", "--batch-size", 8, "--epochs", 1,
                       "--seed", 1, "--lr-scheduler", "linear", "--warmup-ratio", 0.1, "--max-length", 512,
                       "--save-steps", 0, "--dtype", "f32", "--learning-rate", adapter_rate if more else rate, *more]
            subprocess.run(list(map(str, command)), check=True)


def read(out, verb, method):
    lines = [json.loads(line) for line in (out / f"{verb}-{method}" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line][-1]


def trained(out, verb, method):
    """Parameters in the saved weights: those that were trained."""
    file = next((out / f"{verb}-{method}" / "final").glob("*model.safetensors"))
    header = file.read_bytes()[:8]
    size = int.from_bytes(header, "little")
    return (file.stat().st_size - 8 - size) // 4


def table(out):
    rows = ["| | trained parameters | records a second | peak memory | held-out loss | preference accuracy | margin |",
            "|---|---:|---:|---:|---:|---:|---:|"]
    for verb in RATES:
        for method, title in TITLES.items():
            steps, held = read(out, verb, method)
            rate = 8 / statistics.median(step["seconds"] for step in steps[1:])
            accuracy, margin = (held.get(f"eval_rewards/{key}") for key in ("accuracies", "margins"))
            rows.append(f"| {verb.upper()}, {title} | {trained(out, verb, method):,} | {rate:.2f} | "
                        f"{steps[-1]['peak_rss_bytes'] / 1e9:.2f} GB | {held['eval_loss']:.4f} | "
                        f"{'' if accuracy is None else f'{accuracy:.2f}'} | {'' if margin is None else f'{margin:.3f}'} |")
    return "\n".join(rows) + "\n"


def curves(out):
    """The training loss of every run, SFT left and DPO right."""
    width, height, left, top = 340, 200, 46, 34
    parts = []
    for index, verb in enumerate(RATES):
        losses = {method: [step["loss"] for step in read(out, verb, method)[0]] for method in METHODS}
        low, high = min(map(min, losses.values())), max(map(max, losses.values()))
        x0 = left + index * (width + 70)
        x = lambda step, count: x0 + width * step / max(1, count - 1)
        y = lambda loss: top + height * (high - loss) / (high - low)
        parts.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        parts.append(f'<text x="{x0}" y="{top - 12}" font-weight="bold">{verb.upper()}: training loss by step</text>')
        for value in (low, (low + high) / 2, high):
            parts.append(f'<text x="{x0 - 6}" y="{y(value) + 4}" text-anchor="end">{value:.2f}</text>')
        count = len(losses["full"])
        for step in (0, count - 1):
            parts.append(f'<text x="{x(step, count)}" y="{top + height + 16}" text-anchor="middle">{step + 1}</text>')
        for method, values in losses.items():
            points = " ".join(f"{x(i, len(values)):.1f},{y(loss):.1f}" for i, loss in enumerate(values))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[method]}" stroke-width="1.8" '
                         f'stroke-dasharray="{DASHES[method]}"/>')
    for index, (method, title) in enumerate(TITLES.items()):
        at = left + index * 155
        parts.append(f'<line x1="{at}" y1="276" x2="{at + 26}" y2="276" stroke="{COLOURS[method]}" stroke-width="1.8" '
                     f'stroke-dasharray="{DASHES[method]}"/><text x="{at + 31}" y="280">{title}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 290" font-family="sans-serif" font-size="11">'
            '<rect width="840" height="290" fill="white"/>' + "".join(parts) + "</svg>\n")


if __name__ == "__main__":
    main()

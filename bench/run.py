#!/usr/bin/env python3
"""temper beside its peers, on this machine, in one command.

usage: python3 bench/run.py --model SMOLLM2 --pairs PAIRS.jsonl

Contestants take turns on the same tokens and the same weights. A ratio is reported only where the losses agree.
README.md beside this file says what is measured and by which rules.
"""
import argparse, datetime, json, os, platform, shutil, statistics, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parent
WORK = BENCH / "work"
PEERS = ("torch", "trl", "candle", "burn", "llmc", "llamacpp", "zentorch")
DTYPES = ("f32", "bf16")
WARM_UP = 1  # steps at the beginning of every run that do not count
TOLERANCE = {"f32": 1e-3, "bf16": 1e-2}  # relative, between the losses of a step


@dataclass(frozen=True)
class Workload:
    name: str
    kind: str
    records: int  # of an optimizer step
    steps: int  # with the warm-up
    unit: str
    tokens: int = 0  # of a record, for gpt2

    def size(self):
        return (self.records, self.tokens) if self.kind == "gpt2" else (self.records,)


WORKLOADS = (
    Workload("gpt2-1x1024", "gpt2", 1, 6, "tok", 1024),
    Workload("gpt2-4x64", "gpt2", 4, 6, "tok", 64),
    Workload("dpo-4", "dpo", 4, 4, "pairs"),
    Workload("dpo-32", "dpo", 32, 2, "pairs"),
    Workload("lora-4", "lora", 4, 4, "pairs"),
    Workload("sft-4", "sft", 4, 4, "tok"),
    Workload("sft-32", "sft", 32, 2, "tok"),
    Workload("generate", "generate", 32, 1, "tok"),
)


@dataclass(frozen=True)
class Peer:
    name: str
    group: str
    dtype: str  # of temper, to be compared with
    command: tuple
    onednn: bool = False  # products by oneDNN, which turns f32 to bf16 where the hardware multiplies that
    reference: str = ""  # dpo: live or cached; lora: cached

    @property
    def label(self):
        return self.name + (f", {self.reference} reference" if self.reference else "")


# --- the machine and the tools ----------------------------------------------------------------------------------------

def stop(message):
    sys.exit(f"bench: {message}")


def say(message):
    print(f"bench: {message}", file=sys.stderr, flush=True)


def first_line(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "absent"
    return (done.stdout.strip() or "unknown").splitlines()[0]


def machine():
    lscpu = subprocess.run(["lscpu", "-J"], capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    fields = {}

    def collect(rows):
        for row in rows:
            fields[row["field"].rstrip(":")] = row["data"]
            collect(row.get("children", []))

    collect(json.loads(lscpu.stdout)["lscpu"] if lscpu.returncode == 0 else [])
    flags = set((fields.get("Flags") or "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
    return dict(cpu=fields.get("Model name", platform.processor()), cores=os.cpu_count(),
                flags=[flag for flag in wanted if flag in flags], memory_gb=round(memory / 1e9, 1),
                system=f"{platform.system()} {platform.release()}", date=datetime.date.today().isoformat())


def multiplies_bf16(here):
    return any("bf16" in flag for flag in here["flags"])


def python_of(venv):
    return Path(venv) / "bin" / "python"


def lines_of(name):
    return [line for line in (BENCH / name).read_text().splitlines() if line and not line.startswith("#")]


def ensure_venv(given):
    """The Python of the peers: the given environment, or bench/.venv, made on first use from the pinned versions."""
    if given:
        if not python_of(given).exists():
            stop(f"{given} is no virtual environment: leave out --reuse-venv and one is made")
        return python_of(given)
    venv = BENCH / ".venv"
    # pip reads its usual settings: an index of CPU builds (PIP_INDEX_URL) saves gigabytes and computes the same.
    ready = venv / "ready"
    if not ready.exists():
        say("making bench/.venv (once)")
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pip = [python_of(venv), "-m", "pip", "install", "--quiet"]
        needed, optional = lines_of("requirements.txt"), lines_of("requirements-optional.txt")
        if subprocess.run([*pip, *needed]).returncode:
            stop("pip could not install bench/requirements.txt: see above, or give --reuse-venv")
        for line in optional:
            if subprocess.run([*pip, line]).returncode:
                say(f"goes on without {line}")
        ready.touch()
    return python_of(venv)


def build_temper(given):
    if given:
        return Path(given).resolve()
    if subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=BENCH.parent).returncode:
        stop("temper does not build: see above, or give a binary with --temper")
    return target_of(BENCH.parent) / "temper"


def target_of(workspace):
    return Path(os.environ.get("CARGO_TARGET_DIR", workspace / "target")).resolve() / "release"


def build_rust_peers():
    """Gives the folder of the binaries."""
    say("building the Rust peers")
    if subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=BENCH / "rust").returncode:
        stop("the Rust peers do not build: see above, or leave candle and burn out of --peers")
    return target_of(BENCH / "rust")


def peak_of(temper):
    """What the machine can do at best, as `temper bench` measures it."""
    done = subprocess.run([temper, "bench", "--json", "--rows", "64"], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return next((line for line in lines if line.get("peak") is True), {})


# --- who takes part ---------------------------------------------------------------------------------------------------

def prepare(python, workload, steps, a):
    kinds = {"gpt2": ("gpt2", workload.name, workload.records, workload.tokens, steps),
             "dpo": ("dpo", workload.name, workload.records, steps, a.model, a.pairs),
             "lora": ("dpo", workload.name, workload.records, steps, a.model, a.pairs),
             "sft": ("sft", workload.name, workload.records, steps, a.model, a.pairs),
             "generate": ("generate", 512, 16 if a.quick else 64, workload.records, a.model, a.pairs)}
    command = [python, BENCH / "prepare.py", WORK, *map(str, kinds[workload.kind])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        stop(last_words(done.stderr))
    return json.loads((WORK / f"{workload.name}.json").read_text())


def peers_of(workload, python, rust, a):
    """Every peer of a workload, each with its best settings."""
    script = lambda name, *more: (python, BENCH / "peers" / f"{name}.py", *more)
    job, data = WORK / f"{workload.name}.json", WORK / f"{workload.name}.jsonl"
    formats = (("f32", "f32", False), ("f32 oneDNN", "f32-onednn", True), ("bf16", "bf16", True))
    temper_dtype = lambda dtype: dtype.split("-")[0]
    if workload.kind == "gpt2":
        files = (WORK / "gpt2", job)
        step = script("gpt2_torch", *files)
        for name, dtype, onednn in formats:
            yield Peer(f"PyTorch {name}", "torch", temper_dtype(dtype), (*step, "--dtype", dtype), onednn)
        for name, dtype, onednn in formats[1:]:
            command = (*step, "--dtype", dtype, "--compile", "inductor")
            yield Peer(f"PyTorch {name}, compiled", "torch", temper_dtype(dtype), command, onednn)
        command = (*step, "--dtype", "f32-onednn", "--compile", "zentorch")
        yield Peer("PyTorch f32, zentorch", "zentorch", "f32", command, True)
        yield Peer("candle f32", "candle", "f32", (rust / "gpt2-candle", *files))
        yield Peer("burn flex f32", "burn", "f32", (rust / "gpt2-burn", *files))
        yield Peer("llm.c f32", "llmc", "f32", script("gpt2_llmc", *files, a.llmc, WORK))
    elif workload.kind == "generate":
        yield Peer("llama.cpp f32", "llamacpp", "f32", script("generate_llamacpp", a.gguf, job, WORK))
    elif workload.kind == "lora":
        for name, dtype, onednn in formats:
            more = ("--dtype", dtype, "--reference", "cached", "--adapter", WORK / "adapter")
            command = script("dpo_torch", a.model, job, *more)
            yield Peer(f"PyTorch and PEFT {name}", "torch", temper_dtype(dtype), command, onednn, "cached")
    else:
        for reference in ("live", "cached") if workload.kind == "dpo" else ("",):
            more = ("--reference", reference) if reference else ()
            for name, dtype, onednn in formats:
                command = script(f"{workload.kind}_torch", a.model, job, "--dtype", dtype, *more)
                yield Peer(f"PyTorch {name}", "torch", temper_dtype(dtype), command, onednn, reference)
            for name, dtype, onednn in formats[1:]:
                command = script("trl_trainer", workload.kind, a.model, job, data, "--dtype", dtype, *more)
                yield Peer(f"TRL {name}", "trl", temper_dtype(dtype), command, onednn, reference)


def why_not(peer, here, a):
    """Why a peer cannot run, before it is tried."""
    if peer.group == "llmc" and not a.llmc:
        return "give --llmc, a checkout of llm.c"
    if peer.group == "llamacpp" and not a.gguf:
        return "give --gguf, the model as a .gguf file"
    if peer.dtype == "bf16" and not (multiplies_bf16(here) or a.emulated_bf16):
        return "this CPU does not multiply bf16; --emulated-bf16 lets PyTorch emulate it"
    return None


# --- runs -------------------------------------------------------------------------------------------------------------

class Failed(Exception):
    """A contestant that did not run, and its last words."""


def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


def last_words(text):
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines[-1:] or ["it said nothing"])[0][:200]


def run_peer(command):
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise Failed(last_words(done.stderr))
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_temper(temper, workload, dtype, job, a):
    if workload.kind == "generate":
        files = (WORK / "generate.json", WORK / "generate.txt")
        return run_peer((a.python, BENCH / "peers" / "generate_temper.py", temper, a.model, *files, dtype))
    return train_with_temper(temper, workload, dtype, job, a)


def train_with_temper(temper, workload, dtype, job, a):
    """One run in a fresh folder, with a fresh cache, so that the reference of DPO is computed every time."""
    out, cache = WORK / "run", WORK / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    verb = {"gpt2": "pretrain", "lora": "dpo"}.get(workload.kind, workload.kind)
    model = WORK / "gpt2" if workload.kind == "gpt2" else a.model
    options = dict(model=model, data=WORK / f"{workload.name}.jsonl", out=out, order="sequential",
                   learning_rate=job["learning_rate"], lr_scheduler="constant", batch_size=workload.records,
                   max_steps=len(job["steps"]), max_length=workload.tokens or 1024, save_steps=0, dtype=dtype)
    command = [temper, verb]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    if workload.kind == "lora":
        command += ["--method", "lora", "--quantize", "none", "--adapter", str(WORK / "adapter")]
    reference, usage = watch(command, cache)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line and "seconds" in line]
    keep = ("seconds", "loss", "computed_tokens")
    result = dict(workload=workload.name, peer="temper", dtype=dtype, reference_seconds=reference,
                  steps=[{key: step[key] for key in keep} for step in steps], peak_rss_bytes=usage.ru_maxrss * 1024)
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    return result


def fresh_adapter(temper, workload, a):
    """The adapter that all contestants begin with: rank 16 on every dense layer, B = 0."""
    out, adapter = WORK / "fresh", WORK / "adapter"
    for folder in (out, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    command = [temper, "dpo", "--method", "lora", "--model", a.model, "--data", WORK / f"{workload.name}.jsonl",
               "--out", out, "--learning-rate", "0", "--max-steps", "1", "--batch-size", "1", "--dtype", "f32"]
    watch(list(map(str, command)), WORK / "cache")
    (out / "final").rename(adapter)


def watch(command, cache):
    """Runs temper; gives the seconds of its reference pass, read off the lines `reference 0/N` and `reference N/N`."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    begin = end = 0.0
    lines = []
    for line in child.stderr:
        lines.append(line)
        words = line.split()
        if words[:1] == ["reference"] and "/" in words[-1]:
            done, _, _ = words[-1].partition("/")
            end = time.perf_counter()
            begin = end if done == "0" else begin
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise Failed(last_words("".join(lines)))
    return end - begin, usage


def contest(workload, temper, python, rust, job, here, a):
    """All contestants take turns. Gives after each {label: [result, ...]}, {label: why it did not run} and the peers."""
    runs = {f"temper {dtype}": lambda dtype=dtype: run_temper(temper, workload, dtype, job, a) for dtype in a.dtype}
    peers = [peer for peer in peers_of(workload, python, rust, a)
             if peer.group in a.peers and all(word in peer.label for word in a.match)]
    failed = {peer.label: reason for peer in peers if (reason := why_not(peer, here, a))}
    runs |= {peer.label: lambda peer=peer: run_peer(peer.command) for peer in peers}
    results = {label: [] for label in runs}
    for turn in range(a.turns):
        for label, run in runs.items():
            if label in failed:
                continue
            say(f"{workload.name}, turn {turn + 1} of {a.turns}: {label}")
            try:
                results[label].append(run())
            except Failed as error:
                failed[label] = str(error)
                say(f"{label} did not run: {error}")
        yield results, failed, peers


# --- what the runs say ------------------------------------------------------------------------------------------------

def units(workload, job):
    """How much is counted of every step: tokens of all records, or pairs."""
    if workload.kind == "gpt2":
        return [sum(map(len, step)) for step in job["steps"]]
    if workload.kind in ("dpo", "lora"):
        return [len(step) for step in job["steps"]]
    return [sum(len(row["ids"]) for row in step) for step in job["steps"]]


def rate_of(result, counted, reference=""):
    """Units a second after the warm-up. A live reference adds, to every step, its share of temper's one pass."""
    seconds = sum(step["seconds"] for step in result["steps"][WARM_UP:])
    kept = sum(counted[WARM_UP:])
    if reference == "live":
        seconds += result["reference_seconds"] * kept / sum(counted)
    return kept / seconds


def disagreement(result, temper, tolerance):
    """The first step whose losses differ by more than the tolerance, in words; None where all agree."""
    if len(result["steps"]) != len(temper["steps"]):
        return f"{len(result['steps'])} steps, temper {len(temper['steps'])}"
    for number, (mine, other) in enumerate(zip(result["steps"], temper["steps"]), 1):
        loss, expected = mine.get("loss", float("nan")), other["loss"]
        if not abs(loss - expected) <= tolerance * abs(expected):
            return f"losses differ at step {number}: {loss:.5f}, temper {expected:.5f}"
    return None


def shape_of(workload, a):
    """Parameters of the body's matrices, of those past the last attention and of the head, layers, and width of attention,
    from config.json."""
    folder = WORK / "gpt2" if workload.kind == "gpt2" else Path(a.model)
    c = json.loads((folder / "config.json").read_text())
    if workload.kind == "gpt2":
        width, layers = c["n_embd"], c["n_layer"]
        return dict(body=12 * width * width * layers, last=9 * width * width, head=width * c["vocab_size"],
                    layers=layers, width=width)
    width, layers, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
    head = c.get("head_dim") or width // heads
    attention = width * head * (2 * heads + 2 * c["num_key_value_heads"])
    mlp = 3 * width * c["intermediate_size"]
    return dict(body=layers * (attention + mlp), last=width * head * heads + mlp, head=width * c["vocab_size"],
                layers=layers, width=heads * head)


def looks(begin, end):
    """Positions seen, causally, by the tokens at depths begin to end - 1."""
    return (end * (end + 1) - begin * (begin + 1)) // 2


def flops_of(workload, job, temper, shape, reference):
    """Needed floating point operations of the measured steps, none of them counted twice.

    A matrix parameter costs 2 a token forward and 4 backward: 6 for the body at every computed token, 6 for the head at
    every row whose logits are made, and for the last layer's matrices past its attention. Attention costs forward
    4 · width · layers for every token and position that it sees, and 2.5 times as much backward. For GPT-2 and T tokens a row that is, a token,
    6 · (body + head) + 3.5 · 2 · T · width · layers: 0.807 GFLOP at T = 1024, 0.745 at T = 64. A reference pass costs
    the forward part: 2, 2 and 1 instead of 6, 6 and 3.5.
    """
    tokens = rows = seen = 0
    for step, records in list(zip(temper["steps"], job["steps"]))[WARM_UP:]:
        tokens += sum(map(len, records)) if workload.kind == "gpt2" else step["computed_tokens"]
        for record in records:
            if workload.kind == "gpt2":
                rows += len(record)
                seen += looks(0, len(record))
            elif workload.kind == "sft":
                rows += sum(record["mask"][1:])
                seen += looks(0, len(record["ids"]) - 1)
            else:  # the prompt once; its last token predicts the first of both answers
                prompt, answers = len(record["prompt"]), [len(record[key]) for key in ("chosen", "rejected")]
                rows += sum(answers) - 1
                seen += looks(0, prompt) + sum(looks(prompt, prompt + answer - 1) for answer in answers)
    matrices = 2 * (shape["body"] * tokens - shape["last"] * (tokens - rows) + shape["head"] * rows)
    attention = 4 * shape["width"] * shape["layers"] * seen
    passes = 1 if reference == "live" else 0
    # Frozen matrices have no gradient; the adapters themselves are left out.
    trained = 2 if workload.kind == "lora" else 3
    return (trained + passes) * matrices + (3.5 + passes) * attention


def share_of_peak(workload, job, results, shape, reference, peak):
    dtype = results[0]["dtype"]
    best = peak.get(f"{dtype}_gflops") or peak.get("f32_gflops")
    if not best:
        return None
    shares = []
    for result in results:
        kept = units(workload, job)
        seconds = sum(kept[WARM_UP:]) / rate_of(result, kept, reference)
        shares.append(flops_of(workload, job, result, shape, reference) / seconds / (best * 1e9))
    return statistics.median(shares)


def generation_share(phase, rate, shape, dtype, peak):
    """Reading a prompt is arithmetic: 2 a parameter and token. Writing one answer is reading all weights each token."""
    parameters = shape["body"] + shape["head"]
    if phase == "prefill" and peak.get("f32_gflops"):
        best = peak.get(f"{dtype}_gflops") or peak["f32_gflops"]
        return 2 * shape["body"] * rate / (best * 1e9)
    if phase == "decode" and peak.get("read_gb_per_s"):
        return parameters * {"f32": 4, "bf16": 2}[dtype] * rate / (peak["read_gb_per_s"] * 1e9)
    return None


def training_rows(workload, job, results, failed, peers, here, peak, a):
    counted, shape = units(workload, job), shape_of(workload, a)
    for peer in peers:
        # temper in the peer's number format; where it did not run in that, in f32
        own = next((d for d in (peer.dtype, *DTYPES) if results.get(f"temper {d}")), None)
        theirs = results.get(peer.label, [])
        row = dict(workload=workload.name, peer=peer.label, unit=workload.unit, temper_dtype=own)
        if own:
            ours = results[f"temper {own}"]
            row["temper_rate"] = statistics.median(rate_of(r, counted, peer.reference) for r in ours)
            row["temper_peak_rss"] = max(r["peak_rss_bytes"] for r in ours)
            row["share"] = share_of_peak(workload, job, ours, shape, peer.reference, peak)
        if peer.label in failed:
            row["note"] = f"not run: {failed[peer.label]}"
        else:
            row["rate"] = statistics.median(rate_of(r, counted) for r in theirs)
            row["peak_rss"] = max(r["peak_rss_bytes"] for r in theirs)
            if own:
                rounded = peer.onednn and multiplies_bf16(here)
                tolerance = TOLERANCE["bf16" if "bf16" in (peer.dtype, own) or rounded else "f32"]
                found = [disagreement(r, ours[0], tolerance) for r in theirs]
                row["note"] = next(filter(None, found), "")
                if not row["note"]:
                    row["ratio"] = row["temper_rate"] / row["rate"]
        yield row
    yield from temper_alone(workload, failed, peers, a)


def temper_alone(workload, failed, peers, a):
    """A row for every number format that temper could not do, so that it is not silently missing."""
    for dtype in a.dtype:
        if f"temper {dtype}" in failed:
            yield dict(workload=workload.name, peer="—", unit=workload.unit, temper_dtype=dtype,
                       note=f"temper did not run: {failed[f'temper {dtype}']}")


def generation_rows(workload, job, results, failed, peers, peak, a):
    shape = shape_of(workload, a)
    for phase, title in (("prefill", f"read {len(job['ids'])}"), ("decode", "write, one answer"),
                         ("batch", f"write, {job['batch']} answers")):
        for peer in peers:
            theirs = [r for r in results.get(peer.label, []) if phase in r["rates"]]
            own = next((d for d in (peer.dtype, *DTYPES) if results.get(f"temper {d}")), None)
            row = dict(workload=f"generate: {title}", peer=peer.label, unit="tok", temper_dtype=own, note="")
            if own:
                ours = results[f"temper {own}"]
                row["temper_rate"] = statistics.median(r["rates"][phase] for r in ours)
                row["temper_peak_rss"] = max(r["peak_rss_bytes"][phase] for r in ours)
                row["share"] = generation_share(phase, row["temper_rate"], shape, own, peak)
            if theirs:
                row["rate"] = statistics.median(r["rates"][phase] for r in theirs)
                row["peak_rss"] = max(r["peak_rss_bytes"] for r in theirs)
                if own:
                    row["ratio"] = row["temper_rate"] / row["rate"]
            else:
                row["note"] = f"not run: {failed.get(peer.label, 'no such measurement')}"
            yield row
    yield from temper_alone(workload, failed, peers, a)


# --- the page ---------------------------------------------------------------------------------------------------------

def table(rows):
    lines = ["| workload | peer | peer's rate | temper's rate | ratio | temper's share of peak | memory: peer, temper |",
             "|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        rate = lambda key: f"{row[key]:,.4g} {row['unit']}/s" if key in row else "—"
        size = lambda key: f"{row[key] / 1e9:.2f}" if key in row else "—"
        ours = rate("temper_rate") + (f" ({row['temper_dtype']})" if "temper_rate" in row else "")
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else (row.get("note") or "—").replace("|", "/")
        share = f"{row['share']:.0%}" if row.get("share") else "—"
        memory = f"{size('peak_rss')}, {size('temper_peak_rss')} GB"
        lines.append("| " + " | ".join([row["workload"], row["peer"], rate("rate"), ours, ratio, share, memory]) + " |")
    return "\n".join(lines)


def versions(results, temper):
    found = {"temper": first_line([temper, "--version"]).removeprefix("temper "), "rustc": first_line(["rustc", "-V"])}
    for runs in results:
        for result in runs:
            found |= result.get("versions", {})
    return found


def page(done, here):
    cpu = f"{here['cpu']}, {here['cores']} cores ({', '.join(here['flags'])}), {here['memory_gb']} GB, {here['system']}"
    best = lambda raw: ", ".join(f"{key.replace('_', ' ')} {value:,.4g}" for key, value in raw["peak"].items()
                                 if key != "peak" and isinstance(value, (int, float)))
    runs = [f"| {raw['workload']} | {raw['turns']} | {best(raw)} |" for raw in done]
    found = {name: version for raw in done for name, version in raw["versions"].items()}
    return "\n".join([
        f"# Measured on {here['date']}", "", f"Machine: {cpu}.", "",
        f"{WARM_UP} step of warm-up left out of each run; medians of the turns. Ratio: temper's rate over the peer's.", "",
        table([row for raw in done for row in raw["rows"]]), "",
        "| workload | turns | the machine at best, before it |", "|---|---:|---|", *runs, "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in found.items()) + ".", ""])


# --- the command ------------------------------------------------------------------------------------------------------

def chosen(text, known, what):
    picked = [word.strip() for word in text.split(",") if word.strip()]
    for word in picked:
        if word not in known:
            stop(f"there is no {what} `{word}`: choose from {', '.join(known)}")
    return picked


def options():
    kinds = list(dict.fromkeys(w.kind for w in WORKLOADS))
    p = argparse.ArgumentParser(description="temper beside its peers, on this machine.")
    p.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct in Hugging Face layout")
    p.add_argument("--pairs", required=True, help="JSON lines with `prompt`, `chosen` and `rejected` as messages")
    p.add_argument("--only", default=",".join(kinds), help="workloads, or kinds of them: gpt2,dpo-4")
    p.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(PEERS)}")
    p.add_argument("--match", default="", help="only peers whose names contain all of these: bf16,cached")
    p.add_argument("--dtype", default="f32", help="temper's number formats: f32,bf16")
    p.add_argument("--emulated-bf16", action="store_true",
                   help="run the bf16 peers although this CPU does not multiply bf16: tens of times slower than f32")
    p.add_argument("--turns", type=int, default=5, help="runs of every contestant [5]")
    p.add_argument("--steps", type=int, help="optimizer steps a run, with the warm-up, instead of the workload's own")
    p.add_argument("--quick", action="store_true", help="two steps a run, and no batches of 32: does everything work?")
    p.add_argument("--temper", help="the binary, instead of building it")
    p.add_argument("--reuse-venv", metavar="FOLDER", help="a Python environment that has the peers already")
    p.add_argument("--llmc", metavar="FOLDER", help="a checkout of llm.c")
    p.add_argument("--gguf", metavar="FILE", help="the model for llama.cpp")
    a = p.parse_args()
    a.peers = chosen(a.peers, PEERS, "peer")
    a.match = [word for word in a.match.split(",") if word]
    a.dtype = chosen(a.dtype, DTYPES, "number format")
    words = chosen(a.only, kinds + [w.name for w in WORKLOADS], "workload")
    a.workloads = [w for w in WORKLOADS if w.name in words or w.kind in words]
    if a.quick:
        a.workloads = [w for w in a.workloads if w.records < 32 or w.kind == "generate"]
        a.steps = a.steps or WARM_UP + 1
    if a.turns < 1 or a.steps is not None and a.steps <= WARM_UP:
        stop(f"--turns is at least 1, --steps at least {WARM_UP + 1}")
    if not (Path(a.model) / "tokenizer.json").exists():
        stop(f"--model {a.model}: give a folder with config.json, model.safetensors and tokenizer.json")
    if not Path(a.pairs).is_file():
        stop(f"--pairs {a.pairs}: there is no such file")
    return a


def main():
    a = options()
    WORK.mkdir(exist_ok=True)
    python = a.python = ensure_venv(a.reuse_venv)
    temper, here = build_temper(a.temper), machine()
    gpt2 = any(w.kind == "gpt2" for w in a.workloads)
    rust = build_rust_peers() if gpt2 and {"candle", "burn"} & set(a.peers) else Path()
    peak = peak_of(temper)
    out = BENCH / "runs" / here["date"]
    out.mkdir(parents=True, exist_ok=True)
    for workload in a.workloads:
        job = prepare(python, workload, a.steps or workload.steps, a)
        if workload.kind == "lora":
            fresh_adapter(temper, workload, a)
        # Written after every turn: what ends early leaves the turns before.
        for turns, (results, failed, peers) in enumerate(contest(workload, temper, python, rust, job, here, a), 1):
            if workload.kind == "generate":
                rows = list(generation_rows(workload, job, results, failed, peers, peak, a))
            else:
                rows = list(training_rows(workload, job, results, failed, peers, here, peak, a))
            raw = dict(workload=workload.name, machine=here, peak=peak, turns=turns, rows=rows,
                       versions=versions(results.values(), temper), results=results, failed=failed)
            (out / f"{workload.name}.json").write_text(json.dumps(raw, indent=1) + "\n")
            (out / "table.md").write_text(page(days_work(out), here))
        print(table(rows), flush=True)
    say(f"written to {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")


def days_work(out):
    """What the folder holds, in the order of the workloads: a day's table may be made in several runs."""
    files = [out / f"{workload.name}.json" for workload in WORKLOADS]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    return [raw for raw in found if "rows" in raw]


if __name__ == "__main__":
    main()

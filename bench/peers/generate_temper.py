"""temper's own speed of reading a prompt and of writing, seen from outside: when its output arrives.

usage: generate_temper.py TEMPER MODEL generate.json PROMPT.txt DTYPE
prefill: first token of a long prompt against first token of a short one
decode:  tokens after the first of one answer
batch:   many answers at once against as many of one token
"""
import json, os, subprocess, sys, time
from pathlib import Path
from tokenizers import Tokenizer

SHORT = "The"
SPEAK = ("--temperature", "1", "--top-k", "40")  # the samples differ; a likeliest token is rarely the end


def run(command):
    """Seconds to the first byte and to the last, the text, and the peak memory."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pieces, first = [], None
    while piece := os.read(child.stdout.fileno(), 65536):
        pieces.append(piece)
        first = first or time.perf_counter() - start
        last = time.perf_counter() - start
    complaint = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(complaint.strip())
    return first, last, b"".join(pieces).decode(), usage.ru_maxrss * 1024


def main(temper, model, job, prompt, dtype):
    job, prompt = json.loads(Path(job).read_text()), Path(prompt).read_text()
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    count = lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    base = [temper, "generate", "--model", model, "--dtype", dtype]
    ask = lambda text, new, *more: run([*base, "--prompt", text, "--max-new-tokens", str(new), *more])
    one, new, batch = ask(SHORT, 1, "--temperature", "0"), job["new"], job["batch"]
    long = ask(prompt, 1, "--temperature", "0")
    answer = ask(SHORT, new, "--temperature", "0")
    few, many = (ask(SHORT, n, "--samples", str(batch), *SPEAK) for n in (1, new))
    texts = many[2].split("--- sample ")[1:]
    written = sum(count(text.split("\n", 1)[1].removesuffix("\n")) for text in texts) - batch
    rates = dict(prefill=(len(job["ids"]) - 1) / (long[0] - one[0]),
                 decode=(count(answer[2].removesuffix("\n")) - 1) / (answer[1] - answer[0]),
                 batch=written / (many[1] - few[1]))
    peaks = dict(prefill=long[3], decode=answer[3], batch=many[3])
    print(json.dumps(dict(workload="generate", peer="temper", dtype=dtype, rates=rates, peak_rss_bytes=peaks)))


if __name__ == "__main__":
    main(*sys.argv[1:])

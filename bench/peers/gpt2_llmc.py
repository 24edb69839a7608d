"""llm.c's CPU training step: compiles it around gpt2_llmc.c, gives it the same weights and tokens, and runs it.

usage: gpt2_llmc.py MODEL JOB.json LLMC_FOLDER WORK_FOLDER
LLMC_FOLDER is a checkout of llm.c, as of its checkpoint version 3 (the one with a padded vocabulary).
"""
import json, os, subprocess, sys
from pathlib import Path
import numpy
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
VOCABULARY, PADDED, POSITIONS, WIDTH, LAYERS, HEADS = 50257, 50304, 1024, 768, 12, 12
PER_LAYER = ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
             "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
             "mlp.c_proj.bias")


def write_checkpoint(model, path):
    """llm.c's order: each kind of tensor for all layers; matrices as [out, in]; the vocabulary padded with zeros."""
    tensors = load_file(Path(model) / "model.safetensors")
    header = numpy.zeros(256, numpy.int32)
    header[:8] = 20240326, 3, POSITIONS, VOCABULARY, LAYERS, HEADS, WIDTH, PADDED
    with open(path, "wb") as out:
        put = lambda tensor: out.write(numpy.ascontiguousarray(tensor, numpy.float32).tobytes())
        out.write(header.tobytes())
        put(numpy.pad(tensors["transformer.wte.weight"], ((0, PADDED - VOCABULARY), (0, 0))))
        put(tensors["transformer.wpe.weight"])
        for kind in PER_LAYER:
            for layer in range(LAYERS):
                put(tensors[f"transformer.h.{layer}.{kind}"].T)
        put(tensors["transformer.ln_f.weight"])
        put(tensors["transformer.ln_f.bias"])


def build(checkout, program):
    command = ["gcc", "-O3", "-Ofast", "-march=native", "-fopenmp", "-DOMP", f"-I{checkout}",
               str(HERE / "gpt2_llmc.c"), "-o", str(program), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llm.c does not compile: {done.stderr.strip().splitlines()[-1]}\ngive a current checkout to --llmc")


def revision(checkout):
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(model, job, checkout, work):
    job, work = json.loads(Path(job).read_text()), Path(work).resolve()
    program, weights, tokens = work / "gpt2_llmc", work / "gpt2_124M.bin", work / f"{job['workload']}.tokens.bin"
    build(checkout, program)
    if not weights.exists():
        write_checkpoint(model, weights)
    steps = numpy.array(job["steps"], numpy.int32)
    tokens.write_bytes(numpy.array(steps.shape, numpy.int32).tobytes() + steps.tobytes())
    command = [program, weights, tokens, str(job["learning_rate"])]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = child.stderr.read().splitlines()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit("llm.c stopped: " + "; ".join(lines[-2:]))
    measured = [dict(zip(("seconds", "loss"), map(float, line.split()))) for line in lines]
    print(json.dumps(dict(workload=job["workload"], peer="llm.c", dtype="f32", steps=measured,
                          tokens=steps[0].size, peak_rss_bytes=usage.ru_maxrss * 1024,
                          versions={"llm.c": revision(checkout)})))


if __name__ == "__main__":
    main(*sys.argv[1:])

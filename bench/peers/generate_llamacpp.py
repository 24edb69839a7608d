"""llama.cpp's speed of reading a prompt and of writing, through llama-cpp-python's low-level interface, in f32.

usage: generate_llamacpp.py MODEL.gguf generate.json WORK_FOLDER
The file's weights are widened to f32 first, so that both sides multiply the same numbers.
"""
import ctypes, json, os, resource, sys, time
from importlib.metadata import version
from pathlib import Path
import llama_cpp as ll
import numpy

THREADS = os.cpu_count()


def widen(source, work):
    target = Path(work) / "generate-f32.gguf"
    if not target.exists():
        how = ll.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread = ll.LLAMA_FTYPE_ALL_F32, True, THREADS
        how.output_tensor_type = how.token_embedding_type = ll.GGML_TYPE_F32
        if ll.llama_model_quantize(source.encode(), str(target).encode(), ctypes.byref(how)):
            sys.exit(f"llama.cpp cannot widen {source}: give another file to --gguf")
    return target


class Writer:
    """A model and a cache for several sequences; the cache stays in f16, which is the default and fastest."""

    def __init__(self, path, sequences, length):
        self.model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
        how = ll.llama_context_default_params()
        how.n_ctx, how.n_seq_max, how.n_batch, how.n_ubatch = sequences * length, sequences, 512, 512
        how.n_threads = how.n_threads_batch = THREADS
        self.context = ll.llama_init_from_model(self.model, how)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.batch = ll.llama_batch_init(512, 0, 1)

    def clear(self):
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)

    def feed(self, entries):
        """Computes (token, position, sequence) entries; gives the likeliest token after each sequence's last."""
        b, last = self.batch, {sequence: at for at, (_, _, sequence) in enumerate(entries)}
        b.n_tokens = len(entries)
        for at, (token, position, sequence) in enumerate(entries):
            b.token[at], b.pos[at], b.n_seq_id[at] = token, position, 1
            b.seq_id[at][0], b.logits[at] = sequence, last[sequence] == at
        if ll.llama_decode(self.context, b):
            sys.exit("llama.cpp cannot compute the batch")
        logits = lambda at: numpy.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, at), (self.vocabulary,))
        return {sequence: int(logits(at).argmax()) for sequence, at in last.items()}

    def read(self, ids):
        """Seconds of reading a prompt."""
        self.clear()
        start = time.perf_counter()
        self.feed([(token, position, 0) for position, token in enumerate(ids)])
        return time.perf_counter() - start

    def write(self, firsts, new):
        """Tokens a second of continuing one token in every sequence; the first answer token is not counted."""
        self.clear()
        tokens = self.feed([(token, 0, sequence) for sequence, token in enumerate(firsts)])
        start = time.perf_counter()
        for position in range(1, new):
            tokens = self.feed([(token, position, sequence) for sequence, token in tokens.items()])
        return len(firsts) * (new - 1) / (time.perf_counter() - start)


def main(source, job, work):
    job = json.loads(Path(job).read_text())
    ll.llama_log_set(QUIET, None)
    ll.llama_backend_init()
    path, ids, new, batch = widen(source, work), job["ids"], job["new"], job["batch"]
    reader = Writer(path, 1, max(len(ids), new))
    reader.read(ids)  # warm-up
    rates = dict(prefill=len(ids) / reader.read(ids), decode=reader.write(ids[:1], new),
                 batch=Writer(path, batch, new).write(ids[:batch], new))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(workload="generate", peer="llama.cpp", dtype="f32", rates=rates, peak_rss_bytes=peak,
                          versions={"llama-cpp-python": version("llama-cpp-python")})))


QUIET = ll.llama_log_callback(lambda *_: None)

if __name__ == "__main__":
    main(*sys.argv[1:])

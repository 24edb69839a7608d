"""Makes the inputs that every contestant shares, each as tokens (for the peers) and as files (for temper).

usage: prepare.py OUT gpt2 NAME ROWS TOKENS STEPS
       prepare.py OUT dpo|sft NAME RECORDS STEPS MODEL PAIRS
       prepare.py OUT generate PROMPT NEW BATCH MODEL PAIRS
Writes OUT/NAME.json, the job: `workload`, `learning_rate` and `steps`, the records of each optimizer step; and
OUT/NAME.jsonl, the same records as temper reads them. For gpt2, OUT/gpt2 is a model with random weights; for generate,
OUT/generate.json holds the prompt's tokens and OUT/generate.txt its text.
"""
import json, random, sys
from pathlib import Path

MAX_LENGTH = 1024


def main(out, kind, *arguments):
    {"gpt2": gpt2, "dpo": dpo, "sft": sft, "generate": generation}[kind](Path(out), *arguments)


def write(out, name, job, records):
    (out / f"{name}.json").write_text(json.dumps(job))
    (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def gpt2(out, name, rows, tokens, steps):
    rows, tokens, steps = int(rows), int(tokens), int(steps)
    end = gpt2_model(out / "gpt2")
    draw = random.Random(1)
    step = lambda: [[draw.randrange(end) for _ in range(tokens - 1)] + [end] for _ in range(rows)]
    job = dict(workload=name, learning_rate=1e-4, steps=[step() for _ in range(steps)])
    text = lambda row: " ".join(f"t{token}" for token in row[:-1])
    write(out, name, job, [dict(text=text(row)) for rows in job["steps"] for row in rows])


def gpt2_model(folder):
    """GPT-2 124M with fresh weights and a tokenizer whose word t123 is token 123; gives the end token."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel
    end = 50256
    if not (folder / "tokenizer_config.json").exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).save_pretrained(folder)
        vocabulary = {f"t{i}": i for i in range(end)} | {"<|endoftext|>": end}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "unk")}
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=1024, **names)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return end


def chat(model):
    """Gives the function that renders messages to tokens."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda messages, ask: tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)


def usable_pairs(tokens, pairs):
    """Pairs whose prompt is the beginning of both answered conversations and which fit uncut."""
    for line in open(pairs, encoding="utf-8"):
        record = json.loads(line)
        record = {key: record[key] for key in ("prompt", "chosen", "rejected")}
        prompt = tokens(record["prompt"], True)
        answered = [tokens(record["prompt"] + record[key], False) for key in ("chosen", "rejected")]
        if all(len(a) <= MAX_LENGTH and a[:len(prompt)] == prompt for a in answered):
            chosen, rejected = (a[len(prompt):] for a in answered)
            yield record, dict(prompt=prompt, chosen=chosen, rejected=rejected)


def first(items, count, pairs):
    taken = [item for item, _ in zip(items, range(count))]
    if len(taken) < count:
        sys.exit(f"{pairs} has {len(taken)} usable pairs, {count} are needed: give a longer file, or fewer `--steps`")
    return taken


def in_steps(records, size):
    return [records[at:at + size] for at in range(0, len(records), size)]


def dpo(out, name, records, steps, model, pairs):
    taken = first(usable_pairs(chat(model), pairs), int(records) * int(steps), pairs)
    job = dict(workload=name, learning_rate=1e-6, beta=0.1, steps=in_steps([ids for _, ids in taken], int(records)))
    write(out, name, job, [record for record, _ in taken])


def sft(out, name, records, steps, model, pairs):
    tokens = chat(model)
    taken = first(usable_pairs(tokens, pairs), int(records) * int(steps), pairs)
    conversations = [record["prompt"] + record["chosen"] for record, _ in taken]
    rows = [dict(ids=tokens(messages, False), mask=assistant_mask(tokens, messages)) for messages in conversations]
    job = dict(workload=name, learning_rate=2e-5, steps=in_steps(rows, int(records)))
    write(out, name, job, [dict(messages=messages) for messages in conversations])


def assistant_mask(tokens, messages):
    """1 for every token of an assistant's turn: what the template adds after it has been asked to answer."""
    mask = [0] * len(tokens(messages, False))
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = len(tokens(messages[:turn], True)), len(tokens(messages[:turn + 1], False))
            mask[begin:end] = [1] * (end - begin)
    return mask


def generation(out, prompt, new, batch, model, pairs):
    """A prompt of exactly so many tokens, as text that tokenizes back to them."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = " ".join(m["content"] for line in open(pairs, encoding="utf-8") for m in json.loads(line)["prompt"])
    ids = tokenizer(" ".join(text.split()), add_special_tokens=False)["input_ids"][:int(prompt)]
    text = tokenizer.decode(ids)
    if len(ids) < int(prompt) or tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        sys.exit(f"{pairs} makes no prompt of {prompt} tokens: give a longer file")
    job = dict(workload="generate", new=int(new), batch=int(batch), ids=ids)
    (out / "generate.json").write_text(json.dumps(job))
    (out / "generate.txt").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])

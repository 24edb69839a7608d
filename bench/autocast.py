"""What bf16 autocast of PyTorch does to preference margins, computed on any CPU.

usage: autocast.py MODEL PAIRS.jsonl [NUMBER]
Where autocast takes bf16 (linear layers, attention), operands are rounded to bf16, products are summed in f32 and
results are rounded; everything else is PyTorch's. Prints the differences to f32 of answers' log-probabilities and margins.
"""
import json, statistics, sys
import torch
import torch.nn.functional as functional
from transformers import AutoModelForCausalLM, AutoTokenizer

EDGES = (-9, -0.4, -0.2, -0.1, 0, 0.1, 0.2, 0.4, 9)
exact_linear, widened = functional.linear, {}


def rounded(x):
    return x.to(torch.bfloat16).float()


def linear(x, weight, bias=None):
    key = weight.data_ptr()
    if key not in widened:
        widened[key] = rounded(weight)
    return exact_linear(rounded(x), widened[key], None if bias is None else rounded(bias)).to(torch.bfloat16)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    q, k, v = map(rounded, (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if attn_mask is not None:
        seen = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if seen else scores + attn_mask
    elif is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (rounded(p) @ v / p.sum(-1, keepdim=True)).to(torch.bfloat16)


def answers(tokenizer, pair):
    """Tokens of prompt and answer, and where the answer begins, of the chosen and the rejected."""
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    for answer in ("chosen", "rejected"):
        tokens = tokenizer.apply_chat_template(pair["prompt"] + pair[answer], return_dict=False)
        yield tokens, len(prompt)


@torch.no_grad()
def log_probability(model, tokens, first):
    ids = torch.tensor([tokens])
    logits = model(ids).logits[0, first - 1:-1].float()
    return torch.log_softmax(logits, -1).gather(1, ids[0, first:, None]).sum().item()


def main(model, pairs, number="24"):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in open(pairs)][:int(number)]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    score = lambda: [[log_probability(network, *answer) for answer in answers(tokenizer, row)] for row in rows]
    exact = score()
    functional.linear, functional.scaled_dot_product_attention = linear, attention
    autocast = score()
    margins = [(c - r) - (ec - er) for (c, r), (ec, er) in zip(autocast, exact)]
    sums = [abs(a - e) / abs(e) for pair, own in zip(autocast, exact) for a, e in zip(pair, own)]
    print(f"margins: mean {statistics.mean(margins):+.3f}, standard deviation {statistics.stdev(margins):.3f}")
    print(f"sums: worst {max(sums):.2%}, mean {statistics.mean(sums):.2%}")
    for low, high in zip(EDGES, EDGES[1:]):
        print(f"{low:5} to {high:4}: {sum(low <= margin < high for margin in margins)}")


if __name__ == "__main__":
    main(*sys.argv[1:])

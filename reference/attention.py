"""Writes fixtures/attention.json: one head of scaled dot-product attention with and without a mask, in f64.

Read by the attention test of the Rust crate (selftest/stored.rs).
"""
import torch
from common import FIXTURES, provenance, write_json


def main():
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, 1, 3, 4) for _ in range(3))
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1]])  # 1 visible, 0 hidden
    scores = q.double() @ k.double().transpose(-1, -2) / 4**0.5
    attend = lambda s: (torch.softmax(s, -1) @ v.double())[0, 0].tolist()
    write_json(FIXTURES / "attention.json", dict(
        provenance=provenance(__file__, 0), q=q[0, 0].tolist(), k=k[0, 0].tolist(), v=v[0, 0].tolist(),
        mask=mask.tolist(), without_mask=attend(scores),
        with_mask=attend(scores.masked_fill(mask == 0, float("-inf")))))


if __name__ == "__main__":
    main()

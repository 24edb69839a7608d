"""Writes one tiny model folder per architecture line: fixtures/{gpt2,llama,llama3,mistral,qwen2,qwen3,smollm3,
gemma3}-tiny, llama-linear, gpt2-hub, bf16-tiny, f16-tiny; each with golden values in f64 where the model is its own.

Read by the golden tests of the Rust crate (tests/golden.rs). golden.safetensors holds `logits.<sequence>` and
`grad.<parameter>`; golden.json the sequences, the loss and the losses of ten AdamW steps.
"""
import json
import torch
from safetensors.torch import save_file
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM)
from common import (check_f32, exact, folder, load_f64, load_weights, mean_nll, provenance, randomize, write_golden,
                    write_json)

SEED = 1
COMMON = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=56, max_position_embeddings=64, bos_token_id=94, eos_token_id=95,
              tie_word_embeddings=True)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)
MODELS = {
    "gpt2-tiny": (GPT2LMHeadModel, GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, bos_token_id=95, eos_token_id=95,
        embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)),
    "llama-tiny": (LlamaForCausalLM, LlamaConfig(**COMMON)),
    "llama3-tiny": (LlamaForCausalLM, LlamaConfig(**COMMON | dict(tie_word_embeddings=False), rope_parameters=LLAMA3_ROPE)),
    "llama-linear": (LlamaForCausalLM, LlamaConfig(**COMMON, rope_parameters=dict(
        rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "mistral-tiny": (MistralForCausalLM, MistralConfig(**COMMON, sliding_window=5)),
    "qwen2-tiny": (Qwen2ForCausalLM, Qwen2Config(**COMMON)),
    "qwen3-tiny": (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=16)),
    "smollm3-tiny": (SmolLM3ForCausalLM, SmolLM3Config(
        **COMMON | dict(num_hidden_layers=4), no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5,
        pad_token_id=None)),
    "gemma3-tiny": (Gemma3ForCausalLM, Gemma3TextConfig(
        **COMMON | dict(num_hidden_layers=4), head_dim=8, query_pre_attn_scalar=8, sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(full_attention=dict(rope_type="linear", rope_theta=1e6, factor=4.0),
                             sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
}


def sequences():
    """Lengths 13, 24, 7; the first two share their first six tokens, and what is trained has gaps."""
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda n: torch.randint(0, 94, (n,), generator=generator).tolist()
    shared = draw(6)
    tokens = [shared + draw(7), shared + draw(18), draw(7)]
    trained = [lambda t: t >= 6, lambda t: t in (3, 4) or (t >= 8 and not 15 <= t < 19), lambda t: t >= 1]
    return [dict(tokens=x, trained=[int(f(t)) for t in range(len(x))]) for x, f in zip(tokens, trained)]


def as_old_llama(path):
    """Rewrite the folder as early Llama checkpoints were: old rope_scaling, inv_freq buffers, two shards."""
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= dict(rope_theta=rope["rope_theta"], rope_scaling=dict(type="linear", factor=rope["factor"]))
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.31.0"
    write_json(path / "config.json", config, 2)
    tensors = load_weights(path)
    inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, 8, 2).float() / 8))
    tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": inv_freq.clone() for n in range(2)}
    (path / "model.safetensors").unlink()
    names, shards = sorted(tensors), {}
    second = {n for n in names if n.startswith(("model.layers.1", "model.norm"))}
    for i, part in enumerate(([n for n in names if n not in second], sorted(second)), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, path / file, metadata=dict(format="pt"))
        shards |= {n: file for n in part}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(path / "model.safetensors.index.json", dict(metadata=dict(total_size=size), weight_map=shards), 2)


def write_hub_gpt2(data):
    """gpt2-tiny's weights under the names and the config of the published GPT-2."""
    source, path = folder("gpt2-tiny"), folder("gpt2-hub")
    tensors = {k.removeprefix("transformer."): v for k, v in load_weights(source).items()}
    for n in range(2):
        tensors[f"h.{n}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        tensors[f"h.{n}.attn.masked_bias"] = torch.tensor(-10000.0)
    save_file(tensors, path / "model.safetensors", metadata=dict(format="pt"))
    write_json(path / "config.json", dict(
        activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=95,
        embd_pdrop=0.1, eos_token_id=95, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2", n_ctx=64,
        n_embd=32, n_head=4, n_inner=48, n_layer=2, n_positions=64, resid_pdrop=0.1, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=96), 2)
    with exact(), torch.no_grad():
        logits, _ = mean_nll(load_f64(source), data)
    check_f32(path, data, logits)
    write_json(path / "provenance.json", provenance(__file__, SEED), 2)


def write_half(name, dtype, data):
    """llama-tiny's weights rounded to a 16-bit type; the golden logits are those of the rounded weights."""
    path = folder(name)
    config = json.loads((folder("llama-tiny") / "config.json").read_text())
    write_json(path / "config.json", config | dict(dtype=str(dtype).removeprefix("torch.")), 2)
    tensors = {k: v.to(dtype) for k, v in load_weights(folder("llama-tiny")).items()}
    save_file(tensors, path / "model.safetensors", metadata=dict(format="pt"))
    with exact(), torch.no_grad():
        logits, loss = mean_nll(load_f64(path), data)
    save_file({f"logits.{i}": v.contiguous() for i, v in enumerate(logits)}, path / "golden.safetensors")
    write_json(path / "golden.json", dict(sequences=data, loss=loss.item()))
    write_json(path / "provenance.json", provenance(__file__, SEED), 2)


def main():
    data = sequences()
    for i, (name, (cls, config)) in enumerate(MODELS.items()):
        path = folder(name)
        randomize(cls(config), SEED + i).save_pretrained(path)
        (path / "generation_config.json").unlink(missing_ok=True)
        if name == "llama-linear":
            as_old_llama(path)
        write_golden(path, data)
        write_json(path / "provenance.json", provenance(__file__, SEED + i), 2)
    write_hub_gpt2(data)
    write_half("bf16-tiny", torch.bfloat16, data)
    write_half("f16-tiny", torch.float16, data)


if __name__ == "__main__":
    main()

"""Writes fixtures/gguf: llama.gguf (F32, tokenizer included), llama-f32/ (the same model as a folder) and quant.json.

The model is a tiny Llama over chat-tiny's tokenizer (run tokenizer.py first). Its weights are rounded to BF16, so the
folder stores them in BF16 and the F32 file holds exactly the same numbers; q and k rows are permuted in the GGUF file
as llama.cpp's converter does. llama-f32/golden.* has logits in f64. quant.json: for each block type random blocks
(`bytes`, hex) and what gguf.quants.dequantize makes of them (`values`, f32).
Read by the GGUF tests of the Rust crate (tests/checkpoint_read.rs).
"""
import json
import shutil
import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from common import exact, folder, load_f64, load_weights, mean_nll, provenance, randomize, write_json

SEED = 20
HEADS, KV_HEADS = 4, 2
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
# Where each block keeps its f16 scales; every other byte may be anything.
SCALES = {Type.Q8_0: (0,), Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2),
          Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.Q2_K: (80, 82), Type.Q3_K: (108,),
          Type.IQ4_NL: (0,), Type.IQ4_XS: (0,)}


def gguf_name(name):
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def permute(weight, heads):
    """Rows of each head from halves to interleaved pairs, as the rotary embedding of GGUF Llamas expects."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_model(path, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, intermediate_size=128, max_position_embeddings=256, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    randomize(LlamaForCausalLM(config), SEED, std=0.08).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder("chat-tiny") / name, path / name)
    texts = ["The lighthouse keeper wrote 12 letters.", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]
    tokens = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    sequences = [dict(tokens=t, trained=[0] + [1] * (len(t) - 1)) for t in tokens]
    with exact(), torch.no_grad():
        logits, loss = mean_nll(load_f64(path), sequences)
    save_file({f"logits.{i}": v.contiguous() for i, v in enumerate(logits)}, path / "golden.safetensors")
    write_json(path / "golden.json", dict(sequences=sequences, loss=loss.item()))
    return config


def write_gguf(path, config, weights, tokenizer):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    fast = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in fast["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in weights.items():
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permute(array, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind, random, count=3):
    if kind in (Type.F16, Type.BF16):
        values = np.concatenate([random.standard_normal(58), [0.0, -0.0, 6e-8, -3e-6, 65504.0, 1 / 3]])
        return gguf.quants.quantize(values.astype(np.float32), kind).view(np.uint8)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        scales = (0.05 * random.standard_normal((count, 1))).astype("<f2")
        blocks[:, offset:offset + 2] = scales.view(np.uint8)
    return blocks.reshape(-1)


def write_quant(path):
    random = np.random.default_rng(SEED)
    entries = []
    for kind in (Type.F16, Type.BF16, *SCALES):
        data = random_blocks(kind, random)
        values = gguf.quants.dequantize(data, kind).astype(np.float32).reshape(-1)
        assert np.isfinite(values).all()
        block, size = gguf.GGML_QUANT_SIZES[kind]
        assert len(values) * size == len(data) * block
        entries.append(dict(type=kind.name, ggml_type=int(kind), block_values=block, block_bytes=size,
                            bytes=data.tobytes().hex(), values=values.tolist()))
    write_json(path, entries)


def check(path, model_path):
    """transformers reads the GGUF file as the folder's weights."""
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    for name, tensor in load_weights(model_path).items():
        assert torch.equal(read[name], tensor.float()), name


def main():
    path, model_path = folder("gguf"), folder("gguf/llama-f32")
    tokenizer = AutoTokenizer.from_pretrained(folder("chat-tiny"))
    config = write_model(model_path, tokenizer)
    write_gguf(path / "llama.gguf", config, load_weights(model_path), tokenizer)
    write_quant(path / "quant.json")
    check(path / "llama.gguf", model_path)
    for p in (path, model_path):
        write_json(p / "provenance.json", provenance(__file__, SEED), 2)


if __name__ == "__main__":
    main()

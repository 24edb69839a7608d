"""Writes fixtures/lora: adapters as PEFT saves them on gpt2-tiny and llama-tiny, with golden values in f64.

Read by tests/lora.rs. Each folder is one adapter with random A and B: adapter_config.json and
adapter_model.safetensors by PEFT's save_pretrained; golden.safetensors holds `logits.<sequence>` and
`grad.<name in adapter_model.safetensors>`; golden.json the sequences, the loss and the losses of ten AdamW steps.
`merged` in golden.safetensors is one merged weight, by PEFT's merge_and_unload.
"""
import peft, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from common import ADAMW, exact, folder, load_f64, mean_nll, provenance, train_losses, write_json
from tiny import sequences

SEED = 7
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "gpt2-lora": ("gpt2-tiny", dict(target_modules=["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"], fan_in_fan_out=True),
                  "transformer.h.1.attn.c_attn.weight"),
    "gpt2-dora": ("gpt2-tiny", dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, use_dora=True),
                  "transformer.h.0.mlp.c_proj.weight"),
    "llama-lora": ("llama-tiny", dict(target_modules=LLAMA), "model.layers.0.self_attn.k_proj.weight"),
    "llama-rslora-some": ("llama-tiny", dict(target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True),
                          "model.layers.1.mlp.up_proj.weight"),
    "llama-dora": ("llama-tiny", dict(target_modules=LLAMA, use_dora=True), "model.layers.1.self_attn.q_proj.weight"),
    "llama-head": ("llama-tiny", dict(target_modules=["v_proj"], modules_to_save=["lm_head"]),
                   "model.layers.0.self_attn.v_proj.weight"),
    # q, k and v are one matrix in temper, with another rank and scale for each here.
    "llama-patterns": ("llama-tiny", dict(target_modules=LLAMA, rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 6},
                                          alpha_pattern={"[kv]_proj": 3, "model.layers.0.mlp.up_proj": 12.5}),
                       "model.layers.1.self_attn.v_proj.weight"),
}


def adapted(base, path):
    """The adapter on its base, all of it in f64. Use under exact()."""
    model = load_f64(folder(base))
    with torch._C.DisableTorchFunction():  # reading f32 is not a cast for F64 to widen
        model = PeftModel.from_pretrained(model, path, is_trainable=True, autocast_adapter_dtype=False)
        stored = load_file(path / "adapter_model.safetensors")
    model = model.double().eval()
    names = {saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(names) == set(stored), set(names) ^ set(stored)
    return model


def saved_name(name):
    return name.replace(".default", "").replace("modules_to_save.", "").replace("lora_magnitude_vector.weight",
                                                                                 "lora_magnitude_vector")


def main():
    data = sequences()
    for i, (name, (base, settings, weight)) in enumerate(CASES.items()):
        path = folder(f"lora/{name}")
        torch.manual_seed(SEED + i)
        config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, task_type="CAUSAL_LM", init_lora_weights=False,
                            **settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder(base)), config)
        with torch.no_grad():
            for parameter, p in model.named_parameters():
                if "lora_magnitude" in parameter:
                    p.mul_(1 + 0.1 * torch.randn(p.shape))
                if "modules_to_save" in parameter:
                    p.add_(0.02 * torch.randn(p.shape))
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(path)
        (path / "README.md").unlink(missing_ok=True)
        with exact():
            model = adapted(base, path)
            logits, loss = mean_nll(model, data)
            loss.backward()
            trained = {saved_name(n): p for n, p in model.named_parameters() if p.requires_grad}
            tensors = {f"logits.{j}": v.detach().contiguous() for j, v in enumerate(logits)}
            tensors |= {f"grad.{n}": p.grad.clone().contiguous() for n, p in trained.items()}
            norm = float(torch.sqrt(sum(p.grad.pow(2).sum() for p in trained.values())))
            steps = train_losses(trainable(adapted(base, path)), data)
            merged = adapted(base, path).merge_and_unload()
            tensors["merged"] = merged.state_dict()[weight].clone().contiguous()
        save_file(tensors, path / "golden.safetensors")
        write_json(path / "golden.json", dict(base=base, merged=weight, sequences=data, loss=loss.item(), grad_norm=norm,
                                              steps=steps, adamw=ADAMW))
        write_json(path / "provenance.json", provenance(__file__, SEED + i) | dict(peft=peft.__version__), 2)


def trainable(model):
    """The same calls, but only what is trained counts as a parameter."""
    model.parameters = lambda recurse=True: (p for p in type(model).parameters(model, recurse) if p.requires_grad)
    return model


if __name__ == "__main__":
    main()

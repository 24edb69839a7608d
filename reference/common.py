"""What every reference script shares: paths, provenance, exact f64 evaluation and the golden values of a model."""
import contextlib, json, logging
from pathlib import Path
import torch, transformers, trl
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.disable(logging.WARNING)
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ADAMW = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0)


def folder(name):
    path = FIXTURES / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def provenance(script, seed):
    return dict(script=f"reference/{Path(script).name}", torch=torch.__version__.split("+")[0],
                transformers=transformers.__version__, trl=trl.__version__, seed=seed)


def write_json(path, value, indent=None):
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


class F64(TorchFunctionMode):
    """transformers casts norms, softmax and rotary angles to f32 whatever the model's dtype; this makes them f64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        swap = lambda v: torch.float64 if v is torch.float32 else v
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


@contextlib.contextmanager
def exact():
    torch.set_default_dtype(torch.float64)
    try:
        with F64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def load_weights(path):
    tensors = {}
    with torch._C.DisableTorchFunction():  # reading f32 is not a cast for F64 to widen
        for file in sorted(path.glob("model*.safetensors")):
            tensors.update(load_file(file))
    return tensors


def load_f64(path):
    """The folder's model, all of it in f64 (rotary frequencies too), eager attention, no dropout. Use under exact()."""
    config = AutoConfig.from_pretrained(path, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    missing, unexpected = model.load_state_dict(load_weights(path), strict=False)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma's root of the width
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert all(k.endswith("rotary_emb.inv_freq") for k in unexpected), unexpected
    return model


def randomize(model, seed, std=0.15):
    """Weights wide enough that the logits are not flat, norm gains around 1, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.2 * noise if gain else std * noise)
    return model


def sequence_nll(model, tokens, trained):
    logits = model(torch.tensor([tokens])).logits[0]
    logp = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return logits, -(logp * torch.tensor(trained[1:])).sum()


def mean_nll(model, sequences):
    """Sum of the negative log-likelihoods of all trained tokens over their count, and each sequence's logits."""
    count = sum(sum(s["trained"][1:]) for s in sequences)
    logits, nll = zip(*(sequence_nll(model, s["tokens"], s["trained"]) for s in sequences))
    return logits, sum(nll) / count


def completion_logp(model, prompt, completion):
    tokens = prompt + completion
    return -sequence_nll(model, tokens, [0] * len(prompt) + [1] * len(completion))[1]


def grads(model):
    return {f"grad.{name}": p.grad.detach().clone().contiguous() for name, p in model.named_parameters()}


def grad_norm(model):
    return float(torch.sqrt(sum(p.grad.pow(2).sum() for p in model.parameters())))


def train_losses(model, sequences, steps=10, a=ADAMW):
    """The loss before each of `steps` AdamW updates; decay on matrices and embeddings only, constant rate."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=a["weight_decay"]), dict(params=plain, weight_decay=0.0)],
        lr=a["learning_rate"], betas=(a["beta1"], a["beta2"]), eps=a["epsilon"])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        _, loss = mean_nll(model, sequences)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), a["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses


def write_golden(path, sequences):
    """golden.json and golden.safetensors: logits, loss, gradients and ten training steps in f64."""
    with exact():
        model = load_f64(path)
        logits, loss = mean_nll(model, sequences)
        loss.backward()
        tensors = {f"logits.{i}": v.detach().contiguous() for i, v in enumerate(logits)} | grads(model)
        norm = grad_norm(model)
        steps = train_losses(load_f64(path), sequences)
    assert all(v.dtype == torch.float64 for v in tensors.values())
    save_file(tensors, path / "golden.safetensors")
    write_json(path / "golden.json", dict(sequences=sequences, loss=loss.item(), grad_norm=norm, steps=steps, adamw=ADAMW))
    check_f32(path, sequences, logits)


def check_f32(path, sequences, logits):
    """The folder must mean the same to plain from_pretrained in f32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for s, expected in zip(sequences, logits):
        with torch.no_grad():
            got = model(torch.tensor([s["tokens"]])).logits[0].double()
        error = float((got - expected.detach()).abs().max())
        assert error < 1e-4, (path, error)

"""Writes fixtures/chat-tiny: a tiny Llama with a byte-level BPE tokenizer, a ChatML template, and rendered.json.

rendered.json holds `conversations` (messages -> text and ids as apply_chat_template gives them) and `encodings`
(text -> ids, special tokens recognised, none added).
Read by the tokenizer and chat template tests of the Rust crate (tests/text_tokenizer.rs).
"""
import json
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from common import folder, provenance, randomize, write_json

SEED = 10
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
CORPUS = """The lighthouse keeper wrote a letter every evening, and every morning the boat carried it away.
She asked the assistant: what is the weather on the island? It answered that the wind would turn before noon.
"I don't know," he said; "they're late, we've waited, and it's getting dark. You'll see, she'd never forget."
There are 12 months, 365 days and 86400 seconds to count; in 1999 and 2024 the winters were mild.
A model reads the words it is given, one token at a time, and predicts the next. The user asks, the system
instructs, the assistant answers. Training raises the probability of the answers that people prefer.
    if value > 10:
        return value * 2  # indented lines teach the tokenizer about spaces

Once upon a time there was a small engine that learned to write. It wrote about the sea, the sand and the stones,
about the other engines, and about the people who had built them there, in the thin light of the northern summer.
"""
CONVERSATIONS = [
    ([("user", "What is the weather on the island?")], True),
    ([("system", "You answer in one word."), ("user", "Is the sea blue?"), ("assistant", "Yes.")], False),
    ([("user", "Count to 3."), ("assistant", "1, 2, 3"), ("user", "And to 12?"), ("assistant", "10, 11, 12")], False),
    ([("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")], True),
    ([("user", "Grüße aus Köln 🦀 — 日本語も, עברית and 👩‍👩‍👧!"), ("assistant", "naïve café\u00a0№ 5")], False),
    ([("user", "  leading and trailing  \n\n"), ("assistant", "\n\ttabs\tand\r\nlines \n ")], False),
    ([("system", ""), ("user", ""), ("assistant", "")], True),
    ([("user", "Type <|im_end|> or <|endoftext|> here, not <|im_start"), ("assistant", "They're \"quoted\" & <b>bold</b>")], False),
]
ENCODINGS = [
    "", " ", "Hello world", "the sea, the sand", "12345 and 3.14 in 2024", "a1b22c333", "x  y   z    w", "\n", "\n\n\n",
    "line one\nline two\r\n\tindented\n", "don't they're we've I'll she'd it's DON'T", "trailing space ", " leading",
    "naïve café Straße", "日本語 한국어 עברית", "🦀🦀 👩‍👩‍👧 e\u0301 \u00a0\u2009\ufeff", "١٢٣ ½ Ⅷ 5²", "\x00\x07\x7f",
    "<|im_start|>user\nHi<|im_end|>\n", "a<|endoftext|>b", "if value > 10:\n        return value * 2",
    "snake_case camelCase (x)[y]{z} != <= -> #!/;", "user@example.org, http://example.org/a?b=1&c=2",
]


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([CORPUS], trainers.BpeTrainer(
        vocab_size=400, special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return tokenizer


def main():
    path = folder("chat-tiny")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<|endoftext|>", model_max_length=256, clean_up_tokenization_spaces=False, chat_template=TEMPLATE)
    tokenizer.save_pretrained(path, save_jinja_files=False)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0))
    randomize(model, SEED)
    model.generation_config.update(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())  # rope_theta on top, as most published models have it
    config |= dict(rope_theta=config.pop("rope_parameters")["rope_theta"], torch_dtype=config.pop("dtype"))
    write_json(path / "config.json", config, 2)
    rendered = []
    for turns, generation in CONVERSATIONS:
        messages = [dict(role=role, content=content) for role, content in turns]
        render = lambda tokenize: tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=tokenize, return_dict=False)
        rendered.append(dict(messages=messages, add_generation_prompt=generation, text=render(False), ids=render(True)))
    encodings = [dict(text=t, ids=tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ENCODINGS]
    for e in encodings:
        assert tokenizer.decode(e["ids"], clean_up_tokenization_spaces=False) == e["text"], e
    write_json(path / "rendered.json", dict(conversations=rendered, encodings=encodings))
    write_json(path / "provenance.json", provenance(__file__, SEED), 2)


if __name__ == "__main__":
    main()

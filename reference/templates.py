"""Writes fixtures/templates.json: chat templates in the style of well-known families, as transformers renders them.

The templates are the files of reference/templates. Each entry has `name`, `template`, `bos_token`, `eos_token` and
`cases`: `messages`, `add_generation_prompt`, optional `variables`, and either `text` or `error` (what the template
raised). `generation` lists [start, end) in characters of the text inside {% generation %}. The clock stands at `now`;
`dates` gives the formats the templates ask of strftime_now and the strings they get.
Read by the chat template test of the Rust crate (tests/text_template.rs).
"""
import datetime
from pathlib import Path
from unittest import mock
import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from common import FIXTURES, provenance, write_json

NOW = datetime.datetime(2025, 3, 9, 14, 5)
BOS, EOS = "<s>", "</s>"
QUESTION = [("user", "  What is 2 + 2? ")]
ANSWERED = [("user", "Hi there"), ("assistant", "\n Hello! \n")]
SYSTEM = [("system", " Be \"brief\".\n"), ("user", "Who wrote <b>Faust</b> & when?"), ("assistant", "Goethe; 1808 – 1832 🎭")]
LONG = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five")]
WRONG = [("user", "one"), ("user", "two")]
ODD_ROLE = [("user", "one"), ("narrator", "two")]
THINK = [("user", "Is 91 prime?"), ("assistant", "<think>\n7 * 13\n</think>\n\nNo."), ("user", "And 97?"),
         ("assistant", "<think>\nno divisor up to 9\n</think>\n\nYes.")]
EVERY = [(QUESTION, True), (ANSWERED, False), (SYSTEM, False), (LONG, True)]
CASES = {
    "chatml": EVERY,
    "llama3": EVERY,
    "mistral": [*EVERY, (WRONG, False), (ODD_ROLE, False)],
    "qwen3": [*EVERY, (THINK, False), (THINK[:3], True), (THINK[:3], True, dict(enable_thinking=False))],
    "generation": [*EVERY, (THINK, False)],
    "tools": [*EVERY, (ODD_ROLE, False)],
    "gemma": [(QUESTION, True), (ANSWERED, False), (LONG, True), (SYSTEM, False), (WRONG, True)],
}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def render(template, turns, generation_prompt, variables=None):
    case = dict(messages=[dict(role=role, content=content) for role, content in turns],
                add_generation_prompt=generation_prompt)
    if variables:
        case["variables"] = variables
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({BOS: 0, EOS: 1}, unk_token=BOS)),
                                        bos_token=BOS, eos_token=EOS)
    arguments = dict(add_generation_prompt=generation_prompt, chat_template=template, **(variables or {}))
    try:
        case["text"] = tokenizer.apply_chat_template(case["messages"], tokenize=False, **arguments)
    except jinja2.exceptions.TemplateError as error:
        case["error"] = str(error)
    if "endgeneration" in template:
        texts, spans = chat_template_utils.render_jinja_template(
            [case["messages"]], return_assistant_tokens_mask=True, **arguments, **tokenizer.special_tokens_map)
        assert texts[0] == case["text"]
        case["generation"] = spans[0]
    return case


def main():
    entries = []
    with mock.patch.object(chat_template_utils, "datetime", Clock):
        for name, cases in CASES.items():
            template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
            entries.append(dict(name=name, template=template, bos_token=BOS, eos_token=EOS,
                                cases=[render(template, *case) for case in cases]))
    write_json(FIXTURES / "templates.json", dict(
        provenance=provenance(__file__, None), now=NOW.isoformat(), dates={"%d %b %Y": NOW.strftime("%d %b %Y")},
        templates=entries))


if __name__ == "__main__":
    main()

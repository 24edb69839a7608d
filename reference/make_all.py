"""Rewrites every fixture, in order: later scripts read what earlier ones wrote. Takes under a minute on one core."""
import attention, dpo, gguf_files, lora, templates, tiny, tokenizer

for module in (attention, tiny, dpo, lora, tokenizer, templates, gguf_files):
    print(module.__name__, flush=True)
    module.main()

"""What somebody without this package does with an exported folder: python load_exported.py FOLDER PROMPTS OUT"""

import sys

sys.modules["atlas_lm"] = None  # type: ignore[assignment]  # as if it were not installed

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

folder, prompts, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = torch.load(prompts)
with torch.no_grad():
    found = {
        "logits": model(tokens).logits,
        "loss": model(tokens, labels=tokens).loss,
        "streamed": model(tokens, use_cache=True).logits,
        "greedy": model.generate(tokens, max_new_tokens=20, do_sample=False),
        "beams": model.generate(tokens[:1], max_new_tokens=8, num_beams=3, do_sample=False),
        "ids": tokenizer("def f(x):\n\treturn «x»")["input_ids"],
        "text": tokenizer.decode(tokenizer("def f(x):\n\treturn «x»")["input_ids"]),
    }
    try:
        model(tokens, attention_mask=torch.zeros_like(tokens))
    except ValueError as error:
        found["refused"] = str(error)
torch.save(found, out)

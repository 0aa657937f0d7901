"""onnxruntime-genai reads a bundle: one batch, which it pads on the right."""

import json
import sys
from pathlib import Path

import onnxruntime_genai as genai

NEW_TOKENS = 20

bundle, variant = Path(sys.argv[1]), sys.argv[2]
graph = json.loads((bundle / "manifest.json").read_text("utf-8"))["variants"][variant]["graph"]
config = genai.Config(str(bundle))
config.overlay(json.dumps({"model": {"decoder": {"filename": graph}}}))
model = genai.Model(config)
tokenizer = genai.Tokenizer(model)
texts = [
    tokenizer.apply_chat_template(
        json.dumps([{"role": "user", "content": prompt}]), add_generation_prompt=True
    )
    for prompt in json.load(sys.stdin)
]
tokens = tokenizer.encode_batch(texts)
width = tokens.shape()[1]
settings = genai.GeneratorParams(model)
settings.set_search_options(do_sample=False, batch_size=len(texts), max_length=width + NEW_TOKENS)
generator = genai.Generator(model, settings)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([generator.get_sequence(row)[width:].tolist() for row in range(len(texts))]))

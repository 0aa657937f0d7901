"""optimum's ORTModelForCausalLM reads a bundle: one batch, padded on the left."""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

NEW_TOKENS = 20

bundle, variant = Path(sys.argv[1]), sys.argv[2]
graph = json.loads((bundle / "manifest.json").read_text("utf-8"))["variants"][variant]["graph"]
model = ORTModelForCausalLM.from_pretrained(bundle, file_name=Path(graph).name)
tokenizer = AutoTokenizer.from_pretrained(bundle, padding_side="left")
inputs = tokenizer.apply_chat_template(
    [[{"role": "user", "content": prompt}] for prompt in json.load(sys.stdin)],
    add_generation_prompt=True,
    padding=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
print(json.dumps(output[:, inputs["input_ids"].shape[1] :].tolist()))

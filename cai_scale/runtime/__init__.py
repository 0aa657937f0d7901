"""Answer and score with an exported bundle: numpy, onnxruntime, tokenizers, jinja2. No torch."""

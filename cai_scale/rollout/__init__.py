"""Prompts become answers: samplers, revision, collection over ranks."""

SAMPLERS = ("auto", "transformers", "onnx", "onnx-q8", "openai")

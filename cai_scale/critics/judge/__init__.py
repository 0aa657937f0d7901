"""A language model as a critic: asked over any OpenAI-compatible endpoint, or in this process."""

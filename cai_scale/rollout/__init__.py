"""Prompts become responses: sampling, revision, collection over ranks."""

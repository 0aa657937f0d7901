"""Align a language model to a written constitution; answer and score on a plain CPU."""

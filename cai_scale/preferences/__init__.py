"""Scored responses become pairs, and the pairs are audited."""

"""Batch inference: prompts in, answers out."""

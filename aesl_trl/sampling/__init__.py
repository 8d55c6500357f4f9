"""Completions of a model, by generate or by vLLM."""

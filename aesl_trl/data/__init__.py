"""Rows, prompts and benchmarks; `aesl data`."""

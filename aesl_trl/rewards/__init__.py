"""Rewards by name; untrusted answers are graded in child processes."""

"""`aesl eval` and `aesl probe`."""

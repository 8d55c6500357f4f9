"""A model's folder: checked, loaded, handed over to RL, averaged."""

"""The stages as processes that meet through files."""

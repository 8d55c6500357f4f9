"""A run's folder as HTML, PNG and markdown."""

"""Methods x seeds x settings; each cell is a chain."""

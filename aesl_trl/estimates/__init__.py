"""What a recipe's files say, and from that the memory and the hours that its stages need."""

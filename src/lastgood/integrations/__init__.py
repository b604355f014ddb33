"""Optional parts, one file for each framework; each is imported only by those who ask for it."""

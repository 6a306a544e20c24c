"""What a daemon owes the one who started it: readiness, signs of life, signals, and where its secrets lie."""

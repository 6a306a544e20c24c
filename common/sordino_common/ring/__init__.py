"""Arithmetic on secret shares: Z_2^64 on NumPy arrays, fixed point, expansion of seeds, additive sharing."""

"""Secure aggregation: the leader learns Σ_U x_i (+ noise) and nothing else, if one aggregator is honest. One shot.

    contributor i   y_i = x_i - Σ_j PRG(seed_ij) mod 2^b  to the leader; seed_ij, sealed, to helper j
    helper j        Σ_{i in U} PRG(seed_ij) + noise_j     once, for one U of at least N_min
    leader          Σ_U y_i + Σ_j share_j + noise         = Σ_U x_i + noise

`terms.py` what may be summed and how wide the words must be (no NumPy), `helper.py` a helper's side of one sum (no
NumPy), `contributor.py` masks a vector, `shares.py` computes a helper's share, `leader.py` adds up, `wide.py` numbers
wider than an entry. Dropouts before the cut cost nothing; a helper that is lost voids the sum.
Source: the one-server-many-helpers form of Bonawitz et al., CCS 2017, with the key agreement replaced by sealed seeds
to helpers (as in Bell et al. and in Prio's share compression by seeds).
"""

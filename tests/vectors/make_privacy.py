"""Makes privacy.json: `python tests/vectors/make_privacy.py` with `sordino_common` on the path.

Made by the code that it tests: it pins the order in which random words are used, so that a run with a recorded seed
can be done again. That the distribution is right is shown by the statistics of `test_privacy_sampler.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from sordino_common.privacy.discrete_gaussian import discrete_gaussian
from sordino_common.privacy.grid import clip_to_grid

KEY = bytes(range(32))
COUNT = 12


def case(sigma_squared: int) -> dict[str, object]:
    samples = discrete_gaussian(sigma_squared, COUNT, lambda _: KEY).tolist()
    return {"sigma_squared": str(sigma_squared), "key": KEY.hex(), "samples": samples}


def main() -> None:
    import numpy as np

    good = [case(sigma_squared) for sigma_squared in (1, 97, 1 << 32, 1 << 80)]
    flipped = bytes([KEY[0] ^ 1]) + KEY[1:]
    bad = [dict(good[1], key=flipped.hex()), dict(good[2], sigma_squared=str((1 << 32) ^ (1 << 30)))]
    values = [0.5, -0.25, 1e-6, 3.0, -2.0, 0.0]
    rounded, bound = clip_to_grid(np.array(values), clip_norm=1.0, grid_bits=16, random=lambda _: KEY)
    grid = [
        {
            "values": values,
            "clip_norm": 1.0,
            "grid_bits": 16,
            "key": KEY.hex(),
            "grid": rounded.tolist(),
            "bound": bound,
        }
    ]
    path = Path(__file__).parent / "privacy.json"
    path.write_text(
        json.dumps({"discrete_gaussian": good, "bad_discrete_gaussian": bad, "clip_to_grid": grid}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

"""A module of the peers', run as `python -m` runs it, on the BLAS that ours has.

python -m _bench.with_blas mlx_lm lora --test …
"""

from __future__ import annotations

import runpy
import sys

from _bench.peer import load_blas


def main() -> None:
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    load_blas()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

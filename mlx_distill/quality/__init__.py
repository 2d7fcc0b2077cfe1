"""What keeps a data set clean: near-duplicates, contamination, credentials, and answers whose code does not run.

Each module is a pure function over texts (verification runs programs besides); none reads or writes a data set.
Whoever makes one decides what is dropped.
"""

from mlx_distill.quality.contamination import contaminated
from mlx_distill.quality.credentials import find_credentials
from mlx_distill.quality.duplicates import near_duplicates
from mlx_distill.quality.verify import Verification, verify_answers

__all__ = ["Verification", "contaminated", "find_credentials", "near_duplicates", "verify_answers"]

"""Runs code that nobody has read, in a child process, within limits.

    outcome = run_python(source)            # an Execution: passed, failed, timeout, memory, ...

What happens to the code:

- It runs in an interpreter of its own without site-packages, in an environment that holds nothing but PATH, HOME,
  TMPDIR and LANG, in a temporary folder that is deleted afterwards, with nothing on standard input.
- Wall time, processor time, memory, processes, open files, file sizes, the temporary folder's size and output are
  limited (`Limits`). Output beyond its tail is counted, not kept.
- All processes it started are killed at its end: the process group at once, then every descendant, also those that
  left the session or lost their parent. (macOS does not hand orphans on: there they are known by their HOME, and
  one that left its session, lost its parent and changed HOME at once can escape.) They also end when the calling
  process dies, by whatever signal.
- Whether it ran to its end and how its tests went is reported on a pipe of its own: neither printing "all tests
  passed" nor `sys.exit(0)` nor `os._exit(0)` makes a program pass.

What this does NOT do: by itself it is no sandbox. The code runs as the current user. It can read and write every file
that the user can, use the network, and signal the user's other processes. Run as root, the kernel does not hold it to
the limit on processes, which then rests on a check every twentieth of a second alone. macOS ignores limits on address
space, so memory rests on that same check there. And code written to deceive *this* module could take the report pipe
from the driver's own frames and forge a report: the checks stop programs that cheat their tests, not an attacker.
`isolation_level()` says all this in a form that can be stored.

With `sandbox=True`, and the extra `sandbox` installed, the operating system confines it besides: no files but its
own, no network. See `mlx_distill.execution.sandbox` for what that holds off and what it does not.
"""

from mlx_distill.execution.run import (
    Execution,
    IsolationLevel,
    Limits,
    Outcome,
    isolation_level,
    run_python,
    run_sql,
)
from mlx_distill.execution.sandbox import SandboxSupport, sandbox_support

__all__ = [
    "Execution",
    "IsolationLevel",
    "Limits",
    "Outcome",
    "SandboxSupport",
    "isolation_level",
    "run_python",
    "run_sql",
    "sandbox_support",
]

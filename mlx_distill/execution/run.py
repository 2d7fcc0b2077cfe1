"""Starts the supervisor of a program and says what its report means. See the package's docstring for the promises."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mlx_distill.errors import IsolationError, ResourceError
from mlx_distill.execution.sandbox import SandboxSupport, interpreter, sandbox_support
from mlx_distill.execution.supervisor import remove_folder, running
from mlx_distill.records import Record

#: How a program ended. "passed" is the only good end; "processes" and "output" name the limit it passed.
Outcome = Literal["passed", "failed", "timeout", "memory", "output", "processes", "crashed", "not_started"]

_HERE = Path(__file__).parent
#: Beyond the program's own time: two interpreters start, and its processes are killed.
_GRACE_SECONDS = 10.0
#: Room for other processes that the user starts while the program runs.
_OTHER_TASKS = 128


class Limits(Record):
    """What a program may use.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Processor time of each process.
        memory_bytes: Memory that all processes occupy together. The address space of each may be twice that,
            since threads reserve what they never touch.
        processes: Processes at once, the program itself included.
        open_files: Open files of each process.
        file_bytes: Size of one file.
        disk_bytes: Size of all files in the temporary folder together.
        output_bytes: Written to standard output and standard error together.
        tail_bytes: How much of the end of each of the two is kept.
    """

    seconds: float = Field(10.0, gt=0)
    cpu_seconds: int = Field(10, gt=0)
    memory_bytes: int = Field(1 << 30, gt=0)
    processes: int = Field(32, gt=0)
    open_files: int = Field(128, ge=16)
    file_bytes: int = Field(16 << 20, ge=0)
    disk_bytes: int = Field(64 << 20, ge=0)
    output_bytes: int = Field(1 << 20, ge=0)
    tail_bytes: int = Field(8 << 10, gt=0)


class Execution(Record):
    """How a program ran.

    Attributes:
        problem: Why it did not pass, in one sentence; None where it did.
        error: The class of the exception that ended it.
        missing_module: The module that it imports and that is not there.
        exit_code: Negative for the signal that ended it; None where it was stopped or never ran.
        stdout: The end of what it printed, as text.
        stderr: Likewise.
        output_bytes: How much it printed in all.
        tests_run: Tests that ran, its own runs and the driver's together. Plain asserts are not counted.
        tests_failed: Those of them that failed.
        tests_skipped: Tests that skipped themselves or need arguments, such as fixtures.
        statements: SQL statements carried out.
        peak_memory_bytes: As seen every twentieth of a second.
    """

    outcome: Outcome
    problem: str | None = None
    error: str | None = None
    missing_module: str | None = None
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    output_bytes: int = 0
    tests_run: int = 0
    tests_failed: int = 0
    tests_skipped: int = 0
    statements: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def passed(self) -> bool:
        """Whether it ran to its end without an error and no test failed."""
        return self.outcome == "passed"


class IsolationLevel(Record):
    """What stands between a program and the machine.

    Attributes:
        name: "process": a child process with limits. "sandbox": the same, confined by the operating system.
        mechanism: What confines it.
        enforced: What it cannot do.
        not_covered: What it can do all the same.
    """

    name: Literal["process", "sandbox"] = "process"
    mechanism: str | None = None
    enforced: tuple[str, ...]
    not_covered: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.mechanism})" if self.mechanism else self.name


def isolation_level(*, sandbox: bool = False) -> IsolationLevel:
    """How well a program is kept apart on this machine, for a manifest or a notice.

    Raises:
        IsolationError: A sandbox is asked for where there is none.
    """
    gaps = ["reading and writing any file the user can", "network", "signals to the user's other processes"]
    confined: tuple[str, ...] = ()
    support = _sandbox_or_refuse() if sandbox else None
    if support is not None:
        gaps = list(support.gaps)
        confined = ("files outside the temporary folder", "network")
    if os.geteuid() == 0:
        gaps.append("running as root: the kernel's limit on processes")
    if sys.platform == "darwin":
        gaps.append("macOS: the kernel's limit on memory; orphans that left their session and changed HOME")
    return IsolationLevel(
        name="sandbox" if sandbox else "process",
        mechanism=support.mechanism if support else None,
        enforced=(
            "own interpreter without site-packages",
            "empty environment",
            "temporary folder",
            "wall and processor time",
            "memory",
            "processes",
            "open files and file sizes",
            "output",
            "killed with all its processes",
            *confined,
        ),
        not_covered=tuple(gaps),
    )


def run_python(source: str, *, limits: Limits | None = None, sandbox: bool = False) -> Execution:
    """Run Python source as `__main__`, then the tests in it that it has not run itself.

    Blocks until the program has ended; call it from a thread in asynchronous code.

    Args:
        sandbox: Whether the operating system confines it; see `mlx_distill.execution.sandbox`.

    Raises:
        ResourceError: No temporary folder can be made.
        IsolationError: A sandbox is asked for where there is none.
    """
    return _run("python", source, limits or Limits(), sandbox=sandbox)


def run_sql(script: str, *, limits: Limits | None = None, sandbox: bool = False) -> Execution:
    """Run SQL statements in order on an empty in-memory SQLite database; rows are printed, tab-separated.

    Args:
        sandbox: Whether the operating system confines it; see `mlx_distill.execution.sandbox`.

    Raises:
        ResourceError: No temporary folder can be made.
        IsolationError: A sandbox is asked for where there is none.
    """
    return _run("sql", script, limits or Limits(), sandbox=sandbox)


def _sandbox_or_refuse() -> SandboxSupport:
    support = sandbox_support()
    if support.problem is not None:
        hint = "Do without it, or install it:  pip install 'mlx-distill[sandbox]'" if not support.installed else None
        raise IsolationError(support.problem, hint=hint)
    return support


def _run(language: str, source: str, limits: Limits, *, sandbox: bool) -> Execution:
    if sandbox:
        _sandbox_or_refuse()
    try:
        folder = str(Path(tempfile.mkdtemp(prefix="mlx-distill-run-")).resolve())
        file = Path(folder, "main.py" if language == "python" else "main.sql")
        file.write_bytes(source.encode(errors="surrogatepass"))
    except OSError as error:
        raise ResourceError(
            f"no temporary folder could be made for the program: {error.strerror or error}.",
            hint="Free some space, or point TMPDIR at another disk.",
        ) from error
    job = {
        "folder": folder,
        "interpreter": interpreter(folder, _HERE / "driver.py", sandbox=sandbox),
        "driver": str(_HERE / "driver.py"),
        "environment": {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
        "tail_bytes": limits.tail_bytes,
        "watch": limits.model_dump(include={"seconds", "memory_bytes", "processes", "disk_bytes", "output_bytes"}),
        "program": {
            "language": language,
            "file": str(file),
            "token": secrets.token_hex(16),
            "limits": _kernel_limits(limits),
        },
    }
    try:
        facts = _supervise(job, limits.seconds + _GRACE_SECONDS)
        if sys.platform != "linux":  # there, orphans are not given to the supervisor
            _end_orphans(folder)
    finally:
        remove_folder(folder)
    if facts is None:
        return Execution(outcome="crashed", problem="The program ended the process that watched it.")
    return _interpret(facts, limits)


def _kernel_limits(limits: Limits) -> dict[str, int]:
    kernel = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": 2 * limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
    }
    if os.geteuid() != 0:  # the kernel does not hold root to it
        kernel["RLIMIT_NPROC"] = _tasks_of_user() + limits.processes + _OTHER_TASKS
    return kernel


def _tasks_of_user() -> int:
    """How many tasks of this user the kernel counts against its limit on processes."""
    if not Path("/proc/self/stat").exists():
        columns = ["/bin/ps", "-U", str(os.geteuid()), "-o", "pid="]
        return len(subprocess.run(columns, capture_output=True, check=False).stdout.split())
    total = 0
    for process in running():
        with contextlib.suppress(OSError):
            total += process.tasks if Path(f"/proc/{process.pid}").stat().st_uid == os.geteuid() else 0
    return total


def _supervise(job: dict[str, Any], most_seconds: float) -> dict[str, Any] | None:
    """Run the supervisor; None where it was killed or stopped, and then nothing of the program is left either."""
    alive, alive_end = os.pipe()
    try:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_HERE / "supervisor.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=job["environment"],
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it in order
            pass_fds=[alive],
        )
    except OSError as error:
        os.close(alive_end)
        return {"ended": "exit", "status": None, "events": [], "stderr": f"{sys.executable}: {error}"}
    finally:
        os.close(alive)
    output = ""
    with supervisor:
        try:
            output, _ = supervisor.communicate(json.dumps({**job, "alive": alive}), timeout=most_seconds)
        except subprocess.TimeoutExpired as stuck:
            supervisor.kill()
            output = stuck.stdout.decode(errors="replace") if isinstance(stuck.stdout, bytes) else ""
        finally:
            os.close(alive_end)
    lines = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    if lines and "ended" in lines[-1]:
        facts: dict[str, Any] = lines[-1]
        return facts
    _end_orphans(job["folder"], lines[0]["group"] if lines else None)
    return None


def _end_orphans(folder: str, group: int | None = None) -> None:
    """Kill what the supervisor could not: the program's group, and whatever works in its folder or has it as HOME."""
    if group is not None and any(process.group == group for process in running()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for _ in range(100):
        left = _marked_by_proc(folder) if Path("/proc/self/environ").exists() else _marked_by_ps(folder)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _marked_by_proc(folder: str) -> list[int]:
    found = []
    marker = f"HOME={folder}\0".encode()
    for process in running():
        with contextlib.suppress(OSError):
            at = os.readlink(f"/proc/{process.pid}/cwd")  # noqa: PTH115 - a deleted folder's path is no path
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            if at == folder or at.startswith(f"{folder}/") or marker in environment:
                found.append(process.pid)
    return found


def _marked_by_ps(folder: str) -> list[int]:
    listing = subprocess.run(["/bin/ps", "-axwwE", "-o", "pid=,command="], capture_output=True, check=False).stdout
    marker = f"HOME={folder} ".encode()
    return [int(line.split(None, 1)[0]) for line in listing.splitlines() if marker in line + b" "]


def _interpret(facts: dict[str, Any], limits: Limits) -> Execution:
    events = {event["event"]: event for event in facts["events"]}
    error, done = events.get("error", {}), events.get("done", {})
    status: int | None = facts["status"]
    outcome, problem = _outcome(facts, started="started" in events, error=error, done=done, limits=limits)
    return Execution(
        outcome=outcome,
        problem=problem,
        error=error.get("type"),
        missing_module=error.get("module"),
        exit_code=status if facts["ended"] == "exit" else None,
        stdout=facts.get("stdout", ""),
        stderr=facts.get("stderr", ""),
        output_bytes=facts.get("output_bytes", 0),
        tests_run=done.get("run", 0),
        tests_failed=done.get("failed", 0),
        tests_skipped=done.get("skipped", 0),
        statements=done.get("statements", 0),
        seconds=facts.get("seconds", 0.0),
        cpu_seconds=facts.get("cpu_seconds", 0.0),
        peak_memory_bytes=facts.get("peak_memory_bytes", 0),
    )


def _outcome(
    facts: dict[str, Any], *, started: bool, error: dict[str, Any], done: dict[str, Any], limits: Limits
) -> tuple[Outcome, str | None]:
    status: int | None = facts["status"]
    stopped: dict[str, tuple[Outcome, str]] = {
        "timeout": ("timeout", f"It ran longer than {limits.seconds:g} s."),
        "memory": ("memory", f"It occupied more than {limits.memory_bytes >> 20} MiB."),
        "processes": ("processes", f"It had more than {limits.processes} processes."),
        "output": ("output", "It wrote more output or files than allowed."),
        "abandoned": ("crashed", "The process that asked for it has ended."),
    }
    if facts["ended"] in stopped:
        return stopped[facts["ended"]]
    if not started or status is None:
        return "not_started", f"The interpreter did not start: {facts['stderr'].strip() or 'it said nothing'}"
    if status == -signal.SIGXCPU or (status < 0 and facts["cpu_seconds"] >= limits.cpu_seconds):
        return "timeout", f"It used more than {limits.cpu_seconds} s of processor time."
    if status < 0:
        return "crashed", f"It was killed by {signal.Signals(-status).name}."
    if error.get("type") == "MemoryError" or done.get("out_of_memory"):
        return "memory", "It asked for more memory than allowed."
    return _program_outcome(status, error, done)


def _program_outcome(status: int, error: dict[str, Any], done: dict[str, Any]) -> tuple[Outcome, str | None]:
    if error:
        return "failed", f"{error['type']}: {error['message']}".rstrip(": ")
    if not done:
        return "failed", f"It broke off with exit status {status}, before its end."
    if done["failed"]:
        return "failed", f"{done['failed']} of {done['run']} tests failed."
    if status:
        return "failed", f"It ended with exit status {status}."
    if done["missing"]:
        return "failed", f"It ends before {done['missing']} of its tests are defined."
    return "passed", None

"""The experiment trackers that a run can report to: one class each, and how they are opened.

Another one is a class, a line in `KINDS` and an extra of its name. `PACKAGE` is the module that it needs, `HINT` what
to do where it does not start.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import struct
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from mlx_distill import layout
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError, DependencyError
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import content_hash
from mlx_distill.run_records import RunRecord
from mlx_distill.training.tracking import FINISH_SECONDS, INTERRUPT_SECONDS, Point, Trackers

#: The project that runs go to, where the tracker's own environment variable names no other.
PROJECT = "mlx-distill"

_WITHOUT = "To train without it, leave it out of --report-to."


class TensorBoard:
    """Event files in the run's own folder, one a process; `tensorboard --logdir adapters` shows them."""

    PACKAGE = "tensorboardX"
    HINT = _WITHOUT

    def __init__(self, folder: layout.RunFolder, record: RunRecord) -> None:
        # Its SummaryWriter writes from a thread of its own, and hangs the process where that has failed, as on a full
        # disk. Its RecordWriter writes at once and raises.
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import hparams

        self._event, self._summary = Event, Summary
        # The time that the run takes, not counting when it lay still.
        self._began = datetime.fromisoformat(record.created).timestamp()
        root = folder.tensorboard
        root.mkdir(parents=True, exist_ok=True)
        earlier = root.glob("*tfevents*")
        self.next_step = 1 + max((step for path in earlier for step in _steps(path, Event)), default=-1)
        # TensorBoard reads a folder's files by their names' order. Absolute, since RecordWriter takes what is before a
        # colon for a cloud's name.
        self._writer = RecordWriter(str(root.absolute() / f"events.out.tfevents.{time.time_ns():020d}"))
        self._write(self._began, file_version="brain.Event:2")
        # From here on, this file holds; TensorBoard drops what it may have seen of later steps.
        self._write(self._began, step=self.next_step, session_log=SessionLog(status=SessionLog.START))
        for summary in hparams(described(record), {"valid/loss": 0.0, "test/loss": 0.0})[:2]:
            self._write(self._began, summary=summary)
        self._writer.flush()

    def log(self, point: Point) -> None:
        """See `Tracker.log`."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
        self._write(self._began + point.seconds, step=point.step, summary=self._summary(value=values))
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._writer.close()

    def _write(self, wall_time: float, **content: Any) -> None:
        self._writer.write(self._event(wall_time=wall_time, **content).SerializeToString())


class Trackio:
    """Trackio's own store on this machine, or the Space or server that its environment variables name."""

    PACKAGE = "trackio"
    HINT = _WITHOUT

    def __init__(self, folder: layout.RunFolder, record: RunRecord) -> None:
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            # It knows a run by its name alone.
            name=f"{_name(folder)}-{tracking_id(folder, record)}",
            resume="allow",
            config=described(record),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        # Where a run stands is not in its interface, and it does not refuse a step that it has.
        self.next_step = int(self._run._next_step)

    def log(self, point: Point) -> None:
        """See `Tracker.log`."""
        self._run.log(point.values, step=point.step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._trackio.finish()


class Wandb:
    """Weights & Biases; or, where WANDB_MODE is offline, files in the run's folder for `wandb sync`."""

    PACKAGE = "wandb"
    HINT = f"Log in:  wandb login     With no network:  WANDB_MODE=offline, and wandb sync later. {_WITHOUT}"

    def __init__(self, folder: layout.RunFolder, record: RunRecord) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", _name(folder)),
            id=tracking_id(folder, record),
            resume="allow",
            config=described(record),
            dir=os.environ.get("WANDB_DIR", str(folder.root)),
            settings=wandb.Settings(
                # Ours is the standard output of one JSON object or a summary, and the bars.
                console="off",
                # It ends before it is given up, and says so itself.
                finish_timeout=FINISH_SECONDS / 2,
                # What it would tell by itself of the user, the machine, its folders and the command line.
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        # Offline it does not know what it was given before: each folder of files then holds the whole run.
        self.next_step = int(self._run.starting_step)

    def log(self, point: Point) -> None:
        """See `Tracker.log`."""
        self._run.log(point.values, step=point.step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=0 if finished else 1)


KINDS: dict[str, type[TensorBoard | Trackio | Wandb]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def tracker_names(report_to: str | None) -> tuple[str, ...]:
    """The trackers that a setting names, all of them known and installed. Imports none of them.

    Raises:
        ConfigError: There is no such tracker.
        DependencyError: One is not installed.
    """
    if report_to is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in report_to.split(",")))
    for name in names:
        if name not in KINDS:
            near = difflib.get_close_matches(name.lower(), KINDS, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"report_to = {report_to!r}: there is no tracker {name!r}{meant}.",
                hint=f"There are {', '.join(KINDS)}; several with commas.",
            )
    for name in names:
        spec = importlib.util.find_spec(KINDS[name].PACKAGE)
        # A mere folder of that name in the current one, as wandb leaves it, passes for a package without a file.
        if spec is None or spec.origin is None:
            raise DependencyError(KINDS[name].PACKAGE, extra=name)
    return names


def open_trackers(
    config: TrainConfig, folder: layout.RunFolder, record: RunRecord, progress: Progress = SILENT
) -> Trackers:
    """Open the trackers that a run reports to.

    Args:
        record: Of the run as it began; a tracker knows by it that the run goes on.

    Returns:
        A context to be left when the run has ended.

    Raises:
        ConfigError, DependencyError: See `tracker_names`.
        TrainingError: A tracker cannot be started, as where nobody is logged in.
    """
    trackers = Trackers(progress)
    try:
        for name in tracker_names(config.report_to):
            trackers.add(name, partial(KINDS[name], folder, record), hint=KINDS[name].HINT)
    except BaseException:
        trackers.close(finished=False, wait_seconds=INTERRUPT_SECONDS)
        raise
    return trackers


def described(record: RunRecord) -> dict[str, str | int | float | bool]:
    """What a tracker is told of a run: its settings, model and data, flat; of the machine, no more than they name."""
    facts = {
        **record.config,
        "model_name": record.model.name,
        "model_revision": record.model.revision,
        "mlx_distill": record.version,
        **{f"{name}_rows": split.rows for name, split in record.splits.items()},
        **{f"{name}_tokens": split.tokens for name, split in record.splits.items()},
    }
    return {key: value for key, value in facts.items() if isinstance(value, (str, int, float, bool))}


def tracking_id(folder: layout.RunFolder, record: RunRecord) -> str:
    """What a tracker knows a run by: the same when it goes on, another when it is made anew, here or elsewhere."""
    return content_hash([record.identity, record.created, _name(folder)])[:12]


def _name(folder: layout.RunFolder) -> str:
    return folder.root.resolve().name


def _steps(path: Path, event: Any) -> Iterator[int]:
    """The steps of the metrics in an event file, up to where the end of a process may have left it torn."""
    from tensorboardX.record_writer import masked_crc32c

    size = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length, checksum = struct.unpack("<QI", head)
            if checksum != masked_crc32c(head[:8]) or length > size:
                return
            data, end = file.read(length), file.read(4)
            if len(end) < 4 or struct.unpack("<I", end) != (masked_crc32c(data),):
                return
            found = event.FromString(data)
            if any(value.HasField("simple_value") for value in found.summary.value):
                yield found.step

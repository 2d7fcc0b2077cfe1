"""The epoch loop, once for every backend: schedule, steps, evaluation, best adapter, metrics, checkpoints.

Everything that decides the result is a function of the configuration and the cursor, so a run that goes on from a
checkpoint takes the same steps with the same numbers as one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from mlx_distill import layout
from mlx_distill.backends.base import NO_TOKENS, StepStats, Student
from mlx_distill.batches import Batch, in_order, make_batch, plan_epoch
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import TokenSplit
from mlx_distill.errors import TrainingError
from mlx_distill.progress import Bar, Progress
from mlx_distill.records import Split
from mlx_distill.run_records import MetricKind, MetricRow
from mlx_distill.training import checkpoints
from mlx_distill.training.checkpoints import Cursor, Sums
from mlx_distill.training.interrupts import Interrupts, deferred
from mlx_distill.training.schedule import learning_rate


class Loop:
    """One training run over a student.

    Args:
        student: What learns.
        splits: Tokenised rows; "train" is there, "valid" may be.
        config: Of the run.
        folder: Where metrics, checkpoints and the best adapter go.
        progress: Who watches.
    """

    def __init__(
        self,
        student: Student,
        splits: dict[str, TokenSplit],
        config: TrainConfig,
        folder: layout.RunFolder,
        progress: Progress,
    ) -> None:
        self._student = student
        self._splits = splits
        self._config = config
        self._folder = folder
        self._progress = progress
        self._train = splits["train"]
        self._lengths = [len(row.tokens) for row in self._train.rows]
        self.steps_per_epoch = -(-len(self._lengths) // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.cursor = Cursor()
        self._started = time.perf_counter()

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint, if there is one."""
        found = checkpoints.newest(self._folder.checkpoints, self._progress)
        if found is None:
            self._folder.metrics.unlink(missing_ok=True)
            return False
        self.cursor, state = found
        self._student.restore(state)
        rows = layout.read_rows(self._folder.metrics, MetricRow)[: self.cursor.metric_rows]
        layout.write_text(self._folder.metrics, "".join(row.to_json() + "\n" for row in rows))
        return True

    def run(self) -> Cursor:
        """Train to the end; the best adapter is then in the run's folder.

        Raises:
            TrainingError: The loss or gradient is not finite. The best adapter so far stands.
            KeyboardInterrupt: The user stopped it; a checkpoint was saved first.
        """
        self._started = time.perf_counter() - self.cursor.seconds
        with (
            deferred(self._progress) as interrupts,
            self._progress.task("Training", total=self.total_steps, unit="steps") as bar,
        ):
            bar.advance(self.cursor.step)
            if self.cursor.step == 0 and self.cursor.metric_rows == 0:
                self._evaluate_epoch(bar)
            while self.cursor.epoch < self._config.epochs:
                self._run_epoch(bar, interrupts)
        return self.cursor

    def _run_epoch(self, bar: Bar, interrupts: Interrupts) -> None:
        config = self._config
        plan = plan_epoch(self._lengths, config.batch_size, seed=config.seed, epoch=self.cursor.epoch)
        while self.cursor.batch < len(plan):
            self._step(plan[self.cursor.batch], bar)
            if interrupts.asked:
                self._save()
                raise KeyboardInterrupt
            if self.cursor.step % config.checkpoint_every == 0 and self.cursor.batch < len(plan):
                self._save()
        sums = self.cursor.epoch_sums.stats()
        self._move(epoch=self.cursor.epoch + 1, batch=0, epoch_sums=Sums(), train_loss=sums.loss)
        self._write_metric("train", sums)
        self._evaluate_epoch(bar)
        self._save()
        if interrupts.asked:
            raise KeyboardInterrupt

    def _step(self, rows: Sequence[int], bar: Bar) -> None:
        rate = learning_rate(self._config, self.cursor.step, self.total_steps)
        started = time.perf_counter()
        stats = self._student.step(self._micro_batches(rows), rate)
        seconds = time.perf_counter() - started
        if not (math.isfinite(stats.loss_sum) and math.isfinite(stats.grad_norm or 0.0)):
            raise self._not_finite(rows, stats)
        cursor = self.cursor
        self._move(
            step=cursor.step + 1,
            batch=cursor.batch + 1,
            epoch_sums=Sums.of(cursor.epoch_sums.stats() + stats),
            trained_tokens=cursor.trained_tokens + stats.tokens,
            training_seconds=cursor.training_seconds + seconds,
        )
        self._write_metric("step", stats, rate)
        bar.advance(
            1,
            epoch=f"{self.cursor.epoch + 1}/{self._config.epochs}",
            loss=f"{stats.loss:.3f}",
            accuracy=f"{stats.token_accuracy:.1%}",
            tokens_s=f"{stats.tokens / seconds:,.0f}",
        )

    def _micro_batches(self, rows: Sequence[int]) -> list[Batch]:
        size = self._config.micro_batch_size or len(rows)
        return [make_batch(self._train.rows, rows[at : at + size]) for at in range(0, len(rows), size)]

    def _evaluate_epoch(self, bar: Bar) -> None:
        """Validate; keep the adapter if it is the best so far, or if there is nothing to tell by."""
        if "valid" not in self._splits:
            self._student.save_adapter(self._folder.root)
            self._move(best_step=self.cursor.step)
            return
        bar.advance(0, validating=f"{len(self._splits['valid'].rows)} rows")
        stats = self.evaluate("valid")
        if not math.isfinite(stats.loss_sum):
            raise TrainingError(
                f"The validation loss is not finite after {self.cursor.step} steps.",
                hint="Lower --learning-rate, or check the model with  mlx-distill doctor",
            )
        if self.cursor.first_valid_loss is None:
            self._move(first_valid_loss=stats.loss)
        if self.cursor.best_loss is None or stats.loss < self.cursor.best_loss:
            self._student.save_adapter(self._folder.root)
            self._move(best_loss=stats.loss, best_accuracy=stats.token_accuracy, best_step=self.cursor.step)
        self._write_metric("valid", stats)
        self._progress.say(
            f"epoch {self.cursor.epoch}: validation loss {stats.loss:.4f}, token accuracy {stats.token_accuracy:.1%}"
            + (f", train loss {self.cursor.train_loss:.4f}" if self.cursor.train_loss is not None else "")
        )

    def evaluate(self, split: Split) -> StepStats:
        """Loss and accuracy over a whole split, every row once."""
        size = self._config.micro_batch_size or self._config.batch_size
        return sum((self._student.evaluate(b) for b in in_order(self._splits[split].rows, size)), NO_TOKENS)

    def record_test(self, stats: StepStats) -> None:
        """Write the final test's row."""
        self._write_metric("test", stats)

    def _save(self) -> None:
        self._move(seconds=time.perf_counter() - self._started)
        checkpoints.save(
            self._folder.checkpoints, self.cursor, self._student.state(), keep=self._config.keep_checkpoints
        )

    def _move(self, **changes: object) -> None:
        self.cursor = self.cursor.model_copy(update=changes)

    def _write_metric(self, kind: MetricKind, stats: StepStats, rate: float | None = None) -> None:
        row = MetricRow(
            kind=kind,
            step=self.cursor.step,
            epoch=self.cursor.epoch + self.cursor.batch / self.steps_per_epoch,
            loss=stats.loss,
            token_accuracy=stats.token_accuracy,
            target_tokens=stats.target_tokens,
            tokens=stats.tokens,
            seconds=round(time.perf_counter() - self._started, 3),
            learning_rate=rate,
            grad_norm=stats.grad_norm,
        )
        layout.append_row(self._folder.metrics, row)
        self._move(metric_rows=self.cursor.metric_rows + 1)

    def _not_finite(self, rows: Sequence[int], stats: StepStats) -> TrainingError:
        what = "loss" if not math.isfinite(stats.loss_sum) else "gradient"
        lines = ", ".join(str(self._train.lines[row]) for row in rows)
        best = self.cursor.best_step
        kept = f"The adapter of step {best} stands in {self._folder.root}." if best is not None else ""
        return TrainingError(
            f"The {what} is not finite at step {self.cursor.step + 1}, on {self._train.path} lines {lines}. {kept}",
            hint="Lower --learning-rate or --scale into a new --run, or look at these rows.",
        )

"""The epoch loop, once for every backend: schedule, steps, evaluation, best adapter, metrics, checkpoints.

Everything that decides the result is a function of the configuration and the cursor, so a run that goes on from a
checkpoint takes the same steps with the same numbers as one that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from mlx_distill import layout
from mlx_distill.backends.base import ALONE, NO_TOKENS, Peers, StepStats, Student, total
from mlx_distill.batches import Batch, in_order, plan_epoch
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import TokenSplit
from mlx_distill.distillation import Objective
from mlx_distill.errors import TrainingError
from mlx_distill.progress import Bar, Progress
from mlx_distill.records import Split
from mlx_distill.run_records import MemoryPlan, MetricKind, MetricRow
from mlx_distill.training import checkpoints
from mlx_distill.training.checkpoints import Cursor, Sums
from mlx_distill.training.divergence import WINDOW, far_above
from mlx_distill.training.interrupts import Interrupts, deferred
from mlx_distill.training.own_answers import OwnTimes, is_own, own_batches
from mlx_distill.training.planning import answers_at_once, micro_batches, rows_at_once
from mlx_distill.training.schedule import learning_rate
from mlx_distill.training.teaching import Teaching
from mlx_distill.training.together import any_of


class Loop:
    """One training run over a student.

    Args:
        student: What learns.
        splits: Tokenised rows; "train" is there, "valid" may be.
        config: Of the run.
        folder: Where metrics, checkpoints and the best adapter go.
        plan: How batches are computed.
        progress: Who watches.
        observe: Takes each row of the metrics once it is written; those of earlier processes, of a run that goes on,
            come first.
        peers: The processes that each run this loop, on their share of every batch.
        teaching: The teacher, where one's distribution is learned.
    """

    def __init__(
        self,
        student: Student,
        splits: dict[str, TokenSplit],
        config: TrainConfig,
        folder: layout.RunFolder,
        plan: MemoryPlan,
        progress: Progress,
        observe: Callable[[MetricRow], None] = lambda row: None,
        peers: Peers = ALONE,
        teaching: Teaching | None = None,
    ) -> None:
        self._student = student
        self._teaching = teaching
        self._objective = Objective.of(config)
        self._splits = splits
        self._config = config
        self._folder = folder
        self._plan = plan
        self._progress = progress
        self._observe = observe
        self._peers = peers
        self._train = splits["train"]
        self.steps_per_epoch = -(-len(self._train.rows) // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.cursor = Cursor()
        self._started = time.perf_counter()

    def resume(self, saved_every: int | None = None) -> bool:
        """Go on from the newest whole checkpoint, if there is one; the best adapter is then again what it was there.

        Args:
            saved_every: Steps between the checkpoints that were saved so far, where that is not the configuration's.

        Raises:
            TrainingError: What was saved is lost, or nothing was that could be finished with. All is as it was.
            ResourceError: A file cannot be written.
        """
        found = checkpoints.newest(self._folder.checkpoints, self._progress)
        if found is None:
            every = self._config.checkpoint_every if saved_every is None else saved_every
            first_due = min(every, self.steps_per_epoch)
            checkpoints.require_none_needed(self._folder, first_due, finish=self._config.finish)
            self._folder.metrics.unlink(missing_ok=True)
            return False
        self.cursor, state = found
        self._student.restore(checkpoints.put_back_adapter(state, self._folder))
        rows = layout.read_rows(self._folder.metrics, MetricRow)[: self.cursor.metric_rows]
        layout.write_text(self._folder.metrics, "".join(row.to_json() + "\n" for row in rows))
        for row in rows:
            self._observe(row)
        return True

    @property
    def stopped_early(self) -> bool:
        """Whether the validation loss has not fallen for as long as there was patience, with steps still to take."""
        patience = self._config.patience
        return patience is not None and self.cursor.stale >= patience and self.cursor.step < self.total_steps

    def run(self) -> Cursor:
        """Train to the end, or until the patience is, or no more; the best adapter is then in the run's folder.

        Raises:
            TrainingError: The loss or gradient is not finite, or training diverges. The best adapter so far stands.
            ResourceError: A file cannot be written, as on a full disk. What was there before stands.
            KeyboardInterrupt: The user stopped it; a checkpoint was saved first.
        """
        self._started = time.perf_counter() - self.cursor.seconds
        if self._config.finish:
            return self._finish()
        with (
            deferred(self._progress) as interrupts,
            self._progress.task("Training", total=self.total_steps, unit="steps") as bar,
        ):
            bar.advance(self.cursor.step)
            if self.cursor.step == 0 and self.cursor.metric_rows == 0:
                self._validate(bar)
            while self.cursor.epoch < self._config.epochs and not self.stopped_early:
                self._run_epoch(bar, interrupts)
        return self.cursor

    def _run_epoch(self, bar: Bar, interrupts: Interrupts) -> None:
        config = self._config
        plan = plan_epoch(self._train.lengths, config.batch_size, seed=config.seed, epoch=self.cursor.epoch)
        # An interruption saves its checkpoint before the validation that is due after the same step.
        if self._validate_within_epoch(bar):
            self._save()
        while self.cursor.batch < len(plan) and not self.stopped_early:
            self._step(plan[self.cursor.batch], bar)
            if any_of(self._peers, interrupts.asked):
                self._save()
                raise KeyboardInterrupt
            best = self._validate_within_epoch(bar)
            within = self.cursor.batch < len(plan) and not self.stopped_early
            # A new best is saved at once: what follows may go wrong, and then it is what there is.
            if within and (best or self.cursor.step % config.checkpoint_every == 0):
                self._save()
        whole = self.cursor.batch == len(plan)
        self._sum_up()
        if whole:
            self._validate(bar)
        self._save()
        if any_of(self._peers, interrupts.asked):
            raise KeyboardInterrupt

    def _sum_up(self) -> None:
        """End an epoch, whole or not, with its training loss."""
        of_rows, own = self.cursor.epoch_sums.stats(), self.cursor.own_sums.stats()
        # Tokens that the student wrote say nothing of the rows; of an epoch of such steps alone they are all there is.
        all_own = own.target_tokens > 0 and of_rows.target_tokens == 0
        sums = own if all_own else of_rows
        self._move(epoch_sums=Sums(), own_sums=Sums(), train_loss=sums.loss)
        if self.cursor.batch == self.steps_per_epoch:
            self._move(epoch=self.cursor.epoch + 1, batch=0)
        self._write_metric("train", sums, own=all_own)

    def _finish(self) -> Cursor:
        """End the run where its checkpoint stands: that is validated, if it was not, and nothing more is trained."""
        cursor, whole = self.cursor, self.cursor.batch == self.steps_per_epoch
        if "valid" not in self._splits and not whole and not cursor.best_step:
            raise TrainingError(
                f"No adapter is kept yet at step {cursor.step}: with nothing to validate on, the first is that of the "
                "first epoch's end.",
                hint="Leave --finish out, to train on.",
            )
        if cursor.epoch_sums.target_tokens or cursor.own_sums.target_tokens:
            self._sum_up()
        if whole or ("valid" in self._splits and cursor.validated_step != cursor.step):
            with self._progress.task("Validating") as bar:
                self._validate(bar)
        return self.cursor

    def _step(self, rows: Sequence[int], bar: Bar) -> None:
        rate = learning_rate(self._config, self.cursor.step, self.total_steps)
        started = time.perf_counter()
        times = None
        if is_own(self._config, self.cursor.step):
            batches, times = self._own_batches(rows)
        else:
            batches = self._micro_batches(rows)
        stats = self._student.step(batches, rate)
        seconds = time.perf_counter() - started
        if not stats.finite:
            raise self._not_finite(rows, stats)
        cursor = self.cursor
        self._move(
            step=cursor.step + 1,
            batch=cursor.batch + 1,
            epoch_sums=cursor.epoch_sums if times else Sums.of(cursor.epoch_sums.stats() + stats),
            own_sums=Sums.of(cursor.own_sums.stats() + stats) if times else cursor.own_sums,
            trained_tokens=cursor.trained_tokens + stats.tokens,
            training_seconds=cursor.training_seconds + seconds,
        )
        self._write_metric("step", stats, rate, times)
        self._watch(NO_TOKENS if times else stats, rows)
        bar.advance(
            1,
            epoch=f"{self.cursor.epoch + 1}/{self._config.epochs}",
            loss=f"{stats.loss:.3f}",
            accuracy=f"{stats.token_accuracy:.1%}",
            memory=f"{self._student.peak_memory_bytes() / 1e9:.1f} GB",
            **{"tokens/s": f"{stats.tokens / seconds:,.0f}"},
        )

    def _micro_batches(self, batch: Sequence[int]) -> list[Batch]:
        """This process's share of a batch, as it is computed."""
        return [self._taught("train", found) for found in micro_batches(self._plan, self._train, self._share(batch))]

    def _share(self, batch: Sequence[int]) -> Sequence[int]:
        return batch[self._peers.rank :: self._peers.size]

    def _own_batches(self, batch: Sequence[int]) -> tuple[list[Batch], OwnTimes]:
        """The same with answers that the student writes, and the seconds that writing and scoring took."""
        rows = self._share(batch)
        started = time.perf_counter()
        sizes = partial(rows_at_once, self._plan), partial(answers_at_once, self._plan)
        assert self._teaching is not None
        known = self._teaching.words
        own = own_batches(self._student, self._train.rows, rows, self._config, self.cursor.step, known, *sizes)
        written = time.perf_counter()
        taught = [self._taught("train", found) for found in own]
        return taught, OwnTimes(round(written - started, 3), round(time.perf_counter() - written, 3))

    def _taught(self, split: Split, batch: Batch) -> Batch:
        """A batch with what the teacher says of it, where there is one."""
        return batch if self._teaching is None else self._teaching.with_teacher(split, batch)

    def _watch(self, stats: StepStats, rows: Sequence[int]) -> None:
        """End a run that diverges; see `divergence`.

        Args:
            stats: Of the step, where it was on the data's answers: those on the student's own have no like.
        """
        cursor = self.cursor
        window = cursor.window.stats() + stats
        lowest = cursor.lowest_loss
        if stats.target_tokens and (lowest is None or cursor.step == 1):
            score = self._score(stats)
            lowest = score if lowest is None else min(lowest, score)
        self._move(window=Sums.of(window), lowest_loss=lowest)
        ends = cursor.batch == self.steps_per_epoch and "valid" not in self._splits
        if (cursor.step % WINDOW and not ends) or not window.target_tokens or lowest is None:
            return
        found = self._score(window)
        self._move(window=Sums(), lowest_loss=min(lowest, found))
        if not far_above(found, lowest):
            return
        batches = self._micro_batches(rows)
        now = self._score(self._over(batches))
        state = self._student.state()
        self._student.load_adapter(self._folder.root)
        kept = self._score(self._over(batches))
        self._student.restore(state)
        if far_above(now, kept):
            raise TrainingError(
                f"Training diverges: the loss was {lowest:.2f} at its lowest and is {found:.2f} over the last "
                f"steps. On the rows of step {cursor.step} it is {now:.2f}, and {kept:.2f} with the adapter of step "
                f"{cursor.best_step}, which stands in {self._folder.root}.",
                hint=self._advice("Lower --learning-rate or --scale into a new --run"),
            )

    def _advice(self, first: str) -> str:
        """What to do now; or to take what was learned so far, which is in a checkpoint if it is of any step at all."""
        best = self.cursor.best_step
        return f"{first}; or take the adapter of step {best}: the same command with --finish" if best else f"{first}."

    def _validate_within_epoch(self, bar: Bar) -> bool:
        """Validate where `validate_every` asks for it, but for an epoch's end, which validates anyway.

        Returns:
            Whether a new best adapter was found.
        """
        cursor, every = self.cursor, self._config.validate_every
        if every is None or cursor.batch == self.steps_per_epoch:
            return False
        if cursor.step % every or cursor.validated_step == cursor.step:
            return False
        self._validate(bar)
        return self.cursor.best_step == cursor.step

    def _validate(self, bar: Bar) -> None:
        """Validate; keep the adapter if it is the best so far, or if there is nothing to tell by."""
        if "valid" not in self._splits:
            self._student.save_adapter(self._folder.root)
            self._move(best_step=self.cursor.step)
            return
        bar.advance(0, validating=f"{len(self._splits['valid'].rows)} rows")
        stats = self.evaluate("valid")
        if not stats.finite:
            if self._config.finish:
                return  # It ends all the same, with the adapter that is kept.
            raise TrainingError(
                f"The validation loss is not finite after {self.cursor.step} steps.",
                hint=self._advice("Check the model with  mlx-distill doctor  or lower --learning-rate"),
            )
        if self.cursor.first_valid_loss is None:
            self._move(first_valid_loss=stats.loss, first_divergence=stats.divergence, lowest_loss=self._score(stats))
        score = self._score(stats)
        if self.cursor.best_score is None or score < self.cursor.best_score:
            self._student.save_adapter(self._folder.root)
            self._move(best_score=score, best_loss=stats.loss, best_divergence=stats.divergence)
            self._move(best_accuracy=stats.token_accuracy, best_step=self.cursor.step, stale=0)
        else:
            self._move(stale=self.cursor.stale + 1)
        self._move(validated_step=self.cursor.step)
        self._write_metric("valid", stats)
        at = f"step {self.cursor.step}" if self.cursor.batch else f"epoch {self.cursor.epoch}"
        self._progress.say(
            f"{at}: validation loss {stats.loss:.4f}, token accuracy {stats.token_accuracy:.1%}"
            + (f", divergence from the teacher {stats.divergence:.4f}" if stats.divergence is not None else "")
            + (f", train loss {self.cursor.train_loss:.4f}" if self.cursor.train_loss is not None else "")
        )
        if self.stopped_early:
            lowered = "loss" if self._objective is None else "value of what is minimised"
            self._progress.say(
                f"Stopped early, after {self.cursor.step} of {self.total_steps} steps: {self.cursor.stale} validations "
                f"in a row without a lower {lowered}. The adapter of step {self.cursor.best_step} is kept."
            )

    def _score(self, stats: StepStats) -> float:
        """What is minimised, a token."""
        if self._objective is None or stats.divergence is None:
            return stats.loss
        return self._objective.combine(stats.loss, stats.divergence)

    def evaluate(self, split: Split) -> StepStats:
        """Loss and accuracy over a whole split, every row once."""
        found = self._splits[split]
        share = range(self._peers.rank, len(found.rows), self._peers.size)
        batches = in_order(found.rows, self._plan.micro_batch_size, found.lengths, share)
        return self._over(self._taught(split, batch) for batch in batches)

    def _over(self, batches: Iterable[Batch]) -> StepStats:
        return total(self._peers, sum((self._student.evaluate(batch) for batch in batches), NO_TOKENS))

    def record_test(self, stats: StepStats) -> None:
        """Write the final test's row."""
        self._write_metric("test", stats)

    def _save(self) -> None:
        self._move(seconds=time.perf_counter() - self._started)
        state = self._student.state()
        if self._peers.rank == 0:
            state = checkpoints.with_adapter(state, self._folder)
            checkpoints.save(self._folder.checkpoints, self.cursor, state, keep=self._config.keep_checkpoints)
        # Nobody goes on, or ends, before it is there.
        any_of(self._peers, False)

    def _move(self, **changes: object) -> None:
        self.cursor = self.cursor.model_copy(update=changes)

    def _write_metric(
        self,
        kind: MetricKind,
        stats: StepStats,
        rate: float | None = None,
        times: OwnTimes | None = None,
        *,
        own: bool = False,
    ) -> None:
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
            divergence=stats.divergence,
            on_policy=True if own or times is not None else None,
            writing_seconds=None if times is None else times.writing,
            scoring_seconds=None if times is None else times.scoring,
            stopped_early=True if kind == "valid" and self.stopped_early else None,
        )
        layout.append_row(self._folder.metrics, row)
        self._move(metric_rows=self.cursor.metric_rows + 1)
        self._observe(row)

    def _not_finite(self, rows: Sequence[int], stats: StepStats) -> TrainingError:
        what = "gradient" if replace(stats, grad_norm=None).finite else "loss"
        lines = ", ".join(str(self._train.lines[row]) for row in rows)
        best = self.cursor.best_step
        kept = f"The adapter of step {best} stands in {self._folder.root}." if best is not None else ""
        return TrainingError(
            f"The {what} is not finite at step {self.cursor.step + 1}, on {self._train.path} lines {lines}. {kept}",
            hint=self._advice("Lower --learning-rate or --scale into a new --run, or look at these rows"),
        )

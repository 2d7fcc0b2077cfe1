"""Fewer layers: how much each is worth is measured, and those that stay are written under their new numbers.

Which layers go is found by greedy backward elimination: in each round every layer that is left is taken out by itself,
and the one without which the mean loss is lowest goes for good. That layers of a trained model can be taken out whole
is shown by Men et al. (2024, arXiv:2403.03853), who rank them once, by how much each turns its input; here the loss
itself is measured, and again after each removal, as two layers can each be spared while both cannot.

Without layer i, what enters it goes straight into layer i + 1. So a row is read once from the bottom to the top, and at
each layer on the way the layers above it are computed once more: R layers take R²/2 layers' work a row, not R², and
beside the weights no more is in memory than two hidden states (T, D) and a chunk of logits. From L layers down to N
this is O(L·(L − N)) passes over the rows, each of half the model on average.

Does not quantize, dequantize or round: the weights that are written are those that were read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distill import layout
from mlx_distill.agreement import ProbeRow
from mlx_distill.backends.mlx import device
from mlx_distill.backends.mlx.head import Head, eager_loss, evaluate_loss, find_head, plain_loss
from mlx_distill.backends.mlx.layer_settings import cut_settings
from mlx_distill.backends.mlx.loading import load_frozen, load_lazily
from mlx_distill.backends.mlx.saving import write_model
from mlx_distill.errors import ModelError

#: What a quantized matrix has beside its codes; a layer may have some matrices quantized and others not.
_OF_QUANTIZATION = ("scales", "biases")

#: Share by which the losses of the same sums in the same order may differ.
_ROUNDING = 1e-4

_ADVICE = "Close other programs, or take fewer --rows or a smaller model."


@dataclass(frozen=True)
class Prunable:
    """A model whose layers can be taken out.

    Attributes:
        layers: How many it has.
        other_bytes: Size of all weights that are not of a layer.
        layer_bytes: Size of each layer's weights.
    """

    layers: int
    other_bytes: int
    layer_bytes: tuple[int, ...]

    def bytes_with(self, keep: int) -> int:
        """Size of the weights with this many layers left, at most."""
        return self.other_bytes + sum(sorted(self.layer_bytes)[-keep:])


@dataclass(frozen=True)
class Elimination:
    """What was measured.

    Attributes:
        loss: Of the whole model, in nats a token.
        removed: The layers that go, in the order in which they went, and the loss after each.
        kept: The others, from the lowest.
    """

    loss: float
    removed: tuple[tuple[int, float], ...]
    kept: tuple[int, ...]

    @property
    def loss_after(self) -> float:
        """Of the model that is left."""
        return self.removed[-1][1] if self.removed else self.loss


def require_prunable(folder: Path) -> Prunable:
    """Refuse a model whose layers cannot be taken out. Its weights are not read.

    Raises:
        ModelError: Its architecture or its configuration is none of those known; says why.
    """
    model, config = load_lazily(folder)
    layers = _layers(model, folder)
    cut_settings(config, range(len(layers)), folder)
    _require_alike(layers, folder)
    sizes = tuple(_bytes(layer) for layer in layers)
    return Prunable(len(layers), _bytes(model) - sum(sizes), sizes)


def measure(
    folder: Path, rows: Sequence[ProbeRow], keep: int, advance: Callable[[float], None] = lambda amount: None
) -> Elimination:
    """Load a model and find the layers that it can spare.

    Args:
        folder: A model in Hugging Face layout. On a CPU it computes in float32, whatever type its weights have.
        rows: To read.
        keep: Layers to keep, at least one.
        advance: Told that one row was read with each layer taken out: rows × layers that go, in all.

    Raises:
        ModelError: The model does not load, computes more than its layers in turn, or its loss is no number.
        ResourceError: There is not enough memory.
    """
    device.prepare_memory()
    with device.explained_allocation(_ADVICE):
        model, _ = load_frozen(folder, dtype="auto")
        reader = LayerReader(model)
        whole = loss_of(model, rows[0])
        if not math.isfinite(whole):
            raise ModelError(
                f"{folder}: the loss of this model is no number.", hint="Its weights are damaged: get it again."
            )
        if not _same(whole, reader.loss(rows[0], range(reader.layers))):
            raise ModelError(
                f"{folder}: this model does more than compute its layers one after the other, so that none can be "
                "taken out.",
                hint="Take another model.",
            )
        found = eliminate(reader, rows, keep, advance)
        del model, reader
    mx.clear_cache()
    return found


def eliminate(
    reader: LayerReader, rows: Sequence[ProbeRow], keep: int, advance: Callable[[float], None] = lambda amount: None
) -> Elimination:
    """Take out one layer after the other, each time the one without which the mean loss is lowest.

    Of two that are equal the lower one goes.

    Raises:
        ModelError: Without any layer the loss is no number.
    """
    kept = list(range(reader.layers))
    tokens = sum(len(row.positions) for row in rows)
    before = sum(reader.loss(row, kept) for row in rows) / tokens
    removed: list[tuple[int, float]] = []
    while len(kept) > keep:
        totals = [0.0] * len(kept)
        for row in rows:
            for at, loss in enumerate(reader.losses_without_each(row, kept)):
                totals[at] += loss
            advance(1)
        best = min(range(len(kept)), key=lambda at: totals[at] if math.isfinite(totals[at]) else math.inf)
        if not math.isfinite(totals[best]):
            raise ModelError(
                f"Whichever of its {len(kept)} layers is taken out, the loss of the model is no number any more.",
                hint=f"Keep more of them:  --keep-layers {len(kept)}",
            )
        removed.append((kept.pop(best), totals[best] / tokens))
    return Elimination(before, tuple(removed), tuple(kept))


def write_layers(folder: Path, kept: Sequence[int], out: Path) -> None:
    """Write weights and configuration of a model with some of its layers, tensor by tensor, as they are on disk.

    Args:
        kept: Layers, ascending.
        out: A folder without weights.

    Raises:
        ModelError: The model does not load, or its layers cannot be taken out.
        ResourceError: The weights cannot be written, as on a full disk.
    """
    model, config = load_lazily(folder)
    layers = _layers(model, folder)
    model.model.layers = [layers[at] for at in kept]
    settings = cut_settings(config, kept, folder)
    layout.require_disk(out, _bytes(model), what="The pruned model")
    write_model(model, settings, out, what="The pruned model")
    mx.clear_cache()


def require_same(folder: Path, rows: Sequence[ProbeRow], loss: float) -> None:
    """Load what was written, as anybody would, and hold its loss against what was measured.

    Args:
        loss: In nats a token, on these rows.

    Raises:
        ModelError: It does not load, or is another.
        ResourceError: There is not enough memory.
    """
    with device.explained_allocation(_ADVICE):
        model, _ = load_frozen(folder, dtype="auto")
        found = sum(loss_of(model, row) for row in rows) / sum(len(row.positions) for row in rows)
        del model
    mx.clear_cache()
    if not _same(found, loss):
        raise ModelError(
            f"The model that was written has a loss of {found:.4f}, and {loss:.4f} was measured. It was not kept.",
            hint="Please report this, with the model's config.json.",
        )


def loss_of(model: nn.Module, row: ProbeRow) -> float:
    """The loss of a model that is called as a whole: in nats, summed over the positions of a row."""
    tokens = mx.array([row.tokens])
    parts = find_head(model)
    whole = model(tokens) if parts is None else parts[0](tokens)
    return _loss(whole, parts, row)


class LayerReader:
    """Computes a model layer by layer, so that any of them can be left out.

    What lies below the first layer and above the last, and what each layer is given beside the hidden state, such as
    its mask, is the model's own: its body is called with stand-ins for the layers.

    Args:
        model: Of mlx-lm, a body `model` with a list `layers`. Its layers are back in their place after each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._body = model.model
        self._layers = list(self._body.layers)
        self._parts = find_head(model)

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self._layers)

    def loss(self, row: ProbeRow, kept: Sequence[int]) -> float:
        """The loss with some layers, in nats, summed over the positions of a row.

        Args:
            kept: Layers, ascending.
        """
        hidden, calls = self._enter(row)
        return self._leave(self._through(hidden, kept, calls), row)

    def losses_without_each(self, row: ProbeRow, kept: Sequence[int]) -> list[float]:
        """The same without each of these layers in turn.

        Returns:
            One loss for each of `kept`, in their order: to the bit what `loss` gives without it.
        """
        hidden, calls = self._enter(row)
        losses: list[float] = []
        for at, number in enumerate(kept):
            losses.append(self._leave(self._through(hidden, kept[at + 1 :], calls), row))
            if at + 1 < len(kept):
                hidden = self._through(hidden, (number,), calls)
        return losses

    def _enter(self, row: ProbeRow) -> tuple[mx.array, list[_Call]]:
        """What enters the lowest layer, (1, T, D), and how each layer is called."""
        calls: list[_Call] = []
        with self._stand_ins([_StandIn(layer, calls) for layer in self._layers]):
            self._body(mx.array([row.tokens]))
        return calls[0].hidden, calls

    def _through(self, hidden: mx.array, numbers: Sequence[int], calls: Sequence[_Call]) -> mx.array:
        for number in numbers:
            hidden = self._layers[number](hidden, *calls[number].arguments, **calls[number].options)
            # One layer's memory is free before the next one's is taken.
            mx.eval(hidden)
        return hidden

    def _leave(self, hidden: mx.array, row: ProbeRow) -> float:
        """The loss where this leaves the topmost layer."""
        tokens = mx.array([row.tokens])
        with self._stand_ins([_StandIn(layer, [], hidden) for layer in self._layers]):
            whole = self._model(tokens) if self._parts is None else self._body(tokens)
        return _loss(whole, self._parts, row)

    @contextmanager
    def _stand_ins(self, stand_ins: list[_StandIn]) -> Iterator[None]:
        held = self._body.layers
        self._body.layers = stand_ins
        try:
            yield
        finally:
            self._body.layers = held


@dataclass(frozen=True)
class _Call:
    """How a body calls a layer: with what enters it, and what else it is given."""

    hidden: mx.array
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _StandIn:
    """Stands for a layer: notes how it is called, and gives what it was told to, or what entered."""

    def __init__(self, layer: nn.Module, calls: list[_Call], gives: mx.array | None = None) -> None:
        self._layer = layer
        self._calls = calls
        self._gives = gives

    def __getattr__(self, name: str) -> object:
        return getattr(self._layer, name)

    def __call__(self, hidden: mx.array, *arguments: Any, **options: Any) -> mx.array:
        self._calls.append(_Call(hidden, arguments, options))
        return hidden if self._gives is None else self._gives


def _loss(whole: mx.array, parts: tuple[Callable[[mx.array], mx.array], Head] | None, row: ProbeRow) -> float:
    """The loss of what enters the head, (1, T, D); or of logits, (1, T, V), where there are no parts."""
    wanted, targets = whole[0][mx.array(row.positions)], mx.array(row.targets)
    if parts is None:
        return float(plain_loss(wanted, targets)[0].item())
    if device.on_gpu():
        return float(evaluate_loss(parts[1], wanted, targets)[0].item())
    return eager_loss(parts[1], wanted, targets, with_gradient=False)[0]


def _layers(model: nn.Module, folder: Path) -> list[nn.Module]:
    found = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(found, list) or not all(isinstance(layer, nn.Module) for layer in found):
        raise ModelError(f"{folder}: this model has no plain list of layers.", hint="Take a Llama or a Qwen, say.")
    return list(found)


def _require_alike(layers: Sequence[nn.Module], folder: Path) -> None:
    def parts(layer: nn.Module) -> set[str]:
        names = (name for name, _ in tree_flatten(layer.parameters()))
        return {name for name in names if name.rpartition(".")[2] not in _OF_QUANTIZATION}

    for number, layer in enumerate(layers):
        if different := sorted(parts(layer) ^ parts(layers[0])):
            raise ModelError(
                f"{folder}: layer {number} is of another kind than layer 0: {different[0]} is in one of them alone.",
                hint="Take a model whose layers are alike, such as a Llama or a Qwen.",
            )


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))


def _same(first: float, second: float) -> bool:
    return abs(first - second) <= _ROUNDING * (1 + abs(first))

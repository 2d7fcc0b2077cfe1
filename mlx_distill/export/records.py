"""What an export says of itself, beside its files."""

from __future__ import annotations

from typing import Literal

from mlx_distill.agreement import Agreement
from mlx_distill.records import ModelRecord, Record

Kind = Literal["peft", "hf", "mlx", "gguf", "ollama"]


class ExportRecord(Record):
    """`mlx_distill_export.json`.

    Attributes:
        kind: The format.
        weights: What the weights are stored as, such as "float32" or "4 bits".
        source: What was exported, as named.
        base: The model that the adapter was trained on.
        base_source: Where that came from: "hub", "folder", "gguf" or "bundled"; None where only a fused model is known.
        base_revision: Commit of the Hub, or hash of its files; says something beside `base_source` alone.
        adapter_sha256: Of the adapter that is in it.
        consumer: What loaded the result, with its version; None where nothing did.
        agreement: Of what that said with what the student says; None where nothing loaded it.
        limit: The divergence, in nats a position, that would have been refused; None where any is allowed.
        unverified: Why nothing loaded it.
        notes: What one should know before using it.
        bytes: Of all files.
        files: Name → SHA-256.
    """

    format: Literal[1] = 1
    kind: Kind
    weights: str
    source: str
    base: str
    base_source: Literal["folder", "hub", "gguf", "bundled"] | None = None
    base_revision: str | None = None
    licence: str | None = None
    adapter_sha256: str
    consumer: str | None = None
    agreement: Agreement | None = None
    limit: float | None = None
    unverified: str | None = None
    notes: tuple[str, ...] = ()
    bytes: int
    files: dict[str, str]


class ImportRecord(Record):
    """What `import-adapter` made.

    Attributes:
        run: Folder of the run.
        model: The base model.
        rank: Of its factors.
        scale: That the update is multiplied with.
        matrices: That the adapter changes.
        filled: Matrices that PEFT left alone and mlx-lm cannot: they have an update of zero.
        earlier: Whether the folder held this very adapter already.
    """

    run: str
    model: ModelRecord
    kind: Literal["lora", "dora"]
    rank: int
    scale: float
    layers: int
    matrices: int
    filled: int = 0
    earlier: bool = False

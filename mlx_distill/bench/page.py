"""A bench as text for an issue, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mlx_distill.bench.records import BenchRecord, Figures, Spread
from mlx_distill.report.tables import markdown_table

_COLUMNS = (
    "backend",
    "first epoch",
    "later epochs",
    "real tokens/s",
    "step p50 / p95",
    "first step after",
    "peak memory",
    "device",
)

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { padding: 1rem; overflow-x: auto; border: 1px solid #8886; border-radius: .4rem; }
"""


def duration(seconds: float) -> str:
    """So many seconds, as a person says it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.1f} days"


def spread(found: Spread | None, unit: str = "s") -> str:
    """The median, and how far the turns are from it."""
    if found is None:
        return "–"
    show = duration if unit == "s" else lambda value: f"{value:,.2f}" if value < 10 else f"{value:,.0f}"
    if found.least == found.most:
        return show(found.median)
    return f"{show(found.median)} ({show(found.least)} to {show(found.most)})"


def rows_of(record: BenchRecord) -> list[list[str]]:
    """The table, head first."""
    return [list(_COLUMNS), *(_row(figures) for figures in record.figures)]


def headline(record: BenchRecord) -> str:
    """What came out, in a sentence for each other backend."""
    first = record.figures[0].backend
    said = [f"{first} is {_times(ratio)} as fast as {name}." for name, ratio in record.ratios.items()]
    return " ".join(said) or "There is nothing to compare with."


def _times(ratio: Spread) -> str:
    around = "" if ratio.least == ratio.most else f" ({ratio.least:.2f} to {ratio.most:.2f})"
    return f"{ratio.median:.2f} times{around}"


def notes(record: BenchRecord) -> list[str]:
    """What must be known to read the table."""
    said = [
        f"{record.model}: {record.rows} rows, {record.tokens:,} real tokens an epoch, {record.epochs} epochs, "
        f"batches of {record.settings['batch_size']}, LoRA of rank {record.settings['rank']} "
        f"on {record.settings['layers']} layers."
    ]
    said += [f"{figures.backend}: {figures.device}; {figures.ways}." for figures in record.figures if figures.device]
    said += [f"{figures.backend}: {figures.failure}" for figures in record.figures if figures.failure]
    if record.parity:
        said.append(
            f"Losses of the first {record.parity.steps} steps differ by at most {record.parity.largest:.1e} "
            f"({' and '.join(record.parity.backends)}, same batches, same adapter to start from)."
        )
    joules = [f"{f.backend} {f.joules_per_token:.2f} J a token" for f in record.figures if f.joules_per_token]
    said.append(f"Energy of the whole machine: {', '.join(joules)}." if joules else "The system tells no energy.")
    said.append(
        "Median over the turns, and the least and most of them. Each turn is a process of its own; "
        "memory was planned before the first."
    )
    return said


def projection_rows(record: BenchRecord) -> list[list[str]]:
    """How long other trainings would take, head first."""
    names = [figures.backend for figures in record.figures if figures.first_epoch]
    table = [["rows as long as these", "epochs", *names]]
    for one in record.projections:
        table.append([one.name, str(one.epochs), *(duration(one.seconds[name]) for name in names)])
    return table


def as_markdown(record: BenchRecord) -> str:
    """To be pasted into an issue."""
    facts = ", ".join(f"{name} {value}" if name not in ("system", "processor") else value
                      for name, value in record.machine.items())  # fmt: skip
    parts = [
        f"**{headline(record)}**",
        _markdown_table(rows_of(record)),
        "\n".join(f"- {note}" for note in notes(record)),
        "Projected from these figures:",
        _markdown_table(projection_rows(record)),
        "The run that this project began with took 11 minutes on MPS, an M4 Max: 104 prompts, five epochs, "
        "Qwen2.5-1.5B-Instruct.",
        f"`{record.command}`, {record.created[:10]}; {facts}.",
    ]
    return "\n\n".join(parts) + "\n"


def as_html(record: BenchRecord) -> str:
    """One page that needs nothing else; the text for an issue is in it."""
    body = [
        "<h1>What each backend is worth here</h1>",
        f"<p><strong>{escape(headline(record))}</strong></p>",
        _html_table(rows_of(record)),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(record)) + "</ul>",
        "<h2>Projected from these figures</h2>",
        _html_table(projection_rows(record)),
        "<h2>To paste into an issue</h2>",
        f'<pre tabindex="0">{escape(as_markdown(record))}</pre>',
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>bench</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _row(figures: Figures) -> list[str]:
    if figures.first_epoch is None:
        return [figures.backend, f"failed: {figures.failure}", *["–"] * (len(_COLUMNS) - 2)]
    assert figures.step_p50 is not None
    assert figures.step_p95 is not None
    assert figures.peak_bytes is not None
    return [
        figures.backend,
        spread(figures.first_epoch),
        spread(figures.later_epoch),
        spread(figures.tokens_per_second, "tokens/s"),
        f"{duration(figures.step_p50)} / {duration(figures.step_p95)}",
        spread(figures.first_step),
        f"{figures.peak_bytes / 1e9:.2f} GB",
        f"{(figures.device_bytes or 0) / 1e9:.2f} GB",
    ]


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return markdown_table(head, body)


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"

"""What the bench shows: figures, ratios of neighbouring rounds, and the table."""

import statistics
import sys
from collections.abc import Sequence

from msgspec import Struct
from rich.console import Console
from rich.table import Table

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class Figure(Struct, frozen=True, kw_only=True):
    """One line of the table. ratio: median over the pairs of neighbouring rounds. target: of the ratio, or of ours without one."""

    name: str
    ours: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    target: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool | None:
        """None: there is no target."""
        if self.target is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value >= self.target if self.at_least else value <= self.target


def compare(name: str, unit: str, pairs: Sequence[tuple[float, float]], target: float | None = None, *, at_least: bool = False) -> Figure:
    """pairs: (ours, reference) of neighbouring rounds."""
    return Figure(
        name=name,
        unit=unit,
        ours=statistics.median(ours for ours, _ in pairs),
        reference=statistics.median(reference for _, reference in pairs),
        ratio=statistics.median(ours / reference for ours, reference in pairs),
        target=target,
        at_least=at_least,
    )


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 20 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    return f"{text} {unit}".rstrip() if not unit.startswith("/") else text + unit


def show(figures: Sequence[Figure]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for title in ("ours", "reference", "ratio", "target"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for one in figures:
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        sign = ">=" if one.at_least else "<="
        target = "" if one.target is None else f"{sign} {one.target:.2f}" if one.ratio is not None else f"{sign} {one.target:g} {one.unit}"
        verdict = {None: "", True: "[green]ok[/]", False: "[red bold]MISS[/]"}[one.ok]
        table.add_row(one.name, amount(one.ours, one.unit), amount(one.reference, one.unit), ratio, target, verdict)
    out.print(table)
    missed = [one.name for one in figures if one.ok is False]
    out.print(f"\n[red bold]missed: {'; '.join(missed)}[/]" if missed else "\nevery target is met")

"""What came of the checks: for people and for programs."""

from typing import Literal

from msgspec import Struct

VERDICTS = {"ok": "ok", "fail": "FAIL", "na": "n/a", "exempt": "exempt"}


class Finding(Struct, frozen=True):
    """One check. seen: what happened, or why the check does not apply. look_at: file, line and function; section: of the protocol."""

    name: str
    verdict: Literal["ok", "fail", "na", "exempt"]
    expected: str
    seen: str
    look_at: str
    section: str


class Report(Struct, frozen=True):
    """All checks of one venue. against: what exchange."""

    venue: str
    against: str
    findings: list[Finding]
    took_s: float

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == "fail"]

    def __str__(self) -> str:
        """One line a check, then what is wrong and where to look."""
        width = max((len(finding.name) for finding in self.findings), default=0)
        lines = [f"{self.venue}, against {self.against}", ""]
        for finding in self.findings:
            seen = "see below" if finding.verdict == "fail" else finding.seen
            lines.append(f"{VERDICTS[finding.verdict]:<6} {finding.name:<{width}}  {_line(seen)}".rstrip())
        for finding in self.failed:
            lines += [
                "",
                f"FAIL {finding.name}",
                f"  expected  {finding.expected}",
                f"  seen      {finding.seen}",
                f"  look at   {finding.look_at}",
                f"  protocol  {finding.section}",
            ]
        counts = {verdict: sum(finding.verdict == verdict for finding in self.findings) for verdict in VERDICTS}
        told = ", ".join(f"{count} {VERDICTS[verdict]}" for verdict, count in counts.items() if count)
        return "\n".join([*lines, "", f"{len(self.findings)} checks in {self.took_s:.1f} s: {told}"])


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


class NotConforming(AssertionError):
    """A venue failed its checks; the text is the report."""

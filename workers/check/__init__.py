"""The conformance suite that every venue inherits: `fmzbus check-venue`, and `await check(MyVenue)` in a test.

A loopback proxy of the suite's own stands between the venue and an exchange. It passes requests on, writes them down and fails on
demand; the venue is called through the boundary that serves hosts, so that what a host would be told is what is judged.
"""

from workers.check.report import Finding, NotConforming, Report
from workers.check.suite import check, examine

__all__ = ["Finding", "NotConforming", "Report", "check", "examine"]

"""What `tools/report_run.py` takes."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReportConfig:
    """Which trainings the pages are about, and where they go."""

    folder: str = option("", "output folder of trainings, or one record (...-metrics.jsonl)", flag="folder")
    page: str | None = option(
        None, "HTML file to write, where there is one training; <output_name>-report.html beside it when left out"
    )

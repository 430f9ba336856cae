"""What the data-set report takes beside the options of a training script: `tools/inspect_dataset.py`."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInspectConfig:
    """What the data-set report says, and where."""

    script: str = option(
        "train_network.py", "training script whose reading of the data is reported, e.g. sdxl_train_network.py"
    )
    page: str | None = option(
        "dataset_report.html", "HTML file to write, with pictures, charts and tables; an empty text writes none"
    )
    json: bool = option(False, "print the whole report as one JSON object instead of lines, for programs")
    processes: int = option(1, "processes that will train together: --num_processes of accelerate launch")
    pictures_per_bucket: int = option(8, "pictures of each bucket on the page")
    no_duplicates: bool = option(
        False, "do not read every picture: faster, but duplicates and pictures that break off are not found"
    )

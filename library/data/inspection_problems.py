"""What a reader of the data-set report should look at first."""

from __future__ import annotations

from typing import Any

# Sides grown by more than this are worth a warning.
STRONGLY = 2.0
# Share of a picture that the crop may cut off without being named.
MUCH_LOST = 0.25


def problems_of(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What to look at first: level (`error`, `warning` or `info`) and a line of text, the worst first."""
    found: list[tuple[str, str]] = []

    def add(level: str, count: int, what: str, remedy: str = "") -> None:
        if count:
            found.append((level, f"{what}: {count:,}{f' ({remedy})' if remedy else ''}"))

    files, captions = facts["files"], facts["captions"]
    add(
        "error", len(files["unreadable"]), "files that cannot be read", "replace or remove them, or --on_bad_image skip"
    )
    for one in facts["datasets"]:
        add("error", len(one["wrong_size"]), "pictures that do not have the training size", "use --enable_bucket")
        add("warning", len(one["too_small"]), "pictures left out, smaller than bucket_reso_steps")
        strongly = sum(entry["factor"] > STRONGLY for entry in one["enlarged"])
        add(
            "warning", strongly, f"pictures enlarged more than {STRONGLY:g} times", "use larger ones, or leave them out"
        )
        add("info", len(one["cropped"]), f"pictures that lose more than {MUCH_LOST:.0%} to the crop", "see the buckets")
        reg = one["regularisation"]
        unused = reg["pictures_found"] - reg["pictures_used"] if reg else 0
        add(
            "warning",
            unused,
            "regularisation pictures not used",
            "there are more uses of them than of training pictures",
        )
        masks = one["masks"]
        if masks and masks["alpha_asked"] and masks["alpha_found"] == 0:
            found.append(("warning", "alpha_mask is on, but no picture has transparent places: the masks do nothing"))
    if not facts["uses"]:
        found.append(("error", "no pictures to train on"))
    add("warning", len(captions["missing"]), "pictures without a caption file")
    add("info", len(captions["by_class_tokens"]), "pictures with the class tokens as caption", "no caption files there")
    add("warning", len(captions["orphans"]), "caption files without a picture")
    add("info", len(captions["empty"]), "pictures with an empty caption")
    if captions["tokens"]:
        limits = " or ".join(map(str, captions["tokens"]["limits"]))
        add("warning", captions["tokens"]["cut"], f"captions longer than {limits} tokens", "their ends are cut off")
    add("warning", len(files["duplicates"] or ()), "the same file more than once", "they count more than others")
    add("warning", len(files["similar"] or ()), "pictures that look the same", "they count more than others")
    add(
        "warning",
        len(files["leaks"] or ()),
        "held-out pictures that are trained on too",
        "the validation loss is no use",
    )
    order = {"error": 0, "warning": 1, "info": 2}
    return [{"level": level, "text": text} for level, text in sorted(found, key=lambda pair: order[pair[0]])]

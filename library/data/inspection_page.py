"""The data-set report as one HTML page, with the pictures as the model sees them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from library.data import inspection_text as texts
from library.data.buckets import size_text
from library.data.inspection_captions import CHUNK_ENDS
from library.data.plan import PlannedBatch
from library.data.sheets import Cell, cells_of, side_by_side
from library.messages import UserError
from library.page import Page
from library.runtime.files import format_bytes

# Rows and groups that are shown; the rest is counted, and complete with --json.
ROWS = 50
CAPTION_START = 160
BY_CHANCE = {
    "flip_aug": "half of the time mirrored",
    "random_crop": "cut at random places",
    "color_aug": "hue and brightness vary a little",
    "shuffle_caption": "caption parts shuffled",
    "enable_wildcard": "one of several captions",
    "token_warmup_step": "captions grow with the steps",
    "caption_tag_dropout_rate": "caption parts left out",
    "caption_dropout_rate": "captions left out",
    "caption_dropout_every_n_epochs": "captions left out in some epochs",
}
TAGS = 60
GROUPS = 12
# Pictures on the whole page, so that it opens quickly however many buckets there are.
MOST_PICTURES = 480
THUMBNAIL = 224
WEBP_QUALITY = 80
BUCKET_COLUMNS = ("pictures", "uses", "batches", "last_batch", "uses_added", "enlarged")


def make_page(facts: dict[str, Any], group: Any, *, pictures_per_bucket: int) -> Page:
    """The page.

    Args:
        facts: of `library.data.inspection.inspect`.
        group: the data sets, for their pictures.
        pictures_per_bucket: pictures shown of each bucket; 0: none.
    """
    page = Page("Data set", f"What `{facts['script']}` trains on, before anything is trained.")
    page.facts(
        [
            ("pictures", facts["pictures"]),
            ("uses in an epoch", facts["uses"]),
            ("steps per epoch", facts["steps"]["steps_per_epoch"]),
            ("epochs", facts["steps"]["epochs"]),
            ("held out for validation", facts["validation_pictures"]),
        ]
    )
    for problem in facts["problems"]:
        page.notice(problem["text"], problem["level"])
    if not facts["problems"]:
        page.notice("Nothing was found that needs a look.", "good")
    _tree(page, facts)
    _steps(page, facts)
    _buckets(page, facts)
    if pictures_per_bucket > 0:
        _sheets(page, group, pictures_per_bucket)
    _captions(page, facts["captions"])
    _files(page, facts)
    _caches(page, facts)
    page.section("Manifest")
    page.text("Names these pictures and captions; it is `ss_dataset_manifest_hash` in the metadata of what is trained.")
    page.code(facts["manifest_hash"])
    return page


def _tree(page: Page, facts: dict[str, Any]) -> None:
    page.section("Data sets")
    for number, dataset in enumerate(facts["datasets"], 1):
        page.subsection(f"Data set {number}: {dataset['kind']}, {size_text(dataset['resolution'])}")
        buckets = "pictures of several shapes in buckets" if dataset["enable_bucket"] else "all pictures of one size"
        settings = texts.setting_texts(dataset["settings"])
        page.text(", ".join([f"Batch size {dataset['batch_size']}", buckets, *settings]) + ".")
        page.table(
            ["folder or metadata", "pictures", "repeats", "uses", "kind", "settings"],
            [_subset_row(subset) for subset in dataset["subsets"]],
            caption="Subsets",
        )
        if dataset["regularisation"]:
            page.text(texts.regularisation_text(dataset) + ".")
        if dataset["masks"]:
            page.text(texts.mask_text(dataset["masks"]) + ".")
    if facts["notes"]:
        page.subsection("Notes")
        page.bullets(facts["notes"], limit=ROWS)


def _subset_row(subset: dict[str, Any]) -> list[Any]:
    used, found = subset["pictures_used"], subset["pictures_found"]
    low, high = subset["repeats_used"]
    return [
        texts.source_of(subset),
        used if used == found else f"{used:,} of {found:,}",
        low if low == high else f"{low} to {high}",
        subset["uses"],
        "regularisation" if subset["is_reg"] else "training",
        ", ".join(texts.setting_texts(subset["settings"])),
    ]


def _steps(page: Page, facts: dict[str, Any]) -> None:
    steps = facts["steps"]
    page.section("Steps per epoch")
    page.code("\n".join(steps["equation"]))
    batches, exact = steps["batches_per_epoch"], steps["batches_without_remainders"]
    if batches > exact:
        page.text(
            f"A batch holds pictures of one bucket, so the last batch of a bucket may be smaller. Without these "
            f"remainders an epoch would have {exact:.4g} batches instead of {batches:,}."
        )
    if steps["processes"] > 1:
        page.text(
            "Each step takes one batch on every process. A last batch with fewer pictures than there are processes is "
            "filled up with pictures of the same bucket, which then come twice in that epoch."
        )


def _buckets(page: Page, facts: dict[str, Any]) -> None:
    page.section("Buckets")
    for number, dataset in enumerate(facts["datasets"], 1):
        if len(facts["datasets"]) > 1:
            page.subsection(f"Data set {number}")
        buckets = dataset["buckets"]
        page.table(
            ["size", "pictures", "uses", "batches", "pictures in the last", "uses added", "enlarged"],
            [[size_text(bucket["size"]), *(bucket[name] for name in BUCKET_COLUMNS)] for bucket in buckets],
            caption="Training sizes (width x height)",
        )
        page.bars(
            [(size_text(b["size"]), b["uses"]) for b in buckets], title="Uses in an epoch, by bucket", unit="uses"
        )
        if dataset["enable_bucket"]:
            page.text(
                f"Mean difference of aspect ratio between picture and bucket: {dataset['mean_aspect_error']:.4f} "
                "(what differs is cut off)."
            )


def _sheets(page: Page, group: Any, count: int) -> None:
    page.section("What the model sees")
    page.text(
        "Pictures after resize and crop with their processed captions, as they come in epoch 1; x5: five times an "
        "epoch. Places that a mask leaves out are dark and purple. Each time anew:"
    )
    chances = [text for dataset in group.datasets for text in _by_chance(dataset)]
    page.bullets(list(dict.fromkeys(chances)) or ["nothing: all pictures and captions stay the same."])
    room = MOST_PICTURES
    for number, dataset in enumerate(group.datasets, 1):
        for place, (size, members) in enumerate(zip(dataset.buckets.sizes, dataset.buckets.members, strict=True)):
            if room <= 0:
                page.text(f"The page is full: further buckets of data set {number} are not shown.")
                return
            chosen = spread(sorted(set(members)), min(count, room))
            room -= len(chosen)
            page.subsection(f"Data set {number}, {size_text(size)}")
            shown, failures = [], []
            for index in chosen:
                try:
                    shown.append(_shown(dataset, index, place))
                except UserError as error:
                    failures.append(error.problem)
            page.picture_grid(shown, width=150)
            for text in dict.fromkeys(failures):
                page.notice(text, "error")


def spread(values: Sequence[int], count: int) -> list[int]:
    """`count` of the values at about equal distances, the first among them."""
    if len(values) <= count:
        return list(values)
    return [values[position * len(values) // count] for position in range(count)]


def _shown(dataset: Any, index: int, place: int) -> tuple[bytes | Any, str]:
    """Picture and caption of one item."""
    item = dataset.items[index]
    # the picture itself, also where its latents are there already
    latents, item.latents_npz = item.latents_npz, None
    try:
        planned = PlannedBatch(dataset.index, dataset.buckets.sizes[place], (index,), (0,))
        (cell,) = cells_of(dataset.batch(planned, epoch=1, step=0))
    finally:
        item.latents_npz = latents
    marks = [
        text
        for text, said in (
            ("mirrored", cell.flipped),
            ("masked", cell.masked),
            ("regularisation", item.is_reg),
            (f"x{item.repeats}", item.repeats > 1),
        )
        if said
    ]
    name = Path(item.path).name + (f" ({', '.join(marks)})" if marks else "")
    return _webp(cell), f"{name}\n{cell.caption or '(empty caption)'}"


def _by_chance(dataset: Any) -> Iterator[str]:
    """What differs each time a picture is used."""
    for subset in dataset.subsets:
        kinds = [text for name, text in BY_CHANCE.items() if getattr(subset, name)]
        if kinds:
            yield f"{subset.source}: {', '.join(kinds)}."


def _webp(cell: Cell) -> bytes:
    image = side_by_side(cell, THUMBNAIL)
    assert image is not None
    return _encoded(image)


def _encoded(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY)
    return buffer.getvalue()


def _captions(page: Page, captions: dict[str, Any]) -> None:
    page.section("Captions")
    tags = captions["tags"]
    if tags:
        page.bars(
            list(tags.items()), title=f"Most frequent of {len(tags):,} caption parts", unit="pictures", limit=TAGS
        )
    tokens = captions["tokens"]
    if tokens is None:
        page.notice("Tokens were not counted.", "info")
    else:
        _tokens(page, tokens)
    for name, heading, text in (
        ("missing", "Pictures without a caption file", "They are trained with the class tokens, or with nothing."),
        ("by_class_tokens", "Pictures with the class tokens as caption", "Their folders have no caption files."),
        (
            "orphans",
            "Caption files without a picture",
            "Nobody reads them: is the picture missing, or named otherwise?",
        ),
        ("empty", "Empty captions", ""),
    ):
        if captions[name]:
            page.subsection(f"{heading}: {len(captions[name]):,}")
            if text:
                page.text(text)
            page.bullets(captions[name], limit=ROWS)


def _tokens(page: Page, tokens: dict[str, Any]) -> None:
    lengths = [int(length) for length, count in tokens["lengths"].items() for _ in range(count)]
    limits = " or ".join(map(str, tokens["limits"])) or "75"
    page.histogram(
        lengths,
        title="Tokens of the captions",
        x_label="tokens",
        y_label="captions",
        marks=[(end, str(end)) for end in CHUNK_ENDS if end <= max([CHUNK_ENDS[0], *lengths])],
    )
    page.table(
        ["a text encoder that reads", "cuts", "of the captions"],
        [
            [f"{end} tokens", tokens["over"][str(end)], f"{tokens['over'][str(end)] / max(1, len(lengths)):.1%}"]
            for end in CHUNK_ENDS
        ],
        caption=f"Captions that are too long (here {limits} tokens are read)",
    )
    cut = [entry for entry in tokens["longest"] if entry["cut"]]
    if cut:
        page.subsection(f"Cut captions: {tokens['cut']:,}")
        page.text("`--max_token_length 150` or `225` reads more. The longest are:")
        rows = [[entry["tokens"], entry["path"], _start(entry["caption"])] for entry in cut]
        page.table(["tokens", "picture", "caption"], rows)


def _start(text: str) -> str:
    return text if len(text) <= CAPTION_START else text[:CAPTION_START].rsplit(" ", 1)[0] + " ..."


def _files(page: Page, facts: dict[str, Any]) -> None:
    files = facts["files"]
    page.section("Pictures")
    for line in texts.file_lines(files):
        page.text(line)
    if len(files["unreadable"]) > texts.SHOWN:
        page.bullets(files["unreadable"], limit=ROWS)
    for number, dataset in enumerate(facts["datasets"], 1):
        enlarged = dataset["enlarged"]
        if enlarged:
            page.subsection(f"Data set {number}: {len(enlarged):,} pictures are enlarged")
            page.table(
                ["picture", "size", "enlarged to", "times"],
                [[e["path"], size_text(e["size"]), size_text(e["resized"]), e["factor"]] for e in enlarged],
                limit=ROWS,
            )
        cropped = dataset["cropped"]
        if cropped:
            page.subsection(f"Data set {number}: {len(cropped):,} pictures lose much to the crop")
            rows = [[e["path"], size_text(e["size"]), size_text(e["bucket"]), f"{e['lost']:.0%}"] for e in cropped]
            page.table(["picture", "size", "trained at", "lost"], rows, limit=ROWS)
        for name, heading in (("too_small", "left out, too small"), ("wrong_size", "not of the training size")):
            if dataset[name]:
                page.subsection(f"Data set {number}: {len(dataset[name]):,} pictures are {heading}")
                page.table(["picture", "size"], [[e["path"], size_text(e["size"])] for e in dataset[name]], limit=ROWS)
    for name, heading in (("duplicates", "The same file"), ("similar", "Pictures that look the same")):
        groups = files[name] or []
        for index, paths in enumerate(groups[:GROUPS]):
            page.subsection(f"{heading} ({index + 1} of {len(groups):,})")
            page.picture_grid(list(_thumbnails(paths[:6])), width=120)
        if len(groups) > GROUPS:
            page.text(f"and {len(groups) - GROUPS:,} more groups; --json lists all")


def _thumbnails(paths: Sequence[str]) -> Iterator[tuple[bytes, str]]:
    from PIL import Image, ImageOps

    for path in paths:
        with Image.open(path) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
        yield _encoded(small), str(Path(path))


def _caches(page: Page, facts: dict[str, Any]) -> None:
    page.section("Caches on disk")
    rows = []
    for number, dataset in enumerate(facts["datasets"], 1):
        for kind in texts.cache_kinds(facts["family"]):
            holdings = dataset["caches"][kind]
            if holdings is None:
                page.text(f"Data set {number}, {kind}: {texts.cache_text(None)}.")
                continue
            rows.append(
                [
                    f"data set {number}, {kind}",
                    holdings["valid"],
                    sum(holdings["stale"].values()),
                    ", ".join(f"{reason}: {count}" for reason, count in holdings["stale"].items()),
                    holdings["missing"],
                    format_bytes(holdings["bytes_on_disk"]),
                    format_bytes(holdings["bytes_needed"]),
                ]
            )
    if not rows:
        return
    page.table(["cache", "hold", "stale", "why", "missing", "on disk", "more needed"], rows)
    page.text("Stale and missing files are made at the start of a training with `--cache_latents_to_disk`.")
    for number, dataset in enumerate(facts["datasets"], 1):
        needed = sum(holdings["bytes_needed"] for kind in ("latents", "text") if (holdings := dataset["caches"][kind]))
        free = dataset["caches"]["disk_free"]
        if free is not None and needed > free:
            page.notice(f"Data set {number}: its disk has only {format_bytes(free)} free.", "error")

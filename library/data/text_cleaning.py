"""Cleans tags and captions as image taggers and captioners write them.

Tags stand between `", "`; inside here every tag has delimiters of its own, so `a, b` is `, a, , b, `.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from library.data.metadata_json import Metadata, read_metadata, write_metadata
from library.messages import log
from library.options.data_tools import TextCleanConfig

_WORD = r"[\w\-]+"
_HAIR_LENGTH = re.compile(r", (long|short|medium) hair, ")
# Where several people are in the picture, tags of one class contradict each other, so all of them go.
_CLASSES = (
    _HAIR_LENGTH,
    re.compile(r", (bob|hime) cut, "),
    re.compile(rf", {_WORD} eyes, "),
    re.compile(rf", ({_WORD} sleeves|sleeveless), "),
    re.compile(
        rf", (ponytail|braid|ahoge|twintails|{_WORD} bun|single hair bun|single side bun|two side up|two tails"
        rf"|{_WORD} braid|sidelocks), "
    ),
)
_HAIR = re.compile(rf", {_WORD} hair, ")
_SINGLE = re.compile(rf", ({_WORD}|hair ornament), ")
_MASK = ", @@@, "
_RATING = ", rating"

# (from, to), in order, each until nothing changes; plain text, also inside words.
_CAPTION_RULES = (
    ("anime anime", "anime"),
    ("young ", ""),
    ("anime girl", "girl"),
    ("cartoon female", "girl"),
    ("cartoon lady", "girl"),
    ("cartoon character", "girl"),
    ("cartoon woman", "girl"),
    ("cartoon women", "girls"),
    ("cartoon girl", "girl"),
    ("anime female", "girl"),
    ("anime lady", "girl"),
    ("anime character", "girl"),
    ("anime woman", "girl"),
    ("anime women", "girls"),
    ("lady", "girl"),
    ("female", "girl"),
    ("woman", "girl"),
    ("women", "girls"),
    ("people", "girls"),
    ("person", "girl"),
    ("a cartoon figure", "a figure"),
    ("a cartoon image", "an image"),
    ("a cartoon picture", "a picture"),
    ("an anime cartoon image", "an image"),
    ("a cartoon anime drawing", "a drawing"),
    ("a cartoon drawing", "a drawing"),
    ("girl girl", "girl"),
)


def clean_file(config: TextCleanConfig) -> None:
    """Clean tags and captions of all entries of a metadata file; other members stay as they are.

    Raises:
        UserError: a file that cannot be read or written.
    """
    metadata = read_metadata(config.in_json)
    log.info("%d entries in %s", len(metadata), config.in_json)
    for member, clean in (("tags", clean_tags), ("caption", clean_caption)):
        lacking = [key for key, entry in metadata.items() if not isinstance(entry.get(member), str)]
        if lacking:
            log.info("%d entries have no %s, the first one is %s", len(lacking), member, lacking[0])
        changed = _clean_member(metadata, member, clean, debug=config.debug)
        log.info("%s changed in %d entries", member, changed)
    write_metadata(config.out_json, metadata)
    log.info("written: %s", config.out_json)


def _clean_member(metadata: Metadata, member: str, clean: Callable[[str], str], *, debug: bool) -> int:
    changed = 0
    for key, entry in metadata.items():
        before = entry.get(member)
        if not isinstance(before, str):
            continue
        if member == "tags" and before.count(_RATING) > 1:
            log.warning("%s has several ratings: %s", key, before)
        entry[member] = clean(before)
        if entry[member] != before:
            changed += 1
            if debug:
                log.info("%s, %s before: %s", key, member, before)
                log.info("%s, %s after: %s", key, member, entry[member])
    return changed


def clean_tags(tags: str) -> str:
    """Tags without underscores, rating, contradictions between several people, and words that others contain.

    Args:
        tags: separated by `", "`.
    """
    tags = tags.replace("^_^", "^@@@^").replace("_", " ").replace("^@@@^", "^_^")
    tags = tags.partition(_RATING)[0]
    text = f", {tags.replace(', ', ', , ')}, "
    if "girls" in text or "boys" in text:
        text = _without_contradictions(text)
    for word in _SINGLE.findall(text):
        if re.search(rf", (\w+ )+{re.escape(word)}, ", text):
            text = text.replace(f", {word}, ", "")
    return text.replace(", , ", ", ")[2:-2]


def _without_contradictions(text: str) -> str:
    for pattern in _CLASSES:
        if len(pattern.findall(text)) > 1:
            text = pattern.sub("", text)
    # the one hair length that is left says nothing about colours: hidden from the count of those
    length = _HAIR_LENGTH.search(text)
    if length is not None:
        text = _HAIR_LENGTH.sub(_MASK, text)
    if len(_HAIR.findall(text)) > 1:
        text = _HAIR.sub("", text)
    return text if length is None else text.replace(_MASK, length.group())


def clean_caption(caption: str) -> str:
    """A caption in which every kind of person is a girl, and styles of drawing are left out."""
    for old, new in _CAPTION_RULES:
        while old in caption:
            caption = caption.replace(old, new)
    return caption

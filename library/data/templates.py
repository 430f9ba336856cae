"""Captions of textual inversion: templates (of the paper's authors, after CLIP's), and a word written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

# The same under the names that others import.
imagenet_templates_small = list(OBJECT_TEMPLATES)
imagenet_style_templates_small = list(STYLE_TEMPLATES)


def write_out(group: Any, word: str, tokens: Sequence[str], templates: Sequence[str] | None = None) -> None:
    """Let the captions of a data set group name all tokens of a word.

    Args:
        group: what `add_replacement` is called on.
        word: as captions name it.
        tokens: that stand for it.
        templates: one of them, drawn by chance, replaces the caption; None keeps the captions.
    """
    whole = " ".join(tokens)
    if templates is not None:
        group.add_replacement("", [template.format(whole) for template in templates])
    elif len(tokens) > 1:
        group.add_replacement(word, whole)


def names_word(group: Any, word: str) -> bool:
    """Whether any caption of a picture that is no regularisation picture holds the word; True where none is known."""
    captions = [
        caption
        for dataset in getattr(group, "datasets", ())
        for item in getattr(dataset, "items", ())
        if not item.is_reg
        for caption in (item.caption, *affixes(dataset.subsets[item.subset]))
    ]
    return not captions or any(word in caption for caption in captions)


def affixes(subset: Any) -> list[str]:
    """Texts that a subset puts before and after its captions."""
    return [text for text in (subset.caption_prefix, subset.caption_suffix) if text]

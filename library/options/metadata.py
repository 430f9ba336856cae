"""ModelSpec texts written into the files."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataConfig:
    """ModelSpec texts written into the files."""

    metadata_title: str | None = option(None, "")
    metadata_author: str | None = option(None, "")
    metadata_description: str | None = option(None, "")
    metadata_license: str | None = option(None, "")
    metadata_tags: str | None = option(None, "")
    metadata_usage_hint: str | None = option(None, "")
    metadata_thumbnail: str | None = option(None, "")
    metadata_merged_from: str | None = option(None, "")
    metadata_trigger_phrase: str | None = option(None, "")
    metadata_preprocessor: str | None = option(None, "")
    metadata_is_negative_embedding: str | None = option(None, "")

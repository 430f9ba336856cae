"""ModelSpec texts written into the files."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataConfig:
    """ModelSpec texts written into the files."""

    metadata_title: str | None = option(None, "title in the ModelSpec metadata; --output_name when left out")
    metadata_author: str | None = option(None, "author in the ModelSpec metadata")
    metadata_description: str | None = option(None, "description in the ModelSpec metadata")
    metadata_license: str | None = option(None, "licence in the ModelSpec metadata")
    metadata_tags: str | None = option(None, "tags in the ModelSpec metadata, separated by commas")
    metadata_usage_hint: str | None = option(None, "usage hint in the ModelSpec metadata")
    metadata_thumbnail: str | None = option(
        None, "thumbnail in the ModelSpec metadata, a data URL or the path of a picture"
    )
    metadata_merged_from: str | None = option(None, "source models in the ModelSpec metadata")
    metadata_trigger_phrase: str | None = option(None, "trigger phrase in the ModelSpec metadata")
    metadata_preprocessor: str | None = option(None, "preprocessor of control models in the ModelSpec metadata")
    metadata_is_negative_embedding: str | None = option(None, "true for negative embeddings, in the ModelSpec metadata")

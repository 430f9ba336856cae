"""The word that textual inversion teaches."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """The word that textual inversion teaches."""

    weights: str | None = option(None, "embedding file to start from")
    num_vectors_per_token: int = option(1, "vectors of the word; each takes one of the 75 places of a prompt")
    token_string: str | None = option(
        None, "the word, as captions name it; one that no language has, and the name of the written files"
    )
    init_word: str | None = option(None, "word or words that the vectors start from; drawn at random when left out")
    use_object_template: bool = option(False, "replace every caption by a text such as 'a photo of a WORD'")
    use_style_template: bool = option(
        False, "replace every caption by a text such as 'a painting in the style of WORD'"
    )

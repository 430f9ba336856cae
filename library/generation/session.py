"""A run of the picture script: prompt lines to requests, requests to batches, batches to files."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from PIL.Image import Image

from library.generation.batches import BatchQueue
from library.generation.output import OutputFolder, metadata, save_picture
from library.generation.preview import show
from library.generation.request import ImageRequest, SizeCondition
from library.generation.seeds import SeedPlan
from library.messages import Progress, UserError, log
from library.options.image import ImageConfig
from library.prompts import dynamic
from library.prompts.line_options import PICTURE_ITEMS, SIZE_CONDITION_ITEMS, ParsedLine, parse_line
from library.runtime.memory import GENERATION_REMEDIES, explained_out_of_memory

DEFAULT_STRENGTH = 0.8


class Drawer(Protocol):
    """What a session asks of the engine."""

    def check(self, request: ImageRequest) -> None: ...

    def batch_key(self, request: ImageRequest) -> object: ...

    def generate(self, requests: list[ImageRequest]) -> list[Image]: ...

    def facts(self, request: ImageRequest) -> dict[str, str]: ...


class Session:
    """Draws all pictures of a command line.

    Args:
        config: the command line.
        engine: draws batches.
        lines: the prompt lines of file or command line.
        default_size: side of a picture whose side nobody gives.
        sizes: the command line's sizes, for a family with size conditioning; prompt lines may then name them too.
        rng: stream of the random choices without `--seed` (None: unseeded).
        ask: gives the next line of the interactive mode, None at the end.
    """

    def __init__(
        self,
        config: ImageConfig,
        engine: Drawer,
        lines: Iterable[str],
        *,
        default_size: int = 512,
        sizes: SizeCondition | None = None,
        rng: random.Random | None = None,
        ask: Callable[[], str | None] | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.lines = list(lines)
        self.default_size = default_size
        self.sizes = sizes
        self.line_items = PICTURE_ITEMS if sizes is None else (*PICTURE_ITEMS, *SIZE_CONDITION_ITEMS)
        self.ask = ask
        self.iterations = 1 if config.interactive else config.n_iter
        self.seeds = SeedPlan(
            config.seed,
            self.iterations * len(self.lines) * config.images_per_prompt,
            same_per_iteration=config.iter_same_seed,
            rng=rng,
        )
        self.output = OutputFolder(config.outdir, sequential=config.sequential_file_name)
        self.queue = BatchQueue(config.batch_size, engine.batch_key)
        self.progress = Progress(None, "pictures")
        self.drawn = 0
        self.failed = 0

    def run(self) -> None:
        """Draw everything.

        Raises:
            UserError: at the end, when some pictures could not be drawn.
        """
        with Progress(self._foreseen(), "pictures") as self.progress:
            for _ in range(self.iterations):
                self.seeds.start_iteration()
                if self.config.shuffle_prompts:
                    self.seeds.rng.shuffle(self.lines)
                self._draw_lines(self.lines)
        if self.config.interactive and self.ask is not None:
            for line in iter(self.ask, None):
                self._draw_lines([line])
        log.info(f"{self.drawn} pictures in {self.output.folder}" if self.drawn else "no pictures drawn")
        if self.failed:
            raise UserError(f"{self.failed} pictures could not be drawn", "see the messages above")

    def _foreseen(self) -> int | None:
        """Pictures of the whole run, None where a prompt enumerates."""
        if any(dynamic.is_enumerating(line) for line in self.lines):
            return None
        return self.iterations * len(self.lines) * self.config.images_per_prompt

    def _draw_lines(self, lines: list[str]) -> None:
        index = 0
        for line in lines:
            for request in self._requests(line, index):
                index += 1
                try:
                    self.engine.check(request)
                except UserError as error:
                    self._report(error, [request])
                    continue
                self._draw_batches(self.queue.add(request))
        self._draw_batches(self.queue.flush())

    def _requests(self, line: str, index: int) -> Iterator[ImageRequest]:
        """The pictures of a prompt line, in order."""
        count = self.config.images_per_prompt
        if not dynamic.is_dynamic(line):
            parsed = self._parse(line)
            for offset in range(count):
                yield self._request(parsed, line, index + offset)
            return
        for offset, variant in enumerate(dynamic.expand(line, count, self.seeds.rng)):
            yield self._request(self._parse(variant), variant, index + offset)

    def _parse(self, line: str) -> ParsedLine:
        parsed = parse_line(line, self.line_items)
        for item, reason in parsed.not_understood:
            log.warning(f'"--{item}" is left out ({reason}): {line}')
        return parsed

    def _request(self, parsed: ParsedLine, line: str, index: int) -> ImageRequest:
        config, values = self.config, parsed.values
        seed = self.seeds.next(values.get("seeds"))
        if config.interactive:
            log.info(f"seed: {seed}")
        return ImageRequest(
            prompt=parsed.prompt,
            negative_prompt=values.get("negative_prompt", ""),
            width=values.get("width", config.W or self.default_size),
            height=values.get("height", config.H or self.default_size),
            steps=values.get("steps", config.steps),
            scale=values.get("scale", config.scale),
            negative_scale=values.get("negative_scale", config.negative_scale),
            strength=values.get("strength", DEFAULT_STRENGTH if config.strength is None else config.strength),
            network_multipliers=values.get("network_multipliers"),
            clip_prompt=values.get("clip_prompt"),
            seed=seed,
            sizes=self._sizes(values),
            index=index,
            raw_line=line,
        )

    def _sizes(self, values: dict[str, Any]) -> SizeCondition | None:
        if self.sizes is None:
            return None
        given = {item.target: values[item.target] for item in SIZE_CONDITION_ITEMS if item.target in values}
        return dataclasses.replace(self.sizes, **given)

    def _draw_batches(self, batches: list[list[ImageRequest]]) -> None:
        for batch in batches:
            try:
                with explained_out_of_memory("drawing", GENERATION_REMEDIES):
                    images = self.engine.generate(batch)
            except (UserError, RuntimeError) as error:
                self._report(error, batch)
                continue
            self._save(batch, images)
            self.drawn += len(batch)
            self.progress.update(len(batch))

    def _save(self, batch: list[ImageRequest], images: list[Image]) -> None:
        paths = self.output.names([request.seed for request in batch])
        for request, image, path in zip(batch, images, paths, strict=True):
            save_picture(image, path, metadata(request, self.config.sampler, self.engine.facts(request)))
            log.info(f"{path}: {request.prompt}")
        if self.config.interactive and not self.config.no_preview:
            for request, image in zip(batch, images, strict=True):
                show(image, request.prompt)

    def _report(self, error: Exception, batch: list[ImageRequest]) -> None:
        self.failed += len(batch)
        for request in batch:
            log.error(f"not drawn: {error} (prompt line: {request.raw_line})")


def ask_on_terminal() -> str | None:
    """A prompt line from standard input, asked for again while it has no prompt; None at the end of the input."""
    while True:
        try:
            line = input("prompt: ")
        except EOFError:
            return None
        if has_prompt(line):
            return line


def has_prompt(line: str) -> bool:
    """False for a line that is blank, or blank before its first option."""
    return bool(parse_line(line).prompt.strip())

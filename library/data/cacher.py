"""Runs pictures through the VAE: decoded ahead in threads, encoded in batches, stored behind in other threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from library.data import images
from library.data.buckets import crop_ltrb
from library.data.cache_tasks import Task, encoding_batches
from library.data.latents_file import CachedLatents, SourceState, source_state
from library.data.sample import picture_for_cache
from library.messages import Progress, UserError, log

Encode = Callable[[torch.Tensor], torch.Tensor]
Store = Callable[[Task, CachedLatents, SourceState], None]

WRITERS = 4
PENDING_WRITES = 32
# Stacked batches that wait for the VAE.
BATCHES_AHEAD = 2
# So many pictures without finite latents, and none with, tell that there will be none.
ALL_BAD = 8


class WriteBehind:
    """Calls functions in other threads, one after the other where there are too many; a failure ends the work.

    Use as a context manager; leaving it waits for all calls, or after an error for those under way.
    """

    def __init__(self, threads: int = WRITERS, pending: int = PENDING_WRITES) -> None:
        self._pool = ThreadPoolExecutor(threads, "write")
        self._limit = pending
        self._pending: deque[Future] = deque()

    def __enter__(self) -> WriteBehind:
        return self

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called; an earlier call's error is raised here."""
        self._pending.append(self._pool.submit(function, *arguments))
        while self._pending and (self._pending[0].done() or len(self._pending) > self._limit):
            self._pending.popleft().result()

    def __exit__(self, *error: object) -> None:
        try:
            while self._pending and error[0] is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """One batch, decoded: float32 pictures (B, 3, H, W), masks, and the states of the files."""

    tasks: Sequence[Task]
    stack: torch.Tensor
    masks: list[torch.Tensor | None]
    states: list[SourceState]


# Pixels (3, H, W), mask or None, and the state of the file.
_Picture = tuple[torch.Tensor, Any, SourceState]


def _read(task: Task) -> _Picture:
    dataset, index = next(((d, i) for d, i in task.users if d.subsets[d.items[i].subset].alpha_mask), task.users[0])
    try:
        state = source_state(task.wanted.source)
    except FileNotFoundError:
        raise UserError(
            f"picture {task.wanted.source} is gone, it was there when its folder was listed",
            "restore it, or start again without it",
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read picture {task.wanted.source} ({error.strerror})", "replace or remove the file"
        ) from error
    item = dataset.items[index]
    pixels = picture_for_cache(item, dataset.subsets[item.subset], dataset.settings)
    return images.to_tensor(pixels[..., :3]), images.alpha_mask(pixels) if task.wanted.alpha else None, state


class Cacher:
    """Encodes the pictures of tasks.

    Args:
        encode: float32 pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, h, w) on any device.
        encode_exact: asked again, in float32, where `encode` gives values that are not finite.
        batch_size: pictures a call.
        readers: threads that decode pictures ahead.
        leave_out: called with a task whose picture cannot be read, and why; None: that ends the work.
    """

    def __init__(
        self,
        encode: Encode,
        encode_exact: Encode | None,
        batch_size: int,
        readers: int,
        leave_out: Callable[[Task, UserError], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"vae_batch_size is {batch_size}", "set it to 1 or more")
        self.encode = encode
        self.encode_exact = encode_exact
        self.batch_size = batch_size
        self.readers = readers
        self.leave_out = leave_out
        self._seen = self._not_finite = 0

    def run(self, tasks: Sequence[Task], store: Store) -> None:
        """Encode every task's picture; `store` is called in other threads.

        Raises:
            UserError: a picture cannot be read or its latents are not finite, or what `store` raises.
        """
        if not tasks:
            return
        with (
            Progress(len(tasks), "caching latents") as progress,
            WriteBehind() as writers,
            ThreadPoolExecutor(self.readers, "read") as readers,
            ThreadPoolExecutor(1, "stack") as stacker,
        ):
            try:
                for batch, latents, flipped in self._encoded(self._read_ahead(readers, stacker, tasks)):
                    for task, entry, state in self._entries(batch, latents, flipped):
                        writers.submit(store, task, entry, state)
                    progress.update(len(batch.tasks))
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                stacker.shutdown(wait=False, cancel_futures=True)
                raise

    def _read_ahead(
        self, readers: ThreadPoolExecutor, stacker: ThreadPoolExecutor, tasks: Sequence[Task]
    ) -> Iterator[_Pictures]:
        """Decoded batches in order; as many are under way as keep every reader busy."""

        ahead = BATCHES_AHEAD + -(-self.readers // self.batch_size)
        queue: deque[Future[_Pictures | None]] = deque()
        batches = iter(encoding_batches(tasks, self.batch_size))
        more = True
        while more or queue:
            batch = next(batches, None)
            more = batch is not None
            if batch is not None:
                queue.append(stacker.submit(self._stack, batch, [readers.submit(_read, task) for task in batch]))
            if queue and (len(queue) > ahead or not more):
                pictures = queue.popleft().result()
                if pictures is not None:
                    yield pictures

    def _stack(self, batch: Sequence[Task], futures: Sequence[Future[_Picture]]) -> _Pictures | None:
        """One batch from its pictures; None where none of them can be read."""
        read: list[tuple[Task, _Picture]] = []
        for task, future in zip(batch, futures, strict=True):
            try:
                read.append((task, future.result()))
            except UserError as error:
                if self.leave_out is None:
                    raise
                self.leave_out(task, error)
        if not read:
            return None
        pixels, masks, states = zip(*(picture for _, picture in read), strict=True)
        return _Pictures([task for task, _ in read], torch.stack(pixels), list(masks), list(states))

    @torch.no_grad()
    def _encoded(self, batches: Iterator[_Pictures]) -> Iterator[tuple[_Pictures, torch.Tensor, torch.Tensor | None]]:
        """Each batch with its latents, handed on when the next batch's work was given to the device."""
        before: tuple[_Pictures, torch.Tensor, torch.Tensor | None] | None = None
        for batch in batches:
            latents = self.encode(batch.stack)
            flipped = self.encode(batch.stack.flip(-1)) if batch.tasks[0].wanted.flip else None
            if before is not None:
                yield before
            before = batch, latents, flipped
        if before is not None:
            yield before

    @torch.no_grad()
    def _entries(
        self, batch: _Pictures, latents: torch.Tensor, flipped: torch.Tensor | None
    ) -> Iterator[tuple[Task, CachedLatents, SourceState]]:
        latents = self._finite(batch, latents, batch.stack)
        if flipped is not None:
            flipped = self._finite(batch, flipped, batch.stack.flip(-1))
        for row, (task, mask, state) in enumerate(zip(batch.tasks, batch.masks, batch.states, strict=True)):
            mirrored = None if flipped is None else flipped[row]
            ltrb = crop_ltrb(task.wanted.bucket, task.original)
            yield task, CachedLatents(latents[row], task.original, ltrb, mirrored, mask), state

    def _finite(self, batch: _Pictures, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """Latents on the CPU; those that are not finite made again in float32."""
        latents = latents.detach().cpu()
        bad = ~torch.isfinite(latents).flatten(1).all(1)
        self._count(len(bad), int(bad.sum()))
        if bad.any() and self.encode_exact is not None:
            latents[bad] = self.encode_exact(pictures[bad]).detach().cpu().to(latents.dtype)
            bad = ~torch.isfinite(latents).flatten(1).all(1)
        if bad.any():
            names = [task.wanted.source for task, wrong in zip(batch.tasks, bad.tolist(), strict=True) if wrong]
            also = ", in float32 either" if self.encode_exact is not None else ""
            raise UserError(
                f"the VAE gives no finite latents for {', '.join(names)}{also}",
                "look at that picture, use --no_half_vae, or replace the VAE with --vae",
            )
        return latents

    def _count(self, pictures: int, bad: int) -> None:
        """Go on in float32 alone where the first pictures all needed it: an SDXL VAE in float16."""
        self._seen += pictures
        self._not_finite += bad
        if self._not_finite == self._seen >= ALL_BAD and self.encode_exact not in (None, self.encode):
            log.warning("the VAE gives no finite values in this number format, it goes on in float32")
            self.encode = self.encode_exact

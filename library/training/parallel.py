"""Which way a run lays its weights on the processes, and what does not go together with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.messages import UserError, log
from library.runtime.parallel import Copies, Shards

if TYPE_CHECKING:
    from library.options.parser import Resolved
    from library.runtime.processes import Processes
    from library.training.recipes.recipe import Recipe

# Options that change weights or gradients in ways of their own.
APART = ("ema_decay", "fused_backward_pass", "fused_optimizer_groups")


def make_parallel(recipe: Recipe, options: Resolved, processes: Processes) -> Copies:
    """Copies, FSDP shards (`fsdp_config` of the accelerate configuration) or DeepSpeed (`--deepspeed`).

    Raises:
        UserError: a script or an option that cannot work this way.
    """
    if not (options.distributed.deepspeed or processes.shards):
        return Copies()
    way = "--deepspeed" if options.distributed.deepspeed else "FSDP"
    if processes.count == 1 and way == "FSDP":
        return Copies()
    if way not in recipe.spreads:
        log.warning("%s has no effect: what %s trains is too small to be spread", way, recipe.script)
        return Copies()
    for name in APART:
        if name in options and options.value(name):
            raise UserError(f"--{name} with {way}", "leave one of them out")
    half = options.precision.halves_trained
    if way == "FSDP":
        if half or options.precision.mixed_precision == "fp16":
            raise UserError(
                "FSDP with --full_fp16, --full_bf16 or --mixed_precision fp16", "use --mixed_precision bf16 or no"
            )
        return Shards(processes)
    from library.runtime.zero import Zero

    if options.precision.mixed_precision == "fp16" and not half:
        raise UserError("--deepspeed with --mixed_precision fp16", "use --mixed_precision bf16, or add --full_fp16")
    return Zero(
        processes,
        options.distributed,
        batch_size=options.dataset.train_batch_size,
        accumulation=options.loop.gradient_accumulation_steps,
        max_grad_norm=options.optimizer.max_grad_norm,
        weights=options.precision.mixed_precision if half else "no",
    )

"""What to switch on when memory runs out, the most helpful first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.options.registries import find_optimizer

if TYPE_CHECKING:
    from library.options.parser import Resolved

MOST = 6


def memory_remedies(options: Resolved) -> tuple[str, ...]:
    """Options that are not on yet and save memory in this training, by what they save."""
    value, precision = options.value, options.precision
    whole_model = "model_training" in options
    half = precision.mixed_precision == "bf16"
    fixed_text = bool(value("network_train_unet_only")) or (whole_model and not value("train_text_encoder"))
    accumulates = options.loop.gradient_accumulation_steps > 1
    record = find_optimizer(options.optimizer.optimizer_type or "")
    large_moments = record is None or record.state_bytes > 2
    ranked = (
        ("--gradient_checkpointing", not precision.gradient_checkpointing),
        ("--mixed_precision bf16", precision.mixed_precision == "no"),
        ("--cache_latents", not value("cache_latents")),
        ("--cache_text_encoder_outputs", "sdxl" in options and fixed_text and not value("cache_text_encoder_outputs")),
        ("--full_bf16", whole_model and half and not precision.full_bf16),
        (
            "--optimizer_type AdaFactor --fused_backward_pass",
            whole_model and not accumulates and not options.optimizer.fused_backward_pass,
        ),
        ("a smaller --train_batch_size with more --gradient_accumulation_steps", value("train_batch_size", 1) > 1),
        ("--optimizer_type AdamW8bit", large_moments and not options.optimizer.fused_backward_pass),
        ("--ema_device cpu", bool(value("ema_decay")) and value("ema_device") != "cpu"),
        ("--fp8_base_unet", "network" in options and half and not (value("fp8_base") or value("fp8_base_unet"))),
        (
            "--cpu_offload_checkpointing",
            precision.gradient_checkpointing and not precision.cpu_offload_checkpointing,
        ),
        ("a smaller --resolution", True),
        ("a smaller --network_dim", "network" in options),
    )
    return tuple(text for text, helps in ranked if helps)[:MOST]

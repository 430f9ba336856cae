"""Choices by name: optimizers, schedules, samplers, losses, network modules, each a frozen record of facts.

Classes are named by import paths, so that help, docs and checks need no torch. A new choice is a new record here;
the tests walk over every record.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that look most like `name`, best first, whatever the case."""
    by_lower = {k.lower(): k for k in known}
    return [by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerRecord:
    """One value of `--optimizer_type` (compared without case).

    Attributes:
        name: as users write it; aliases: other spellings.
        path: import path of the class.
        package: what to `pip install`, or None for the base installation.
        min_version: oldest version of the package that has the class.
        defaults: arguments that are set unless `--optimizer_args` gives them.
        note: one sentence for help and docs.
        adaptive: finds its rate itself; `--learning_rate` is a factor near 1.
        schedule_free: takes no learning-rate schedule and must be told about training and evaluation.
        fused_backward: works with `--fused_backward_pass`.
        state_bytes: memory that it keeps for a trained number, in bytes; what is shared by many counts as nothing.
        forbids: options that cannot be combined with it.
    """

    name: str
    path: str
    package: str | None = None
    min_version: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    adaptive: bool = False
    schedule_free: bool = False
    fused_backward: bool = False
    state_bytes: float = 8
    aliases: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()

    @property
    def independent(self) -> bool:
        """The update of a parameter depends on that parameter alone."""
        return not self.adaptive and not self.schedule_free


def _optimizer(name: str, path: str, note: str, **facts: Any) -> OptimizerRecord:
    return OptimizerRecord(name=name, path=path, note=note, **facts)


_MOMENTUM = MappingProxyType({"nesterov": True, "momentum": 0.9})
_BNB = {"package": "bitsandbytes"}
_DADAPT = {"package": "dadaptation", "adaptive": True}
_FREE = {"package": "schedulefree", "schedule_free": True, "forbids": ("lr_scheduler_type",)}
_DADAPT_NOTE = "finds its learning rate itself: set --learning_rate 1.0; each other rate has a step size of its own"

OPTIMIZERS: tuple[OptimizerRecord, ...] = (
    _optimizer(
        "AdamW", "torch.optim.AdamW", "the default; two float32 moments a parameter", state_bytes=8, fused_backward=True
    ),
    _optimizer("AdamW8bit", "bitsandbytes.optim.AdamW8bit", "AdamW with 8-bit moments", state_bytes=2, **_BNB),
    _optimizer(
        "PagedAdamW", "bitsandbytes.optim.PagedAdamW", "AdamW whose moments move to CPU memory", state_bytes=0, **_BNB
    ),
    _optimizer(
        "PagedAdamW8bit",
        "bitsandbytes.optim.PagedAdamW8bit",
        "AdamW with 8-bit moments that move to CPU memory",
        min_version="0.39.0",
        state_bytes=0,
        **_BNB,
    ),
    _optimizer(
        "PagedAdamW32bit",
        "bitsandbytes.optim.PagedAdamW32bit",
        "AdamW with 32-bit moments that move to CPU memory",
        min_version="0.39.0",
        state_bytes=0,
        **_BNB,
    ),
    _optimizer(
        "Lion",
        "lion_pytorch.Lion",
        "sign of the momentum; a third to a tenth of AdamW's rate",
        package="lion-pytorch",
        state_bytes=4,
        fused_backward=True,
    ),
    _optimizer(
        "Lion8bit",
        "bitsandbytes.optim.Lion8bit",
        "Lion with 8-bit momentum",
        min_version="0.38.0",
        state_bytes=1,
        **_BNB,
    ),
    _optimizer(
        "PagedLion8bit",
        "bitsandbytes.optim.PagedLion8bit",
        "Lion with 8-bit momentum that moves to CPU memory",
        min_version="0.39.0",
        state_bytes=0,
        **_BNB,
    ),
    _optimizer(
        "SGDNesterov",
        "torch.optim.SGD",
        "SGD with Nesterov momentum 0.9",
        defaults=_MOMENTUM,
        state_bytes=4,
        fused_backward=True,
    ),
    _optimizer(
        "SGDNesterov8bit",
        "bitsandbytes.optim.SGD8bit",
        "SGD with Nesterov momentum 0.9 in 8 bits",
        defaults=_MOMENTUM,
        state_bytes=1,
        **_BNB,
    ),
    _optimizer(
        "DAdaptation",
        "dadaptation.experimental.DAdaptAdamPreprint",
        _DADAPT_NOTE,
        aliases=("DAdaptAdamPreprint",),
        state_bytes=12,
        **_DADAPT,
    ),
    _optimizer("DAdaptAdaGrad", "dadaptation.DAdaptAdaGrad", _DADAPT_NOTE, state_bytes=12, **_DADAPT),
    _optimizer("DAdaptAdam", "dadaptation.DAdaptAdam", _DADAPT_NOTE, state_bytes=12, **_DADAPT),
    _optimizer("DAdaptAdan", "dadaptation.DAdaptAdan", _DADAPT_NOTE, state_bytes=20, **_DADAPT),
    _optimizer("DAdaptAdanIP", "dadaptation.experimental.DAdaptAdanIP", _DADAPT_NOTE, state_bytes=20, **_DADAPT),
    _optimizer("DAdaptLion", "dadaptation.DAdaptLion", _DADAPT_NOTE, state_bytes=8, **_DADAPT),
    _optimizer("DAdaptSGD", "dadaptation.DAdaptSGD", _DADAPT_NOTE, state_bytes=12, **_DADAPT),
    _optimizer("Prodigy", "prodigyopt.Prodigy", _DADAPT_NOTE, package="prodigyopt", adaptive=True, state_bytes=16),
    _optimizer(
        "AdaFactor",
        "transformers.optimization.Adafactor",
        "little memory; sets its own rate unless --optimizer_args relative_step=False",
        state_bytes=0,
        fused_backward=True,
    ),
    _optimizer("AdamWScheduleFree", "schedulefree.AdamWScheduleFree", "AdamW without a schedule", **_FREE),
    _optimizer("RAdamScheduleFree", "schedulefree.RAdamScheduleFree", "RAdam without schedule and warm-up", **_FREE),
    _optimizer("SGDScheduleFree", "schedulefree.SGDScheduleFree", "SGD without a schedule", state_bytes=4, **_FREE),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleRecord:
    """One value of `--lr_scheduler` (compared with case).

    Attributes:
        name: as users write it.
        formula: the factor f(s) after the warm-up, s = update, W = warm-up, T = all updates.
        takes: options that change it; any other schedule option has no effect.
        needs: options or `--lr_scheduler_args` keys without which it cannot run.
        arguments: keys that `--lr_scheduler_args` may set.
        forbids: options that must be left at their default.
        note: one sentence for help and docs.
    """

    name: str
    formula: str
    takes: tuple[str, ...] = ("lr_warmup_steps",)
    needs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    note: str = ""


SCHEDULES: tuple[ScheduleRecord, ...] = (
    ScheduleRecord(
        name="constant", formula="1", takes=(), forbids=("lr_warmup_steps",), note="the same rate all the time"
    ),
    ScheduleRecord(name="constant_with_warmup", formula="1", note="rises for the warm-up, then stays"),
    ScheduleRecord(name="linear", formula="max(0, (T - s) / max(1, T - W))", note="falls in a straight line to 0"),
    ScheduleRecord(
        name="cosine",
        formula="max(0, (1 + cos(2 pi c p)) / 2), p = (s - W) / max(1, T - W), c = 0.5",
        arguments=("num_cycles",),
        note="falls along half a cosine to 0",
    ),
    ScheduleRecord(
        name="cosine_with_restarts",
        formula="max(0, (1 + cos(pi frac(n p))) / 2), n = --lr_scheduler_num_cycles; 0 from p = 1 on",
        takes=("lr_warmup_steps", "lr_scheduler_num_cycles"),
        note="falls along a cosine and jumps back, several times",
    ),
    ScheduleRecord(
        name="polynomial",
        formula="((r - e) (1 - (s - W) / (T - W))^k + e) / r, r = --learning_rate, k = --lr_scheduler_power",
        takes=("lr_warmup_steps", "lr_scheduler_power"),
        arguments=("lr_end",),
        note="falls along a power to lr_end (1e-7)",
    ),
    ScheduleRecord(
        name="piecewise_constant",
        formula="the factor of the step range that s lies in",
        takes=(),
        needs=("step_rules",),
        arguments=("step_rules",),
        note="a staircase, e.g. --lr_scheduler_args \"step_rules='1:5,0.1:12,0.01'\"",
    ),
    ScheduleRecord(
        name="adafactor",
        formula="the rate that the Adafactor optimizer sets itself; adafactor:RATE names the first one",
        takes=(),
        forbids=("lr_warmup_steps",),
        note="only with --optimizer_type AdaFactor, which chooses it itself",
    ),
    ScheduleRecord(
        name="cosine_with_min_lr",
        formula="(1 - m) (1 + cos(2 pi c p)) / 2 + m, c = --lr_scheduler_num_cycles / 2",
        takes=("lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"),
        needs=("lr_scheduler_min_lr_ratio", "min_lr"),
        arguments=("min_lr",),
        note="falls along a cosine to a share m of the rate",
    ),
    ScheduleRecord(
        name="inverse_sqrt",
        formula="sqrt(q / (s - W + q)), q = --lr_scheduler_timescale, else W, else 10000",
        takes=("lr_warmup_steps", "lr_scheduler_timescale"),
        note="falls with the square root of the step",
    ),
    ScheduleRecord(
        name="warmup_stable_decay",
        formula="1 until the last D = --lr_decay_steps updates, then (1 - m) (1 + cos(pi n p)) / 2 + m",
        takes=("lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"),
        needs=("lr_decay_steps",),
        arguments=("decay_type", "warmup_type"),
        note="rises, stays, and falls in the last updates",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerRecord:
    """One value of `--sampler` and `--sample_sampler`.

    Attributes:
        name, aliases: as users write it.
        scheduler: class name in `diffusers`.
        note: one sentence for help and docs.
        settings: constructor arguments of its own, besides the common ones.
        noise_draws: random draws per sampler step, 0 for samplers that draw none.
        calls: U-Net calls for N steps.
    """

    name: str
    scheduler: str
    note: str
    aliases: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    noise_draws: int = 0
    calls: str = "N"


def _sampler(name: str, scheduler: str, note: str, **facts: Any) -> SamplerRecord:
    return SamplerRecord(name=name, scheduler=scheduler, note=note, **facts)


_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}

SAMPLERS: tuple[SamplerRecord, ...] = (
    _sampler("ddim", "DDIMScheduler", "deterministic, the default"),
    _sampler("pndm", "PNDMScheduler", "Runge-Kutta start, then multistep", calls="N + 9"),
    _sampler("lms", "LMSDiscreteScheduler", "linear multistep of order 4", aliases=("k_lms",)),
    _sampler("euler", "EulerDiscreteScheduler", "Euler's method", aliases=("k_euler",)),
    _sampler(
        "euler_a",
        "EulerAncestralDiscreteScheduler",
        "Euler's method with fresh noise at each step",
        aliases=("k_euler_a",),
        noise_draws=1,
    ),
    _sampler("heun", "HeunDiscreteScheduler", "second order", calls="2N - 1"),
    _sampler(
        "dpm_2", "KDPM2DiscreteScheduler", "second order, midpoint in log sigma", aliases=("k_dpm_2",), calls="2N - 1"
    ),
    _sampler(
        "dpm_2_a",
        "KDPM2AncestralDiscreteScheduler",
        "dpm_2 with fresh noise",
        aliases=("k_dpm_2_a",),
        noise_draws=2,
        calls="2N - 1",
    ),
    _sampler(
        "dpmsolver",
        "DPMSolverMultistepScheduler",
        "DPM-Solver of order 2",
        settings={"algorithm_type": "dpmsolver", **_SIGMA_MIN},
    ),
    _sampler(
        "dpmsolver++",
        "DPMSolverMultistepScheduler",
        "DPM-Solver++ of order 2",
        settings={"algorithm_type": "dpmsolver++", **_SIGMA_MIN},
    ),
    _sampler(
        "dpmsingle",
        "DPMSolverSinglestepScheduler",
        "DPM-Solver++ of order 2, single step",
        settings={**_SIGMA_MIN, "lower_order_final": True},
    ),
)

SAMPLER_NAMES: tuple[str, ...] = (
    *(record.name for record in SAMPLERS),
    *(alias for record in SAMPLERS for alias in record.aliases),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRecord:
    """One value of `--loss_type`; d = prediction - target, c = the per-sample threshold.

    Attributes:
        takes: options that change it.
    """

    name: str
    formula: str
    takes: tuple[str, ...] = ()


_HUBER = ("huber_schedule", "huber_c", "huber_scale")

LOSSES: tuple[LossRecord, ...] = (
    LossRecord(name="l1", formula="|d|"),
    LossRecord(name="l2", formula="d^2"),
    LossRecord(name="huber", formula="2 c (sqrt(d^2 + c^2) - c)", takes=_HUBER),
    LossRecord(name="smooth_l1", formula="2 (sqrt(d^2 + c^2) - c)", takes=_HUBER),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRecord:
    """One network module known by name; `--network_module` takes any importable module with the same interface."""

    name: str
    note: str
    package: str | None = None
    arguments: tuple[str, ...] = field(default=())


_LORAPLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_LORA = (
    *("conv_dim", "conv_alpha", "rank_dropout", "module_dropout"),
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *_LORAPLUS,
)

NETWORKS: tuple[NetworkRecord, ...] = (
    NetworkRecord(
        name="networks.lora",
        note="LoRA on linear and 1x1 layers; with conv_dim also on 3x3 convolutions",
        arguments=_LORA,
    ),
    NetworkRecord(
        name="networks.lora_fa",
        note="LoRA-FA: LoRA whose down matrices stay as drawn, which saves memory",
        arguments=_LORA,
    ),
    NetworkRecord(
        name="networks.dylora",
        note="DyLoRA: LoRA for all ranks at once, in groups of unit; files can be cut to a lower rank",
        arguments=("conv_dim", "conv_alpha", "unit", *_LORAPLUS),
    ),
    NetworkRecord(
        name="networks.oft",
        note="Orthogonal fine-tuning of the U-Net: network_dim blocks a layer, network_alpha bounds the rotation",
        arguments=("enable_all_linear", "enable_conv"),
    ),
    NetworkRecord(
        name="lycoris.kohya",
        note="LoCon, LoHa, LoKr, (IA)^3, DyLoRA and others by --network_args algo=NAME",
        package="lycoris-lora",
    ),
)


def find_optimizer(name: str) -> OptimizerRecord | None:
    """The record of an `--optimizer_type` (any case, "" = AdamW), or None for a class by path."""
    wanted = (name or "AdamW").lower()
    for record in OPTIMIZERS:
        if wanted in (record.name.lower(), *(a.lower() for a in record.aliases)):
            return record
    return None


def find_schedule(name: str) -> ScheduleRecord | None:
    """The record of a `--lr_scheduler`, `adafactor:RATE` included, or None."""
    wanted = "adafactor" if name.startswith("adafactor") else name
    return next((record for record in SCHEDULES if record.name == wanted), None)

"""Calls the hooks of a trainer object, whichever release of sd-scripts its class was written for.

Per hook the union of arguments is known by name; the method found on the object is looked at once and gets what
it names (spec: public names of the trainers). A method that only exists in later releases' strategy interface is
refused at the start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from library.messages import UserError

STRATEGY_METHODS = {
    "get_tokenize_strategy": "load_tokenizer",
    "get_tokenizers": "load_tokenizer",
    "get_latents_caching_strategy": "assert_extra_args",
    "get_text_encoding_strategy": "get_text_cond",
    "get_text_encoder_outputs_caching_strategy": "cache_text_encoder_outputs_if_needed",
    "get_models_for_text_encoding": "get_text_cond",
    "load_unet_lazily": "load_target_model",
    "prepare_text_encoder_fp8": "load_target_model",
}


def refuse_strategy_overrides(trainer: Any) -> None:
    """Stop when a subclass overrides methods of the v0.10 strategy interface, which is not offered."""
    found = [name for name in STRATEGY_METHODS if hasattr(trainer, name)]
    if found:
        instead = ", ".join(sorted({STRATEGY_METHODS[name] for name in found}))
        raise UserError(
            f"{type(trainer).__name__} overrides {', '.join(found)}, which belong to the strategy classes of v0.10",
            f"override {instead} instead",
        )


class Hooks:
    """The hooks of one trainer object.

    Args:
        trainer: the object.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._parameters: dict[str, list[inspect.Parameter]] = {}

    def overridden(self, name: str) -> bool:
        """True if the method is not this project's own (a subclass's, or one assigned from outside)."""
        if name in vars(self.trainer):
            return True
        return not getattr(getattr(type(self.trainer), name), "__module__", "").startswith("library.training.")

    def parameters(self, name: str) -> list[inspect.Parameter]:
        """Parameters of the method after self."""
        if name not in self._parameters:
            self._parameters[name] = list(inspect.signature(getattr(self.trainer, name)).parameters.values())
        return self._parameters[name]

    def positional_count(self, name: str) -> int:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return sum(p.kind in kinds for p in self.parameters(name))

    def names(self, name: str) -> set[str]:
        return {p.name for p in self.parameters(name)}

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call as is."""
        return getattr(self.trainer, name)(*args, **kwargs)

    def assert_extra_args(self, args: Any, group: Any) -> None:
        """Third argument (the validation group) only where the method takes one."""
        extra = (getattr(group, "validation", None),) if self.positional_count("assert_extra_args") >= 3 else ()
        self.call("assert_extra_args", args, group, *extra)

    def cache_text_outputs(
        self, args: Any, accelerator: Any, unet: Any, vae: Any, tokenizers: list, encoders: list, group: Any, dtype: Any
    ) -> None:
        """With or without tokenizers, by the number of parameters (8 in 0.7.0, 7 in 0.10)."""
        name = "cache_text_encoder_outputs_if_needed"
        if self.positional_count(name) == 7:
            self.call(name, args, accelerator, unet, vae, encoders, group, dtype)
        else:
            self.call(name, args, accelerator, unet, vae, tokenizers, encoders, group, dtype)

    def step_logs(self, **values: Any) -> dict[str, Any]:
        """`generate_step_logs` by keyword, with the names that the method has."""
        method: Callable[..., dict] = self.trainer.generate_step_logs
        names = self.names("generate_step_logs")
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters("generate_step_logs"))
        return method(**{k: v for k, v in values.items() if takes_any or k in names})

    def sample_images(
        self, accelerator: Any, args: Any, epoch: Any, step: int, device: Any, vae: Any, tokenizers: list, *rest: Any
    ) -> None:
        """The tokenizer alone or a list, as the method's parameter name asks."""
        plural = "tokenizers" in self.names("sample_images")
        tokenizer = tokenizers if plural or len(tokenizers) > 1 else tokenizers[0]
        self.call("sample_images", accelerator, args, epoch, step, device, vae, tokenizer, *rest)

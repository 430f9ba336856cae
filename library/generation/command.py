"""The picture script's whole run: options to an opened model and networks, prompt lines to picture files."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.generation.checks import check_options
from library.generation.embeddings import EmbeddingFiles, add_embeddings, read_embeddings
from library.generation.engine import Engine
from library.generation.networks import check_networks, load_networks, network_specs, show_metadata
from library.generation.request import SizeCondition
from library.generation.session import Session, ask_on_terminal
from library.messages import UserError, log
from library.models.family import Family, LoadedModel, family
from library.models.vae import load_vae
from library.models.vae_slicing import slice_convolutions
from library.options.image import ImageConfig
from library.options.image_model import ImageModelConfig
from library.prompts.files import read_prompt_lines
from library.runtime.attention import choose_backend
from library.runtime.devices import pick_device

if TYPE_CHECKING:
    from library.options.parser import Resolved


def run(options: Resolved, namespace: Any = None, *, family_name: str = "sd") -> None:
    """Draw everything that a command line asks for.

    Args:
        options: of the picture script: concerns `image`, `image_model`, `image_passes`.
        namespace: the script's; nothing here needs it.
        family_name: the script's model family.

    Raises:
        UserError: bad input, or pictures that could not be drawn.
    """
    image, model = options.image, options.image_model
    check_options(image, model, options.image_passes, family_name=family_name)
    lines = prompt_lines(image)
    if not lines and not image.interactive:
        log.info("no prompts: nothing to draw (give --prompt, --from_file or --interactive)")
        return
    own = family(family_name)
    engine = open_engine(own, model, image)
    sizes = size_condition(options)
    Session(image, engine, lines, default_size=own.default_size, sizes=sizes, ask=ask_on_terminal).run()


def size_condition(options: Resolved) -> SizeCondition | None:
    """The command line's sizes, None for a script whose models know none."""
    return SizeCondition(**dataclasses.asdict(options.image_sizes)) if "image_sizes" in options else None


def prompt_lines(image: ImageConfig) -> list[str]:
    """The prompt lines of the file, else of the command line."""
    if image.from_file is not None:
        if image.prompt is not None:
            log.warning("--prompt has no effect: --from_file wins")
        return read_prompt_lines(image.from_file)
    return [] if image.prompt is None else [image.prompt]


def open_engine(
    own: Family, config: ImageModelConfig, image: ImageConfig, *, noise_device: str | torch.device | None = None
) -> Engine:
    """Open model and networks as the options say, on the best device of this machine; `noise_device`: see `Engine`."""
    specs = network_specs(config.network_module, config.network_weights, config.network_mul, config.network_args)
    check_networks(specs)
    embeddings = read_embeddings(config.textual_inversion_embeddings, config.XTI_embeddings)
    device, dtype = pick_device(), _dtype(config)
    model = open_model(own, config, device=device, dtype=dtype)
    if config.network_show_meta:
        show_metadata(specs)
    merge_first = len(specs) if config.network_merge else config.network_merge_n_models or 0
    networks = load_networks(
        specs,
        model,
        merge_first=merge_first,
        pre_calculate=config.network_pre_calc,
        device=device,
        dtype=dtype,
        channels_last=config.opt_channels_last,
    )
    words = add_embeddings(model, embeddings)
    return Engine(
        own,
        model,
        device=device,
        dtype=dtype,
        sampler=image.sampler,
        clip_skip=config.clip_skip,
        max_chunks=image.max_embeddings_multiples or 1,
        networks=networks,
        vae_batch_size=config.vae_batch_size,
        facts=_facts(config, model, embeddings),
        noise_device=noise_device,
        words=words,
    )


def open_model(own: Family, config: ImageModelConfig, *, device: str | torch.device, dtype: torch.dtype) -> LoadedModel:
    """Open the model for drawing: in evaluation mode, in its number format, on the device."""
    backend = choose_backend(xformers=config.xformers or config.diffusers_xformers, sdpa=config.sdpa)
    source = find_model(config.ckpt or "")
    model = own.load(
        source,
        v2=config.v2,
        v_parameterization=config.v_parameterization or None,
        vae=config.vae,
        dtype=dtype,
        device=device,
    )
    if model.prediction_type == "v_prediction" and not config.v_parameterization:
        log.info("the model says that it predicts velocity, and is used so")
    if config.no_half_vae and dtype != torch.float32:
        vae = config.vae or source
        model.vae = load_vae(vae, scaling_factor=own.latent_scale, dtype=torch.float32, device=device)
    if config.tokenizer_cache_dir:
        model.tokenizers = own.load_tokenizers(config.v2, config.tokenizer_cache_dir, None)
    model.unet.set_attention_backend(backend)
    if config.vae_slices:
        slice_convolutions(model.vae, config.vae_slices)
    for module in (*model.text_encoders, model.vae, model.unet):
        module.eval().requires_grad_(False)
        if config.opt_channels_last:
            module.to(memory_format=torch.channels_last)
    return model


def find_model(name: str) -> str:
    """`--ckpt`: a path as it is, or the one file or folder that a pattern matches.

    Raises:
        UserError: a pattern that matches several.
    """
    if Path(name).exists() or not glob.has_magic(name):
        return name
    found = sorted(glob.glob(name))
    if len(found) > 1:
        raise UserError(f"--ckpt {name} matches {len(found)} files: {', '.join(found[:4])}", "name one of them")
    return found[0] if found else name


def _dtype(config: ImageModelConfig) -> torch.dtype:
    if config.fp16:
        return torch.float16
    return torch.bfloat16 if config.bf16 else torch.float32


def _facts(config: ImageModelConfig, model: LoadedModel, embeddings: EmbeddingFiles) -> dict[str, str]:
    """What the metadata of every picture say about the run."""
    facts = {"model": Path(model.source).name}
    if config.vae:
        facts["vae"] = Path(config.vae).name
    if config.clip_skip is not None:
        facts["clip-skip"] = str(config.clip_skip)
    if embeddings.names:
        facts["embeddings"] = ", ".join(embeddings.names)
    return facts

"""One picture request as the command line gives it: prompt, size, sampler, counts, output."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """One picture request as the command line gives it: prompt, size, sampler, counts, output."""

    prompt: str | None = option(None, "")
    from_file: str | None = option(None, "")
    interactive: bool = option(False, "")
    no_preview: bool = option(False, "")
    n_iter: int = option(1, "")
    images_per_prompt: int = option(1, "")
    batch_size: int = option(1, "")
    seed: int | None = option(None, "")
    iter_same_seed: bool = option(False, "")
    shuffle_prompts: bool = option(False, "")
    W: int | None = option(None, "")
    H: int | None = option(None, "")
    steps: int = option(50, "")
    scale: float = option(7.5, "")
    negative_scale: float | None = option(None, "")
    sampler: str = option(
        "ddim",
        "",
        choices=(
            "ddim",
            "pndm",
            "lms",
            "euler",
            "euler_a",
            "heun",
            "dpm_2",
            "dpm_2_a",
            "dpmsolver",
            "dpmsolver++",
            "dpmsingle",
            "k_lms",
            "k_euler",
            "k_euler_a",
            "k_dpm_2",
            "k_dpm_2_a",
        ),
    )
    strength: float | None = option(None, "")
    image_path: str | None = option(None, "")
    mask_path: str | None = option(None, "")
    guide_image_path: list[str] | None = option(None, "")
    outdir: str = option("outputs", "")
    sequential_file_name: bool = option(False, "")
    use_original_file_name: bool = option(False, "")
    max_embeddings_multiples: int | None = option(None, "")

"""Old functions on a script's namespace that concern the data."""

from __future__ import annotations

import argparse

from library.data.config import parse_face_range, parse_resolution
from library.messages import warn_once


def prepare_dataset_args(args: argparse.Namespace, support_metadata: bool) -> None:
    """Read the texts of the data options, in place: `resolution` becomes (width, height), the face range two floats.

    Raises:
        UserError: resolution or face range cannot be read.
    """
    if getattr(args, "caption_extention", None) is not None:
        args.caption_extension, args.caption_extention = args.caption_extention, None
    args.resolution = parse_resolution(args.resolution)
    args.face_crop_aug_range = parse_face_range(args.face_crop_aug_range)
    if support_metadata and getattr(args, "in_json", None) and (args.color_aug or args.random_crop):
        warn_once("latents of --in_json are not used with --color_aug or --random_crop")

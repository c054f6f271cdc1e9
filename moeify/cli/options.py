"""Options of the command line that have long help or that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Dtypes that a model may be converted to."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Export(StrEnum):
    """Kinds of converted folders, and `auto`."""

    auto = "auto"
    native = "native"
    custom = "custom"
    moeify = "moeify"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An option of a preset, such as experts=16."),
]
PLAN_HELP = "A plan file (.yaml, .json) or the name of a preset."
MODEL_HELP = "A local Hugging Face folder."
ExportOption = Annotated[
    Export,
    typer.Option(
        "--export",
        metavar="KIND",
        help="native (loads in transformers alone), custom (its code needs moeify), moeify "
        "(for moeify.load), or auto, the first that fits.",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16, ...; the source's dtypes if not given.",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Such as 5GB or 512MiB.")
]
Verify = Annotated[
    int,
    typer.Option(
        "--verify",
        min=0,
        metavar="N",
        help="Compare with SRC on N random inputs in a fresh process; 0 skips this.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Text file with one document per line to run the model on; needs --in-memory.",
    ),
]

"""``loraweave fuse``: a recipe's LoRAs become one, by what each does to its own data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from loraweave.cli.merge import weights_of
from loraweave.cli.verb import Verb, positive
from loraweave.errors import LoraweaveError

if TYPE_CHECKING:
    from loraweave.recipe import Recipe


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file: its 'base' and 'experts' are used")
    parser.add_argument(
        "--data", metavar="NAME=FILE", action="append", default=[], help="JSON lines of what an expert was made for"
    )
    parser.add_argument(
        "--prompt", metavar="NAME=TEXT", action="append", default=[],
        help="for a diffusers pipeline instead: a prompt to paint with one expert; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--out", metavar="DIR", required=True, help="where the LoRA is written; of a pipeline a .safetensors file"
    )
    parser.add_argument(
        "--weight", metavar="NAME=NUMBER", action="append", default=[], help="strength of one LoRA (default: 1)"
    )
    parser.add_argument("--rank", type=positive, metavar="N", help="of the result at most (default: all there is)")
    parser.add_argument("--ridge", type=float, metavar="X", default=1e-6, help="default: 1e-6")
    parser.add_argument("--batch-size", type=positive, metavar="N", default=8, help="examples per pass (default: 8)")
    parser.add_argument("--steps", type=positive, metavar="N", default=30, help="denoising steps (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of what is painted (default: 0)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the LoRA in DIR (its other files stay) or the file"
    )
    parser.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="recipe fields to set")


def _run(options: argparse.Namespace) -> None:
    from loraweave.recipe import load_recipe

    if bool(options.data) == bool(options.prompt):
        raise LoraweaveError("give --data NAME=FILE for each expert, or --prompt NAME=TEXT over a diffusers pipeline")
    recipe = load_recipe(options.recipe, options.overrides)
    data: dict[str, Any] = {}
    for assignment in options.data or options.prompt:
        name, equals, value = assignment.partition("=")
        flag = "--data" if options.data else "--prompt"
        if not equals or not name.strip() or not value.strip():
            raise LoraweaveError(f"{flag} {assignment}: expected NAME={'FILE' if options.data else 'TEXT'}")
        if options.data and name.strip() in data:
            raise LoraweaveError(f"--data {assignment}: {name.strip()!r} is given twice")
        data.setdefault(name.strip(), []).append(value.strip())
    place = _painted(recipe, data, options) if options.prompt else _read(recipe, data, options)
    print(f"written to {place}; try: loraweave inspect {place}")


def _read(recipe: Recipe, data: dict[str, Any], options: argparse.Namespace) -> Any:
    import loraweave as lw
    from loraweave.cli.building import load_base
    from loraweave.experts.writer import check_folder

    check_folder(options.out, options.overwrite)
    examples = {name: files[0] for name, files in data.items()}
    model, tokenizer = load_base(recipe.base)
    settings = _settings(options) | {"batch_size": options.batch_size}
    fused = lw.fuse(model, recipe.sources(), examples, tokenizer=tokenizer, **settings)
    _say(fused)
    return lw.write_expert(fused, options.out, overwrite=options.overwrite)


def _painted(recipe: Recipe, data: dict[str, Any], options: argparse.Namespace) -> Any:
    import torch

    import loraweave as lw
    from loraweave.experts.filewriter import check_file, write_lora_file
    from loraweave.integrations.diffusers import load_pipeline

    check_file(options.out, options.overwrite)
    pipe = load_pipeline(recipe.base, "DiffusionPipeline")
    if torch.cuda.is_available():
        pipe.to("cuda")
    settings = _settings(options) | {"seed": options.seed}
    fused = lw.fuse(pipe, recipe.sources(), data, call={"num_inference_steps": options.steps}, **settings)
    _say(fused)
    return write_lora_file(fused, options.out, overwrite=options.overwrite)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"weights": weights_of(options.weight), "rank": options.rank, "ridge": options.ridge}


def _say(fused: Any) -> None:
    ranks = sorted({factors.rank for factors in fused.factors.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"fused: {len(fused.factors)} modules, {rank}")


VERB = Verb(
    name="fuse",
    summary="several LoRAs become one that does to each one's own data what that one did",
    details="Fuse a recipe's LoRAs into one ordinary LoRA by least squares on what each one's own data give to every\n"
    "module (Mix-of-Show's gradient fusion). 'loraweave merge' needs no data and no model.",
    examples=[
        (
            "loraweave fuse recipe.yaml --data qa=qa.jsonl --data nli=nli.jsonl -o fused --rank 16",
            "LoRAs of a language model",
        ),
        (
            "loraweave fuse hero.yaml --prompt 'hero=sks hero' --prompt 'coat=zwx coat' -o fused.safetensors",
            "LoRAs of a diffusers pipeline, into a file that diffusers loads",
        ),
    ],
    arguments=_arguments,
    run=_run,
)

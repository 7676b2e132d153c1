"""``loraweave compare``: several methods on the same data, in one table."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; its 'compare' lists the methods")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where results, picture and mixture go")
    parser.add_argument("--small", action="store_true", help="the recipe's small form: section 'small'")
    parser.add_argument("--fresh", action="store_true", help="make every cell anew, also those that DIR has already")
    parser.add_argument(
        "overrides", metavar="FIELD=VALUE", nargs="*", help="recipe fields to set, e.g. train.seeds=[0,1]"
    )


def _run(options: argparse.Namespace) -> None:
    from loraweave.cli.processes import alone

    process = alone()
    from loraweave.cli.comparing import compare
    from loraweave.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, small=options.small)
    compare(recipe, options.out, fresh=options.fresh, process=process)


VERB = Verb(
    name="compare",
    summary="several methods on the same data, in one table",
    details="Compare the bare base, every expert alone and several methods on the same test data, over several seeds.\n"
    "Leaves results.json, a heat map of the learned weights and the mixture of the first method that learns.\n"
    "Each method and seed is kept in DIR/cells once it is done: run the same again to go on after an interruption,\n"
    "or share the work: torchrun --nproc-per-node 2 -m loraweave compare RECIPE -o DIR\n"
    "(with several GPUs also accelerate launch --num_processes 2 -m loraweave compare RECIPE -o DIR).\n"
    "Retention is a method's score on each expert's task divided by that expert's own, averaged over tasks.",
    examples=[
        ("loraweave compare examples/zoo.yaml -o out/zoo", "on the bundled model and LoRAs"),
        ("loraweave compare recipe.yaml -o out/mine train.seeds=[0,1,2] compare=[sum,linear,mole]", "your own"),
    ],
    arguments=_arguments,
    run=_run,
)

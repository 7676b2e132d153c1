"""``loraweave train``: a recipe becomes a saved mixture."""

from __future__ import annotations

import argparse

from loraweave.cli.verb import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where the mixture is saved")
    parser.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help="recipe fields to set, e.g. train.steps=50")
    parser.add_argument(
        "--copy-experts", action="store_true", help="save the experts too; DIR then needs just the base"
    )
    parser.add_argument(
        "--checkpoints",
        metavar="DIR",
        help="keep checkpoints and samples there, and go on from the last whole one",
    )


def _run(options: argparse.Namespace) -> None:
    from loraweave import persistence
    from loraweave.cli import building
    from loraweave.files import check_replaceable
    from loraweave.recipe import load_recipe
    from loraweave.training.learn import check, learn, learns, settled

    recipe = load_recipe(options.recipe, options.overrides)
    check_replaceable(options.out, ours=building.MIXTURE_FILES)
    if recipe.images is not None:
        from loraweave.cli.image_gates import teach

        kept = {"copy_experts": options.copy_experts, "checkpoints": options.checkpoints}
        teach(recipe, recipe.images, options.out, **kept)
        return
    # Before the base is loaded, so that bad data shows at once.
    data = building.training_data(recipe, recipe.train.seed) if building.names_training_data(recipe) else []
    mixture, tokenizer = building.build(recipe)
    # Experts that were made in memory are nowhere on disk.
    copied = options.copy_experts or bool(recipe.merged)
    if learns(mixture):
        check(mixture)
        data = data or building.training_data(recipe, recipe.train.seed)
        # A search has no checkpoints: it is over in minutes.
        checkpoints = {"output_dir": options.checkpoints, "resume": options.checkpoints is not None}
        learned = learn(mixture, data, tokenizer=tokenizer, **checkpoints, **recipe.train.options())
        mixture, copied = settled(mixture, learned), copied or learned.expert is not None
        print(learned.summary)
    else:
        print(f"{recipe.method.name!r} has nothing to train")
    place = persistence.save(mixture, options.out, copy_experts=copied, recipe=recipe.to_dict())
    print(f"saved to {place}; try: loraweave generate {place} --input TEXT")


VERB = Verb(
    name="train",
    summary="train the gates of a recipe and save the mixture",
    details="Train the gates of a recipe (the base and the experts stay as they are) and save the mixture.\n"
    "A recipe with a section 'images' trains gates over a diffusers pipeline, for 'loraweave image'.",
    examples=[
        ("loraweave train examples/zoo.yaml -o out/mixture", "train gates over bundled LoRAs"),
        ("loraweave train examples/zoo.yaml -o out/mixture train.steps=50 method.scale=2", "with other settings"),
        ("loraweave train recipe.yaml -o out/mixture --checkpoints out/ckpt", "run again after a crash to go on"),
        ("loraweave train examples/images.yaml -o out/gated", "gates over LoRAs of a diffusers pipeline"),
    ],
    arguments=_arguments,
    run=_run,
)

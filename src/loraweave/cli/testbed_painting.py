"""The painting part of ``loraweave testbed``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from loraweave import persistence
from loraweave.cli.painting import Way, call_of, contestants, loading
from loraweave.cli.testbed_gates import Classroom, Course, courses
from loraweave.cli.testbed_settings import folders, note, noted
from loraweave.errors import LoraweaveError, unknown
from loraweave.evaluation.alignment import alignment, check_references
from loraweave.evaluation.testbed import chosen_sets, testbed_of
from loraweave.experts.resolve import resolve_experts
from loraweave.experts.types import Expert
from loraweave.files import atomic_path, write_json_atomic, write_text_atomic
from loraweave.integrations.host import open_host
from loraweave.integrations.rivals import Loading
from loraweave.mixture import Mixture, attach
from loraweave.policies import Sum
from loraweave.recipe import Recipe
from loraweave.recipe.rivals import Rival
from loraweave.recipe.testbeds import CompositionSet, Testbed
from loraweave.training.learn import learns

PICTURES, SCORES = "pictures.jsonl", "alignment.json"


def paint(
    recipe: Recipe,
    out: str | Path,
    ids: Sequence[str] = (),
    limit: int | None = None,
    *,
    clip: str | None = None,
    dino: str | None = None,
) -> None:
    """Paint every chosen set by every method, with every prompt and seed; what is there stays.

    Methods that learn are trained first, where the recipe's section ``images`` says by what, and kept in ``out``.
    With ``clip`` (folder or hub id, with ``dino`` beside it) the pictures are scored too, and the table is printed.

    Raises:
        LoraweaveError: no test bed, something cannot be read, or ``out`` has pictures or gates with other settings.
    """
    testbed, out = testbed_of(recipe), Path(out)
    if clip is not None:
        check_references(testbed, clip, dino)
    chosen = chosen_sets(testbed, ids, limit)
    ways = contestants(recipe) or {recipe.method.name: Way(recipe.method.policy())}
    places = folders(ways)
    _refuse_strangers(recipe, ways, chosen)
    jobs = {one: _jobs(testbed, one, places, out) for one in chosen}
    todo = {one: [job for job in of_set if not job.path.exists()] for one, of_set in jobs.items()}
    total, left = sum(map(len, jobs.values())), sum(map(len, todo.values()))
    unpainted = {job.method for of_set in todo.values() for job in of_set}
    before = noted(out)
    with Classroom(recipe, testbed) as room:
        if unpainted and recipe.images is not None:
            _check_painting(recipe, testbed, room.pipe, {label: ways[label] for label in unpainted}, chosen)
        taught = courses(recipe, room, out, ways, before)
        note(out, recipe, testbed, ways, {label: course.noted for label, course in taught.items()}, before)
        print(f"{len(chosen)} sets by {', '.join(ways)}: {total} pictures, {total - left} of them there already")
        lacking = [course for label, course in taught.items() if label in unpainted and not course.done()]
        for course in lacking:
            course.check(room.mixture)  # all of them, before hours of the first one's training
        for course in lacking:
            course.train(room.mixture)
    ways |= {label: Way(ways[label].policy, course.place) for label, course in taught.items()}
    if left:
        _paint(recipe, testbed, todo, {label: way for label, way in ways.items() if label in unpainted}, left)
    rows = [row for one in chosen for row in _rows(testbed, one, jobs[one], out)]
    write_text_atomic(out / PICTURES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out / PICTURES}: {len(rows)} rows; try: loraweave judge {out / PICTURES} -o {out / 'judged'} --dry-run")
    if clip is not None:
        _score(recipe, testbed, out, clip, dino, taught)


def _score(
    recipe: Recipe, testbed: Testbed, out: Path, clip: str, dino: str | None, taught: Mapping[str, Course]
) -> None:
    from loraweave.evaluation.image_metrics import Clip, Dino
    from loraweave.reporting.published import published_table

    found = alignment(out / PICTURES, testbed, Clip(clip), None if dino is None else Dino(dino))
    costs = {label: json.loads(course.cost.read_text()) for label, course in taught.items() if course.cost.exists()}
    results = {**found, "costs": costs, "clip": clip, "dino": dino, "recipe": recipe.to_dict()}
    write_json_atomic(out / SCORES, results)
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for method in found["scores"]:
        table.add_column(Text(method), justify="right")
    rows = {name: [of[name] for of in found["scores"].values()] for name in next(iter(found["scores"].values()))}
    if found["distinctness"]:
        rows["distinctness"] = [of["mean"] for of in found["distinctness"].values()]
    for name, values in rows.items():
        table.add_row(Text(name), *(f"{value:.3f}" for value in values))
    console.print(table)
    if (beside := published_table(results)) is not None:
        console.print(beside)
    print(f"{out / SCORES}: every number")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One picture."""

    row: str
    method: str
    prompt: str
    seed: int
    path: Path


def _jobs(testbed: Testbed, one: CompositionSet, places: Mapping[str, str], out: Path) -> list[_Job]:
    prompts = testbed.prompts_of(one)
    jobs = []
    for method, place in places.items():
        for number, prompt in enumerate(prompts):
            for seed in testbed.seeds:
                extra = f"--{number}" if len(prompts) > 1 else ""
                # The seed always: with more or other seeds, what is there must neither be lost nor pass for another's.
                row = f"{one.id}{extra}--{seed}"
                jobs.append(_Job(row, method, prompt, seed, out / place / f"{row.replace(' ', '_')}.png"))
    return jobs


def _rows(testbed: Testbed, one: CompositionSet, jobs: Sequence[_Job], out: Path) -> list[dict[str, Any]]:
    """Rows of ``pictures.jsonl``: every method's picture of one prompt and seed."""
    rows: dict[str, dict[str, Any]] = {}
    for job in jobs:
        new = {
            "id": job.row,
            "set": one.id,
            "elements": testbed.described(one),
            "prompt": job.prompt,
            "seed": job.seed,
            "pictures": {},
        }
        rows.setdefault(job.row, new)["pictures"][job.method] = str(job.path.relative_to(out))
    return list(rows.values())


def _paint(
    recipe: Recipe,
    testbed: Testbed,
    todo: Mapping[CompositionSet, Sequence[_Job]],
    ways: Mapping[str, Way],
    total: int,
) -> None:
    pipe = _pipeline(recipe, testbed)
    plain = {label: way.policy for label, way in ways.items() if way.saved is None and way.rival is None}
    saved = {label: way.saved for label, way in ways.items() if way.saved is not None}
    all_of = {label: persistence.saved_experts(place) for label, place in saved.items()}
    needed = {name for one, jobs in todo.items() if jobs for name in one.experts}.union(*all_of.values())
    sources = {name: source for name, source in recipe.sources().items() if name in needed}
    read = resolve_experts(sources, open_host(pipe, None).read)
    experts = {expert.name: expert.scaled(testbed.strength) for expert in read}
    rivals = {
        label: _Rival(way.rival, label, pipe, testbed, experts, todo)
        for label, way in ways.items()
        if way.rival is not None
    }
    with tqdm(total=total, desc="painting", unit="picture", disable=not sys.stderr.isatty()) as bar:
        for one, jobs in todo.items():
            own = [job for job in jobs if job.method in plain]
            if not own:
                continue
            mixture = attach(pipe, {name: experts[name] for name in one.experts}, Sum())
            try:
                _refuse_untrained(mixture, plain)
                for job in own:
                    mixture.policy = plain[job.method]
                    _finish(pipe, testbed, job, bar)
            finally:
                mixture.detach()
        for label, place in saved.items():
            # Its gates know all their experts; those that a set does not have are masked.
            mixture = attach(pipe, {name: experts[name] for name in all_of[label]}, Sum())
            try:
                persistence.adopt(mixture, place)
                for one, jobs in todo.items():
                    with mixture.only(*one.experts):
                        for job in jobs:
                            if job.method == label:
                                _finish(pipe, testbed, job, bar)
            finally:
                mixture.detach()
        for rival in rivals.values():
            rival.paint(bar)


class _Rival:
    """A contestant that is no mixture, and its pictures; what does not fit the pipeline shows at once."""

    def __init__(
        self,
        rival: Rival,
        label: str,
        pipe: Any,
        testbed: Testbed,
        experts: Mapping[str, Expert],
        todo: Mapping[CompositionSet, Sequence[_Job]],
    ) -> None:
        self.rival, self.label, self.pipe, self.testbed, self.experts = rival, label, pipe, testbed, experts
        own = {
            one: [dataclasses.replace(job, prompt=rival.prompt(job.prompt)) for job in jobs if job.method == label]
            for one, jobs in todo.items()
        }
        self.todo = {one: jobs for one, jobs in own.items() if jobs}
        if self.todo:
            prompts = dict.fromkeys(job.prompt for jobs in self.todo.values() for job in jobs)
            self._loading(list(self.todo)).warn_of_tokens(label, list(prompts))

    def paint(self, bar: Any) -> None:
        for sets in [[one] for one in self.todo] if self.rival.hangs_on_set else [list(self.todo)]:
            if sets:
                with self._loading(sets):
                    for job in (job for one in sets for job in self.todo[one]):
                        _finish(self.pipe, self.testbed, job, bar)

    def _loading(self, sets: Sequence[CompositionSet]) -> Loading:
        experts = {name: self.experts[name] for one in sets for name in one.experts}
        return loading(self.label, self.rival, self.pipe, experts, self.testbed, call_of(self.testbed))


def _finish(pipe: Any, testbed: Testbed, job: _Job, bar: Any) -> None:
    picture = _picture(pipe, testbed, job)
    with atomic_path(job.path) as path:
        picture.save(path, format="PNG")
    bar.update()


def _pipeline(recipe: Recipe, testbed: Testbed) -> Any:
    from loraweave.integrations.diffusers import load_pipeline, scheduler_named

    pipe: Any = load_pipeline(recipe.base, "DiffusionPipeline")
    pipe.scheduler = scheduler_named(pipe, testbed.scheduler, testbed.scheduler_options)
    if testbed.vae is not None:
        pipe.vae = _vae(testbed.vae)
    if torch.cuda.is_available():
        pipe.to("cuda", torch.float16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae(name: str) -> Any:
    import diffusers

    try:
        return diffusers.AutoencoderKL.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoraweaveError(f"testbed.vae: {name!r} cannot be read: {str(error).splitlines()[0]}") from error


def _check_painting(
    recipe: Recipe, testbed: Testbed, pipe: Any, ways: Mapping[str, Way], chosen: Sequence[CompositionSet]
) -> None:
    """Raise now what painting would raise after hours of training."""
    from loraweave.integrations.diffusers import scheduler_named

    scheduler_named(pipe, testbed.scheduler, testbed.scheduler_options)
    if testbed.vae is not None:
        _vae(testbed.vae)
    sources = recipe.sources()
    experts = {name: sources[name] for one in chosen for name in one.experts}
    for label, way in ways.items():
        if way.rival is not None:
            loading(label, way.rival, pipe, experts, testbed, call_of(testbed))


def _refuse_strangers(recipe: Recipe, ways: Mapping[str, Way], chosen: Sequence[CompositionSet]) -> None:
    """Raise unless every saved mixture is of the recipe's experts and has those of every set."""
    for label, way in ways.items():
        if way.saved is None:
            continue
        names = persistence.saved_experts(way.saved)
        for name in names:
            if name not in recipe.names:
                raise LoraweaveError(f"compare.{label}.saved: {way.saved}: {unknown('expert', name, recipe.names)}")
        for one in chosen:
            if lacking := [name for name in one.experts if name not in names]:
                raise LoraweaveError(
                    f"compare.{label}.saved: {way.saved} mixes {', '.join(names)}, but the set {one.id} needs "
                    f"{', '.join(lacking)}, too; train gates over all experts of the test bed"
                )


def _refuse_untrained(mixture: Mixture, policies: Mapping[str, Any]) -> None:
    for label, policy in policies.items():
        mixture.policy = policy
        if learns(mixture):
            raise LoraweaveError(
                f"compare.{label}: {policy.name} learns, and nothing here trains it for pictures; say by what in a "
                f"section 'images', name a mixture that 'loraweave train' saved (compare.{label}: {{saved: FOLDER}}), "
                "or leave it out"
            )


def _picture(pipe: Any, testbed: Testbed, job: _Job) -> Any:
    call = {"prompt": job.prompt, "num_inference_steps": testbed.steps, **call_of(testbed)}
    return pipe(**call, generator=torch.Generator().manual_seed(job.seed)).images[0]

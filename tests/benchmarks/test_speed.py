"""The speed suite at toy size: it runs, it checks before it times, and its figures mean what they say."""

import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from speed import document, image_floors, report, run
from speed.checks import check
from speed.denoisers import IMAGE_SIZES, SDXLSize, make_image_bench
from speed.images import call, pictures
from speed.models import SIZES, Bench, arithmetic, make_bench, token_ids
from speed.ours import OURS, attach, ungated
from speed.peers import PEERS, peft_all, peft_one
from speed.place import Place
from speed.rows import BATCH, MIXTURES, mixtures
from speed.scenarios import SCENARIOS
from speed.timing import Task, interleave, ratios
from speed.training import STEPS
from torch import nn
from torch.testing import assert_close

import loraweave as lw
from elsewhere import elsewhere

NAMES = [contender.name for contender in (*PEERS, *OURS)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(SIZES["tiny"], tmp_path / "experts")


@pytest.mark.slow
def test_the_suite_times_every_contender_and_writes_its_tables(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    run.main(["--size", "tiny", "--rounds", "1", "--threads", "1", "--group", "core", "-o", str(output)])
    written = json.loads(output.read_text())
    longer = {"generate, batch 1 x 256", "generate, batch 2 x 256"}
    assert set(written["scenarios"]) == {"forward", "generate, batch 1", "train"} | longer
    assert list(written["scenarios"].pop("train")["contenders"]) == list(STEPS) == list(written["memory"])
    assert all(0 < m["before"] <= m["peak"] == m["peaks"][0] for m in written["memory"].values())
    for name, scenario in written["scenarios"].items():
        assert tuple(scenario["contenders"]) == SCENARIOS[name].contenders
        assert scenario["arithmetic"]["ratio"] > 1
        assert all(len(c["seconds"]) == 1 and c["seconds"][0] > 0 for c in scenario["contenders"].values())
    assert len(written["checks"]) == 4 + 4 + 4 + 2 + 2
    assert all(name in output.with_suffix(".md").read_text() for name in NAMES)


def test_a_group_done_before_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    kept = {"rounds": 5, "what": "", "baseline": "x", "contenders": {}}
    surroundings = report.environment(1)
    size = {"name": "tiny", **dataclasses.asdict(SIZES["tiny"])}
    scenarios = {name: kept for name, scenario in SCENARIOS.items() if scenario.group == "start"}
    before = {"format": report.FORMAT, "environment": surroundings, "size": size, "scenarios": scenarios}
    output.write_text(json.dumps({**before, "memory": {}, "checks": {}, "bounds": []}))
    run.main(["--quick", "--threads", "1", "--group", "start", "--resume", "-o", str(output)])
    assert "attach 128: done before" in capsys.readouterr().out
    assert json.loads(output.read_text())["scenarios"] == scenarios


def test_figures_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    new = {"environment": report.environment(1), "size": {}}
    with pytest.raises(ValueError, match="measured with threads 2, this is 1"):
        report.merged({**new, "environment": report.environment(2)}, new, tmp_path / "x.json")


@pytest.mark.parametrize("device", ["nowhere", "xpu"])
def test_a_device_that_is_not_there_is_named(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--device", device])
    assert f"--device: '{device}' cannot be used: " in capsys.readouterr().err


def test_of_several_children_the_median_peak_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([5, 50, 9, 20, 7, 30])
    monkeypatch.setattr(run.memory, "peak_of", lambda *_: {"peak": next(peaks), "before": 1})
    suite = run.Run(run.parse(["--quick"]), tmp_path, run.Console(quiet=True))
    suite._memory(("a", "b"), SIZES["tiny"], tmp_path, rounds=3)
    assert suite.result["memory"]["a"] == {"peak": 7, "before": 1, "peaks": [5, 9, 7]}
    assert suite.result["memory"]["b"]["peak"] == 30


@pytest.mark.slow
@pytest.mark.parametrize("group", ["core", "decode,shapes", "rows,gates,paging", "images"])
def test_it_runs_on_another_device(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.memory, "peak_of", lambda *_: {"peak": 2, "before": 1})  # a child has no such device
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    output = tmp_path / "figures.json"
    options = ["--quick", "--rounds", "1", "--threads", "1", "--device", "elsewhere:0", "--group", group]
    with elsewhere():
        run.main([*options, "-o", str(output)])
    written = json.loads(output.read_text())
    assert written["environment"]["device"] == "elsewhere:0"
    assert written["checks"]
    with pytest.raises(SystemExit, match="measured with device 'elsewhere:0', this is None"):
        run.main(["--quick", "--threads", "1", "-o", str(output)])


@pytest.mark.slow
def test_it_runs_in_half_precision(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    options = ["--quick", "--rounds", "1", "--threads", "1", "--dtype", "bfloat16"]
    run.main([*options, "--group", "core,images", "-o", str(output)])
    written = json.loads(output.read_text())
    assert written["environment"]["dtype"] == "bfloat16"
    assert written["scenarios"]["forward"]["arithmetic"]["base_mb"] == pytest.approx(
        1e3 * written["scenarios"]["forward"]["arithmetic"]["base_gflop"]
    )


def test_peers_compute_in_the_models_number_format(tmp_path: Path) -> None:
    bench = make_bench(SIZES["tiny"], tmp_path, Place(dtype="bfloat16"))
    for contender in PEERS:
        model = contender.build(bench)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}, contender.name
        assert model(**token_ids(bench, 1, 4)).logits.isfinite().all()


def test_a_unet_of_sdxls_shape(tmp_path: Path) -> None:
    size = SDXLSize(text=16, tokens=5, latent=8, rank=2, channels=(8, 16), depths=(1, 2), head=4, pooled=16, layers=1)
    bench = make_image_bench(dataclasses.replace(size, groups=4, time=8), tmp_path)
    names = ("bare", "floor", "peft all", "composite", "composite, floor")
    latents = {name: picture() for name, picture in pictures(bench, names).items()}
    assert_close(latents["floor"], latents["peft all"], atol=1e-4, rtol=1e-3)
    assert_close(latents["composite"], latents["composite, floor"], atol=1e-4, rtol=1e-3)
    assert (latents["floor"] - latents["bare"]).abs().max() > 0.01
    whole = IMAGE_SIZES["images"]["large"]
    with torch.device("meta"):
        assert sum(p.numel() for p in whole.denoiser().parameters()) == 2_567_463_684  # as published


@pytest.mark.slow
def test_every_group_runs(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    run.main(["--quick", "--rounds", "1", "--threads", "1", "-o", str(output)])
    assert set(json.loads(output.read_text())["scenarios"]) == {*SCENARIOS, *run.IMAGE_SCENARIOS}


def test_arithmetic_of_a_worked_case(bench: Bench) -> None:
    found = arithmetic(bench)
    # 2 layers of width 32, 64 in the feed-forward part: 4 x 32^2 + 3 x 32 x 64 weights each; a head of 64 x 32
    base = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 64 * 32
    lora = 4 * 2 * 2 * (4 * 64 + 3 * 96)  # experts, rank, layers
    assert found["base_gflop"] == pytest.approx(2e-9 * base)
    assert found["lora_mb"] == pytest.approx(4e-6 * lora)
    assert found["ratio"] == pytest.approx((base + lora) / base)


def test_arithmetic_of_a_worked_denoiser(tmp_path: Path) -> None:
    found = image_floors.arithmetic(make_image_bench(IMAGE_SIZES["images, DiT"]["tiny"], tmp_path), call)
    # 2 rows of 16 patches and 5 tokens, all of width 16, in 2 layers; 3 LoRAs of rank 2 on 4 projections of the patches
    square, heads = 16 * 16, 2
    factors = 3 * 2 * (16 + 16) * 4 * 2
    patches = 16 * (square + 2 * (4 + 8) * square + square)
    tokens = 5 * (square + (4 + 8) * square + 3 * square)  # the second layer does nothing more with them
    attention = 2 * heads * 2 * 21 * 21 * 8
    step = (256 * 16 + square) + 2 * square  # of the time and of the pooled text
    modulation = 16 * (3 * 96 + 32 + 32)
    assert found["base_gflop"] == pytest.approx(2e-9 * 2 * (patches + tokens + attention + step + modulation))
    assert found["lora_gflop"] == pytest.approx(2e-9 * 2 * 16 * factors)
    assert found["lora_mb"] == pytest.approx(4e-6 * factors)
    assert found["ratio"] == pytest.approx(1 + found["lora_gflop"] / found["base_gflop"])


def test_the_page_shows_the_committed_figures() -> None:
    text = document.PAGE.read_text(encoding="utf-8")
    assert document.written(text, document.read(document.sources(text))) == text


def test_a_table_is_written_from_the_figures() -> None:
    results = {"environment": {"cores": 2}, "memory": {}, "scenarios": {}}
    results["scenarios"]["a"] = {"what": "b", **report.summary({"bare": [1.0], "x": [3.0]}, "bare")}  # type: ignore[index]
    text = "<!-- source: old -->\n<!-- end -->\n<!-- measured: a -->\n<!-- end -->\nwords"
    made = document.written(text, {"new.json": results})
    assert "From `new.json`: cores 2." in made
    assert "| x | 3000.0 | 3000.0 - 3000.0 | 3.00 |" in made
    assert made.endswith("words")


def test_what_one_file_lacks_is_taken_from_an_older_one() -> None:
    def measured(cores: int, **seconds: float) -> dict[str, Any]:
        scenarios = {n: {"what": n, **report.summary({"bare": [s]}, "bare")} for n, s in seconds.items()}
        return {"environment": {"cores": cores}, "memory": {}, "scenarios": scenarios}

    text = (
        "<!-- source: old -->\n<!-- end -->\n<!-- measured: a -->\n<!-- end -->\n<!-- measured: b -->\n<!-- end -->\n"
    )
    made = document.written(text, {"new.json": measured(2, a=1.0), "old.json": measured(4, a=5.0, b=7.0)})
    assert (
        "<!-- source: new.json old.json -->\nFrom `new.json`: cores 2.\n\nOlder, from `old.json`: b: cores 4." in made
    )
    assert "| bare | 1000.0 |" in made
    assert "| bare | 7000.0 |" in made
    assert "5000" not in made
    other = {**measured(4, a=5.0), "size": {"name": "large"}}
    with pytest.raises(ValueError, match="of several sizes: full, large"):
        document.written(text, {"new.json": measured(2, a=1.0), "gpu.json": other})


def test_a_contender_without_its_loras_is_not_timed(bench: Bench) -> None:
    with pytest.raises(AssertionError, match="sum: says the same as the bare model"):
        check({"bare": bench.model(), "sum": bench.model()}, bench)


def test_a_contender_that_computes_something_else_is_not_timed(bench: Bench) -> None:
    with pytest.raises(AssertionError, match="sum should equal peft all"):
        check({"bare": bench.model(), "peft all": peft_all(bench), "sum": peft_one(bench)}, bench)


def test_contenders_share_the_base_weights_and_the_folded_one_does_not_touch_them(bench: Bench) -> None:
    weights = {name: p.clone() for name, p in bench.base.named_parameters()}
    own = {p.data_ptr() for p in bench.base.parameters()}
    models: dict[str, nn.Module] = {c.name: c.build(bench) for c in OURS}
    assert own <= {p.data_ptr() for p in models["sum"].parameters()}
    assert not own & {p.data_ptr() for p in models["folded"].parameters()}
    assert all(torch.equal(p, weights[name]) for name, p in bench.base.named_parameters())
    bench.contexts.close()


def test_the_gates_are_not_trivial(bench: Bench) -> None:
    mixture = attach(bench, lw.MoLE(granularity="block"))
    with mixture.record() as log:
        mixture.model(input_ids=torch.arange(1, 13).view(1, -1))
    for weights in log.weights.values():
        assert weights.shape == (1, 12, bench.size.experts)
        assert weights.std(dim=1).min() > 1e-3
        assert weights.std(dim=2).min() > 1e-2
    assert ungated(bench) is not mixture.model


def test_every_bound_names_what_exists() -> None:
    for bound in report.BOUNDS:
        assert (bound.at_most is None) != (bound.at_least is None)
        if bound.scenario in (*run.IMAGE_SCENARIOS, "import", "attach 128"):
            continue
        assert bound.scenario in SCENARIOS
        known = STEPS if bound.scenario == "train" else SCENARIOS[bound.scenario].contenders
        assert {bound.of, bound.to} <= set(known)


@pytest.mark.slow
def test_rows_with_their_own_mixtures_are_timed_against_one_mixture(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    run.main(["--size", "tiny", "--rounds", "1", "--threads", "1", "--group", "rows", "-o", str(output)])
    written = json.loads(output.read_text())
    assert set(written["scenarios"]) == {"rows, forward", "rows, generate"}
    assert written["checks"]["rows, forward: 8 experts = peft, 8 experts"] < 1e-3
    assert {bound["ratio"] for bound in written["bounds"]} == {"8 mixtures / one mixture"}


def test_as_many_mixtures_as_are_named_stand_in_the_batch(bench: Bench) -> None:
    full = Bench(SIZES["full"], bench.base, {})
    rows = [tuple(row.items()) for row in mixtures(full)]
    assert (len(rows), len(set(rows))) == (BATCH, MIXTURES) == (16, 8)


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """What other tests left behind is not searched before every run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_garbage")
def test_rounds_are_interleaved_and_shuffled() -> None:
    ran: list[str] = []
    tasks = {name: Task(lambda _, name=name: ran.append(name)) for name in "abcde"}  # type: ignore[misc]
    tasks["slow"] = Task(lambda _: ran.append("slow"), rounds=1)
    seconds = interleave(tasks, rounds=4, seed=0)
    assert ran[:6] == [*"abcde", "slow"]  # warm-up
    rounds = [ran[6:12], ran[12:17], ran[17:22], ran[22:]]
    assert sorted(rounds[0]) == [*"abcde", "slow"]
    assert all(sorted(later) == [*"abcde"] for later in rounds[1:])
    assert len({tuple(later) for later in rounds[1:]}) == 3
    assert [len(sample) for sample in seconds.values()] == [4] * 5 + [1]


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratios([2.0, 40.0, 6.0], [1.0, 20.0, 3.0]).median == 2.0
    assert ratios([3.0], [1.0, 9.0]).median == 3.0


def test_bounds_are_judged_by_the_measured_ratio() -> None:
    results = {"forward": report.summary({"bare": [1.0, 1.0], "sum": [1.31, 1.31], "peft all": [1.8, 1.8]}, "bare")}
    verdicts = {v["ratio"]: v["holds"] for v in report.judge(results)}
    assert verdicts == {"sum / bare": False, "peft all / sum": True}


def test_bounds_of_seconds_and_of_memory() -> None:
    results = {"attach 128": report.summary({"peft all": [90.0], "sum": [2.9], "mole block": [3.2]}, "peft all")}
    memory = {
        "mole block": {"peak": 9},
        "peft LoRA": {"peak": 10},
        "attach: bare": {"peak": 100, "files": 40},
        "attach: sum": {"peak": 143, "files": 40},
    }
    found = {v["ratio"]: (v["bound"], v["measured"], v["holds"]) for v in report.judge(results, memory)}
    assert found == {
        "sum": ("<= 3 s", 2.9, True),
        "mole block": ("<= 3 s", 3.2, False),
        "train: mole block / peft LoRA": ("<= 1.0", 0.9, True),
        "attach 128: (sum - bare) / LoRA files": ("<= 1.05", 43 / 40, False),
    }

"""The bundled model, LoRAs and card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from loraweave import zoo
from loraweave.errors import LoraweaveError

LIMIT_MB = 18.0


def test_the_whole_zoo_is_small() -> None:
    folder = Path(zoo.__file__).parent
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ours = [path for path in files if folder / "images" not in path.parents]
    assert sum(path.stat().st_size for path in ours) / 1e6 <= LIMIT_MB


def test_there_are_enough_experts_and_the_card_knows_them_all() -> None:
    experts, skills = zoo.experts(), zoo.skills()
    assert list(experts) == list(skills)
    assert len(experts) >= 12
    assert len(zoo.generated()) >= 8
    folders = {path.name for path in (zoo.base_path().parent / "loras").iterdir()}
    assert folders == set(experts)


def test_shapes_differ() -> None:
    skills = zoo.skills().values()
    assert len({entry["rank"] for entry in skills}) >= 3
    assert len({tuple(entry["targets"]) for entry in skills}) >= 3
    assert any(entry["rslora"] for entry in skills)
    assert any(entry["rank_pattern"] for entry in skills)
    assert any(entry["alpha"] != 2 * entry["rank"] for entry in skills)


def test_every_lora_beats_the_base_and_the_floor() -> None:
    for name, entry in zoo.skills().items():
        assert entry["lora"] > max(entry["floor"], entry["base"]), name


def test_generated_skills_are_skills_that_the_base_has_not() -> None:
    entries = [zoo.skills()[name] for name in zoo.generated()]
    assert all(entry["base"] <= 50 for entry in entries)
    assert all(entry["lora"] >= 75 for entry in entries)
    assert len([entry for entry in entries if entry["lora"] >= 80]) >= 8


def test_folders_are_ordinary_peft_folders_without_machine_paths() -> None:
    for name, folder in zoo.experts().items():
        config = json.loads((folder / "adapter_config.json").read_text())
        entry = zoo.skills()[name]
        assert config["base_model_name_or_path"] == zoo.BASE
        assert config["r"] == entry["rank"]
        assert set(config["target_modules"]) == set(entry["targets"])
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            assert all(file.get_slice(key).get_dtype() in {"F16", "F32"} for key in file.keys())  # noqa: SIM118
    for path in zoo.base_path().parent.rglob("*.json"):
        assert "/work" not in path.read_text(encoding="utf-8")
        assert "/home" not in path.read_text(encoding="utf-8")


def test_an_unknown_expert_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(LoraweaveError, match="did you mean 'reverse_sort'"):
        zoo.experts(["reverse_sorts"])


def test_the_card_cannot_be_changed_by_callers() -> None:
    zoo.card()["loras"].clear()
    assert zoo.skills()


def test_the_tokenizer_gives_back_what_it_took() -> None:
    _, tokenizer = zoo.load_base()
    for text in ("sort words z to a: dog cat", "name[The Rice Boat], price 'cheap' ; ü", "room 417 (west), x=3"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    digits = tokenizer("417", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]).strip() for i in digits] == ["4", "1", "7"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo.generated()) if (Path(zoo.__file__).parent / "card.json").exists() else [])
def test_a_lora_scores_what_the_card_says(name: str) -> None:
    from peft import PeftModel

    model, tokenizer = zoo.load_base()
    tuned = PeftModel.from_pretrained(model, zoo.experts()[name]).eval()
    rows = zoo.tasks.get(zoo.generated()[name]).sample(60, seed=77, split="test")
    batch = tokenizer([row["input"] for row in rows], padding=True, return_tensors="pt")
    out = tuned.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=28, do_sample=False
    )
    answers = tokenizer.batch_decode(out, skip_special_tokens=True)
    right = sum(a.strip() == row["target"] for a, row in zip(answers, rows, strict=True))
    assert 100 * right / len(rows) >= zoo.skills()[name]["lora"] - 12

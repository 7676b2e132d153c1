"""Image metrics with tiny random models, against slow loops and tables worked by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from loraweave.errors import LoraweaveError
from loraweave.evaluation import image_metrics
from loraweave.evaluation.image_metrics import (
    Clip,
    Dino,
    distinctness,
    diversity,
    image_alignment,
    lpips_diversity,
    text_alignment,
    zero_shot,
)

PROMPTS = ["a red hat", "a coat", "a red hat", "a " + "very " * 60 + "long text"]


def random_pictures(n: int, seed: int = 0, size: tuple[int, int] = (20, 24)) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(256, size=(*size, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 260, "max_position_embeddings": 40, "eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=12)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    make_tokenizer("$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return Clip(str(clip_folder), batch_size=3)


@pytest.fixture(scope="module", params=["vit", "dinov2"])
def dino_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = ViTModel(ViTConfig(**sizes)) if request.param == "vit" else Dinov2Model(Dinov2Config(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


@cache
def plain(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


def slow_picture(folder: Path, picture: Image.Image) -> torch.Tensor:
    """CLIP's projection of the normalised CLS token, one picture by itself."""
    model = plain(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=[picture], return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = model.vision_model(pixels).last_hidden_state
        return model.visual_projection(model.vision_model.post_layernorm(tokens[:, 0]))[0]


def slow_text(folder: Path, tokenizer: Any, text: str) -> torch.Tensor:
    """CLIP's projection of the token that ends the text."""
    model = plain(folder)
    ids = tokenizer(text).input_ids
    ids = torch.tensor([[*ids[:39], 1] if len(ids) > 40 else ids])
    with torch.no_grad():
        tokens = model.text_model(input_ids=ids).last_hidden_state
        return model.text_projection(tokens[:, -1])[0]


def test_text_alignment_one_by_one(clip: Clip, clip_folder: Path, t5_tokenizer: Any) -> None:
    pictures = random_pictures(4)
    slow = [
        cosine(slow_picture(clip_folder, picture), slow_text(clip_folder, t5_tokenizer, prompt))
        for picture, prompt in zip(pictures, PROMPTS, strict=True)
    ]
    assert text_alignment(clip, pictures, PROMPTS) == pytest.approx(slow, abs=1e-5)
    assert len({round(value, 3) for value in slow}) == 4


def test_image_alignment_one_by_one(clip: Clip, clip_folder: Path) -> None:
    pictures, references = random_pictures(4), random_pictures(5, seed=1)
    slow = [
        sum(cosine(slow_picture(clip_folder, p), slow_picture(clip_folder, r)) for r in references) / 5
        for p in pictures
    ]
    assert image_alignment(clip, pictures, references) == pytest.approx(slow, abs=1e-5)
    assert image_alignment(clip, pictures[:1], pictures[:1]) == pytest.approx([1])


def test_dino_takes_the_cls_token(dino_folder: Path) -> None:
    from transformers import AutoModel

    pictures, references = random_pictures(3), random_pictures(2, seed=1)
    model = AutoModel.from_pretrained(dino_folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(dino_folder)

    def slow(picture: Image.Image) -> torch.Tensor:
        with torch.no_grad():
            return model(**processor(images=[picture], return_tensors="pt")).last_hidden_state[0, 0]

    expected = [sum(cosine(slow(p), slow(r)) for r in references) / 2 for p in pictures]
    assert image_alignment(Dino(str(dino_folder), batch_size=2), pictures, references) == pytest.approx(
        expected, abs=1e-5
    )


def test_grey_and_transparent_pictures_are_read(clip: Clip) -> None:
    (picture,) = random_pictures(1)
    grey = picture.convert("L")
    same = image_alignment(clip, [grey], [grey.convert("RGB")])
    assert same == pytest.approx([1])
    assert image_alignment(clip, [picture.convert("RGBA")], [picture]) == pytest.approx([1])


def test_diversity_over_all_pairs(clip: Clip, clip_folder: Path) -> None:
    pictures = random_pictures(4)
    features = [slow_picture(clip_folder, picture) for picture in pictures]
    pairs = [1 - cosine(features[i], features[j]) for i in range(4) for j in range(i)]
    assert diversity(clip, pictures) == pytest.approx(sum(pairs) / 6, abs=1e-5)
    assert diversity(clip, [pictures[0]] * 3) == pytest.approx(0, abs=1e-5)
    with pytest.raises(LoraweaveError, match="at least two pictures, got 1"):
        diversity(clip, pictures[:1])


def test_lpips_is_averaged_over_all_pairs() -> None:
    pictures = [Image.new("RGB", (4, 2), (level, 0, 0)) for level in (0, 51, 255)]
    seen: list[Any] = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        seen.append((tuple(a.shape), float(a.max()), float(b.max())))
        return abs(float(a[0, 0, 0, 0] - b[0, 0, 0, 0]))

    # Red 0, 0.2 and 1: distances 0.2, 1 and 0.8.
    assert lpips_diversity(pictures, distance=distance) == pytest.approx(2 / 3)
    assert seen[0] == ((1, 3, 2, 4), 0.0, pytest.approx(0.2))


class Perception:
    """In torchmetrics' place: takes what that takes, looks at -1..1 as that does, and sees the red of one pixel."""

    def __init__(self, net_type: str = "alex", reduction: str = "mean", normalize: bool = False) -> None:
        self.net_type, self.normalize, self.training = net_type, normalize, True

    def eval(self) -> Perception:
        self.training = False
        return self

    def __call__(self, *pictures: torch.Tensor) -> torch.Tensor:
        low = 0.0 if self.normalize else -1.0
        assert not self.training
        assert not torch.is_grad_enabled()
        for picture in pictures:
            assert picture.shape == (1, 3, 2, 4)
            assert picture.dtype == torch.float32
            assert low <= float(picture.min()) <= float(picture.max()) <= 1.0
        a, b = (2 * picture - 1 if self.normalize else picture for picture in pictures)
        return (a - b)[0, 0, 0, 0].abs()


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_tells_torchmetrics_how_bright_pictures_are(monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    """Its networks look at -1..1, our pictures are 0..1: without ``normalize`` every distance would be half of it."""
    made: list[Perception] = []

    def make(*arguments: Any, **options: Any) -> Perception:
        made.append(Perception(*arguments, **options))
        return made[-1]

    for name in ("torchvision", "torchmetrics", "torchmetrics.image", "torchmetrics.image.lpip"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(
        sys.modules["torchmetrics.image.lpip"], "LearnedPerceptualImagePatchSimilarity", make, raising=False
    )
    pictures = [Image.new("RGB", (4, 2), (red, 0, 255)) for red in (0, 51, 255)]
    # Red 0, 0.2 and 1 are -1, -0.6 and 1: distances 0.4, 2 and 1.6.
    assert lpips_diversity(pictures, network=network) == pytest.approx(4 / 3)
    assert [one.net_type for one in made] == [network]


def test_lpips_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    pictures = random_pictures(2)
    with pytest.raises(LoraweaveError, match=r"pip install 'loraweave\[eval\]'"):
        lpips_diversity(pictures)
    with pytest.raises(LoraweaveError, match="did you mean 'alex'"):
        lpips_diversity(pictures, network="alexnet")
    with pytest.raises(LoraweaveError, match="pictures of one size"):
        lpips_diversity([*pictures, *random_pictures(1, size=(8, 8))])


def test_distinctness_by_hand() -> None:
    concepts = ["hat", "coat", "dog", "boat"]
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.1, 0.8, 0.2], [0.1, 0.9, 0.2, 0.3]])
    wanted = [["hat", "coat"], ["hat", "coat"], ["coat"]]
    found = distinctness(scores, concepts, wanted)
    assert found["concepts"] == {"hat": 1.0, "coat": pytest.approx(2 / 3)}
    assert found["mean"] == pytest.approx(4 / 5)
    assert found["all"] == pytest.approx(2 / 3)


def test_zero_shot_scores_are_cosines(clip: Clip) -> None:
    pictures, phrases = random_pictures(3), {"hat": "a red hat", "coat": "a coat"}
    scores = zero_shot(clip, pictures, phrases)
    for k, phrase in enumerate(phrases.values()):
        assert scores[:, k].tolist() == pytest.approx(text_alignment(clip, pictures, [phrase] * 3), abs=1e-6)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ([["hat"], ["hat"]], "expected scores of 2 pictures and 2 concepts"),
        ([["hut"]], "did you mean 'hat'"),
        ([[]], "should show nothing"),
        ([["hat", "coat"]], "fewer than the 2 to choose from"),
    ],
)
def test_distinctness_needs_distractors(wanted: Sequence[Sequence[str]], said: str) -> None:
    with pytest.raises(LoraweaveError, match=said):
        distinctness(torch.zeros(1, 2), ["hat", "coat"], wanted)


def test_models_that_will_not_do(tmp_path: Path, dino_folder: Path, clip: Clip) -> None:
    with pytest.raises(LoraweaveError, match="not found, or not a vision model"):
        Clip(str(tmp_path / "nowhere"))
    with pytest.raises(LoraweaveError, match=r"no tokenizer|no text and image features"):
        Clip(str(dino_folder))
    T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, vocab_size=9)).save_pretrained(tmp_path)
    with pytest.raises(LoraweaveError, match="with its processor"):
        Dino(str(tmp_path))
    with pytest.raises(LoraweaveError, match="4 pictures but 1 prompts"):
        text_alignment(clip, random_pictures(4), ["x"])
    with pytest.raises(LoraweaveError, match="at least one of the pictures"):
        clip.pictures([])


def test_importing_the_metrics_loads_no_transformers() -> None:
    assert "transformers" not in vars(image_metrics)

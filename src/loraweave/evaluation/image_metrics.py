"""How well pictures show what they should.

- *Text alignment*: cosine of picture and prompt in CLIP's space (MoLE section 4.1; DreamBooth's CLIP-T).
- *Image alignment*: mean cosine of a picture and the concept's reference pictures, in CLIP's space (MoLE; CLIP-I) or in
  that of a DINO model (DreamBooth's DINO).
- *Diversity*: mean distance of pictures made from the same prompt, by LPIPS (DreamBooth's DIV) or by features.
- *Distinctness*: does each concept appear? A classifier scores all concepts, those among them that should not be there;
  a concept appears if it is among the best ``m`` of a picture that should show ``m``.

Models come from a folder or the hub, in fp32. Cosines lie between -1 and 1; published ones are not multiplied by 2.5.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from loraweave import zoo
from loraweave.errors import LoraweaveError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MODEL = "openai/clip-vit-large-patch14"
DINO_MODEL = "facebook/dino-vits16"


class Looks(Protocol):
    """Something that turns pictures into feature vectors."""

    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """``[n, d]``, each row of length 1."""


class Clip:
    """A CLIP model of transformers (CLIP, SigLIP and others with text and image features).

    Args:
        source: folder or hub id, with processor and tokenizer; or a bundled one (``zoo:images/clip-metrics``).
        device: default: the GPU if there is one.
        batch_size: pictures or texts at once.

    Raises:
        LoraweaveError: there is no such model, or it has no text and image features.
    """

    def __init__(self, source: str = CLIP_MODEL, *, device: str | None = None, batch_size: int = 32) -> None:
        self.source = source
        self._model, self._processor = _load(source, "AutoModel", device)
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(zoo.local(source))
        except (OSError, ValueError) as error:
            raise LoraweaveError(f"CLIP model {source!r}: it has no tokenizer ({_first(error)})") from error
        if not (hasattr(self._model, "get_text_features") and hasattr(self._model, "get_image_features")):
            raise LoraweaveError(
                f"model {source!r}: {type(self._model).__name__} has no text and image features; expected a CLIP model"
            )
        self.batch_size = batch_size

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """``[n, d]``, each row of length 1."""
        batches = _batches(_some("pictures", pictures), self.batch_size)
        return _unit([self._model.get_image_features(**_pixels(self, batch)) for batch in batches])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """``[n, d]``, each row of length 1. Texts longer than the model reads (CLIP: 77 tokens) are cut, as usual."""
        config = getattr(self._model.config, "text_config", self._model.config)
        rows = []
        for batch in _batches(_some("texts", texts), self.batch_size):
            encoded = self._tokenizer(
                list(batch),
                padding="max_length",
                truncation=True,
                max_length=config.max_position_embeddings,
                return_tensors="pt",
            ).to(self._model.device)
            rows.append(self._model.get_text_features(**encoded))
        return _unit(rows)


class Dino:
    """A self-supervised vision transformer of transformers (DINO, DINOv2); its features are the CLS token's.

    Args: as :class:`Clip`.

    Raises:
        LoraweaveError: there is no such model, or it gives no sequence of tokens.
    """

    def __init__(self, source: str = DINO_MODEL, *, device: str | None = None, batch_size: int = 32) -> None:
        self.source = source
        self._model, self._processor = _load(source, "AutoModel", device)
        self.batch_size = batch_size

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image]) -> Tensor:
        """``[n, d]``, each row of length 1."""
        rows = []
        for batch in _batches(_some("pictures", pictures), self.batch_size):
            tokens = getattr(self._model(**_pixels(self, batch)), "last_hidden_state", None)
            if tokens is None or tokens.dim() != 3:
                raise LoraweaveError(f"{type(self._model).__name__}: no tokens; expected a vision transformer")
            rows.append(tokens[:, 0])
        return _unit(rows)


def text_alignment(clip: Clip, pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Cosine of each picture and its prompt.

    Raises:
        LoraweaveError: unequal numbers, or none.
    """
    if len(pictures) != len(prompts):
        raise LoraweaveError(f"text alignment: {len(pictures)} pictures but {len(prompts)} prompts")
    unique = list(dict.fromkeys(prompts))
    of_texts = clip.texts(unique)[[unique.index(prompt) for prompt in prompts]]
    return _listed((clip.pictures(pictures) * of_texts).sum(-1))


def image_alignment(looks: Looks, pictures: Sequence[Image], references: Sequence[Image]) -> list[float]:
    """Each picture's mean cosine with all ``references``: pictures of one concept.

    Raises:
        LoraweaveError: no pictures or no references.
    """
    return _listed((looks.pictures(pictures) @ looks.pictures(references).T).mean(-1))


def diversity(looks: Looks, pictures: Sequence[Image]) -> float:
    """Mean of ``1 - cosine`` over all pairs of at least two pictures of the same prompt."""
    n = len(_two("diversity", pictures))
    features = looks.pictures(pictures)
    pairs = torch.triu_indices(n, n, offset=1)
    return float((1 - (features @ features.T)[pairs[0], pairs[1]]).double().mean())


def lpips_diversity(pictures: Sequence[Image], *, network: str = "alex", distance: Any = None) -> float:
    """Mean LPIPS distance (Zhang et al. 2018) over all pairs of at least two pictures of the same prompt and size.

    Computed by torchmetrics. Its calibration comes with it, but the network under it does not: torchvision loads
    that from download.pytorch.org at first use, into ``$TORCH_HOME``.

    Args:
        pictures: of equal size.
        network: ``alex``, ``vgg`` or ``squeeze``; published figures mostly take ``alex``.
        distance: of two ``[1, 3, H, W]`` pictures in 0..1, in place of LPIPS.

    Raises:
        LoraweaveError: unequal sizes, fewer than two pictures, torchmetrics or torchvision is not installed, or the
            network cannot be loaded.
    """
    sizes = {picture.size for picture in _two("LPIPS", pictures)}
    if len(sizes) > 1:
        raise LoraweaveError(f"LPIPS: expected pictures of one size, got {' and '.join(map(str, sorted(sizes)))}")
    measure = distance or _lpips(network)
    tensors = [_tensor(picture) for picture in pictures]
    with torch.no_grad():
        return statistics.fmean(float(measure(a, b)) for a, b in itertools.combinations(tensors, 2))


def zero_shot(clip: Clip, pictures: Sequence[Image], phrases: Mapping[str, str]) -> Tensor:
    """``[n, K]``: cosine of each picture and the phrase of each of K concepts; a classifier for
    :func:`distinctness`."""
    return clip.pictures(pictures) @ clip.texts(list(phrases.values())).T


def distinctness(scores: Tensor, concepts: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Does each concept appear that should?

    Args:
        scores: ``[n, K]``, how strongly each picture shows each concept, by any classifier.
        concepts: the K names; more than any picture should show, or every answer would be right.
        wanted: which concepts each picture should show.

    Returns:
        ``concepts`` (name -> share of the pictures that should show it in which it is among the best ``m``, ``m``
        the number of concepts wanted there), ``mean`` over all pictures and wanted concepts, ``all`` (share of
        pictures with every wanted concept).

    Raises:
        LoraweaveError: wrong shapes, an unknown or repeated concept, or a picture that should show all of them or none.
    """
    if scores.shape != (len(wanted), len(concepts)) or not len(wanted):
        raise LoraweaveError(
            f"distinctness: expected scores of {len(wanted)} pictures and {len(concepts)} concepts, got shape "
            f"{tuple(scores.shape)}"
        )
    found: dict[str, list[float]] = {}
    whole = []
    for row, names in zip(scores, wanted, strict=True):
        for name in names:
            if name not in concepts:
                raise unknown("concept", name, concepts)
        if not 0 < len(set(names)) == len(names) < len(concepts):
            raise LoraweaveError(
                f"distinctness: a picture should show {', '.join(names) or 'nothing'}; expected at least one concept, "
                f"none twice, and fewer than the {len(concepts)} to choose from"
            )
        best = {concepts[int(k)] for k in row.topk(len(names)).indices}
        for name in names:
            found.setdefault(name, []).append(float(name in best))
        whole.append(float(best == set(names)))
    return {
        "concepts": {name: statistics.fmean(found[name]) for name in concepts if name in found},
        "mean": statistics.fmean(itertools.chain.from_iterable(found.values())),
        "all": statistics.fmean(whole),
    }


# ---------------------------------------------------------------- inside


def _load(source: str, kind: str, device: str | None) -> tuple[Any, Any]:
    import transformers

    try:
        place = zoo.local(source)
        model = getattr(transformers, kind).from_pretrained(place, dtype=torch.float32)
        processor = transformers.AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise LoraweaveError(
            f"model {source!r}: not found, or not a vision model of transformers with its processor ({_first(error)})"
        ) from error
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


def _lpips(network: str) -> Callable[[Tensor, Tensor], Any]:
    known = ("alex", "vgg", "squeeze")
    if network not in known:
        raise unknown("LPIPS network", network, known)
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise LoraweaveError("LPIPS needs torchmetrics and torchvision: pip install 'loraweave[eval]'") from error
    try:
        measure = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)
    except (OSError, RuntimeError) as error:
        raise LoraweaveError(
            f"LPIPS: the {network} network cannot be loaded ({_first(error)}); torchvision fetches it from "
            "download.pytorch.org into $TORCH_HOME: put it there, or take 'diversity' with a model that you have"
        ) from error
    measured: Callable[[Tensor, Tensor], Any] = measure.eval()
    return measured


def _pixels(self: Clip | Dino, pictures: Sequence[Image]) -> Any:
    rgb = [picture.convert("RGB") for picture in pictures]
    return self._processor(images=rgb, return_tensors="pt").to(self._model.device)


def _tensor(picture: Image) -> Tensor:
    """``[1, 3, H, W]`` in 0..1."""
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def _unit(outputs: Sequence[Any]) -> Tensor:
    """One matrix of rows of length 1, on the CPU; newer transformers wrap features in an output."""
    rows = [output if isinstance(output, Tensor) else output.pooler_output for output in outputs]
    return torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1).cpu()


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _some(what: str, items: Sequence[Any]) -> Sequence[Any]:
    if not len(items):
        raise LoraweaveError(f"expected at least one of the {what}, got none")
    return items


def _two(what: str, pictures: Sequence[Image]) -> Sequence[Image]:
    if len(pictures) < 2:
        raise LoraweaveError(f"{what}: expected at least two pictures, got {len(pictures)}")
    return pictures


def _listed(values: Tensor) -> list[float]:
    return [float(value) for value in values]


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

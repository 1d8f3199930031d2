"""Encoders from a folder in Hugging Face's format: of texts, of images, or of both (CLIP-like)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparing.core.checks import require_whole
from sparing.core.errors import RequestError
from sparing.core.minilm import minilm
from sparing.core.quiet import quietly
from sparing.pool.encoders import Encoder, UnreadableError, in_batches
from sparing.pool.encoders.inputs import of_folder
from sparing.pool.encoders.projected import projected
from sparing.pool.items import Item, Vectors

_WEIGHTS: Final = ("*.safetensors", "*.bin")
_ENDS: Final = 1 << 20


def hugging_face(
    given: str | Path,
    *,
    device: str = "cpu",
    batch: int = 64,
    max_length: int | None = None,
    dtype: str = "float32",
    dim: int | None = None,
) -> Encoder:
    """The encoder in a folder, never from the network; "minilm" is that of an installed package.

    Texts: the mean of the last layer over tokens, or what the folder's 1_Pooling says (Reimers and
    Gurevych 2019). Images: the class token of the last layer, or its mean. Both (a model with
    get_image_features and get_text_features): the projections into their common space.
    batch: items at once; max_length: tokens of a text, further ones are cut; dim: project to so
    many values. Raises RequestError for what cannot be loaded.
    """
    require_whole("batch", batch, 1)
    path = _folder(given)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise RequestError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    made = HuggingFace(path, device, batch, max_length, getattr(torch, dtype))
    return projected(made, dim)


@final
class HuggingFace:
    """What ``hugging_face`` gives without a projection.

    main is made of an item's image where it has one and the model reads images, else of its text.
    A model of both gives second vectors as soon as one item of a batch is a pair; where an item is
    none, second repeats main.
    """

    def __init__(
        self, path: Path, device: str, batch: int, max_length: int | None, dtype: torch.dtype
    ) -> None:
        self.path, self.batch, self.device = path, batch, torch.device(device)
        self._model = _loaded(path, dtype).to(self.device).eval().requires_grad_(False)
        self._both = hasattr(self._model, "get_image_features")
        config = self._model.config
        sees = self._both or (hasattr(config, "image_size") or hasattr(config, "num_channels"))
        self._inputs = of_folder(path) if sees else None
        reads = self._both or self._inputs is None
        self._tokens = _tokenizer(path) if reads else None
        self._length = _length(path, config, self._tokens, max_length) if reads else 0
        self._pool = _pooling(path) if reads else "mean"
        self._version = f"{path.name}-{_fingerprint(path)}-{str(dtype).removeprefix('torch.')}"
        if reads:
            self._version += f"-{self._length}"
        self._dim = int(getattr(config, "projection_dim", 0) or 0) if self._both else 0
        if not self._dim:
            self._dim = _width(config.vision_config if self._both else config)
        # SigLIP was trained on texts filled up, without a mask
        full = getattr(config, "model_type", "").startswith("siglip")
        self._padding: bool | str = "max_length" if full else True

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def version(self) -> str:
        return self._version

    def __call__(self, items: Sequence[Item]) -> Vectors:
        """(n, dim). Raises UnreadableError for items without what the model reads."""
        sees = [self._inputs is not None and _shown(item) for item in items]
        main = np.zeros((len(items), self._dim), np.float32)
        details: dict[int, str] = {}
        for kind, one in ((True, self._images), (False, self._texts)):
            at = [row for row, seen in enumerate(sees) if seen == kind]
            self._into(main, items, at, one, details)
        second: NDArray[np.float32] | None = None
        said = [row for row, item in enumerate(items) if sees[row] and item.text is not None]
        if self._both and said:
            second = main.copy()
            self._into(second, items, said, self._texts, details)
        if details:
            raise UnreadableError(details)
        return Vectors(main=main, second=second)

    def _into(
        self,
        rows: NDArray[np.float32],
        items: Sequence[Item],
        at: list[int],
        one: Callable[[Sequence[Item]], NDArray[np.float32]],
        details: dict[int, str],
    ) -> None:
        if one == self._texts:  # texts of like length need the least padding
            at = sorted(at, key=lambda row: len(items[row].text or ""))
        try:
            rows[at] = in_batches([items[row] for row in at], self.batch, one, self._dim)
        except UnreadableError as error:
            details.update({at[place]: why for place, why in error.details.items()})

    @torch.inference_mode()
    def _images(self, items: Sequence[Item]) -> NDArray[np.float32]:
        assert self._inputs is not None
        given = self._inputs(items).to(self.device, self._model.dtype)
        if self._both:
            return _features(self._model.get_image_features(pixel_values=given))
        last = self._model(pixel_values=given).last_hidden_state
        if last.ndim == 4:
            return _array(last.mean((2, 3)))
        embeddings = getattr(self._model, "embeddings", None)
        leads = getattr(embeddings, "cls_token", None) is not None
        return _array(last[:, 0] if leads else last.mean(1))

    @torch.inference_mode()
    def _texts(self, items: Sequence[Item]) -> NDArray[np.float32]:
        texts = [item.text or "" for item in items]
        empty = [at for at, text in enumerate(texts) if not text.strip()]
        if empty or self._tokens is None:
            wants = "an image" if self._tokens is None else "a text that is not empty"
            at = range(len(items)) if self._tokens is None else empty
            raise UnreadableError({row: f"this encoder needs {wants}" for row in at})
        given = self._tokens(
            texts,
            padding=self._padding,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        ).to(self.device)
        if self._both:
            return _features(self._model.get_text_features(**given))
        last = self._model(**given).last_hidden_state
        if self._pool == "cls":
            return _array(last[:, 0])
        mask = given["attention_mask"][..., None].to(last.dtype)
        return _array((last * mask).sum(1) / mask.sum(1).clamp(min=1))


def _shown(item: Item) -> bool:
    return item.image is not None or item.tensor is not None


def _features(found: Any) -> NDArray[np.float32]:
    return _array(found if isinstance(found, Tensor) else found.pooler_output)


def _array(found: Tensor) -> NDArray[np.float32]:
    made: NDArray[np.float32] = found.float().cpu().numpy()
    return made


def _folder(given: str | Path) -> Path:
    if given == "minilm":
        return minilm()
    return Path(given).expanduser()


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RequestError(
            f'this encoder needs the package "{error.name}", which is not installed; '
            'run: pip install "sparing[hf]"'
        ) from error
    return transformers


def _loaded(path: Path, dtype: torch.dtype) -> Any:
    models = _transformers()
    try:
        with quietly():
            return models.AutoModel.from_pretrained(path, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(
            f"the model in {path} cannot be loaded ({first}); the folder needs the files that the "
            "model's save_pretrained writes"
        ) from error


def _tokenizer(path: Path) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(
            f"the tokenizer in {path} cannot be read ({first}); the folder needs the files that "
            "the tokenizer's save_pretrained writes"
        ) from error


def _length(path: Path, config: Any, tokens: Any, wanted: int | None) -> int:
    """How many tokens of a text are read: what was wanted, what the folder says, what it can."""
    inner = getattr(config, "text_config", config)
    most = int(getattr(inner, "max_position_embeddings", 0) or 1 << 30)
    pad = getattr(tokens, "pad_token_id", None)
    if getattr(inner, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        most -= int(pad or 0) + 1  # these number positions from the padding's id on
    if wanted is not None:
        require_whole("max_length", wanted, 1)
        if wanted > most:
            raise RequestError(f"max_length is {wanted}; the model in {path} takes up to {most}")
        return wanted
    said = _json(path / "sentence_bert_config.json").get("max_seq_length")
    limits = [most, int(said or most), int(getattr(tokens, "model_max_length", most))]
    return min(min(limits), 512)


def _pooling(path: Path) -> str:
    said = _json(path / "1_Pooling" / "config.json")
    chosen = [k for k, v in said.items() if k.startswith("pooling_mode_") and v is True]
    if chosen in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if chosen == ["pooling_mode_cls_token"]:
        return "cls"
    raise RequestError(
        f"{path} pools by {', '.join(chosen)}; mean and class token are known: wrap the model in a "
        "callable of your own"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}); write it anew") from error
    return found if isinstance(found, dict) else {}


def _width(config: Any) -> int:
    for name in ("hidden_size", "dim", "d_model"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    sizes = getattr(config, "hidden_sizes", None)
    if sizes:
        return int(sizes[-1])
    raise RequestError(
        f"the size of the vectors of a {config.model_type} is not known; wrap it in a callable"
    )


def _fingerprint(path: Path) -> str:
    """Of the weights' and settings' files: names, sizes, and the first and last megabyte."""
    made = hashlib.blake2b(digest_size=8)
    patterns = [*_WEIGHTS, "config.json", "tokenizer*", "vocab*", "merges.txt", "preprocessor*"]
    for file in sorted({f for pattern in patterns for f in path.glob(pattern)}):
        size = file.stat().st_size
        made.update(f"{file.name}{size}".encode())
        with file.open("rb") as data:
            made.update(data.read(_ENDS))
            data.seek(max(0, size - _ENDS))
            made.update(data.read(_ENDS))
    return made.hexdigest()

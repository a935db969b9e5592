"""Text encoders: captions in, features for cross-attention out.

`T5TextEncoder` is a pretrained T5 (the paper's), frozen; `SmallTextEncoder` is a tiny T5 with a
vocabulary made from the captions themselves, trained together with the diffusion model and needing
no download. Both are a `TextEncoder`. transformers and tokenizers are imported when one is made.

Legend: B batch, S text positions, width of the features.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextFeatures(NamedTuple):
    """What a model's `context` and `context_mask` take.

    context: (B, S, width) in the encoder's dtype. mask: (B, S) bool, True = valid; each row has a
    valid position, because an empty caption still has its end-of-sequence token (a row that is all
    False means the null condition to the models).
    """

    context: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """What training and sampling need of a text encoder."""

    @property
    def name(self) -> str:
        """What the features depend on beside the caption; to label cached features."""

    @property
    def width(self) -> int:
        """Last dimension of the features."""

    @property
    def max_length(self) -> int:
        """Longest caption in tokens, end-of-sequence included; a longer one is cut."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to ids (B, S) int64 and mask (B, S) bool on the CPU, S the longest caption's."""

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tokens to features (B, S, width)."""

    def features(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Tokens to features with the mask that the diffusion model should see."""

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Captions to features, on the encoder's device."""


def t5_label(name_or_path: str | Path, revision: str | None, dtype: str, max_length: int) -> str:
    """What stored features of a T5 are known by, without loading it.

    Of the name only the last part: it is the same by hub name and in a folder on any machine.
    """
    name = str(name_or_path).rstrip("/").rpartition("/")[2]
    return f"t5:{name}@{revision or 'main'}:{dtype}:{max_length}"


def length_buckets(mask: Tensor, shortest: int = 32) -> list[tuple[Tensor, int]]:
    """Rows of a batch by the length that they need: up to 32 positions, 64, 128, ...

    Args:
        mask: (B, S) bool, True = valid.
        shortest: positions below which rows are not told apart.

    Returns:
        Rows (B_i,) int64 on the mask's device, and the longest of them: for each length that
        occurs, from short to long; every row once.
    """
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths = (mask * positions).amax(1).clamp(min=1).tolist()
    buckets: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        buckets.setdefault(max(0, (length - 1) // shortest).bit_length(), []).append(row)
    return [
        (torch.tensor(rows, device=mask.device), max(lengths[row] for row in rows))
        for _, rows in sorted(buckets.items())
    ]


class T5TextEncoder:
    """A pretrained T5 encoder, frozen and in evaluation mode.

    The paper's "T5-XXL, text encoder width 1024" is the original `t5-11b` (d_model 1024);
    `google/t5-v1_1-xxl` is 4096 wide. Width comes from the model's config and both work, as does
    every other T5, ByT5 included. It is not an nn.Module on purpose: a trainer neither saves nor
    averages nor shards it with the model that it trains.

    Args:
        name_or_path: model name, or a folder with config.json, weights and tokenizer.
        dtype: "bfloat16" or "float32". float16 is refused: T5's activations exceed its range and
            turn to NaN.
        max_length: longest caption in tokens, end-of-sequence included (the paper: 256).
        revision: branch, tag or commit of a model that is given by name.
        device: where the weights go.
        paper_text_mode: as the authors' own code base (IDEA-Research/hana) has it: features padded
            with zeros to max_length and no mask, so that cross-attention sees the padding and the
            pooled text is the mean over all positions.

    Raises:
        ValueError: dtype, max_length, a model that is not a T5, or one whose weights or tokenizer
            are not whole.
        OSError: the model is neither a folder nor to be had by name.

    Numerics: runs without autocast, whatever the caller's. Features of padding are zero.
    Source: section 4.3 and Table 6 of the paper.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        max_length: int = 256,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        paper_text_mode: bool = False,
    ) -> None:
        if dtype not in ("bfloat16", "float32"):
            why = "; T5's activations overflow float16 to NaN" if dtype == "float16" else ""
            raise ValueError(f"T5TextEncoder: dtype must be bfloat16 or float32, got {dtype}{why}")
        if max_length < 1:
            raise ValueError(f"T5TextEncoder: max_length must be at least 1, got {max_length}")
        from transformers import AutoConfig, AutoTokenizer, T5EncoderModel

        source = str(name_or_path)
        # transformers' own message for a folder like this names neither the folder's fault nor T5.
        file = Path(source) / "config.json"
        if Path(source).is_dir() and "model_type" not in (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ):
            raise ValueError(f"T5TextEncoder: {source} has no config.json of a transformers model")
        try:
            at = revision or "main"
            config = AutoConfig.from_pretrained(source, revision=at)
            if config.model_type != "t5":
                raise ValueError(f"T5TextEncoder: {source} is a {config.model_type}, not a t5")
            self._tokenizer = AutoTokenizer.from_pretrained(source, revision=at)
            # Typed as the model alone; with output_loading_info it is a pair.
            loaded: Any = T5EncoderModel.from_pretrained(
                source, revision=at, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except OSError as error:
            raise OSError(
                f"T5TextEncoder: cannot load {source!r}. Give a folder that holds config.json, "
                "weights and tokenizer; on a machine with a network, "
                f"`hf download {source} --local-dir FOLDER` makes one. Cause: {error}"
            ) from error
        # Where the tokenizer's files are absent, transformers makes one without a single word.
        tokens = set(self._tokenizer.get_vocab()) - set(self._tokenizer.get_added_vocab())
        if not tokens - set(self._tokenizer.all_special_tokens) - {"\u2581"}:
            raise ValueError(
                f"T5TextEncoder: {source} has no tokenizer, or one without words "
                "(spiece.model without tokenizer.json needs the sentencepiece package)"
            )
        model, loading = loaded
        # transformers only logs these, and leaves such weights random.
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise ValueError(
                f"T5TextEncoder: {source} lacks {len(missing)} weights of its encoder, "
                f"{missing[:3]} for instance"
            )
        self._model = model.requires_grad_(False).eval().to(device)
        self._max_length = max_length
        self._width = int(config.d_model)
        self.paper_text_mode = paper_text_mode
        self._label = t5_label(source, revision, dtype, max_length)
        self._commit = str(getattr(config, "_commit_hash", None) or "")
        mode = "paper" if paper_text_mode else "masked"
        self._name = f"t5:{source}@{at}:{dtype}:{max_length}:{mode}"

    @property
    def name(self) -> str:
        """Model as given, revision, dtype, length and mode."""
        return self._name

    @property
    def label(self) -> str:
        """What stored features are known by: `t5_label`."""
        return self._label

    @property
    def commit(self) -> str:
        """Commit of the model where it came from a hub, else empty."""
        return self._commit

    @cached_property
    def weights(self) -> str:
        """Digest of 256 values of each weight in bfloat16, 16 hex digits."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.state_dict().items()):
            flat = weight.reshape(-1)
            some = flat[:: max(1, len(flat) // 256)][:256].to("cpu", torch.bfloat16).contiguous()
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def width(self) -> int:
        """d_model of the T5's config."""
        return self._width

    @property
    def max_length(self) -> int:
        """Longest caption in tokens, end-of-sequence included."""
        return self._max_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self._model.device)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to token ids.

        Args:
            captions: B strings; an empty one is allowed, one that is too long is cut and keeps its
                end-of-sequence token.

        Returns:
            ids (B, S) int64 and mask (B, S) bool, True = a token of the caption. S is the longest
            caption's, or max_length in paper_text_mode.

        Raises:
            TypeError: captions is one string, or holds something else than strings.
            ValueError: no captions, or a tokenizer that leaves an empty caption without any token.
        """
        _check_captions("T5TextEncoder", captions)
        batch = self._tokenizer(
            list(captions),
            padding="max_length" if self.paper_text_mode else "longest",
            padding_side="right",
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        mask = batch["attention_mask"].bool()
        if not bool(mask.any(dim=1).all()):
            raise ValueError(
                "T5TextEncoder: the tokenizer gives no token for an empty caption; "
                "a T5 tokenizer ends every caption with its end-of-sequence token"
            )
        return batch["input_ids"].long(), mask

    # Not inference_mode: the diffusion model saves the features for its backward pass.
    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tokens to features (B, S, width) in the encoder's dtype, zero where the mask is False.

        Captions of about one length are computed together, without the padding that longer ones
        and `paper_text_mode` would give them.
        """
        features = torch.zeros(*ids.shape, self._width, dtype=self._model.dtype, device=ids.device)
        with torch.autocast(ids.device.type, enabled=False):
            for rows, length in length_buckets(mask):
                part = mask[rows, :length]
                out = self._model(input_ids=ids[rows, :length], attention_mask=part)
                hidden = out.last_hidden_state.masked_fill(~part.unsqueeze(-1), 0.0)
                features[rows, :length] = hidden
        return features

    def features(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Tokens to features; in paper_text_mode with a mask that is all True."""
        context = self(ids, mask)
        return TextFeatures(context, torch.ones_like(mask) if self.paper_text_mode else mask)

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Captions to features, on the encoder's device."""
        return _encode(self, captions)


@dataclass(frozen=True, kw_only=True)
class SmallTextConfig:
    """Sizes of a `SmallTextEncoder`.

    Args:
        width: of the features; divisible by heads.
        layers: transformer layers.
        heads: attention heads.
        max_length: longest caption in tokens, end-of-sequence included.
    """

    width: int = 128
    layers: int = 2
    heads: int = 4
    max_length: int = 64

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"SmallTextConfig: {field} must be at least 1, got {value!r}")
        if self.width % self.heads:
            raise ValueError(
                f"SmallTextConfig: heads={self.heads} does not divide width={self.width}"
            )


class SmallTextEncoder(nn.Module):
    """A tiny T5 encoder over the words of the captions, trained with the diffusion model.

    Words are found by lower-casing and splitting at spaces and punctuation; a word that the
    vocabulary lacks becomes the unknown token. No dropout.

    Args:
        tokenizer: a tokenizers.Tokenizer with "<pad>", "</s>" and "<unk>" as ids 0, 1, 2, as
            `from_captions` makes it.
        config: sizes.

    Raises:
        ValueError: the tokenizer has other special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: SmallTextConfig) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        ids = {token: tokenizer.token_to_id(token) for token in _SPECIAL}
        if list(ids.values()) != list(range(len(_SPECIAL))):
            raise ValueError(f"SmallTextEncoder: the tokenizer must start with {_SPECIAL}: {ids}")
        tokenizer.enable_truncation(config.max_length)
        tokenizer.enable_padding(pad_id=_SPECIAL.index("<pad>"), pad_token="<pad>")
        self._tokenizer = tokenizer
        self.config = config
        t5 = T5Config(
            vocab_size=tokenizer.get_vocab_size(),
            d_model=config.width,
            d_kv=config.width // config.heads,
            d_ff=4 * config.width,
            num_layers=config.layers,
            num_heads=config.heads,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
        # The stack alone: the model around it holds its embedding a second time, and tied
        # parameters trouble sharded training and safetensors.
        self.encoder = T5EncoderModel(t5).encoder

    @classmethod
    def from_captions(
        cls,
        captions: Iterable[str],
        *,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        max_length: int = 64,
        max_words: int = 8192,
    ) -> SmallTextEncoder:
        """A fresh encoder whose vocabulary is the captions' words.

        Args:
            captions: any number; their order does not matter.
            width, layers, heads, max_length: see `SmallTextConfig`.
            max_words: the most frequent ones are kept, ties in alphabetical order.

        Raises:
            ValueError: the captions hold no word.
        """
        config = SmallTextConfig(width=width, layers=layers, heads=heads, max_length=max_length)
        return cls(_word_tokenizer(captions, max_words), config)

    def fresh(self) -> SmallTextEncoder:
        """Another encoder of these sizes and this vocabulary, with new weights on the CPU."""
        return SmallTextEncoder(
            type(self._tokenizer).from_str(self._tokenizer.to_str()), self.config
        )

    @property
    def name(self) -> str:
        """Sizes and a digest of the vocabulary. The weights are not in it: they are in training."""
        words = json.dumps(self.vocabulary, sort_keys=True)
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        config = self.config
        return f"small-t5:{config.width}x{config.layers}x{config.heads}:{digest}"

    @property
    def width(self) -> int:
        """Last dimension of the features."""
        return self.config.width

    @property
    def max_length(self) -> int:
        """Longest caption in tokens, end-of-sequence included."""
        return self.config.max_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token to id, special tokens included."""
        return dict(self._tokenizer.get_vocab())

    def unknown_words(self, captions: Iterable[str]) -> list[str]:
        """Words of the captions that the vocabulary lacks, each once, as they come."""
        unknown = _SPECIAL.index("<unk>")
        found: dict[str, None] = {}
        for caption in captions:
            row = self._tokenizer.encode(caption)
            for token, (start, end) in zip(row.ids, row.offsets, strict=True):
                if token == unknown:
                    found[caption[start:end]] = None
        return list(found)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to token ids; arguments, shapes and errors as `T5TextEncoder.tokenize`."""
        _check_captions("SmallTextEncoder", captions)
        rows = self._tokenizer.encode_batch(list(captions))
        ids = torch.tensor([row.ids for row in rows])
        return ids, torch.tensor([row.attention_mask for row in rows]).bool()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tokens to features (B, S, width), zero where the mask is False; differentiable."""
        out = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        features: Tensor = out.masked_fill(~mask.unsqueeze(-1), 0.0)
        return features

    def features(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Tokens to features, with the mask as it is."""
        return TextFeatures(self(ids, mask), mask)

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Captions to features, on the encoder's device; differentiable."""
        return _encode(self, captions)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, tokenizer.json and model.safetensors into a folder."""
        from safetensors.torch import save_file

        self.save_vocabulary(folder)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, Path(folder) / "model.safetensors")

    def save_vocabulary(self, folder: str | Path) -> None:
        """Write config.json and tokenizer.json: all but the weights."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        settings = {"format": _FORMAT, **asdict(self.config)}
        (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self._tokenizer.save(str(path / "tokenizer.json"))

    @classmethod
    def from_vocabulary(cls, folder: str | Path) -> SmallTextEncoder:
        """An encoder with new weights, on the CPU, of what `save_vocabulary` wrote.

        Raises:
            FileNotFoundError: one of the two files is absent.
            ValueError: another format, or unknown config fields.
        """
        from tokenizers import Tokenizer

        path = Path(folder)
        for file in ("config.json", "tokenizer.json"):
            if not (path / file).is_file():
                raise FileNotFoundError(f"SmallTextEncoder: {path} has no {file}")
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        found = settings.pop("format", None)
        if found != _FORMAT:
            raise ValueError(f"SmallTextEncoder: format must be {_FORMAT!r}, got {found!r}")
        unknown = sorted(settings.keys() - asdict(SmallTextConfig()).keys())
        if unknown:
            raise ValueError(f"SmallTextEncoder: config.json has unknown fields {unknown}")
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        return cls(tokenizer, SmallTextConfig(**settings))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu"
    ) -> SmallTextEncoder:
        """Read what `save_pretrained` wrote, bit for bit; weights keep the dtype they had.

        Raises:
            FileNotFoundError: one of the three files is absent.
            ValueError: another format, unknown config fields, or weights that do not fit.
        """
        from safetensors.torch import load_file

        file = Path(folder) / "model.safetensors"
        encoder = cls.from_vocabulary(folder)
        if not file.is_file():
            raise FileNotFoundError(f"SmallTextEncoder: {folder} has no model.safetensors")
        weights = load_file(file)
        expected = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in weights.items()}
        if given != expected:
            differing = sorted(
                name for name in expected | given if expected.get(name) != given.get(name)
            )
            raise ValueError(
                f"SmallTextEncoder: {len(differing)} weights do not fit config.json, "
                f"{differing[0]}: expected {expected.get(differing[0])}, "
                f"got {given.get(differing[0])}"
            )
        encoder.load_state_dict(weights, assign=True)
        return encoder.to(device)


_FORMAT = "fastdiff.SmallTextEncoder.1"
# T5's own ids for the three.
_SPECIAL = ["<pad>", "</s>", "<unk>"]


def _word_tokenizer(captions: Iterable[str], max_words: int) -> Tokenizer:
    """A WordLevel tokenizer that ends each caption with "</s>"."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import NFKC, Lowercase, Sequence
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    normalizer, splitter = Sequence([NFKC(), Lowercase()]), Whitespace()
    words: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            words[word] += times
    if not words:
        raise ValueError("SmallTextEncoder: the captions hold no word to make a vocabulary of")
    kept = sorted(words, key=lambda word: (-words[word], word))[:max_words]
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *sorted(kept)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _SPECIAL.index("</s>"))]
    )
    return tokenizer


def _encode(encoder: TextEncoder, captions: Sequence[str]) -> TextFeatures:
    ids, mask = encoder.tokenize(captions)
    return encoder.features(ids.to(encoder.device), mask.to(encoder.device))


def _check_captions(owner: str, captions: Sequence[str]) -> None:
    if isinstance(captions, str):
        raise TypeError(f"{owner}: captions must be a list of strings, got one string")
    if len(captions) == 0:
        raise ValueError(f"{owner}: captions must not be empty")
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"{owner}: captions must be strings, got {type(caption).__name__}")

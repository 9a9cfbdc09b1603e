"""The transformers front door: `from tern.transformers import AutoModelForCausalLM, AutoTokenizer`.

Knows the names and shapes of transformers' API; runs on Tern's engine and does not import transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import torch

from tern.chat import ChatTemplate, Tokenizer
from tern.checkpoint import GenerationConfig, ModelSource, resolve_model
from tern.engine import (
    CONTINUE,
    Engine,
    EngineOptions,
    Finish,
    FinishReason,
    GeneratedToken,
    Request,
    SamplingParams,
    Steering,
)
from tern.errors import EngineUnavailableError, InvalidRequestError, OptionError

TokenIds = list[int]


class BatchEncoding(dict[str, Any]):
    """What a tokenizer call returns: a dict whose entries are attributes too, movable with `.to(device)`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}, only {sorted(self)}") from None

    def to(self, device: torch.device | str) -> BatchEncoding:
        """The same encoding with its tensors on `device`."""
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.items()}
        return BatchEncoding(moved)


class TernTokenizer:
    """A checkpoint's tokenizer and chat template behind transformers' tokenizer methods."""

    padding_side = "left"

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text."""
        return self._tokenizer.eos_id

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text."""
        return self._tokenizer.bos_id

    @property
    def pad_token_id(self) -> int:
        """The id that fills up shorter rows of a batch."""
        return self._tokenizer.pad_id

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        add_special_tokens: bool = False,
    ) -> BatchEncoding:
        """Encode one text or several.

        With `return_tensors="pt"`, `input_ids` and `attention_mask` are int64 [texts, tokens], padded on the left;
        without, they are lists. Texts of different lengths need `padding=True` to become a tensor.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(each, add_special_tokens=add_special_tokens) for each in texts]
        if return_tensors is None and not padding:
            flat = isinstance(text, str)
            masks = [[1] * len(row) for row in rows]
            return BatchEncoding(input_ids=rows[0] if flat else rows, attention_mask=masks[0] if flat else masks)
        return self._padded(rows, return_tensors, padding=bool(padding))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> TokenIds:
        """The token ids of one text; `add_special_tokens` puts the begin token first where the tokenizer has one."""
        ids = self._tokenizer.encode(text)
        return [self.bos_token_id, *ids] if add_special_tokens and self.bos_token_id is not None else ids

    def decode(self, token_ids: int | Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ids = torch.as_tensor(token_ids).reshape(-1).tolist()
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Sequence[Sequence[int]] | torch.Tensor, *, skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in sequences]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **template_kwargs: Any,
    ) -> str | TokenIds | torch.Tensor | BatchEncoding:
        """Render one conversation: as text if not `tokenize`, else as ids, a tensor [1, tokens] or an encoding."""
        text = self._template.render(
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs or None,
        )
        if not tokenize:
            return text
        encoding = self([text], return_tensors=return_tensors) if return_tensors else self(text)
        if return_dict:
            return encoding
        ids: TokenIds | torch.Tensor = encoding["input_ids"]
        return ids

    def _padded(self, rows: list[TokenIds], return_tensors: str | None, *, padding: bool) -> BatchEncoding:
        width = max(map(len, rows), default=0)
        if not padding and any(len(row) != width for row in rows):
            raise InvalidRequestError(
                f"The {len(rows)} texts have different lengths (up to {width} tokens): pass padding=True.", param="text"
            )
        ids = [[self.pad_token_id] * (width - len(row)) + row for row in rows]
        masks = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        if return_tensors is None:
            return BatchEncoding(input_ids=ids, attention_mask=masks)
        if return_tensors != "pt":
            raise InvalidRequestError(
                f"return_tensors is {return_tensors!r}: only 'pt' is served.", param="return_tensors"
            )
        return BatchEncoding(
            input_ids=torch.tensor(ids, dtype=torch.int64), attention_mask=torch.tensor(masks, dtype=torch.int64)
        )


@dataclass
class _IdCollector:
    """The sink of one row: its generated ids."""

    token_ids: TokenIds = field(default_factory=list)
    finished: Finish | None = None

    def push(self, token: GeneratedToken) -> Steering:
        self.token_ids.append(token.token_id)
        return CONTINUE

    def finish(self, finish: Finish) -> None:
        self.finished = finish


class TernForCausalLM:
    """A causal language model with transformers' `generate`."""

    def __init__(self, engine: Engine, source: ModelSource) -> None:
        self._engine = engine
        self.config = source.config
        self.generation_config: GenerationConfig = source.generation
        self._ids = itertools.count()

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return self._engine.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return self._engine.dtype

    def eval(self) -> TernForCausalLM:
        """Itself: it is always in evaluation mode."""
        return self

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
    ) -> torch.Tensor:
        """Complete each row of `input_ids` int64 [rows, tokens].

        Zeros in `attention_mask` mark padding. Returns int64 [rows * num_return_sequences, tokens + completion]: each
        row is its prompt as given and its completion, filled up with `pad_token_id` on the right. As in transformers,
        decoding is greedy unless `do_sample`; sampling values not given come from the checkpoint.
        """
        if not use_cache:
            raise OptionError("use_cache=False has no meaning here: the engine always keeps a KV cache; leave it out.")
        params = self._params(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            given={"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p},
            repetition_penalty=repetition_penalty,
            seed=seed,
            n=num_return_sequences,
            eos_token_id=eos_token_id,
        )
        prompts = _unpadded(input_ids, attention_mask)
        collectors = self._run(prompts, params)
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        return _stacked(input_ids.repeat_interleave(num_return_sequences, dim=0), collectors, pad or 0)

    def _params(
        self,
        *,
        max_new_tokens: int,
        min_new_tokens: int,
        do_sample: bool,
        given: dict[str, Any],
        repetition_penalty: float,
        seed: int | None,
        n: int,
        eos_token_id: int | Sequence[int] | None,
    ) -> SamplingParams:
        sampling: dict[str, Any] = {"temperature": 0.0}
        if do_sample:
            sampling = self.generation_config.sampling_defaults()
            sampling |= {name: value for name, value in given.items() if value is not None}
            if sampling.get("top_k") == 0:
                sampling["top_k"] = -1
        stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        return SamplingParams(
            **sampling | {"repetition_penalty": repetition_penalty},
            n=n,
            seed=seed,
            max_tokens=max_new_tokens,
            min_tokens=min_new_tokens,
            stop_token_ids=stops,
            ignore_eos=bool(stops),
        )

    def _run(self, prompts: list[TokenIds], params: SamplingParams) -> list[_IdCollector]:
        collectors = [_IdCollector() for _ in range(len(prompts) * params.n)]
        call = next(self._ids)
        requests = [
            Request(
                request_id=f"generate-{call}-{row}",
                prompt_token_ids=tuple(prompts[row // params.n]),
                params=params,
                sink=sink,
                choice_index=row % params.n,
            )
            for row, sink in enumerate(collectors)
        ]
        try:
            for request in requests:
                self._engine.add(request)
            while self._engine.has_work:
                self._engine.step()
        finally:
            for request in requests:
                self._engine.cancel(request.request_id)
        for sink in collectors:
            if sink.finished is not None and sink.finished.reason is FinishReason.ERROR:
                raise EngineUnavailableError(sink.finished.message or "The engine failed on this request; see the log.")
        return collectors


class AutoTokenizer:
    """Opens a checkpoint's tokenizer as transformers' class of the same name does."""

    @staticmethod
    def from_pretrained(
        model: str | PathLike[str] | None, *, revision: str | None = None, token: str | None = None, **ignored: Any
    ) -> TernTokenizer:
        """The tokenizer of a directory, a hub id, or None for the embedded model."""
        _refuse_unknown(ignored)
        source = resolve_model(None if model is None else fspath(model), revision=revision, token=token)
        return TernTokenizer(Tokenizer.from_directory(source.directory), ChatTemplate.from_directory(source.directory))


class AutoModelForCausalLM:
    """Opens a checkpoint's network as transformers' class of the same name does."""

    @staticmethod
    def from_pretrained(
        model: str | PathLike[str] | None,
        *,
        device_map: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        **ignored: Any,
    ) -> TernForCausalLM:
        """The network of a directory, a hub id, `dummy:PRESET`, or None for the embedded model.

        `dtype` (or its older name `torch_dtype`) is a torch dtype or its name; `device_map` is "auto" or "cpu".
        """
        _refuse_unknown(ignored)
        if device_map not in (None, "auto", "cpu"):
            raise OptionError(f"device_map is {device_map!r}: it must be 'auto' or 'cpu'.")
        wanted = dtype if dtype is not None else torch_dtype
        name = "auto" if wanted is None else str(wanted).removeprefix("torch.")
        source = resolve_model(None if model is None else fspath(model), revision=revision, token=token)
        engine = Engine.open(source, EngineOptions.from_keywords(dtype=name, max_queue=None))
        return TernForCausalLM(engine, source)


_HARMLESS = {"trust_remote_code", "low_cpu_mem_usage", "use_fast", "attn_implementation", "use_safetensors"}
"""Keywords of `from_pretrained` that change nothing here: no code from a repository is ever run."""


def _refuse_unknown(keywords: Mapping[str, Any]) -> None:
    unknown = sorted(keywords.keys() - _HARMLESS)
    if unknown:
        raise OptionError(f"from_pretrained got {', '.join(unknown)}, which Tern does not know: leave it out.")


def _unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[TokenIds]:
    """Each row's real tokens."""
    if input_ids.dim() != 2:
        raise InvalidRequestError(
            f"input_ids has shape {tuple(input_ids.shape)}: it must be [rows, tokens].", param="input_ids"
        )
    if attention_mask is None:
        return [list(map(int, row)) for row in input_ids.tolist()]
    if attention_mask.shape != input_ids.shape:
        raise InvalidRequestError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}.",
            param="attention_mask",
        )
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def _stacked(prompts: torch.Tensor, collectors: list[_IdCollector], pad: int) -> torch.Tensor:
    """Prompts and completions side by side, [rows, tokens + longest completion]."""
    longest = max((len(sink.token_ids) for sink in collectors), default=0)
    completions = [sink.token_ids + [pad] * (longest - len(sink.token_ids)) for sink in collectors]
    tail = torch.tensor(completions, dtype=torch.int64, device=prompts.device).reshape(len(collectors), longest)
    return torch.cat([prompts, tail], dim=1)

"""A network behind transformers' `generate`: rows of ids in, the same rows with their completions out.

Knows the engine and tensors of ids; knows no text.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch

from tern.checkpoint import GenerationConfig, ModelSource
from tern.engine import CONTINUE, Engine, Finish, FinishReason, GeneratedToken, Request, SamplingParams, Steering
from tern.errors import EngineUnavailableError, InvalidRequestError, OptionError
from tern.transformers.settings import (
    DEFAULT_NEW_TOKENS,
    DEFAULT_TOP_K,
    GenerateSettings,
    Streamer,
    merged_settings,
)
from tern.transformers.tokenizer import TokenIds


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
    """A causal language model with transformers' `generate`; calls from several threads take turns."""

    def __init__(self, engine: Engine, source: ModelSource) -> None:
        self._engine = engine
        self.config = source.config
        self.generation_config: GenerationConfig = source.generation
        self._ids = itertools.count()
        self._lock = threading.Lock()

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

    def to(self, device: torch.device | str) -> TernForCausalLM:
        """Itself, if that is where it is: a loaded network does not move."""
        if torch.device(device).type != self.device.type:
            raise OptionError(f"device is {str(device)!r} but the network is on {self.device}: say so in device_map.")
        return self

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        streamer: Streamer | None = None,
        seed: int | None = None,
        **settings: Unpack[GenerateSettings],
    ) -> torch.Tensor:
        """Complete each row of `input_ids` int64 [rows, tokens], which may be given as the first argument, `inputs`.

        Zeros in `attention_mask` mark padding. Returns int64 [rows * num_return_sequences, tokens + completion]: each
        row is its prompt as given and its completion, filled up with `pad_token_id` on the right. As in transformers,
        what `settings` leave open comes from `generation_config` (transformers' class or a dict), then from the
        checkpoint's `generation_config.json`, and decoding is greedy if none of them says `do_sample`. `streamer` is
        told of each token of a single row; `seed` makes sampling repeatable.
        """
        input_ids = inputs if input_ids is None else input_ids
        prompts = _unpadded(input_ids, attention_mask)
        assert input_ids is not None, "otherwise _unpadded has raised"
        wanted = merged_settings(generation_config, settings)
        params = self._params(wanted, width=input_ids.shape[1], seed=seed)
        if streamer is not None:
            if len(prompts) * params.n != 1:
                raise InvalidRequestError(
                    f"streamer was given with {len(prompts) * params.n} sequences: it can follow only one.",
                    param="streamer",
                )
            streamer.put(input_ids.cpu())
        collectors = self._run(prompts, params, streamer)
        return _stacked(input_ids.repeat_interleave(params.n, dim=0), collectors, self._pad(wanted))

    def _params(self, wanted: GenerateSettings, *, width: int, seed: int | None) -> SamplingParams:
        """Sampling parameters for prompts that are `width` tokens wide."""
        checkpoint = self.generation_config
        sampling: dict[str, Any] = {"temperature": 0.0}
        if wanted.get("do_sample", checkpoint.do_sample):
            sampling = {"top_k": DEFAULT_TOP_K}
            for name in ("temperature", "top_p", "top_k", "min_p"):
                value = wanted.get(name, getattr(checkpoint, name, None))
                if value is not None:
                    sampling[name] = value
        penalty = wanted.get("repetition_penalty", checkpoint.repetition_penalty)
        stops = wanted.get("eos_token_id")
        return SamplingParams(
            **sampling,
            repetition_penalty=1.0 if penalty is None else penalty,
            n=wanted.get("num_return_sequences") or 1,
            seed=seed,
            max_tokens=self._new_tokens(wanted, width),
            min_tokens=wanted.get("min_new_tokens") or 0,
            stop_token_ids=list(stops) if isinstance(stops, Iterable) else [] if stops is None else [stops],
            ignore_eos=stops is not None,
        )

    def _new_tokens(self, wanted: GenerateSettings, width: int) -> int:
        """How many tokens to write; a number that the caller did not choose gives way to the model's length."""
        if (count := wanted.get("max_new_tokens")) is not None:
            return count
        if (length := wanted.get("max_length")) is not None:
            if not isinstance(length, int) or length <= width:
                raise InvalidRequestError(
                    f"max_length is {length!r}: it must be a whole number above the prompt's own {width} tokens.",
                    param="max_length",
                )
            return length - width
        return max(
            1, min(self.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS, self._engine.max_model_len - width)
        )

    def _pad(self, wanted: GenerateSettings) -> int:
        """What fills up short rows: the pad token, or as in transformers an end token where there is none."""
        ends = [wanted.get("eos_token_id"), *sorted(self.generation_config.eos_token_ids), 0]
        return next(
            token for token in (wanted.get("pad_token_id"), self.config.pad_token_id, *ends) if isinstance(token, int)
        )

    def _run(self, prompts: list[TokenIds], params: SamplingParams, streamer: Streamer | None) -> list[_IdCollector]:
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
        with self._lock:
            try:
                for request in requests:
                    self._engine.add(request)
                self._step_until_done(collectors, streamer)
            finally:
                for request in requests:
                    self._engine.cancel(request.request_id)
        for sink in collectors:
            if sink.finished is not None and sink.finished.reason is FinishReason.ERROR:
                raise EngineUnavailableError(sink.finished.message or "The engine failed on this request; see the log.")
        if streamer is not None:
            streamer.end()
        return collectors

    def _step_until_done(self, collectors: list[_IdCollector], streamer: Streamer | None) -> None:
        """Tokens reach the streamer between steps, so that its exceptions reach the caller."""
        told = 0
        while self._engine.has_work:
            self._engine.step()
            if streamer is not None:
                for token_id in collectors[0].token_ids[told:]:
                    streamer.put(torch.tensor([token_id]))
                told = len(collectors[0].token_ids)


def _unpadded(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> list[TokenIds]:
    """Each row's real tokens."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        kind = f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, torch.Tensor) else type(input_ids)
        raise InvalidRequestError(
            f"input_ids is {kind}: it must be a tensor of whole numbers [rows, tokens].", param="input_ids"
        )
    if attention_mask is None:
        rows: list[TokenIds] = input_ids.tolist()
        return rows
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

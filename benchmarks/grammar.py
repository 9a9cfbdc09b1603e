"""What grammars cost a token, and whether answers under them are always what was asked.

    python -m benchmarks.grammar [--model MODEL] [--answers 10000] [--schemas 200] [--tiktoken FILE]

Answers of a hot model (temperature 1.5) under random schemas are checked with the `jsonschema` package; those cut by
the token limit are counted apart. Times are of one mask and of one accepted token, on one thread; with `--tiktoken`
over the tokens of that file (`cl100k_base.tiktoken` has 100 256), since what a mask costs grows with the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import numpy as np

from benchmarks.random_schemas import Schema, random_schema
from benchmarks.tiktoken_vocabulary import read_tiktoken
from tern import LLM, SamplingParams, StructuredOutputsParams
from tern.chat import AnswerForm, CompiledGrammar, GrammarCompiler, Tokenizer

BATCH = 64
MAX_TOKENS = 256


def schemas(count: int, seed: int = 1) -> list[Schema]:
    """The same `count` schemas for the same seed."""
    rng = random.Random(seed)
    return [random_schema(rng) for _ in range(count)]


def check_answers(llm: LLM, asked: Sequence[Schema], answers: int) -> Counter[str]:
    """Generate `answers` answers, the schemas in turn: how many finished, were valid, or were cut."""
    counts: Counter[str] = Counter(finished=0, valid=0, cut=0, failed=0)
    conversation = [{"role": "user", "content": "Fill in the form."}]
    for start in range(0, answers, BATCH):
        mine = [asked[number % len(asked)] for number in range(start, min(start + BATCH, answers))]
        params = [
            SamplingParams(
                temperature=1.5,
                seed=start + place,
                max_tokens=MAX_TOKENS,
                reasoning_max_tokens=0,
                structured_outputs=StructuredOutputsParams(json=schema),
            )
            for place, schema in enumerate(mine)
        ]
        for schema, output in zip(mine, llm.chat([conversation] * len(mine), params, use_tqdm=False), strict=True):
            choice = output.outputs[0]
            assert choice.message is not None
            if choice.finish_reason != "stop":
                counts["cut" if choice.finish_reason == "length" else "failed"] += 1
                continue
            counts["finished"] += 1
            counts["valid"] += _is_valid(choice.message.content, schema)
    return counts


def _is_valid(content: str | None, schema: Schema) -> bool:
    try:
        jsonschema.validate(json.loads(content or ""), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"not valid: {content!r} under {json.dumps(schema)}: {error!s:.200}")
        return False
    return True


def time_tokens(tokenizer: Tokenizer, asked: Sequence[Schema], seed: int = 2) -> tuple[list[float], list[float]]:
    """Seconds of every mask and of every accepted token of one random walk through each schema's grammar."""
    rng = random.Random(seed)
    compiler = GrammarCompiler(tokenizer, [tokenizer.eos_id or 0])
    masks: list[float] = []
    accepts: list[float] = []
    for schema in asked:
        grammar = compiler.for_text(AnswerForm("json", schema, "schema"))
        assert grammar is not None
        _walk(grammar, tokenizer.vocab_size, rng, masks, accepts)
    return masks, accepts


def _walk(grammar: CompiledGrammar, vocab: int, rng: random.Random, masks: list[float], accepts: list[float]) -> None:
    state = grammar.start()
    for _ in range(MAX_TOKENS):
        if state.ended:
            return
        mask = np.zeros(-(-vocab // 32), np.uint32)
        started = time.perf_counter()
        state.fill(mask, ())
        filled = time.perf_counter()
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token_id = int(rng.choice(allowed))
        chosen = time.perf_counter()
        state.accept(token_id)
        masks.append(filled - started)
        accepts.append(time.perf_counter() - chosen)


def main() -> None:
    """Run both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--tiktoken", type=Path, metavar="FILE")
    options = parser.parse_args()
    llm = LLM(options.model, max_model_len=2048, max_num_seqs=BATCH, progress=False)
    asked = schemas(options.schemas)
    tokenizer = read_tiktoken(options.tiktoken) if options.tiktoken else llm.get_tokenizer()
    print(f"{tokenizer.vocab_size} tokens in the vocabulary")
    for name, seconds in zip(("mask", "accept"), time_tokens(tokenizer, asked), strict=True):
        cuts = statistics.quantiles(seconds, n=100)
        print(
            f"{name}: median {cuts[49] * 1e6:.0f} us, 99th percentile {cuts[98] * 1e6:.0f} us ({len(seconds)} tokens)"
        )
    if options.answers:
        counts = check_answers(llm, asked, options.answers)
        print(", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()

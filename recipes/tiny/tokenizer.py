"""The embedded model's tokenizer: byte-level BPE that keeps copying simple.

Words, runs of spaces, single digits and single Chinese characters are pieces of their own, so a name has the same
tokens in a question, in JSON and at the start of a line. The protocol's tags are single added tokens.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.tiny import about, data, words

VOCABULARY = 3072
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("think", "response", "tool_call", "tool_response", "system_setting", "global_setting", "tool_list")
    for slash in ("", "/")
)
PIECES = r"\p{Han}|[\p{L}&&[^\p{Han}]]+|\p{N}|\n+|[^\p{L}\p{N}\n]*[^\s\p{L}\p{N}][^\p{L}\p{N}\n]*|\s+"


def corpus(examples: int, seed: int) -> list[str]:
    """Training text, and its listed words often enough to get a token where the vocabulary allows.

    A held-out word must not get one: its embedding would never be trained.
    """
    rng = random.Random(seed)
    texts = []
    for _ in range(examples):
        example = data.training_example(rng)
        texts.append(example.prompt() + example.completion())
    names = [name for names in (*words.CITIES.values(), *words.PEOPLE.values()) for name in names]
    texts += [name for name in names if not words.is_held_out(name)] * 3
    texts += list(words.HAN) * 20
    for topic in about.TOPICS:
        texts += [*topic.questions_en, *topic.questions_zh, topic.answer_en, topic.answer_zh] * 20
    return texts


def train_tokenizer(examples: int = 12000, seed: int = 1) -> Tokenizer:
    """Learn the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL, *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(examples, seed), trainer)
    # Tags are tokens of the text, not of its frame: `skip_special_tokens` must leave them for the parser.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and the files that transformers reads beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    for name, content in (("special_tokens_map", special), ("tokenizer_config", config)):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")

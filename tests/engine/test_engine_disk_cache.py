"""Engines over a cache directory: a restart finds the prefix, and the answers never change."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fakes import EOS, HashModel, Recorder, add, make_engine, make_request, run
from test_engine_model import ANSWER, PROMPTS, network, plain_answer

from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions, EngineService, FinishReason, disk_cache
from tern.errors import OptionError
from tern.ops.placement import interpreted

SIZES = {"block_size": 4, "num_kv_blocks": 96, "max_num_seqs": 8, "max_num_batched_tokens": 32}
DOCUMENT = [(number * 37) % 50 + 3 for number in range(70)]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slow machine write all that is queued."""
    monkeypatch.setattr(disk_cache, "FLUSH_SECONDS", 60.0)


def hashing(directory: Path, model: HashModel | None = None, *, identity: str = "a", **options: Any) -> Engine:
    """A small engine on the fake model, which notices every slot that holds what it should not."""
    values = EngineOptions.from_keywords(**{**SIZES, "kv_cache_dir": directory, **options})
    return Engine(model or HashModel(), {EOS}, values, weights_identity=identity)  # type: ignore[arg-type]


def ask(engine: Engine, prompt: list[int] = DOCUMENT, **fields: Any) -> Recorder:
    sink = add(engine, "only", prompt, ignore_eos=True, **fields)
    run(engine)
    return sink


def ask_once(directory: Path, prompt: list[int] = DOCUMENT, **fields: Any) -> Recorder:
    """The answer of an engine that is started for it, and closed."""
    engine = hashing(directory)
    sink = ask(engine, prompt, **fields)
    engine.close()
    return sink


def files(directory: Path) -> list[Path]:
    return sorted(found for found in directory.rglob("*") if found.is_file())


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU nothing is interpreted")
def test_a_gpus_fp8_cache_outlives_its_engine(tmp_path: Path) -> None:
    answers = []
    for chunk, restored in ((64, 0), (4, 8)):
        sizes = {**SIZES, "max_num_batched_tokens": chunk, "max_num_seqs": 2}
        own = {"kv_cache_dtype": "fp8", "kv_cache_dir": tmp_path, "speculation": "off"}
        with interpreted():
            options = EngineOptions.from_keywords(**sizes, **own)
            engine = Engine(network("dense"), {EOS}, options, weights_identity="a")
            answers.append(ask(engine, DOCUMENT[:11], max_tokens=3).ids)
            engine.close()
        assert engine.runner.kv.keys.dtype == torch.float8_e4m3fn
        assert engine.stats().disk_hit_tokens == restored
    assert answers[0] == answers[1]


def test_a_restart_computes_only_what_is_new(tmp_path: Path) -> None:
    first = hashing(tmp_path)
    cold = ask(first)
    first.close()
    assert cold.end.num_cached_tokens == 0
    assert len(files(tmp_path)) == 77 // 4, "the last generated token is not computed"
    assert first.stats().disk_bytes_written == sum(file.stat().st_size for file in files(tmp_path))
    second = hashing(tmp_path)
    warm = ask(second)
    assert warm.ids == cold.ids
    assert warm.end.num_cached_tokens == 68
    stats = second.stats()
    assert (stats.disk_hit_tokens, stats.prefix_hit_tokens, stats.computed_tokens) == (68, 68, 2 + 7)
    assert stats.disk_bytes_read == 17 * files(tmp_path)[0].stat().st_size
    assert ask(second).ids == cold.ids
    assert second.stats().disk_hit_tokens == 68, "memory has them now"
    second.close()
    assert second.stats().disk_bytes_written == 0


@pytest.mark.parametrize("architecture", ["dense", "moe wint4"])
@pytest.mark.parametrize("state", ["warm", "damaged", "shared", "preempted"])
def test_greedy_output_is_the_networks_own(tmp_path: Path, architecture: str, state: str) -> None:
    def build(**options: Any) -> Engine:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 60, "block_size": 5}
        values = EngineOptions.from_keywords(**{**sizes, "kv_cache_dir": tmp_path, **options})
        return Engine(network(architecture), {EOS}, values, weights_identity=architecture)

    def answers(*engines: Engine) -> None:
        """Ask each for everything, a step of one after a step of the other."""
        sinks = [
            add(engine, str(number), prompt, max_tokens=ANSWER, ignore_eos=True)
            for engine in engines
            for number, prompt in enumerate(PROMPTS)
        ]
        while any(engine.has_work for engine in engines):
            for engine in engines:
                engine.step()
                engine.check_integrity()
        for index, sink in enumerate(sinks):
            assert sink.ids == plain_answer(architecture, index % len(PROMPTS))

    tight = {"num_kv_blocks": 33, "max_model_len": 130, "block_size": 4} if state == "preempted" else {}
    pair = [build(**tight) for _ in range(2 if state == "shared" else 1)]
    answers(*pair)
    for engine in pair:
        engine.close()
    if state == "damaged":
        for number, file in enumerate(files(tmp_path)):
            content = bytearray(file.read_bytes())
            content[number * 101 % len(content)] ^= 4
            file.write_bytes(content)
    again = build(**tight)
    answers(again)
    again.close()
    assert (again.stats().disk_hit_tokens == 0) == (state == "damaged")
    assert (again.stats().disk_bytes_written > 0) == (state == "damaged")
    if state == "damaged":
        mended = build()
        answers(mended)
        mended.close()
        assert mended.stats().disk_hit_tokens > 0
        assert mended.stats().disk_bytes_written == 0, (
            "all that was damaged has been written again, not the first alone"
        )


def test_two_engines_on_one_directory_at_the_same_time(tmp_path: Path) -> None:
    """Threads, limits and evictions all at once: nothing but speed may depend on them."""
    prompts = [DOCUMENT[:length] for length in (70, 41, 22)] + [list(range(start, start + 30)) for start in (3, 9, 20)]
    engine = make_engine()
    alone = [ask(engine, prompt).ids for prompt in prompts]
    wrong: list[tuple[list[int], list[int]]] = []

    def serve(directory: Path, turn: int) -> None:
        engine = hashing(directory, num_kv_blocks=24, kv_cache_dir_size=20 * 4096)
        for count in range(2 * len(prompts)):
            index = (count * (1 + turn * 4)) % len(prompts)
            answer = ask(engine, prompts[index]).ids
            if answer != alone[index]:
                wrong.append((prompts[index], answer))
        engine.close()

    threads = [threading.Thread(target=serve, args=[tmp_path, turn]) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < len(files(tmp_path)) <= 20 + 2 * 2


@pytest.mark.parametrize(
    "changes",
    [{"identity": "b"}, {"block_size": 5}, {"quantization": "wint8"}, {"enable_prefix_caching": True}],
    ids=str,
)
def test_only_the_same_weights_and_layout_share(tmp_path: Path, changes: dict[str, Any]) -> None:
    first, second = hashing(tmp_path), hashing(tmp_path, **changes)
    ask(first)
    first.close()
    assert (ask(second).end.num_cached_tokens > 0) == ("enable_prefix_caching" in changes)
    second.close()


def test_salts_keep_owners_apart(tmp_path: Path) -> None:
    for salt, hits in ((b"a", 0), (b"b", 0), (b"a", 68)):
        assert ask_once(tmp_path, cache_salt=salt).end.num_cached_tokens == hits


def test_what_was_computed_of_a_cancelled_prompt_is_kept(tmp_path: Path) -> None:
    first = hashing(tmp_path)
    add(first, "only", DOCUMENT)
    first.step()
    first.cancel("only")
    first.close()
    assert ask_once(tmp_path).end.num_cached_tokens == 32


def test_blocks_that_gave_no_finite_logits_are_not_kept(tmp_path: Path) -> None:
    model = HashModel()
    model.spoil_token = 60
    engine = hashing(tmp_path, model)
    assert ask(engine, [*DOCUMENT, 60]).end.reason is FinishReason.ERROR
    engine.close()
    assert files(tmp_path) == []


def test_blocks_evicted_before_they_were_written_are_written_all_the_same(tmp_path: Path) -> None:
    engine = hashing(tmp_path, num_kv_blocks=24)
    for start in range(3, 33, 3):
        ask(engine, list(range(start, start + 25)) * 3, max_tokens=1)
    engine.close()
    for start in range(3, 33, 3):
        assert ask_once(tmp_path, list(range(start, start + 25)) * 3).end.num_cached_tokens == 72


def test_a_full_disk_does_not_end_the_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = hashing(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        cold = ask(engine)
        assert ask(engine, DOCUMENT[:30]).end.reason is FinishReason.LENGTH
        engine.close()
    assert files(tmp_path) == []
    assert cold.ids == ask(make_engine()).ids


def test_a_service_writes_what_is_queued_when_it_stops(tmp_path: Path) -> None:
    service = EngineService(hashing(tmp_path))
    request = make_request("only", DOCUMENT, ignore_eos=True)
    service.start()
    service.submit(request)
    assert service.drain(60)
    service.stop()
    assert len(files(tmp_path)) == 19


def test_an_engine_that_goes_takes_its_writer_along(tmp_path: Path) -> None:
    engine = hashing(tmp_path)
    ask(engine)
    assert engine.disk_cache is not None
    writer, gone = engine.disk_cache._writer, weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert not writer.is_alive()
    assert len(files(tmp_path)) == 19


def test_a_process_that_ends_writes_first(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom test_engine_disk_cache import ask, hashing\n"
        "engine = hashing(Path(sys.argv[1]))\nask(engine)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=Path(__file__).parent)
    assert ask_once(tmp_path).end.num_cached_tokens == 68


def test_a_directory_of_no_use_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = EngineOptions(kv_cache_dir=tmp_path / "file")
    with pytest.raises(OptionError, match=r"kv_cache_dir is .*file', where no files can be made"):
        Engine.open(resolve_model("dummy:tiny"), options, progress=False)


def test_a_limit_below_one_block_and_weights_without_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="kv_cache_dir_size is 4095 bytes, but a block of 4 tokens takes 4096"):
        hashing(tmp_path, kv_cache_dir_size=4095)
    with pytest.raises(OptionError, match=r"nothing tells this model's weights from others: open it with Engine\.open"):
        make_engine(kv_cache_dir=tmp_path)


def test_sampled_answers_do_not_change_either(tmp_path: Path) -> None:
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 20}
    cold = ask_once(tmp_path, **drawn)
    warm = ask_once(tmp_path, **drawn)
    assert warm.ids == cold.ids
    assert warm.end.num_cached_tokens == 68

"""`tern doctor`: what it says of this machine and of what fits, before anything is loaded."""

from __future__ import annotations

import json
import socket
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tern.bench import diagnose, hardware
from tern.bench import doctor as doctor_module
from tern.checkpoint import load_tensors, resolve_model, weight_bytes
from tern.cli import main
from tern.engine import EngineOptions, fits
from tern.engine.cache_size import token_bytes
from tern.engine.fits import HOST_BYTES, step_bytes
from tern.ops import cpu


def tern(*arguments: str) -> int | str | None:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def test_doctor_counts_what_would_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = resolve_model("dummy:tiny")
    for quantization in (None, "wint8", "wint4"):
        loaded = load_tensors(source, quantization=quantization, dtype=torch.bfloat16)
        assert weight_bytes(source.config, torch.bfloat16, quantization) == sum(t.nbytes for t in loaded.values())
    found = diagnose(source)
    assert [fit.precision for fit in found.fits if fit.device == "cpu"] == ["bfloat16", "wint8", "wint4"]
    assert found.machine.isa == cpu.machine().name
    assert all(fit.longest_context == source.config.max_position_embeddings for fit in found.fits)

    assert tern("quantize", "dummy:tiny", str(tmp_path / "out"), "--bits", "4") == 0
    assert "Try it: tern chat" in capsys.readouterr().err
    assert tern("doctor", str(tmp_path / "out"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [fit["precision"] for fit in report["fits"] if fit["device"] == "cpu"] == ["wint4"]
    assert report["advice"] == f"tern serve {tmp_path / 'out'}"
    assert tern("quantize", "dummy:tiny", str(tmp_path / "two"), "--bits", "2") == 2


def test_what_it_says_of_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    machine = diagnose(None).machine
    assert set(machine.flags) <= set(hardware.CPU_FLAGS)
    assert machine.versions["torch"] == torch.__version__
    assert {"python", "tern", "numpy", "tokenizers"} <= machine.versions.keys()
    assert 0 < machine.free_gb <= machine.memory_gb
    assert machine.disk_free_gb > 0
    assert tern("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names[:2] == ["processor", "kernels"]
    assert names[-4:] == ["memory", "disk", "ports", "software"]


def test_a_port_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        monkeypatch.setattr(doctor_module, "PORTS", (port,))
        assert diagnose(None).machine.free_ports == []
    assert diagnose(None).machine.free_ports == [port]


def test_the_control_group_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "memory.max"
    monkeypatch.setattr(hardware, "_CGROUP_LIMIT", file)
    assert hardware.memory_limit() is None
    file.write_text("max\n")
    assert hardware.memory_limit() is None
    file.write_text("8000000000\n")
    assert diagnose(None).machine.memory_limit_gb == 8.0


def test_flags_are_read_as_the_kernel_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_CPUINFO", info)
    assert hardware.processor_flags() == []
    info.write_text("model name\t: Some: Processor\nflags\t\t: amx_int8 fpu avx2\n\nmodel name\t: Another\n")
    assert hardware.processor_name() == "Some: Processor"
    assert hardware.processor_flags() == ["avx2", "amx_int8"]


@pytest.mark.parametrize(
    ("free", "fitting", "advice"),
    [
        (400e9, ["bfloat16", "wint8", "wint4"], "tern serve dummy:ernie-4.5-21b-a3b"),
        (35e9, ["wint8", "wint4"], "tern serve dummy:ernie-4.5-21b-a3b --quantization wint8"),
        (25e9, ["wint8", "wint4"], "tern serve dummy:ernie-4.5-21b-a3b --quantization wint4"),
        (17e9, ["wint4"], "tern serve dummy:ernie-4.5-21b-a3b --quantization wint4 --max-model-len 61440"),
        (5e9, [], None),
    ],
)
def test_the_advice_is_what_serves(
    free: float, fitting: list[str], advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "free_memory", lambda _: int(free))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    source = resolve_model("dummy:ernie-4.5-21b-a3b")
    found = diagnose(source)
    assert [fit.precision for fit in found.fits if fit.fits] == fitting
    assert found.advice == advice
    for fit in found.fits:
        used = fit.weights_gb * 1e9 + fit.longest_context * token_bytes(source.config, torch.bfloat16)
        assert not fit.fits or used + HOST_BYTES + step_bytes(source.config, EngineOptions()) <= free


@pytest.mark.parametrize(
    ("installed", "line"),
    [
        ({}, "attention  Tern's own kernels\n"),
        ({"flashinfer": "0.7.2"}, "attention  flashinfer 0.7.2, for prompts that it can attend\n"),
    ],
)
def test_a_card_is_described_and_preferred(
    installed: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(doctor_module, "installed_attention", lambda: installed)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (140_000_000_000, 150_000_000_000))
    assert tern("doctor", "dummy:ernie-4.5-21b-a3b") == 0
    said = capsys.readouterr().out
    assert "GPU        NVIDIA H200, compute capability 9.0, 140.0 GB free of 150.0" in said
    assert line in said
    assert "cuda:0  bfloat16    43.7 GB" in said
    assert "try        tern serve dummy:ernie-4.5-21b-a3b\n" in said
    assert "--device auto: The weights take 43.7 GB and the cache of 131072 tokens 7.5 GB of the 124.3 GB" in said


@pytest.mark.parametrize(
    ("model", "card", "host", "fitting", "advice"),
    [
        ("ernie-4.5-21b-a3b", 80e9, 9e9, ["bfloat16", "fp8", "wint8", "wint4"], ""),
        ("ernie-4.5-21b-a3b", 32e9, 9e9, ["fp8", "wint8", "wint4"], " --quantization wint4"),
        (
            "ernie-4.5-21b-a3b",
            16e9,
            64e9,
            ["wint4", "split bfloat16+wint8", "split bfloat16+wint4", "cpu bfloat16", "cpu wint8", "cpu wint4"],
            " --device split",
        ),
        ("ernie-4.5-21b-a3b", 2e9, 64e9, ["cpu bfloat16", "cpu wint8", "cpu wint4"], " --device cpu"),
    ],
)
def test_a_card_has_its_own_precisions_and_can_share(
    model: str, card: float, host: float, fitting: list[str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card_found = SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card_found)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (int(card), int(card)))
    monkeypatch.setattr(fits, "free_memory", lambda _: int(host))
    found = diagnose(resolve_model(f"dummy:{model}"))
    names = [f"{fit.device.replace('cuda:0', '')} {fit.precision}".strip() for fit in found.fits if fit.fits]
    assert names == fitting
    assert found.advice == f"tern serve dummy:{model}{advice}"
    assert found.residence is not None
    assert found.residence.startswith("The weights take 43.7 GB")


def test_an_old_card_and_a_missing_triton_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["Tesla T4", "NVIDIA A100"]
    cards = [SimpleNamespace(name=name, major=7 + place, minor=5 - 5 * place) for place, name in enumerate(names)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", cards.__getitem__)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (15_000_000_000, 16_000_000_000))
    monkeypatch.setattr(doctor_module, "PACKAGES", ("torch", "no-such-triton"))
    problems = diagnose(None).machine.gpu_problems
    assert len(problems) == 2
    assert problems[0].startswith("Tesla T4 has compute capability 7.5, but bfloat16 needs 8.0")
    assert "pip install 'tern-llm[gpu]'" in problems[1]
    assert tern("doctor") == 0
    assert f"           {problems[0]}\n" in capsys.readouterr().out
    monkeypatch.setattr(doctor_module, "_versions", lambda: {"triton": "3.9"})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: cards[1])
    assert diagnose(None).machine.gpu_problems == []


@pytest.mark.parametrize(
    ("text", "smi", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12.3.0\n",
            None,
            "550.54.15",
        ),
        ("something else", None, "unknown"),
        (None, "/usr/bin/nvidia-smi", "unknown"),
        (None, None, None),
    ],
)
def test_the_driver_s_version(
    text: str | None, smi: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", file)
    monkeypatch.setattr("shutil.which", lambda _: smi)
    assert hardware.nvidia_driver() == version


@pytest.mark.parametrize(
    ("driver", "cuda", "visible", "said"),
    [
        (None, None, None, None),
        ("550.54", None, None, "NVIDIA's driver is installed (version 550.54), but torch"),
        ("550.54", "13.0", "", "CUDA_VISIBLE_DEVICES is '', which hides every card"),
        ("550.54", "13.0", None, "built for CUDA 13.0, but finds no card beside NVIDIA's driver (version 550.54)"),
    ],
)
def test_why_a_card_is_not_found(
    driver: str | None, cuda: str | None, visible: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: driver)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    problems = diagnose(None).machine.gpu_problems
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]


def test_a_directory_is_advised_as_it_can_be_found(tmp_path: Path) -> None:
    folder = tmp_path / "my 模型"
    folder.mkdir()
    source = resolve_model(None)
    for file in source.directory.iterdir():
        (folder / file.name).symlink_to(file)
    assert diagnose(resolve_model(folder)).advice == f"tern serve '{folder}'"


@pytest.mark.parametrize(
    ("name", "value", "said"), [("TERN_NUM_THREADS", "99999", "may use"), ("TERN_FORCE_ISA", "sse9", "no such kernels")]
)
@pytest.mark.parametrize("command", [("doctor",), ("generate", "hello"), ("bench",)], ids=" ".join)
def test_settings_that_cannot_be_are_one_sentence(
    name: str,
    value: str,
    said: str,
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    default_machine = import_module("tern.ops.cpu.machine")._default_machine
    monkeypatch.setattr(cpu, "machine", default_machine.__wrapped__)  # what a new process would choose
    assert tern(*command) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"tern: {name} is")
    assert said in shown
    assert shown.count("\n") == 1

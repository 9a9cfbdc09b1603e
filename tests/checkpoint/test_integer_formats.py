"""AWQ, GPTQ and compressed-tensors: what known integers, scales and zero points stand for comes out, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writer import Tensors, moe_model, pt_tensors, write_checkpoint
from test_layouts import assert_same, canonical, logits
from torch import Tensor

from tern import ops
from tern.checkpoint import load_model, load_tensors, quantise_checkpoint, resolve_model
from tern.errors import CheckpointError, UnsupportedConfigError

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Case:
    """One way of keeping integers; `written` makes the tensors of one weight and says which floats they stand for."""

    config: dict[str, Any]
    bits: int = 4
    groups: int = 2
    symmetric: bool = False
    shuffled: bool = False
    one_byte_zeros: bool = False
    draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def written(self, out: int, depth: int) -> tuple[Tensors, Tensor]:
        top = 1 << self.bits
        integers = torch.randint(0, top, (out, depth), generator=self.draw)
        zeros = torch.randint(1, top, (out, self.groups), generator=self.draw)
        if self.symmetric:
            zeros.fill_(top // 2)
        scales = torch.rand(out, self.groups, generator=self.draw).add(0.5).mul(0.02).half()
        index = torch.arange(depth) // (depth // self.groups)
        if self.shuffled:
            index = index[torch.randperm(depth, generator=self.draw)]
        floats = torch.empty(out, depth)
        for column in range(depth):
            group = index[column]
            floats[:, column] = (integers[:, column] - zeros[:, group]).float() * scales[:, group].float()
        return self.tensors(integers, zeros, scales, index), floats

    def tensors(self, integers: Tensor, zeros: Tensor, scales: Tensor, index: Tensor) -> Tensors:
        method = self.config["quant_method"]
        if method == "gptq":
            less = 0 if self.config.get("checkpoint_format") == "gptq_v2" else 1
            return {
                "qweight": words(integers, self.bits).t(),
                "qzeros": words(zeros.t() - less, self.bits),
                "scales": scales.t(),
                "g_idx": index.int(),
            }
        if method == "awq":
            return {"qweight": awq_words(integers.t()), "qzeros": awq_words(zeros.t()), "scales": scales.t()}
        tensors = {
            "weight_packed": words(integers, self.bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(integers.shape),
        }
        if self.one_byte_zeros:
            tensors["weight_zero_point"] = (zeros - (1 << (self.bits - 1))).to(torch.int8)
        elif not self.symmetric:
            tensors["weight_zero_point"] = words(zeros.t(), self.bits).t()
        if self.shuffled:
            tensors["weight_g_idx"] = index.int()
        return tensors


def words(integers: Tensor, bits: int) -> Tensor:
    """Integers [rows, n] -> words [rows, n * bits / 32] int32, one after the other in plain Python's arithmetic."""
    per = 32 // bits
    rows = []
    for row in integers.tolist():
        row += [0] * (-len(row) % per)
        packed = [sum(v << (bits * i) for i, v in enumerate(row[at : at + per])) for at in range(0, len(row), per)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def awq_words(integers: Tensor) -> Tensor:
    """The same with AWQ's order of the eight columns in a word."""
    columns = torch.arange(integers.shape[1]).view(-1, 8)[:, list(AWQ_ORDER)].flatten()
    return words(integers[:, columns], 4)


def compressed(bits: int, strategy: str, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, "type": "int", "strategy": strategy, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
GPTQ_V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
CASES: dict[str, Callable[[], Case]] = {
    "gptq": lambda: Case(GPTQ),
    "gptq, symmetric": lambda: Case({**GPTQ, "sym": True, "checkpoint_format": "gptq"}, symmetric=True),
    "gptq v2": lambda: Case(GPTQ_V2),
    "gptq, act order": lambda: Case({**GPTQ, "desc_act": True}, groups=4, shuffled=True),
    "gptq, 8 bit": lambda: Case({**GPTQ_V2, "bits": 8}, bits=8),
    "gptq, 8 bit, one group": lambda: Case({**GPTQ, "bits": 8, "group_size": -1}, bits=8, groups=1),
    "awq": lambda: Case({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "awq, small groups": lambda: Case({"quant_method": "awq", "bits": 4, "version": "GEMM"}, groups=4),
    "compressed, group": lambda: Case(compressed(4, "group"), symmetric=True),
    "compressed, channel": lambda: Case(compressed(8, "channel"), bits=8, groups=1, symmetric=True),
    "compressed, asymmetric": lambda: Case(compressed(4, "group", symmetric=False)),
    "compressed, asymmetric 8 bit": lambda: Case(compressed(8, "group"), bits=8),
    "compressed, zeros of a byte": lambda: Case(compressed(4, "group"), one_byte_zeros=True),
    "compressed, act order": lambda: Case(compressed(4, "group", actorder="group"), groups=4, shuffled=True),
}


def quantised(case: Case, model: torch.nn.Module, *, but: str = "down_proj of none") -> Tensors:
    """The network's tensors with its projections quantised, which changes the network; those named `but` stay."""
    tensors: Tensors = {}
    state = model.state_dict()
    for name, tensor in pt_tensors(model).items():
        if not name.endswith("_proj.weight") or but in name:
            tensors[name] = tensor
            continue
        parts, floats = case.written(*tensor.shape)
        tensors |= {name.removesuffix("weight") + key: part.contiguous() for key, part in parts.items()}
        put(state, name, floats)
    model.load_state_dict(state)
    return tensors


def put(state: dict[str, Tensor], name: str, floats: Tensor) -> None:
    if ".experts." not in name:
        state[name].copy_(floats)
        return
    stem, _, rest = name.partition(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        state[f"{stem}.experts.down_proj"][int(expert)] = floats
    else:
        half = state[f"{stem}.experts.gate_up_proj"][int(expert)].chunk(2)[projection == "up_proj"]
        half.copy_(floats)


@pytest.fixture(params=CASES)
def case(request: Any) -> Case:
    return CASES[request.param]()


def test_integers_become_the_floats_that_they_stand_for(tmp_path: Path, case: Case) -> None:
    model = moe_model(**SIZES)
    tensors = quantised(case, model, but="layers.2.self_attn")
    source = resolve_model(write_checkpoint(tmp_path / "it", model, tensors, shards=3, quantization_config=case.config))
    assert source.default_quantization == f"wint{case.bits}"
    assert_same(load_tensors(source, dtype=torch.float32, quantization="none"), canonical(model))  # type: ignore[arg-type]


def test_they_are_packed_on_the_cpu(tmp_path: Path, case: Case) -> None:
    model = moe_model(**SIZES)
    tensors = quantised(case, model)
    config = {"quantization_config": case.config, "dtype": "float16"}
    source = resolve_model(write_checkpoint(tmp_path / "it", model, tensors, **config))
    found = load_tensors(source)
    for name, tensor in canonical(model).items():
        weight = found[name]
        if name.endswith((".weight", "moe.gate_up", "moe.down")):
            assert isinstance(weight, ops.PackedWeight)
            again = ops.pack(tensor, case.bits, weight.parts)
            assert torch.equal(weight.values, again.values), name
            assert torch.equal(weight.scales, again.scales), name
        elif isinstance(weight, Tensor) and "moe" not in name:
            assert weight.dtype == torch.bfloat16, name
    assert logits(load_model(source), [4, 5, 6]).isfinite().all()


def test_they_are_packed_into_files(tmp_path: Path) -> None:
    model = moe_model(**SIZES)
    case = CASES["awq"]()
    tensors = quantised(case, model)
    source = resolve_model(write_checkpoint(tmp_path / "it", model, tensors, quantization_config=case.config))
    quantise_checkpoint(source, tmp_path / "out", 8)
    written = load_model(resolve_model(tmp_path / "out"))
    assert torch.equal(logits(written, [4, 5]), logits(load_model(source, quantization="wint8"), [4, 5]))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({**GPTQ, "bits": 3}, "GPTQ weights whose bits is '3': Tern reads 4 and 8"),
        ({**GPTQ, "bits": True}, "GPTQ weights whose bits is 'True'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin': Tern reads gptq and gptq_v2"),
        ({"quant_method": "awq", "bits": 8}, "AWQ weights whose bits is '8': Tern reads 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ weights whose version is 'gemv': Tern reads gemm"),
        (
            {**compressed(8, "channel"), "format": "int-quantized"},
            "format is 'int-quantized': Tern reads pack-quantized",
        ),
        (compressed(2, "group"), "num_bits is '2': Tern reads 4 and 8"),
        (compressed(4, "block"), "strategy is 'block': Tern reads group and channel"),
        (compressed(8, "group", type="float"), "type is 'float': Tern reads int"),
        ({**compressed(4, "group"), "config_groups": {}}, "without sound config_groups"),
        ({**compressed(4, "group"), "config_groups": {"group_0": 7}}, "without sound config_groups"),
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes', which Tern does not read"),
    ],
)
def test_other_variants_are_named(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    model = moe_model(**SIZES)
    directory = write_checkpoint(tmp_path / "it", model, {}, quantization_config=config)
    with pytest.raises(UnsupportedConfigError, match=sentence):
        resolve_model(directory)


def test_activations_that_are_quantised_too_are_named(tmp_path: Path) -> None:
    config = compressed(8, "channel")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    directory = write_checkpoint(tmp_path / "it", moe_model(**SIZES), {}, quantization_config=config)
    with pytest.raises(UnsupportedConfigError, match="whose input_activations is"):
        resolve_model(directory)


class TestDamage:
    """Parts that are missing or do not fit each other are listed by name."""

    STEM = "model.layers.0.self_attn.q_proj"

    def complaint(self, place: Path, case: Case, change: Callable[[Tensors], object], shards: int = 1) -> str:
        model = moe_model(**SIZES)
        tensors = quantised(case, model)
        change(tensors)
        config = case.config
        directory = write_checkpoint(place / "it", model, tensors, shards=shards, quantization_config=config)
        with pytest.raises(CheckpointError) as caught:
            load_tensors(resolve_model(directory))
        return str(caught.value)

    @pytest.mark.parametrize(
        ("name", "part", "sentence"),
        [
            ("gptq", "scales", "missing: {stem}.scales, needed beside {stem}."),
            ("gptq", "qweight", "missing: {stem}.qweight, needed beside {stem}."),
            ("awq", "qzeros", "missing: {stem}.qzeros, needed beside {stem}."),
            ("compressed, group", "weight_shape", "missing: {stem}.weight_shape, needed beside {stem}."),
        ],
    )
    def test_a_part_is_missing(self, tmp_path: Path, name: str, part: str, sentence: str) -> None:
        text = self.complaint(tmp_path, CASES[name](), lambda tensors: tensors.pop(f"{self.STEM}.{part}"))
        assert "1 problem was found" in text
        assert sentence.format(stem=self.STEM) in text

    @pytest.mark.parametrize(
        ("name", "part", "value"),
        [
            ("gptq", "scales", torch.ones(3, 64)),
            ("gptq", "qzeros", torch.ones(2, 64, dtype=torch.int32)),
            ("gptq", "g_idx", torch.ones(3, dtype=torch.int32)),
            ("gptq", "qweight", torch.ones(8, 64)),
            ("gptq", "qweight", torch.ones(8, dtype=torch.int32)),
            ("awq", "scales", torch.ones(64)),
            ("awq", "qzeros", torch.ones(2, 8)),
            ("compressed, group", "weight_shape", torch.tensor([64, 2**40])),
            ("compressed, group", "weight_shape", torch.tensor([-64, 64])),
            ("compressed, group", "weight_shape", torch.ones(2)),
            ("compressed, group", "weight_scale", torch.ones(64, 7)),
            ("compressed, asymmetric", "weight_zero_point", torch.ones(64, 2)),
        ],
    )
    def test_a_part_does_not_fit(self, tmp_path: Path, name: str, part: str, value: Tensor) -> None:
        change: Callable[[Tensors], object] = lambda tensors: tensors.update({f"{self.STEM}.{part}": value})  # noqa: E731
        text = self.complaint(tmp_path, CASES[name](), change)
        assert 1 <= text.count("\n  - ") == text.count(f"misshapen: {self.STEM}.") <= 2, "zeros are to go with scales"

    def test_a_group_that_there_is_not(self, tmp_path: Path) -> None:
        change: Callable[[Tensors], object] = lambda tensors: tensors[f"{self.STEM}.g_idx"].fill_(9)  # noqa: E731
        text = self.complaint(tmp_path, CASES["gptq"](), change)
        assert f"{self.STEM}.weight has inputs in groups that there are not, of 2: download it again" in text

    def test_a_missing_shard_is_reported_once(self, tmp_path: Path) -> None:
        model = moe_model(**SIZES)
        case = CASES["gptq"]()
        tensors = quantised(case, model)
        directory = write_checkpoint(tmp_path / "it", model, tensors, shards=3, quantization_config=case.config)
        (directory / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError) as caught:
            load_tensors(resolve_model(directory))
        assert "1 problem was found" in str(caught.value)

    def test_integers_without_a_description_are_surplus(self, tmp_path: Path) -> None:
        model = moe_model(**SIZES)
        directory = write_checkpoint(tmp_path / "it", model, quantised(CASES["gptq"](), model))
        assert "quantization_config" not in json.loads((directory / "config.json").read_text())
        with pytest.raises(CheckpointError, match=r"surplus: .*q_proj\.g_idx .* is no tensor of this architecture"):
            load_tensors(resolve_model(directory))

"""Values of configurations and weights that no checkpoint has are refused at load, in every family, in one line that names them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cellfm_hub as cf
from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.configs import parse_config
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.registry import Entry, registry
from cellfm_hub.weights import Key, check_numbers, load_network
from golden_cases import PORTABLE, Case
from test_contract import CASES, model_of

NETWORKS = [entry for entry in registry().checkpoints.values() if entry.checkpoint.source is not None]
FAMILIES = list({entry.adapter_path: entry for entry in NETWORKS}.values())
SETTINGS = {"config.json", "args.json"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".torch")


def load(case: Case, folder: Path) -> cf.Embedder:
    return cf.load(model_of(case), checkpoint=folder, device="cpu", precision="float32", options=case.options)


def refused(call: Callable[[], Any], *fragments: str) -> None:
    with pytest.raises(CheckpointFormatError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


# Configurations


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.family)
def test_values_of_configurations(entry: Entry) -> None:
    """Each key of each family: nothing is converted, nothing absurd is taken, and the published values pass."""
    adapter = entry.adapter_class()
    assert issubclass(adapter, TokenAdapter)
    good = dict(entry.checkpoint.config)
    adapter.published(good)
    assert good, "nothing to try"
    for key, value in good.items():
        wrong: list[Any] = [None, "8", [8], {}, float("nan"), float("inf")]
        if type(value) is int:
            wrong += [-3, 10**9, 8.5, True]
        if type(value) is bool:
            wrong += [0, 1, "true"]
        if key not in {"pad_token_id", "mask_token_id", "pad_value"} and type(value) is int:
            wrong.append(0)
        for other in wrong:
            if (key, other) == ("pad_value", -3):  # any number
                continue
            if key == "pad_value" and other in (10**9, 8.5):
                continue
            refused(lambda changed={**good, key: other}: adapter.published(changed), f"{key}=", "expected" if other is not None else "")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("geneformer-v2-basic", "hidden_act", "silu"),
        ("geneformer-v2-basic", "position_embedding_type", "relative_key"),
        ("dnabert2-basic", "hidden_act", "relu"),
        ("nt-v1-basic", "emb_layer_norm_before", True),
    ],
)
def test_what_the_network_does_not_do(name: str, key: str, value: Any, tmp_path: Path) -> None:
    """A setting that changes the vectors is followed or refused, never passed over."""
    case, folder = Case(PORTABLE / name), tmp_path / "checkpoint"
    shutil.copytree(case.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    refused(lambda: load(case, folder), "config.json", f"{key}={value!r}", "expected")


def test_geneformer_follows_the_activation(tmp_path: Path) -> None:
    case, folder = Case(PORTABLE / "geneformer-v2-basic"), tmp_path / "checkpoint"
    shutil.copytree(case.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    blocks = load(case, folder).adapter.network.encoder.blocks
    x = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(blocks[0].feed_forward.activation(x), nn.functional.gelu(x))


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.family)
def test_every_setting_has_limits(entry: Entry) -> None:
    """No field of a family's configuration takes just any number."""
    adapter = entry.adapter_class()
    assert issubclass(adapter, TokenAdapter)
    network, _ = adapter.published(dict(entry.checkpoint.config))
    configs = [module.config for module in network.modules() if dataclasses.is_dataclass(getattr(module, "config", None))]
    kinds = {type(config) for config in configs if type(config).__module__.startswith("cellfm_adapters")}
    for kind in kinds:
        assert not [f.name for f in dataclasses.fields(kind) if f.type in (int, float, "int", "float")]  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.family)
def test_heads_that_do_not_divide_the_width(entry: Entry) -> None:
    adapter = entry.adapter_class()
    assert issubclass(adapter, TokenAdapter)
    good = dict(entry.checkpoint.config)
    heads = next(key for key in ("num_attention_heads", "nheads", "encoder_heads", "nhead") if key in good)
    refused(lambda: adapter.published({**good, heads: 11}), f"{heads}=11", "does not divide")


@pytest.mark.parametrize("param", [p for p in CASES if any((p.values[0].checkpoint / name).is_file() for name in SETTINGS)])
@pytest.mark.parametrize("value", [-1, 0, "8", True, 10**9])
def test_files_with_wrong_values(param: Case, value: Any, tmp_path: Path) -> None:
    """The message names the file, the key, what it holds and what was expected."""
    case, folder = param, tmp_path / "checkpoint"
    shutil.copytree(case.checkpoint, folder)
    path = next(folder / name for name in SETTINGS if (folder / name).is_file())
    good = json.loads(path.read_text())
    tried = {"num_hidden_layers", "num_attention_heads", "hidden_size", "nlayers", "nheads", "n_bins", "max_seq_len"} & set(good)
    assert len(tried) >= 3
    for key in sorted(tried):
        path.write_text(json.dumps({**good, key: value}))
        refused(lambda: load(case, folder), path.name, f"{key}={value!r}", "expected")


@pytest.mark.parametrize("value", [0, 1, -5, "256", 2.5, True])
def test_limits_of_tokenizers(value: Any, tmp_path: Path) -> None:
    case, folder = Case(PORTABLE / "nt-v2-basic"), tmp_path / "checkpoint"
    shutil.copytree(case.checkpoint, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": value}))
    refused(lambda: load(case, folder), "tokenizer_config.json", f"model_max_length={value!r}", "expected")
    path.write_text(json.dumps({"model_max_length": 10**30}))  # how files say that there is none
    assert load(case, folder).adapter.max_tokens == 256  # type: ignore[attr-defined]


def test_missing_keys() -> None:
    @dataclasses.dataclass
    class Config:
        width: int

    refused(lambda: parse_config(Config, {}, "here"), "here lacks width", "config.json")


# Weights

CPU = torch.device("cpu")


def changed_weights(case: Case, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write a checkpoint in which every tensor of floats is changed."""
    shutil.copytree(case.checkpoint, folder)

    def through(content: Any) -> Any:
        if isinstance(content, torch.Tensor):
            return change(content) if content.is_floating_point() else content
        return {key: through(value) for key, value in content.items()} if isinstance(content, dict) else content

    (path,) = (path for path in folder.iterdir() if path.suffix in WEIGHTS and path.stem not in {"all_tokens"})
    if path.suffix == ".safetensors":
        save_file(through(load_file(path)), path)
    else:
        torch.save(through(torch.load(path, weights_only=True)), path)  # noqa: TID251 - written by ourselves


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: torch.full_like(t, torch.nan), "NaN"),
        (lambda t: torch.full_like(t, -torch.inf), "infinite"),
        (lambda t: (t * 10).to(torch.int8), "int8"),
        (lambda t: t.to(torch.int64), "int64"),
        (lambda t: t > 0, "bool"),
    ],
    ids=["NaN", "infinite", "int8", "int64", "bool"],
)
def test_weights_that_are_none(case: Case, change: Any, said: str, tmp_path: Path) -> None:
    changed_weights(case, tmp_path / "checkpoint", change)
    refused(lambda: load(case, tmp_path / "checkpoint"), said, "expected", str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_wrong_number_among_many(dtype: torch.dtype, value: float) -> None:
    """Wherever it stands, in every precision."""
    for place in (0, 12_345, 99_999):
        tensor = torch.ones(100_000, dtype=dtype)
        check_numbers(tensor, "w", "here")
        tensor[place] = value
        refused(lambda tensor=tensor: check_numbers(tensor, "w", "here"), "w of here")
    check_numbers(torch.full((3,), torch.finfo(dtype).max, dtype=dtype), "w", "here")
    check_numbers(torch.empty(0, dtype=dtype), "w", "here")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_numbers_of_other_kinds(dtype: torch.dtype) -> None:
    refused(lambda: check_numbers(torch.zeros(3).to(dtype), "w", "here"), "w of here", str(dtype).removeprefix("torch."), "quantized")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(2, 4, bias=False)
        self.parts = nn.Linear(2, 4, bias=False)


def test_a_parameter_that_nothing_fills() -> None:
    """A family's table that forgets a parameter, or a part of one, does not leave it to chance."""
    tensors = {"w": torch.ones(4, 2), "q": torch.ones(2, 2), "k": torch.ones(2, 2)}
    keys = {"w": Key((4, 2), "whole.weight"), "q": Key((2, 2), "parts.weight", (0, 2)), "k": Key((2, 2), "parts.weight", (1, 2))}
    load_network(Small, tensors, keys, origin="here", device=CPU, dtype=torch.float32)
    for forgotten, unset in (("w", "whole.weight"), ("q", "parts.weight"), ("k", "parts.weight")):
        some = {name: tensor for name, tensor in tensors.items() if name != forgotten}
        layout = {name: key for name, key in keys.items() if name != forgotten}
        refused(
            lambda some=some, layout=layout: load_network(Small, some, layout, origin="here", device=CPU, dtype=torch.float32),
            f"no tensor of the file is mapped to {unset}",
        )


def test_a_part_that_is_filled_twice() -> None:
    """Two halves that both lead to the first leave the second to chance."""
    tensors = {"w": torch.ones(4, 2), "q": torch.ones(2, 2), "k": torch.ones(2, 2)}
    keys = {"w": Key((4, 2), "whole.weight"), "q": Key((2, 2), "parts.weight", (0, 2)), "k": Key((2, 2), "parts.weight", (0, 2))}
    refused(lambda: load_network(Small, tensors, keys, origin="here", device=CPU, dtype=torch.float32), "parts.weight")

"""Every card, checked against the network it describes. Written over the registry: a new card needs no line here."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from cellfm_hub import registry as registry_module
from cellfm_hub.adapter import Adapter, CellAdapter, CellFeatures, SequenceAdapter, SequenceFeatures, TokenAdapter
from cellfm_hub.cards import CardError, read_card
from cellfm_hub.nn import Encoder
from cellfm_hub.registry import Entry, registry
from cellfm_hub.weights import Layout, count_parameters
from golden_cases import PORTABLE

FOLDER = registry_module._own_cards()
CARDS = sorted(FOLDER.glob("[!_]*.md"))
ENTRIES = [entry for entry in registry().checkpoints.values() if entry.card.owner == "cellfm-hub"]
NETWORKS = [entry for entry in ENTRIES if entry.checkpoint.source is not None]

assert CARDS, f"no cards in {FOLDER}"
assert NETWORKS, "no checkpoint with weights is registered"

each_card = pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
each_network = pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)


def front_matter(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\n---\n")[0].removeprefix("---\n")


def scalars(node: yaml.Node | None, key: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every plain value of a YAML document, with the key it stands under."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from scalars(value, name.value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from scalars(value, key)
    elif isinstance(node, yaml.ScalarNode):
        yield key, node


# The text of the cards


@each_card
def test_card_is_valid(path: Path) -> None:
    card = read_card(path)
    assert card.cellfm.title
    assert len(card.text) > 200, "the prose says what the model is for, its input and its traps"
    assert "FIDELITY" not in card.text, "a placeholder for measured figures, see tests/benchmarks/fidelity.py"
    assert card.tags


@each_card
def test_hashes_are_quoted(path: Path) -> None:
    """An unquoted hash of digits alone would be read as a number."""
    hashes = [(key, node) for key, node in scalars(yaml.compose(front_matter(path))) if key in {"sha256", "revision"}]
    unquoted = [f"{key}: {node.value}" for key, node in hashes if node.value != "null" and node.style not in {'"', "'"}]
    assert unquoted == []


@each_card
def test_unknown_is_explained(path: Path) -> None:
    """What is not known is `null`, with a comment on the line or the one above."""
    lines = front_matter(path).splitlines()
    wrong = [
        line.strip()
        for before, line in zip(["", *lines], lines, strict=False)
        if re.search(r"(sha256|revision|commercial_use): null", line) and "#" not in line and not before.strip().startswith("#")
    ]
    assert wrong == []


# What every checkpoint states


@each_entry
def test_licence_is_stated(entry: Entry) -> None:
    assert entry.licence.strip()
    card = entry.card
    assert card.license != "other" or card.license_name
    if re.search(r"\bnc\b", f"{card.license} {entry.licence}".lower()):
        assert entry.checkpoint.commercial_use is False
    # The schema has no default for it: each checkpoint says yes, no, or null with a reason.
    stated = yaml.safe_load(front_matter(FOLDER / f"{entry.family}.md"))["cellfm"]["checkpoints"][entry.name]
    assert "commercial_use" in stated


@each_entry
def test_adapter_fits_the_card(entry: Entry) -> None:
    adapter_class = entry.adapter_class()
    assert issubclass(adapter_class, Adapter)
    kinds = {"cell": (CellAdapter, CellFeatures), "sequence": (SequenceAdapter, SequenceFeatures)}[entry.modality]
    assert issubclass(adapter_class, kinds)
    assert (entry.requires.values == "sequences") == (entry.modality == "sequence")
    assert issubclass(adapter_class, TokenAdapter) == (entry.checkpoint.source is not None)
    assert adapter_class.__module__.startswith("cellfm_adapters.")


@each_entry
def test_recipes_are_possible(entry: Entry) -> None:
    layers = entry.checkpoint.layers
    for name, recipe in entry.recipes.items():
        assert recipe.description, name
        if layers is not None:
            assert -layers - 1 <= recipe.output_layer <= layers, name


@pytest.mark.parametrize("adapter", sorted({entry.adapter_path for entry in NETWORKS}))
def test_adapter_has_a_golden_case(adapter: str) -> None:
    """Numbers of the original code stand in tests/golden under the name of a family, an alias or a checkpoint that the adapter serves."""
    names = set[str]()
    for entry in NETWORKS:
        if entry.adapter_path == adapter:
            names |= {entry.family, entry.name, *entry.card.cellfm.aliases}
    cases = [path.name for path in PORTABLE.iterdir() if (path / "case.json").is_file()]
    assert any(case.startswith(f"{name}-") for case in cases for name in names), f"{sorted(names)} not in {cases}"


# What can be recomputed


def published(entry: Entry) -> tuple[nn.Module, Layout]:
    adapter_class = entry.adapter_class()
    assert issubclass(adapter_class, TokenAdapter)
    with torch.device("meta"):
        return adapter_class.published(dict(entry.checkpoint.config))


@each_network
def test_parameters(entry: Entry) -> None:
    """The card's number is that of the published file."""
    assert entry.checkpoint.config, "the keys of config.json that fix the network"
    assert entry.checkpoint.parameters == count_parameters(published(entry)[1])


@each_network
def test_layout_fills_the_network(entry: Entry) -> None:
    """Every key leads to a parameter of its shape, and every number of the network is filled exactly once."""
    network, layout = published(entry)
    targets = network.state_dict()
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in targets}
    for source, key in layout.items():
        if key.to is None:
            continue
        assert key.to in targets, f"{source} leads to {key.to}, which is not in the network"
        index, count = key.part
        assert tuple(targets[key.to].chunk(count)[index].shape) == key.shape, f"{source} -> {key.to}"
        assert key.required, f"{source} fills {key.to}, so every file must have it"
        parts[key.to].append(key.part)
    for name, filled in parts.items():
        count = filled[0][1] if filled else 0
        assert sorted(filled) == [(i, count) for i in range(count)], f"{name} is filled by {filled}"
        assert filled, f"nothing fills {name}"


@each_network
def test_width_and_depth(entry: Entry) -> None:
    network, _ = published(entry)
    encoders = [module for module in network.modules() if isinstance(module, Encoder)]
    layers, dim = entry.checkpoint.layers, entry.checkpoint.embedding_dim
    assert layers is not None
    assert dim is not None
    if len(encoders) == 1:
        (encoder,) = encoders
        assert layers == encoder.config.layers == len(encoder.blocks)
        pooling = entry.recipes["default"].pooling or "mean"
        if pooling in {"cls", "mean", "max"}:
            assert dim == encoder.config.dim
        else:  # the family's own may put several vectors side by side
            assert dim % encoder.config.dim == 0
    else:
        assert layers in {len(module) for module in network.modules() if isinstance(module, nn.ModuleList)}
        assert any(dim % size == 0 for parameter in network.parameters() for size in parameter.shape if size > 1)


@each_network
def test_longest_input(entry: Entry) -> None:
    """The longest input is a number of the configuration, but for up to two rows of padding, or the default of an option.

    ``None`` says that there is none: then the network takes any length, and has no table with a row for each position.
    """
    longest, config = entry.checkpoint.max_tokens, entry.checkpoint.config
    tables = {key.shape[0] for key in published(entry)[1].values() if key.shape}
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions in tables:
        assert longest is not None
        assert 0 <= positions - longest <= 2
    elif longest is None:
        adapter_class = entry.adapter_class()
        assert issubclass(adapter_class, TokenAdapter)
        assert adapter_class.unlimited
    else:
        sizes = [config.get(name) for name in ("max_position_embeddings", "seq_len", "pad_length")]
        sizes.append(getattr(entry.adapter_class().options.model_fields.get("max_length"), "default", None))
        assert any(isinstance(size, int) and 0 <= size - longest <= 2 for size in sizes), f"{longest} is none of {sizes}"


@each_network
def test_files(entry: Entry) -> None:
    weights = [name for name in entry.checkpoint.files if name.endswith((".safetensors", ".bin", ".pt", ".ckpt", ".torch", ".pth"))]
    assert weights, "no file of weights among the files"
    sizes = [entry.checkpoint.files[name].size for name in weights]
    parameters = entry.checkpoint.parameters
    if parameters is not None and None not in sizes:
        # 2 or 4 bytes each, several times over in a file of several models; and a header.
        bytes_each = sum(size for size in sizes if size is not None) / parameters
        assert bytes_each >= 2
        assert 0 <= bytes_each - round(bytes_each) < 0.02


# What a card may not say

CARD = Path(__file__).parent / "plugin_example/cellfm_plugin_example/model_cards/gc-content.md"
HASH = "a" * 64
FILES = f'{{model.safetensors: {{sha256: "{HASH}", size: 1}}}}'


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = CARD.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path / "gc-content.md"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tags: [example]", "tagz: [example]", "tagz: Extra inputs are not permitted"),
        ("  modality: sequence\n", "  modality: sequence\n  colour: red\n", "cellfm.colour: Extra inputs"),
        ("      parameters: 0", "      parameter: 0", "cellfm.checkpoints.gc-content.parameter: Extra inputs"),
        ("      parameters: 0", "      parameter: 0", "cellfm.checkpoints.gc-content.parameters: Field required"),
        ("      description: The plain", "      layer: 3\n      description: The plain", "cellfm.recipes.default.layer: Extra inputs"),
        ("      source: null # no weights", "      source: {hubb: a/b}", "cellfm.checkpoints.gc-content.source.hubb: Extra inputs"),
        (
            "      source: null # no weights",
            "      source: {hub: a/b}\n      files: {model.safetensors: {sha265: null, size: 1}}",
            "cellfm.checkpoints.gc-content.files.model.safetensors.sha265: Extra inputs",
        ),
        (
            "      source: null # no weights",
            f"      source: {{hub: a/b}}\n      files: {FILES.replace(HASH, 'abc')}",
            "cellfm.checkpoints.gc-content.files.model.safetensors.sha256: String should match pattern",
        ),
        (
            "      source: null # no weights",
            f"      source: {{hub: a/b}}\n      files: {FILES}\n      revision: {'1' * 40}",
            "cellfm.checkpoints.gc-content.revision: Input should be a valid string",
        ),
        ("      source: null # no weights", "      source: {hub: a/b}", "checkpoints.gc-content: has a source but lists no files"),
        ("      source: null # no weights", "      source: {hub: a/b, package: c}", "shipped in a package are fetched from nowhere"),
        (
            "      source: null # no weights",
            "      source: {package: c}\n      files: {model.safetensors: {sha256: null, size: 1}}",
            "checkpoints.gc-content: model.safetensors is shipped in c, so its sha256 can be given",
        ),
        ("      default: true\n", "", "exactly one must be the default, 0 are"),
        ("    default:\n", "    other:\n", "recipes: 'default' is missing"),
        ("  modality: sequence\n", "", "modality: set it for the family or for checkpoint 'gc-content'"),
        ("      commercial_use: true\n", "", "cellfm.checkpoints.gc-content.commercial_use: Field required"),
        ("      layers: null\n", "      layers: null\n      parameters: 7\n", "'parameters' stands twice, again in line 23"),
        ("license: apache-2.0\n", "license: [apache\n", "the front matter is not valid YAML"),
        ("---\nlicense", "license", "starts with YAML front matter"),
    ],
)
def test_wrong_card_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    """In one line that names the file and the exact place in it."""
    path = changed(tmp_path, old, new)
    with pytest.raises(CardError) as caught:
        read_card(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Give two folders of cards, of two packages, which are then all that the registry knows."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    monkeypatch.setattr(registry_module, "_card_folders", lambda: iter([(ours, "cellfm-hub"), (theirs, "rival")]))
    registry.cache_clear()
    yield ours, theirs
    registry.cache_clear()


@pytest.mark.parametrize(
    ("file", "change", "claimed"),
    [
        ("gc-content.md", ("", ""), "gc-content"),
        ("other.md", ("", ""), "gc-content"),
        ("other.md", ("    gc-content:\n", "    gc-two:\n      aliases: [GC-Content]\n"), "GC-Content"),
        ("gc.md", ("    gc-content:\n", "    gc-two:\n"), "gc"),
    ],
    ids=["family", "checkpoint", "alias", "family against alias"],
)
def test_duplicates_are_refused(folders: tuple[Path, Path], file: str, change: tuple[str, str], claimed: str) -> None:
    """A name, whatever it names, belongs to one card; the error names both owners."""
    ours, theirs = folders
    text = CARD.read_text(encoding="utf-8")
    (ours / "gc-content.md").write_text(text.replace("  title:", "  aliases: [gc]\n  title:"), encoding="utf-8")
    (theirs / file).write_text(text.replace(*change) if any(change) else text, encoding="utf-8")
    with pytest.raises(CardError) as caught:
        registry()
    message = str(caught.value)
    assert f"{claimed!r}" in message
    assert "cellfm-hub" in message
    assert "rival" in message


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "a/../../b"])
def test_a_folder_outside_the_published_root_is_refused(tmp_path: Path, folder: str) -> None:
    text = (FOLDER / "geneformer.md").read_text(encoding="utf-8")
    (tmp_path / "geneformer.md").write_text(text.replace("folder: Geneformer-V2-104M}", f"folder: {folder}}}"), encoding="utf-8")
    with pytest.raises(CardError, match=r"source\.folder.*not a path below the published root"):
        read_card(tmp_path / "geneformer.md")


def test_alias_of_two_checkpoints_is_refused(folders: tuple[Path, Path]) -> None:
    text = CARD.read_text(encoding="utf-8")
    second = (
        text[text.index("    gc-content:\n") : text.index("\n---\n", 5)]
        .replace("gc-content", "gc-two")
        .replace("default: true", "aliases: [gc-content]")
    )
    (folders[0] / "gc-content.md").write_text(text.replace("\n---\n", f"\n{second}\n---\n", 1), encoding="utf-8")
    with pytest.raises(CardError, match="two cards claim the model name 'gc-content'"):
        registry()


def test_files_that_are_no_cards(folders: tuple[Path, Path]) -> None:
    """A file whose name begins with an underscore is a template, not a card."""
    shutil.copy(CARD, folders[0] / "_template.md")
    assert registry().checkpoints == {}


def test_names_are_found_in_any_case() -> None:
    for entry in ENTRIES:
        for name in (entry.name, entry.name.upper(), *entry.checkpoint.aliases):
            assert registry().find(name).name == entry.name
    for family, card in registry().cards.items():
        defaults = [name for name, checkpoint in card.cellfm.checkpoints.items() if checkpoint.default]
        assert [registry().find(family).name] == defaults

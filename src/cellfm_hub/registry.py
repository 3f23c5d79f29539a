"""Which models there are: cards of this package and of installed plug-ins, found without importing any adapter."""

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cellfm_hub.cards import Card, CardError, Checkpoint, Fidelity, Modality, Recipe, Requires, read_card
from cellfm_hub.errors import ModelNotFoundError, did_you_mean

if TYPE_CHECKING:
    from cellfm_hub.adapter import Adapter

ENTRY_POINT_GROUP = "cellfm_hub.adapters"


@dataclass(frozen=True)
class ModelInfo:
    """What the card says of one checkpoint."""

    name: str
    family: str
    description: str
    modality: Modality
    default: bool
    """Whether the family's name means this checkpoint."""
    aliases: tuple[str, ...]
    embedding_dim: int | None
    layers: int | None
    max_tokens: int | None
    parameters: int | None
    licence: str
    commercial_use: bool | None
    source: str | None
    revision: str | None
    citation: str | None
    dataset_dependent: bool
    package: str
    """The distribution that ships the card."""


@dataclass(frozen=True)
class Entry:
    """A checkpoint together with its family's card."""

    name: str
    card: Card
    checkpoint: Checkpoint

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.card.name

    @property
    def modality(self) -> Modality:
        """``"cell"`` or ``"sequence"``."""
        modality = self.checkpoint.modality or self.card.cellfm.modality
        assert modality is not None  # the card's schema sees to it
        return modality

    @property
    def requires(self) -> Requires:
        """What the input must be."""
        requires = self.checkpoint.requires or self.card.cellfm.requires
        assert requires is not None
        return requires

    @property
    def adapter_path(self) -> str:
        """``package.module:Class``."""
        path = self.checkpoint.adapter or self.card.cellfm.adapter
        assert path is not None
        return path

    @property
    def licence(self) -> str:
        """SPDX id, or the name of the licence."""
        return self.checkpoint.licence or self.card.license_name or self.card.license

    @property
    def is_shipped(self) -> bool:
        """Whether its files travel inside an installed package."""
        source = self.checkpoint.source
        return source is not None and source.package is not None

    @property
    def dataset_dependent(self) -> bool:
        """Whether it is fitted to the file."""
        own = self.checkpoint.dataset_dependent
        return self.card.cellfm.dataset_dependent if own is None else own

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Named bundles of pooling and layer."""
        return self.card.cellfm.recipes

    @property
    def options(self) -> dict[str, str]:
        """Switches, with a line on each."""
        own = self.checkpoint.options
        return self.card.cellfm.options if own is None else own

    def fidelity(self, precision: str) -> Fidelity | None:
        """Measured agreement of a half precision with float32, or ``None``."""
        return self.checkpoint.fidelity.get(precision)  # type: ignore[call-overload, no-any-return]

    def adapter_class(self) -> "type[Adapter]":
        """Import the adapter; the only place where that happens."""
        module, _, attribute = self.adapter_path.partition(":")
        adapter: type[Adapter] = getattr(importlib.import_module(module), attribute)
        return adapter

    def info(self) -> ModelInfo:
        """Return the flat summary that users see."""
        checkpoint = self.checkpoint
        return ModelInfo(
            name=self.name,
            family=self.family,
            description=checkpoint.description,
            modality=self.modality,
            default=checkpoint.default,
            aliases=checkpoint.aliases,
            embedding_dim=checkpoint.embedding_dim,
            layers=checkpoint.layers,
            max_tokens=checkpoint.max_tokens,
            parameters=checkpoint.parameters,
            licence=self.licence,
            commercial_use=checkpoint.commercial_use,
            source=_place_of(checkpoint),
            revision=checkpoint.revision,
            citation=self.card.cellfm.citation,
            dataset_dependent=self.dataset_dependent,
            package=self.card.owner,
        )


def _place_of(checkpoint: Checkpoint) -> str | None:
    source = checkpoint.source
    if source is None:
        return None
    return f"the installed package {source.package}" if source.package else source.hub or source.url


def _own_cards() -> Path:
    """Return the folder of the cards shipped with the hub: inside the package, or (editable install) at the top of the checkout."""
    package = Path(__file__).parent
    inside = package / "model_cards"
    return inside if inside.is_dir() else package.parents[1] / "model_cards"


def _card_folders() -> Iterator[tuple[Path, str]]:
    yield _own_cards(), "cellfm-hub"
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        owner = entry_point.dist.name if entry_point.dist else entry_point.name
        # find_spec locates a top-level package without running it.
        spec = importlib.util.find_spec(entry_point.value) if "." not in entry_point.value else None
        folders = [Path(place) / "model_cards" for place in (spec.submodule_search_locations or [])] if spec else []
        folder = next((f for f in folders if f.is_dir()), None)
        if folder is None:
            warnings.warn(
                f"plug-in {owner!r} names {entry_point.value!r}, which has no model_cards folder; it is left out",
                stacklevel=2,
            )
        else:
            yield folder, owner


@dataclass(frozen=True)
class Registry:
    """All names: exact checkpoints, families, and aliases of both."""

    cards: dict[str, Card]
    checkpoints: dict[str, Entry]
    names: dict[str, str]
    """Any accepted name, lower case -> name of a checkpoint."""

    def find(self, name: str) -> Entry:
        """Return the checkpoint that `name` stands for.

        Raises
        ------
        ModelNotFoundError
            With the nearest names.
        """
        try:
            return self.checkpoints[self.names[str(name).strip().lower()]]
        except KeyError:
            msg = f"no model is called {name!r}.{did_you_mean(str(name), self.names)} 'cellfm models' lists all of them"
            raise ModelNotFoundError(msg) from None


@cache
def registry() -> Registry:
    """Read every card. Cached; ``registry.cache_clear()`` after installing a plug-in in a running process."""
    cards: dict[str, Card] = {}
    checkpoints: dict[str, Entry] = {}
    names: dict[str, str] = {}
    owners: dict[str, str] = {}

    def claim(name: str, checkpoint: str, owner: str) -> None:
        taken = names.setdefault(name.lower(), checkpoint)
        if taken != checkpoint or owners.get(name.lower(), owner) != owner:
            msg = f"two cards claim the model name {name!r}: {owners[name.lower()]} and {owner}; uninstall one of them"
            raise CardError(msg)
        owners[name.lower()] = owner

    for folder, owner in _card_folders():
        for path in sorted(folder.glob("[!_]*.md")):
            card = read_card(path, owner=owner)
            if card.name in cards:
                msg = f"two packages have a card for family {card.name!r}: {cards[card.name].owner} and {owner}; uninstall one of them"
                raise CardError(msg)
            cards[card.name] = card
            origin = f"{owner} ({path.name})"
            for name, checkpoint in card.cellfm.checkpoints.items():
                checkpoints[name] = Entry(name, card, checkpoint)
                for alias in (name, *checkpoint.aliases):
                    claim(alias, name, origin)
                if checkpoint.default:
                    for alias in (card.name, *card.cellfm.aliases):
                        claim(alias, name, origin)
    return Registry(cards, checkpoints, names)


def list_models(*, modality: Modality | None = None, commercial: bool | None = None, family: str | None = None) -> list[ModelInfo]:
    """List the models the hub knows. Imports no adapter and reads no weights.

    Parameters
    ----------
    modality
        ``"cell"`` or ``"sequence"``; ``None`` for both.
    commercial
        ``True``: only models whose weights may be used commercially; ``False``: only the others, unknown ones included.
    family
        Only this family.

    Returns
    -------
    One :class:`ModelInfo` per checkpoint, by family.
    """
    infos = [entry.info() for entry in registry().checkpoints.values()]
    return [
        info
        for info in infos
        if (modality is None or info.modality == modality)
        and (commercial is None or (info.commercial_use is True) == commercial)
        and (family is None or info.family == family)
    ]


def markdown_table() -> str:
    """Return the table of models that stands in the README."""

    def number(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    heading = ["model", "family", "input", "width", "layers", "tokens", "parameters", "licence", "commercial use"]
    rows = [heading, ["---"] * len(heading)]
    for info in list_models():
        default = " (default)" if info.default and info.family != info.name else ""
        allowed = "not known" if info.commercial_use is None else "yes" if info.commercial_use else "no"
        sizes = [number(n) for n in (info.embedding_dim, info.layers, info.max_tokens, info.parameters)]
        rows.append([f"`{info.name}`{default}", info.family, f"{info.modality}s", *sizes, info.licence, allowed])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def weights_table() -> str:
    """Return the table of the README that says where each family's weights come from, under which licence, and how large they are."""
    heading = ["family", "weights", "from", "mirrors", "licence", "commercial use", "download"]
    rows = [heading, ["---"] * len(heading)]
    for name, card in registry().cards.items():
        groups: dict[tuple[str, str, str, str], list[Entry]] = {}
        for entry in (e for e in registry().checkpoints.values() if e.family == name and e.checkpoint.source is not None):
            groups.setdefault(_provenance(entry), []).append(entry)
        for (places, mirrors, licence, allowed), entries in groups.items():
            shown = f"`{entries[0].name}`" if len(entries) == 1 else f"{len(entries)} checkpoints"
            rows.append([card.name, shown, places, mirrors, licence, allowed, _download_sizes(entries)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _provenance(entry: Entry) -> tuple[str, str, str, str]:
    checkpoint = entry.checkpoint
    source = checkpoint.source
    assert source is not None
    places = [f"Hugging Face `{source.hub}`"] if source.hub else ["in the package"] if source.package else []
    places += sorted({str(urlsplit(file.url).hostname) for file in checkpoint.files.values() if file.url})
    if not places:
        places = [f"by hand from {urlsplit(source.url or '').hostname}"]
    mirrors = [f"Hugging Face `{mirror.hub}`" if mirror.hub else str(urlsplit(mirror.url or "").hostname) for mirror in source.mirrors]
    allowed = "not known" if checkpoint.commercial_use is None else "yes" if checkpoint.commercial_use else "no"
    return ", ".join(places), ", ".join(mirrors), entry.licence, allowed


def _download_sizes(entries: list[Entry]) -> str:
    """Add up what the cards know. Small configuration files, whose sizes are often not recorded, do not make a sum unknown."""
    sums = []
    for entry in entries:
        sizes = {path: file.size for path, file in entry.checkpoint.files.items() if file.archive is None}
        if all(size is not None or path.endswith("config.json") for path, size in sizes.items()):
            sums.append(sum(size or 0 for size in sizes.values()))

    def number(size: int) -> str:
        return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"

    if not sums:
        return "not known"
    span = number(sums[0]) if min(sums) == max(sums) else f"{number(min(sums))} to {number(max(sums))}"
    unknown = len(entries) - len(sums)
    return span + (f" ({unknown} not known)" if unknown else "")

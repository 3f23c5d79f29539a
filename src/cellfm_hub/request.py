"""One call of ``encode``: what may be asked for, and what was."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch

from cellfm_hub.adapter import Adapter, CellAdapter, TokenAdapter
from cellfm_hub.cards import Recipe
from cellfm_hub.engine.device import choose_batch_tokens
from cellfm_hub.errors import InputError, SpeciesError, UsageError, did_you_mean
from cellfm_hub.registry import Entry
from cellfm_hub.sequences import Long
from cellfm_hub.sources.genome import WINDOW

Level = Literal["cell", "gene", "sequence", "token", "base", "variant"]
OnEmpty = Literal["nan", "error"]

LEVELS: dict[str, tuple[Level, ...]] = {"cell": ("cell", "gene"), "sequence": ("sequence", "token", "base", "variant")}
"""Modality -> its levels, first the default: one vector per input."""


class EncodeOptions(TypedDict, total=False):
    """Keyword options of :meth:`Embedder.encode`."""

    layer: str | None
    gene_ids: str | None
    species: str | None
    recipe: str
    pooling: str | None
    output_layer: int | None
    batch_tokens: int | None
    seed: int | None
    on_empty: OnEmpty | None
    progress: bool | None
    long: Long
    overlap: int
    reverse_complement: Literal["mean"] | None
    genome: str | Path | None
    window: int


PER_TOKEN: tuple[Level, ...] = ("gene", "token", "base")
"""Levels with a vector for every token of an input."""
NEUTRAL: dict[str, Any] = {"long": "error", "overlap": 0, "window": WINDOW, "on_empty": "nan"}
"""What options are that were not given, where that is not ``None``."""

_CHANGES_NOTHING = {"batch_tokens", "progress"}
"""Options on which no vector and no message depends, beyond rounding."""


@dataclass(frozen=True)
class Request:
    """One call of ``encode`` after validation."""

    level: Level
    recipe: str
    pooling: str | None
    """``None`` for one vector per token."""
    normalize: bool
    """Whether vectors are scaled to length 1."""
    output_layer: int
    """Counted from the front."""
    layer: str | None
    gene_ids: str | None
    species: str | None
    dataset_dependent: bool
    """Whether a vector may depend on the other rows."""
    batch_tokens: int
    seed: int
    on_empty: OnEmpty | None
    progress: bool | None
    long: Long
    overlap: int
    reverse_complement: Literal["mean"] | None
    genome: str | Path | None
    window: int

    def asked(self, said: Collection[str]) -> dict[str, Any]:
        """Return the options that were given, without those of which a receipt speaks by itself (`said`)."""
        every = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in {*said, *_CHANGES_NOTHING}}
        return {name: value for name, value in every.items() if value and value != NEUTRAL.get(name)}

    @property
    def per_token(self) -> bool:
        """Whether vectors are not pooled."""
        return self.pooling is None


def make_request(
    name: str,
    entry: Entry,
    adapter: Adapter,
    *,
    device: torch.device,
    default_batch_tokens: int | None,
    default_seed: int,
    orthologs: bool = False,
    level: Level | None = None,
    **given: Unpack[EncodeOptions],
) -> Request:
    """Validate the options of a call of ``encode`` and fill in the defaults.

    Parameters
    ----------
    name, entry, adapter, device
        The loaded model.
    default_batch_tokens, default_seed
        What :func:`cellfm_hub.load` was given.
    orthologs
        Whether mouse genes are read as human ones.
    level, given
        What the user gave.

    Raises
    ------
    InputError
        Naming the option, what it may be, and what to do.
    """
    check_options(name, entry, level=level, **given)
    level = level or LEVELS[entry.modality][0]
    recipe = given.get("recipe", "default")
    if species := given.get("species"):
        check_species(species, name, entry, adapter, also=("mouse",) if orthologs else ())
    per_token = level in PER_TOKEN
    pooling, output_layer = _network_choices(
        name, entry.recipes[recipe], adapter, given.get("pooling"), given.get("output_layer"), per_token=per_token
    )
    chosen = entry.recipes[recipe]
    budget = given.get("batch_tokens")
    seed = given.get("seed")
    return Request(
        level=level,
        recipe=recipe,
        pooling=pooling,
        normalize=chosen.normalize and not per_token and given.get("pooling") in (None, chosen.pooling),
        output_layer=output_layer,
        layer=given.get("layer"),
        gene_ids=given.get("gene_ids"),
        species=species,
        dataset_dependent=entry.dataset_dependent or adapter.dataset_dependent or chosen.dataset_dependent,
        batch_tokens=choose_batch_tokens(default_batch_tokens if budget is None else budget, device),
        seed=default_seed if seed is None else seed,
        on_empty=given.get("on_empty"),
        progress=given.get("progress"),
        long=given.get("long", "error"),
        overlap=given.get("overlap", 0),
        reverse_complement=given.get("reverse_complement"),
        genome=given.get("genome"),
        window=given.get("window", WINDOW),
    )


def check_options(name: str, entry: Entry, *, level: Level | None = None, **given: Unpack[EncodeOptions]) -> None:
    """Raise if options of ``encode`` are not those of such a model, have no such value, or do not go together.

    Tells what can be told from the card, before a file of the model is fetched.

    Raises
    ------
    UsageError
        If one is not an option of such models, or would have no effect beside the others.
    InputError
        If one has no such value.
    """
    levels = LEVELS[entry.modality]
    level = level or levels[0]
    if level not in levels:
        msg = f"level={level!r} is not one of {name}, a model of {entry.modality}s; use {' or '.join(map(repr, levels))}"
        raise InputError(msg)
    check_modality(f"{name}, a model of {entry.modality}s", entry.modality, **given)
    for option, allowed in (
        ("on_empty", (None, "nan", "error")),
        ("long", ("error", "truncate", "tile")),
        ("reverse_complement", (None, "mean")),
    ):
        if option in given and given[option] not in allowed:  # type: ignore[literal-required]
            msg = f"{option}={given[option]!r} is not known; use {' or '.join(map(repr, allowed))}"  # type: ignore[literal-required]
            raise InputError(msg)
    if given.get("overlap", 0) < 0:
        msg = f"overlap={given['overlap']}; expected a number of bases, 0 or more"
        raise InputError(msg)
    if given.get("window", WINDOW) < 1:
        msg = f"window={given['window']}; expected a number of bases, 1 or more"
        raise InputError(msg)
    recipe = given.get("recipe", "default")
    if recipe not in entry.recipes:
        nearest = did_you_mean(recipe, entry.recipes)
        msg = f"recipe={recipe!r} is not one of {name}.{nearest} It has {', '.join(entry.recipes)}"
        raise InputError(msg)
    if given.get("overlap") and given.get("long", "error") != "tile":
        msg = f"overlap={given['overlap']} is what windows share, and only long='tile' makes windows; pass that too, or leave out overlap"
        raise UsageError(msg)
    if given.get("reverse_complement") and level in PER_TOKEN:
        msg = f"reverse_complement='mean' averages whole vectors; with level={level!r} embed the other strand by itself"
        raise UsageError(msg)
    if given.get("pooling") and level in PER_TOKEN:
        msg = (
            f"pooling={given['pooling']!r} is not possible with level={level!r}: one vector per token is not pooled, leave one of them out"
        )
        raise UsageError(msg)


def check_modality(what: str, modality: str, **given: Unpack[EncodeOptions]) -> None:
    """Raise a UsageError if an option is for the other kind of data than `what`, cells or sequences."""
    of_sequences = ("long", "overlap", "reverse_complement", "genome", "window")
    foreign = of_sequences if modality == "cell" else ("layer", "gene_ids", "species")
    if wrong := [option for option in foreign if given.get(option, NEUTRAL.get(option)) != NEUTRAL.get(option)]:
        msg = f"{', '.join(wrong)}: not an option of {what}; leave it out"
        raise UsageError(msg)


def known_species(entry: Entry, adapter: Adapter) -> tuple[str, ...]:
    """Return the species that a model knows; none if it takes any."""
    return (adapter.species if isinstance(adapter, CellAdapter) else ()) or tuple(entry.requires.species)


def check_species(species: str, name: str, entry: Entry, adapter: Adapter, also: Sequence[str] = ()) -> None:
    """Raise a SpeciesError unless the model knows the species, or it is one of `also`."""
    known = known_species(entry, adapter)
    if known and species not in (*known, *also):
        msg = f"species={species!r}, but {name} is a model of {', '.join(known)}; 'cellfm models' lists others"
        raise SpeciesError(msg)


def _network_choices(
    name: str, recipe: Recipe, adapter: Adapter, pooling: str | None, output_layer: int | None, *, per_token: bool
) -> tuple[str | None, int]:
    """Return the pooling, ``None`` for one vector per token, and the layer counted from the front."""
    if not isinstance(adapter, TokenAdapter):
        if pooling is not None or output_layer is not None or per_token:
            msg = f"{name} is a plain function of its input, without layers or tokens; leave out pooling, output_layer and level"
            raise InputError(msg)
        return "", 0
    if pooling is not None and pooling not in adapter.poolings:
        msg = f"pooling={pooling!r} is not possible with {name}: use {', '.join(map(repr, adapter.poolings))}"
        raise InputError(msg)
    chosen = pooling or recipe.pooling or adapter.poolings[0]
    if chosen not in adapter.poolings:
        msg = f"the card of {name} names the pooling {chosen!r} in a recipe, but the model has {', '.join(map(repr, adapter.poolings))};"
        raise InputError(msg + " pass one of these as pooling=")
    wanted = recipe.output_layer if output_layer is None else output_layer
    layer = wanted if wanted >= 0 else adapter.layers + 1 + wanted
    if not 0 <= layer <= adapter.layers:
        msg = f"output_layer={wanted} is not in {name}: use 0 (embedding output) to {adapter.layers},"
        msg += f" or -1 (last) to {-adapter.layers - 1}"
        raise InputError(msg)
    return (None if per_token else chosen), layer

"""Model cards: ``model_cards/<family>.md``, whose YAML front matter is the registration of a family.

The top-level keys are those of the Hugging Face hub, so that a card is a valid hub card; ours stand under ``cellfm:``.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cellfm_hub.errors import CellFMError

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Modality = Literal["cell", "sequence"]


def _encrypted(url: str) -> str:
    """Accept ``https://``, and plain http only to a server on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        msg = f"{url!r} is not an https:// address"
        raise ValueError(msg)
    return url


Url = Annotated[str, AfterValidator(_encrypted)]


def _stays_inside(path: str) -> str:
    """Accept a relative path that never climbs out of its folder."""
    if not path or path.startswith(("/", "\\")) or ":" in path or ".." in re.split(r"[/\\]", path):
        msg = f"{path!r} is not a path below the published root"
        raise ValueError(msg)
    return path


PublishedPath = Annotated[str, AfterValidator(_stays_inside)]


class CardError(CellFMError):
    """A model card is malformed."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Strict):
    """One published file. What was never seen is ``None``, not a guess."""

    sha256: Sha256 | None
    size: int | None
    """Bytes."""
    revision: Commit | None = None
    """Where it differs from the checkpoint's: a file that was added to the repository later."""
    url: Url | None = None
    """Address of this very file, where it is not in the checkpoint's hub repository (figshare, zenodo, a plain server)."""
    archive: PublishedPath | None = None
    """Published path of the tar or zip archive (itself one of the files) that holds this one, under the same path or base name."""
    optional: bool = False
    """The model works without it, with less (one species of several, say): ``add`` and ``bundle`` do not ask for it."""


class Recipe(_Strict):
    """A named bundle of choices that turns hidden states into one vector."""

    description: str
    output_layer: int = -1
    """0 = embedding output, k = after block k, -1 = last."""
    pooling: str | None = None
    """``None``: the checkpoint's own default."""
    normalize: bool = False
    """Scale each vector to length 1; left out where the user asks for another pooling than the recipe's."""
    dataset_dependent: bool = False
    """A vector depends on the other rows of the data; the adapter surveys them first."""


class Requires(_Strict):
    """What the input must be."""

    values: Literal["counts", "log counts", "sequences"]
    ids: str | None = None
    """The kind of gene identifier, e.g. ``Ensembl``."""
    species: tuple[str, ...] = ()


class Mirror(_Strict):
    """Another place with the same files, asked when the places before it have failed."""

    hub: str | None = None
    """Repository on the Hugging Face hub, with its `revision`."""
    revision: Commit | None = None
    url: Url | None = None
    """Or the address of a folder on a plain server, to which a file's path is appended."""
    names: dict[PublishedPath, PublishedPath] = Field(default_factory=dict)
    """Published path -> path there, of the files it has. Empty: all of them, under their own paths."""

    @model_validator(mode="after")
    def _one_place(self) -> "Mirror":
        if (self.hub is None) == (self.url is None) or (self.hub is None) != (self.revision is None):
            msg = "a mirror is a hub repository with a revision, or the url of a folder"
            raise ValueError(msg)
        return self


class Source(_Strict):
    """Where the files of a checkpoint are published."""

    hub: str | None = None
    """Repository on the Hugging Face hub."""
    folder: Literal[""] | PublishedPath = ""
    """Folder of the repository that holds the weights; other files are named from the repository's root."""
    url: str | None = None
    """Page or folder for people (Google Drive, SharePoint): files are fetched by hand from there, unless they have a url of their own."""
    package: str | None = None
    """Importable name of an installed package that holds the files, for checkpoints small enough to travel with the software."""
    mirrors: tuple[Mirror, ...] = ()
    """Asked in this order after `hub` or the file's own url."""

    @model_validator(mode="after")
    def _shipped_or_fetched(self) -> "Source":
        if self.package is not None and (self.hub is not None or self.url is not None or self.mirrors):
            msg = "files that are shipped in a package are fetched from nowhere: give package alone, or hub, url and mirrors"
            raise ValueError(msg)
        return self


class Fidelity(_Strict):
    """Worst row of a half-precision run against float32, on random weights of the published shape."""

    cosine_min: float
    centred_error_p99: float | None
    """99th percentile of ``|x16 - x32| / |x32 - mean|``; ``None`` where too few rows could be run."""


class Checkpoint(_Strict):
    """One published set of weights."""

    aliases: tuple[str, ...] = ()
    description: str
    default: bool = False
    source: Source | None
    """``None``: the model has no weights."""
    revision: Commit | None = None
    files: dict[PublishedPath, File] = Field(default_factory=dict)
    """Path below the published root -> what is known of it."""
    config: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """The keys of the published ``config.json`` that fix the network."""
    parameters: int | None
    """Numbers in the published file, heads included, a tied matrix once."""
    embedding_dim: int | None
    layers: int | None
    max_tokens: int | None
    licence: str | None = None
    """SPDX id; ``None``: the card's."""
    commercial_use: bool | None
    """``None``: not known."""
    fidelity: dict[Literal["bfloat16", "float16"], Fidelity] = Field(default_factory=dict)
    adapter: str | None = None
    modality: Modality | None = None
    requires: Requires | None = None
    dataset_dependent: bool | None = None
    options: dict[str, str] | None = None
    """Where they differ from the family's."""


class SelfTest(_Strict):
    """One array of a golden case that ``cellfm selftest`` compares with."""

    case: str
    """Folder of the golden case."""
    expected: str
    """The array, one row per input."""
    input: str = ""
    """File with the input."""
    tokens: tuple[str, str] | None = None
    """Instead of `input`: arrays of padded token ids and of lengths, for models that sample."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Of ``load``."""
    encode: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Keywords of ``encode`` or ``encode_tokens``."""

    @model_validator(mode="after")
    def _one_input(self) -> "SelfTest":
        if bool(self.input) == (self.tokens is not None):
            msg = f"selftest {self.case}: give input or tokens"
            raise ValueError(msg)
        return self


class Recorded(_Strict):
    """The beginning of a vector that somebody computed with published weights and the original code."""

    checkpoint: str
    sequence: str
    pooling: str
    first: tuple[float, ...]


class RecordedVectors(_Strict):
    """Vectors of published weights, and who recorded them."""

    source: str
    vectors: tuple[Recorded, ...]


class Family(_Strict):
    """The ``cellfm:`` block of a card."""

    adapter: str | None = None
    """``package.module:Class``, imported only when a model is loaded. Here, or at every checkpoint."""
    modality: Modality | None = None
    title: str
    aliases: tuple[str, ...] = ()
    citation: str | None
    """DOI of the paper."""
    requires: Requires | None = None
    dataset_dependent: bool = False
    """Fitted to the file: a vector depends on the other rows."""
    recipes: dict[str, Recipe]
    options: dict[str, str] = Field(default_factory=dict)
    """Switch of the family -> what it does, allowed values and default. A test compares them with the adapter's."""
    selftests: tuple[SelfTest, ...] = ()
    recorded: RecordedVectors | None = None
    """Last layer, float32."""
    checkpoints: dict[ModelName, Checkpoint]

    @model_validator(mode="after")
    def _complete(self) -> "Family":
        if "default" not in self.recipes:
            msg = "recipes: 'default' is missing"
            raise ValueError(msg)
        if (defaults := sum(c.default for c in self.checkpoints.values())) != 1:
            msg = f"checkpoints: exactly one must be the default, {defaults} are"
            raise ValueError(msg)
        for name, checkpoint in self.checkpoints.items():
            for field in ("adapter", "modality", "requires"):
                if getattr(checkpoint, field) is None and getattr(self, field) is None:
                    msg = f"{field}: set it for the family or for checkpoint {name!r}"
                    raise ValueError(msg)
            if checkpoint.source is not None and not checkpoint.files:
                msg = f"checkpoints.{name}: has a source but lists no files"
                raise ValueError(msg)
            for path, file in checkpoint.files.items():
                if checkpoint.source is not None and checkpoint.source.package is not None and file.sha256 is None:
                    msg = f"checkpoints.{name}: {path} is shipped in {checkpoint.source.package}, so its sha256 can be given"
                    raise ValueError(msg)
                if file.archive is not None and (file.archive == path or file.archive not in checkpoint.files):
                    msg = f"checkpoints.{name}: {path} is said to be in {file.archive}, which is not one of the other files"
                    raise ValueError(msg)
        return self


class Card(_Strict):
    """A whole model card: hub keys, our block and the prose."""

    name: ModelName
    license: str
    library_name: Literal["cellfm-hub"]
    pipeline_tag: Literal["feature-extraction"]
    license_name: str | None = None
    license_link: str | None = None
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    cellfm: Family
    text: str
    owner: str
    """The distribution that ships the card."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML would quietly take the last. Also aliases: a few lines can stand for billions."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002, theirs
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"{key.value!r} stands twice, again in line {key.start_mark.line + 2}"  # behind the line of '---'
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n(.*)\Z", re.DOTALL)


def read_card(path: Path, *, owner: str = "cellfm-hub") -> Card:
    """Read and validate one card.

    Raises
    ------
    CardError
        Naming the file and the exact place in it.
    """
    try:
        match = _FRONT_MATTER.match(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        msg = f"{path}: a model card is a text file in UTF-8 ({error})"
        raise CardError(msg) from error
    if match is None:
        msg = f"{path}: a model card starts with YAML front matter between two lines of '---'"
        raise CardError(msg)
    try:
        front: Any = yaml.load(match[1], _Loader)  # noqa: S506, a safe loader
        if not isinstance(front, dict):
            msg = f"{path}: the front matter is not a mapping"
            raise CardError(msg)
        return Card.model_validate({**front, "name": path.stem, "text": match[2].strip(), "owner": owner})
    except yaml.YAMLError as error:
        msg = f"{path}: the front matter is not valid YAML ({str(error).splitlines()[0]})"
        raise CardError(msg) from error
    except ValidationError as error:
        places = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        msg = f"{path}: {places}"
        raise CardError(msg) from error
    except (ValueError, TypeError, RecursionError) as error:  # a number of thousands of digits, a date in month 13, a list as a key
        msg = f"{path}: the front matter holds a value that YAML cannot read ({' '.join(str(error).split())[:200]})"
        raise CardError(msg) from error

"""Registries: what the zoo knows by name, found without importing it.

An entry may be an object or the string `"module:attribute"`, which is imported at first use. Domains register
strings, so that listing costs nothing; other packages register through entry points:

    [project.entry-points."zoo.tasks"]
    "graph/my-task" = "my_package.tasks:MyTask"
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, overload

from zoo.errors import ConfigError, UnknownNameError
from zoo.names import DOMAINS, match, suggestion

T = TypeVar("T")
F = TypeVar("F")
_log = logging.getLogger("zoo")
_lock = threading.RLock()
_domains_imported = False


def import_domains() -> None:
    """Import every `zoo.<domain>` package once; they are light, since they register strings."""
    global _domains_imported
    with _lock:
        if _domains_imported:
            return
        _domains_imported = True  # set first: a look-up made while a domain registers must not recurse
        for domain in DOMAINS:
            importlib.import_module(f"zoo.{domain}")


def _address(entry: object) -> str | None:
    """`module:qualified.name` of an entry: tells that a lazy string and an object are the same thing.

    Lambdas and local functions have no address that names only one of them.
    """
    if isinstance(entry, str):
        return entry
    if isinstance(entry, EntryPoint):
        return entry.value
    module, name = getattr(entry, "__module__", None), getattr(entry, "__qualname__", None)
    return f"{module}:{name}" if module and name and "<" not in name else None


class Registry(Generic[T]):
    """Entries of one kind by name.

    Args:
        kind: what an entry is called in messages, e.g. `"task"`.
        entry_point_group: group under which other packages add entries; None if they cannot.
        needs: methods that an entry must have, checked when it is registered or, if lazy, at first use.
            Without `needs` an entry must be callable.
        factories: whether a callable that makes such an entry does as well.
    """

    def __init__(
        self,
        kind: str,
        entry_point_group: str | None = None,
        needs: tuple[str, ...] = (),
        factories: bool = False,
    ) -> None:
        self.kind = kind
        self.entry_point_group = entry_point_group
        self._needs = needs
        self._factories = factories
        self._entries: dict[str, Any] = {}
        self._plugins_read = entry_point_group is None

    @overload
    def register(self, name: str) -> Callable[[F], F]: ...
    @overload
    def register(self, name: str, entry: F) -> F: ...

    def register(self, name: str, entry: Any = None) -> Any:
        """Add `entry` (an object or `"module:attribute"`) under `name`; without `entry`, decorate an object.

        Registering the same thing again, also lazily and then by the decorator in its module, does nothing.

        Raises:
            ConfigError: the name is taken by something else, or the entry is not what this registry holds.
        """
        if entry is None:

            def decorate(decorated: Any) -> Any:
                self.register(name, decorated)
                return decorated

            return decorate
        if not name or name != name.strip():
            raise ConfigError(f"{self.kind} name {name!r} is empty or padded with blanks. Give it a name.")
        self._check(name, entry)
        with _lock:
            old = self._entries.get(name)
            same = old is entry or (_address(old) is not None and _address(old) == _address(entry))
            if old is not None and not same:
                raise ConfigError(
                    f"{self.kind} {name!r} is already registered as {_address(old) or old!r}, received "
                    f"{_address(entry) or entry!r}. Choose another name."
                )
            if old is None or isinstance(old, (str, EntryPoint)):
                self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """The entry called `name`, imported if it was not yet.

        Raises:
            UnknownNameError: nobody registered it; the message has near misses.
            ConfigError: it cannot be imported or is not what this registry holds; the message has its origin.
        """
        self._discover()
        if name not in self._entries:
            raise UnknownNameError(f"Unknown {self.kind} {name!r}. {suggestion(name, self._entries)}")
        entry = self._entries[name]
        if isinstance(entry, (str, EntryPoint)):
            loaded = self._load(name, entry)
            self._check(name, loaded)
            self._entries[name] = entry = loaded
        return entry

    def names(self, glob: str = "*") -> list[str]:
        """Names that `glob` matches, in natural order. Imports no entry."""
        self._discover()
        return match(self._entries, glob)

    def broken(self) -> dict[str, str]:
        """Import every entry (slow) and give the message of each that fails, by name."""
        failures = {}
        for name in self.names():
            try:
                self.get(name)
            except ConfigError as error:
                failures[name] = str(error)
        return failures

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def _check(self, name: str, entry: object) -> None:
        if isinstance(entry, EntryPoint):
            return
        if isinstance(entry, str):
            module, colon, attribute = entry.partition(":")
            if not (module and colon and attribute):
                raise ConfigError(
                    f"{self.kind} {name!r}: expected an object or 'module:attribute', received {entry!r}."
                )
            return
        if self._factories and callable(entry):
            return
        missing = [need for need in self._needs if not callable(getattr(entry, need, None))]
        if missing or not (self._needs or callable(entry)):
            what = f"has no method {missing[0]}()" if missing else "is not callable"
            raise ConfigError(
                f"{self.kind} {name!r}: {_address(entry) or repr(entry)[:80]} {what}. "
                f"Register a {'class or object with it' if missing else 'function or class'}."
            )

    def _load(self, name: str, entry: str | EntryPoint) -> Any:
        if isinstance(entry, EntryPoint):
            try:
                return entry.load()
            except Exception as error:  # a foreign module may raise anything; name where it is from
                raise ConfigError(
                    f"{self.kind} {name!r} of the plug-in {_distribution(entry)!r} cannot be loaded from "
                    f"{entry.value}: {type(error).__name__}: {error}. Update or uninstall that plug-in."
                ) from error
        module_name, _, attribute = entry.partition(":")
        try:
            target: Any = importlib.import_module(module_name)
            for part in attribute.split("."):
                target = getattr(target, part)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "zoo":
                raise
            extra = name.partition("/")[0]
            remedy = f"'sparse-model-zoo[{extra}]'" if extra in DOMAINS else error.name
            raise ConfigError(
                f"{self.kind} {name!r} needs the package {error.name!r}, which is not installed. "
                f"Run: pip install {remedy}"
            ) from error
        except AttributeError as error:
            raise ConfigError(
                f"{self.kind} {name!r} is registered as {entry}, which does not exist: {error}."
            ) from error
        return target

    def _discover(self) -> None:
        import_domains()
        if self._plugins_read or self.entry_point_group is None:
            return
        with _lock:
            if self._plugins_read:
                return
            for entry in entry_points(group=self.entry_point_group):
                try:
                    self.register(entry.name, entry)
                except ConfigError as error:  # one bad plug-in must not take the others down
                    _log.warning("The plug-in %r is ignored: %s", _distribution(entry), error)
            self._plugins_read = True


def _distribution(entry: EntryPoint) -> str:
    """Name of the distribution that declares an entry point."""
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


ARCHITECTURES: Registry[Callable[..., Any]] = Registry("architecture", "zoo.architectures")
METHODS: Registry[Any] = Registry("method", "zoo.methods", needs=("sparsify",))
TASKS: Registry[Any] = Registry("task", "zoo.tasks", needs=("evaluate",), factories=True)
STUDIES: Registry[Any] = Registry("study", "zoo.studies", needs=("run", "report"))
#: domain/name -> function that returns a data set, with an attribute `source` for cards
DATASETS: Registry[Callable[[], Any]] = Registry("data set", "zoo.datasets")
#: domain -> function of a data set's name or file: the task that is measured on it, None if models only train
#: on it, and its `Source`
MEASURED: Registry[Callable[[str], Any]] = Registry("measure of data", "zoo.measured")
#: domain -> function of a data set's name or file: the content whose digest goes on cards of models that were
#: trained on it, None if the name is none of a data set of the domain
CONTENTS: Registry[Callable[[str], Any]] = Registry("content of data", "zoo.contents")
FINETUNERS: Registry[Any] = Registry("fine-tuner", "zoo.finetuners", needs=("run",))
#: domain -> `make_job(dataset, *, recipe, seed, device, model) -> zoo.Job`, behind `zoo sparsify`
JOBS: Registry[Callable[..., Any]] = Registry("maker of jobs", "zoo.jobs")
#: domain -> function of a model: a sample of noise of the size that its data have, where the data are not at
#: hand; None where that size is not known
EXAMPLES: Registry[Callable[..., Any]] = Registry("maker of examples")
#: domain -> dataclass with `run() -> Path`, behind `zoo pretrain`
PRETRAINERS: Registry[Any] = Registry("pre-trainer", "zoo.pretrainers", needs=("run",))
#: how the model of a recipe row is made: function of row, seed, start and place, see `zoo.bundles.make`
MAKERS: Registry[Callable[..., Any]] = Registry("maker", "zoo.makers")
#: domain -> function that returns the path of further recipe rows, see `zoo.bundles.recipes`
RECIPES: Registry[Callable[[], Any]] = Registry("recipes", "zoo.recipes")
#: domain/marker file (or file:field of its JSON) -> function behind `zoo sparsify FOLDER` for folders of
#: another library
FOLDERS: Registry[Any] = Registry("folder handler", "zoo.folders")
#: domain -> function of a folder that another library wrote: the tensors and extras of its model, as the
#: domain's bundles have them; of other domains the tensors are those of the safetensors, by their names
BASE_READERS: Registry[Any] = Registry("reader of public models")
#: library -> class of `zoo.recipes.check.Library`: how recipes for models of that library are tried
RECIPE_CHECKS: Registry[Any] = Registry("recipe check", "zoo.recipe_checks", needs=("base", "zeros"))
#: domain -> function that lets a model of the domain write, behind `zoo generate`
GENERATORS: Registry[Any] = Registry("generator", "zoo.generators")

#: ending of a file, ".ply" -> dataclass with `run() -> dict` and `describe(dict) -> str`: `zoo sparsify FILE`
FILE_SPARSIFIERS: Registry[Any] = Registry(
    "kind of file to sparsify", "zoo.file_sparsifiers", needs=("run", "describe")
)
#: what `zoo export MODEL --to NAME` writes beside plain weights -> dataclass with `run() -> dict` and
#: `describe(dict) -> str`
EXPORTERS: Registry[Any] = Registry("export", "zoo.exporters", needs=("run", "describe"))
#: domain -> function of a bundle and a path that draws its model, behind `zoo show --picture`
PICTURES: Registry[Callable[..., Any]] = Registry("maker of pictures", "zoo.pictures")

register_architecture = ARCHITECTURES.register
register_method = METHODS.register
register_task = TASKS.register
register_study = STUDIES.register

MAKERS.register("sparsify", "zoo.bundles.make:sparsify")
EXPORTERS.register("onnx", "zoo.bundles.interchange:ExportOnnx")
EXPORTERS.register("torch-export", "zoo.bundles.interchange:ExportProgram")
for _name, _class in {  # methods that belong to no domain
    "prune": "prune:Prune",
    "magnitude": "magnitude:MagnitudePruning",
    "fast-convnet": "fast_convnets:FastConvNet",
    "random-pruning": "random_pruning:RandomPruning",
    "dynamic-sparse": "dynamic_sparse:DynamicSparse",
    "lottery-ticket": "tickets:LotteryTicket",
    "lottery-jackpot": "jackpots:LotteryJackpot",
    "bip": "bip:BiP",
    "nested": "nested:Nested",
    "sparse-soup": "soups:SparseSoup",
    "sr-ste": "sr_ste:SparseRefined",
    "pgf": "pgf:ProgressiveFlow",
    "bdwp": "bdwp:BDWP",
    "sparse-ift": "sparse_ift:SparseIFT",
    "mask-sparsity": "mask_sparsity:MaskSparsity",
    "wgsef": "wgsef:WGSEF",
    "iss-p": "iss_p:ISSP",
    "sparcl": "sparcl:SparCL",
    "consensus": "consensus:Consensus",
    "turbo-vbi": "turbo_vbi:TurboVBI",
    "random-search": "random_search:RandomSearch",
}.items():
    METHODS.register(_name, f"zoo.methods.{_class}")
STUDIES.register("quick-selection", "zoo.methods.studies.quick_selection:STUDY")

"""FORMATS: other people's checkpoints: read as averages of a model, and turned into one another.

This is the front door, for users as for other modules. Who wrote a checkpoint `producers` knows,
how one is written `writers`; here is what a model has to do with it: its names, order, ties and
shapes, against which all is checked. Where averages and trained weights are both there, the caller
says which are meant: nothing here guesses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from polyak import checkpoint
from polyak.checkpoint import Checkpoint, Stored
from polyak.decay import Decay, DecayLike
from polyak.files import StrPath
from polyak.producers import Content, naming, read_json, recognized, respelled, stripped, under
from polyak.selection import Tree, by_parameter, listed, named_throughout, parameters_of
from polyak.writers import KEEPING_WEIGHTS, WRITERS, read_all, write

__all__ = [
    "WRITERS",
    "Averages",
    "Content",
    "convert",
    "load_averages",
    "opened",
    "recognized",
    "write",
]


def load_averages(
    path: StrPath,
    model: nn.Module | None = None,
    *,
    which: str | None = None,
    at: str = "",
    part: str = "",
) -> Averages:
    """Read averages from a checkpoint of polyak or of a peer, whatever program wrote it.

    >>> import tempfile
    >>> from torch import nn
    >>> from torch.optim.swa_utils import AveragedModel
    >>> import polyak
    >>> model = nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(AveragedModel(model).state_dict(), f"{folder}/swa.pt")
    ...     averages = load_averages(f"{folder}/swa.pt", model)
    >>> averages
    Averages(2 tensors, producer='torch AveragedModel', which='averages', clock=0, decay=None)
    >>> model.load_state_dict(averages)
    <All keys matched successfully>

    Args:
        path: a file, or a folder that holds one checkpoint.
        model: whose tensors they are, in any wrapper; it is only read. It names what a peer keeps
            without names, and all is checked against it. Buffers and frozen parameters may be
            missing, as many averages leave them out.
        which: the set of tensors that is meant; by default the only one there is.
        at: the dotted path of the part of a checkpoint to look at, such as `"trainer.ema"`.
        part: the name of a module, to read that one alone under its own names, such as
            `"model"` for what a LightningModule calls `self.model`.

    Returns:
        The tensors, in host memory and in the dtypes of the file. With a model a tied one is there
        under each of its names.

    Raises:
        ValueError: it is no checkpoint, not recognized, can only be unpickled, has several sets
            and `which` is missing, has no names and `model` is missing, or does not fit the model;
            all differences are listed.
        OSError: there is no such file, or it cannot be read.
    """
    with opened(path) as found:
        content = recognized(found, at)
        with naming(path):
            name = content.pick(which)
            tree = None if model is None else Tree(model)
            read = read_all(_named(content, name, tree, part))
            if tree is not None:
                _refuse_untied(read, tree)
        return Averages(read, content, name)


class Averages(Mapping[str, Tensor]):
    """Tensors from a checkpoint by their names in the plain model, and what is known of them.

    Attributes:
        producer: the program that wrote the checkpoint.
        which: the set that was read: "averages", "weights", or one of several averages.
        clock: how many updates they have seen, as the producer counts; None if it is not told,
            and of weights.
        decay: the decay that continues them; None if it is not told, and of weights.
        details: what else the checkpoint tells, by the producer's own words.
    """

    def __init__(self, tensors: Mapping[str, Tensor], content: Content, which: str) -> None:
        self._tensors = dict(tensors)
        self.producer = content.producer
        self.which = which
        self.clock, self.decay = _told(content, which)
        self.details = dict(content.details)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return (
            f"Averages({len(self)} tensors, producer={self.producer!r}, which={self.which!r}, "
            f"clock={self.clock}, decay={self.decay!r})"
        )


@contextmanager
def opened(path: StrPath) -> Iterator[Checkpoint]:
    """Open a checkpoint; of what can only be unpickled, say what to run where it was made.

    Raises:
        ValueError: as `checkpoint.opened`.
        OSError: there is no such file, or it cannot be read.
    """
    with ExitStack() as stack:
        try:
            found = stack.enter_context(checkpoint.opened(path))
        except ValueError as error:
            message = str(error)
            advice = [text for pattern, text in _ADVICE.items() if re.search(pattern, message)]
            if not advice:
                raise
            raise ValueError(f"{message}. {advice[0]}") from None
        yield found


def convert(
    source: StrPath,
    out: StrPath,
    to: str,
    *,
    which: str | None = None,
    at: str = "",
    model: nn.Module | None = None,
    clock: int | None = None,
    decay: float | DecayLike | None = None,
    config: StrPath | None = None,
) -> Content:
    """Write the averages of one program's checkpoint as another program expects them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"n_averaged": torch.tensor(7), "module.w": torch.ones(2)}, f"{folder}/a.pt")
    ...     content = convert(f"{folder}/a.pt", f"{folder}/a.safetensors", "safetensors")
    ...     load_averages(f"{folder}/a.safetensors")
    Averages(1 tensors, producer='polyak', which='averages', clock=7, decay=None)

    Args:
        source: a checkpoint; see `load_averages`.
        out: see `write`.
        to: one of `WRITERS`.
        which: the set of tensors that is meant; by default the only one there is. Trained weights
            beside averages go along where the new format has a place for them.
        at: see `load_averages`.
        model: see `load_averages`, and for the order of a file without names.
        clock: by default what the source tells of the averages; of weights there is none.
        decay: by default what the source tells of the averages; of weights there is none.
        config: see `write`; by default the one beside the source.

    Returns:
        What the source was recognized as. Its tensors cannot be read any more.

    Raises:
        ValueError, OSError: as `load_averages` and `write`.
    """
    with opened(source) as found:
        content = recognized(found, at)
        with naming(source):
            name = content.pick(which)
            tree = None if model is None else Tree(model)
            tensors = content.sets[name]
            if tree is not None or isinstance(tensors, Mapping):
                tensors = _named(content, name, tree)
            beside_them = to in KEEPING_WEIGHTS and not _are_weights(name)
            trained = content.weights if beside_them else None
            if tree is not None and trained is not None:
                trained = _named(content, "weights", tree)
        beside = found.path.parent / "config.json"
        if config is None and beside.exists() and "_class_name" in read_json(beside):
            config = beside
        told = _told(content, name)
        write(
            out,
            tensors,
            to,
            which="weights" if _are_weights(name) else "averages",
            weights=trained,
            clock=told[0] if clock is None else clock,
            decay=told[1] if decay is None else decay,
            model=model,
            config=config,
        )
    return content


# ------------------------------------------------- for what can only be unpickled, what to run

_ADVICE = {
    r"\(ultralytics\.": (
        "For ultralytics: c = torch.load(path, weights_only=False), then "
        'torch.save((c["ema"] or c["model"]).float().state_dict(), "weights.pt")'
    ),
    r"network-snapshot-\d+-\d\.\d+\.pkl' is a pickle": (
        'For EDM2, in its folder: net = pickle.load(open(path, "rb"))["ema"], then '
        'safetensors.torch.save_file(net.state_dict(), "weights.safetensors")'
    ),
    r"\((dnnlib|torch_utils|training)\.": (
        "For EDM2, in its folder: c = torch.load(path, weights_only=False), then "
        'torch.save({"net": c["net"], "ema": c["ema"], "state": dict(c["state"])}, "state.pt")'
    ),
    r"\((mmengine|omegaconf|fairseq|numpy)\.": (
        "Or keep what is plain: c = torch.load(path, weights_only=False), then torch.save({k: c[k] "
        'for k in c if "state_dict" in k or k in ("model", "ema")}, "weights.pt")'
    ),
}


# ------------------------------------------------------------------------ names against a model


def _told(content: Content, name: str) -> tuple[int | None, Decay | None]:
    """Return the clock and the decay of a set; trained weights have none."""
    return (None, None) if _are_weights(name) else (content.clock, content.decays.get(name))


def _are_weights(name: str) -> bool:
    return name.partition(" ")[0] == "weights"


def _named(content: Content, name: str, tree: Tree | None, part: str = "") -> dict[str, Stored]:
    """Return a set of tensors under the names of the plain model, checked against it."""
    tensors = content.sets[name]
    dot = "." if name == "weights" else content.dot
    if tree is None:
        if not isinstance(tensors, Mapping) or dot != ".":
            dots = f"with {dot!r} for each dot" if dot else "without dots"
            kept = f"under names {dots}" if isinstance(tensors, Mapping) else "as a list"
            raise ValueError(
                f"{content.producer} keeps its {len(tensors)} {name} {kept}, and only the model "
                "tells which is which: pass model=, built as it was in training"
            )
        return _part(tensors, part) if part else dict(tensors)
    if part and (not isinstance(tensors, Mapping) or dot != "."):
        raise ValueError(
            f"{content.producer} keeps its {len(tensors)} {name} without names, so that there is "
            f"no part {part!r}: leave part= out and pass the whole model"
        )
    if not isinstance(tensors, Mapping):
        found = by_parameter(tensors, tree)
    elif dot != ".":
        parameters = {key: key for key, _ in parameters_of(tree)}
        found = respelled(tensors, parameters, dot) or dict(tensors)
    else:
        found = _part(tensors, part) if part else dict(tensors)
    if not found.keys() <= tree.by_name.keys():
        spelled = {short: key for key, short in stripped(tree.by_name).items()}
        found = {spelled.get(key, key): stored for key, stored in found.items()}
    _refuse_misfits(found, tree, f"the {name} of {content.producer}")
    return named_throughout(found, tree)


def _part(tensors: Mapping[str, Stored], part: str) -> dict[str, Stored]:
    found = under(part, tensors)
    if not found:
        parts = sorted({name.partition(".")[0] for name in tensors})
        raise ValueError(
            f"there is no part {part!r} in it: its tensors are in {', '.join(parts[:20])}. Pass "
            "one of these, or leave part= out"
        )
    return found


def _refuse_misfits(found: Mapping[str, Stored], tree: Tree, what: str) -> None:
    """Refuse tensors that are not this model's. Only what is trained must be there."""
    known = {tree.by_name[name].name for name in found if name in tree.by_name}
    parameters = [slot for slot in tree.slots if not slot.is_buffer]
    trained = [slot for slot in parameters if slot.tensor.requires_grad] or parameters
    wrong = [f"{slot.name}: missing in the file" for slot in trained if slot.name not in known]
    wrong += [f"{name}: only in the file" for name in found if name not in tree.by_name]
    wrong += [
        f"{name}: {stored.shape} in the file, {tuple(tree.by_name[name].tensor.shape)} in the model"
        for name, stored in found.items()
        if name in tree.by_name and stored.shape != tuple(tree.by_name[name].tensor.shape)
    ]
    if wrong:
        first = next(iter(found), "").partition(".")[0]
        inner = under(first, found)
        hint = f", or pass part={first!r}" if inner.keys() & tree.by_name.keys() else ""
        raise ValueError(
            f"{what} do not fit {type(tree.modules[0]).__name__}:{listed(wrong)}\n"
            f"build the model as it was in training{hint}"
        )


def _refuse_untied(read: Mapping[str, Tensor], tree: Tree) -> None:
    """Refuse several values for what is one tensor in the model."""
    wrong = [
        " and ".join(names)
        for slot in tree.slots
        if len(names := [name for name in slot.names if name in read]) > 1
        and not all(_same(read[names[0]], read[name]) for name in names[1:])
    ]
    if wrong:
        raise ValueError(
            f"what is one tensor in the model has several values in the file:{listed(wrong)}\n"
            "build the model without these ties, as it was in training"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))

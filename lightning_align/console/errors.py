"""Errors of the parser in three lines: what is wrong with the nearest names, what is possible, and where the help is."""

import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lightning_align.console.configs import nearest, shipped

WIDTH = 400
"""The largest number of characters of a line."""


def explain(message: str, *, command: str = "", options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Say in at most three lines what is wrong with a command line.

    Args:
        message: The message of jsonargparse.
        command: The command, such as ``fit``. Empty if it is not known.
        options: The names of the command's options, such as ``trainer.max_steps``.
        arguments: The command line.

    Returns:
        The lines. A message of an unknown kind is shortened to its innermost lines.
    """
    call = f"lightning-align {command}".strip()
    for kind in (
        _missing_config,
        _broken_config,
        _unknown_option,
        _unrecognized,
        _required,
        _no_class,
        _no_choice,
        _wrong_type,
    ):
        lines = kind(message, call, options, arguments)
        if lines:
            break
    else:
        lines = [*_innermost(message)[:2], f"Help: {call} --help"]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in lines)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``; did you mean 'a' or 'b'?`` with the nearest names, or nothing if none is near."""
    found = near(name, names)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def near(name: str, names: Iterable[str]) -> list[str]:
    """Return the one or two names that are nearest, whatever their case: one if it is very near."""
    by_lower = {other.lower(): other for other in names}
    found = get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6)
    if found and SequenceMatcher(None, name.lower(), found[0]).ratio() >= 0.8:
        found = found[:1]
    return [by_lower[match] for match in found]


def unknown_command(name: str, commands: Sequence[str]) -> str:
    """Say that there is no such command, and which there are."""
    near = did_you_mean(name, commands)
    return f"no command {name!r}{near or '.'}\nCommands: {', '.join(commands)}\nHelp: lightning-align --help"


# -- kinds of errors. Each function returns the lines, or none if the message is of another kind.


def _missing_config(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"(?:File does not exist|Problems? (?:opening|reading)[^']*): '?([^'\n]+)'?", message)
    if not match or 'key "config"' not in message:
        return []
    path = match[1]
    # The parser completes the path, and people read the one that they gave.
    given = next((word.partition("=")[2] or word for word in arguments if word and path.endswith(f"/{word}")), path)
    given = next((word.split("=", 1)[1] for word in arguments if "=" in word and path.endswith(word.split("=", 1)[1])), given)
    local = get_close_matches(Path(given).name, [file.name for file in Path(given).parent.glob("*.y*ml")], n=1)
    others = [str(Path(given).parent / name) for name in local] + nearest(given)
    hint = f"; did you mean {' or '.join(map(repr, others[:2]))}?" if others else "."
    groups = ", ".join(dict.fromkeys(name.partition("/")[0] for name in shipped()))
    return [
        f"--config {given}: there is no such file, and no shipped configuration of this name{hint}",
        f"Shipped configurations ({groups}): lightning-align configs",
    ]


def _broken_config(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    if "Problems parsing config" not in message:
        return []
    for path in (Path(word.rpartition("=")[2]) for word in arguments):
        if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
            continue
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"
            line = "" if mark is None else path.read_text(encoding="utf-8", errors="replace").splitlines()[mark.line].strip()
            problem = getattr(error, "problem", None) or str(error)
            return [f"{path}{place} is not valid YAML: {problem}", *([f"The line is: {line}"] if line else [])]
    return []


def _unknown_option(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"Option '([^']+)' is not accepted([^\n]*)", message)
    if not match:
        return []
    # The class is named after the option if it is a factory, and before it otherwise.
    after = re.findall(r"class_path='([^']+)'", match[2])
    before = re.findall(r"class_path '([^']+)'", message[: match.start()])
    path = (after or before[-1:] or [""])[0]
    if path.endswith(("LightningModule", "LightningDataModule", ".Callback")):
        key = (_keys(message) or ["model"])[0]
        example = {"model": "SFTModule", "data": "SFTDataModule"}.get(key, "CLASS")
        return [
            f"--{key}.{match[1]} needs a class: name it before, as in --{key} {example}, or give a --config first.",
            f"Help: {call} --help",
        ]
    known = parameters(path)
    hint = did_you_mean(match[1], known) or "."
    if match[1] in ("lr", "learning_rate", "weight_decay") and "optimizer" in known:
        name = match[1].replace("learning_rate", "lr")
        hint = f"; it is set with --{(_keys(message) or ['model'])[0]}.optimizer AdamW --model.optimizer.{name} VALUE."
    lines = [f"{_short(path) or 'it'} has no argument {match[1]!r}{hint}"]
    if known:
        lines.append(f"Arguments of {_short(path)}: {', '.join(known)}")
    return [*lines, f"Help: {call} {_help_flag(message, path)}"]


def _unrecognized(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"unrecognized arguments: (\S+)|does not accept option '([^']+)'|No action for key \"([^\"]+)\"", message)
    if not match:
        return []
    given = next(part for part in match.groups() if part)
    name = given.lstrip("-").partition("=")[0]
    if match[1] and not given.startswith("-"):
        return [f"the argument {given!r} belongs to no option.", f"Options begin with --, as in {call} --config sft/jsonl"]
    head, _, rest = name.partition(".")
    groups = list(dict.fromkeys(option.partition(".")[0] for option in options))
    dashes = "--" if match[1] else ""
    wrong, known = (head, groups) if head not in groups and rest else (name, options)
    hint = did_you_mean(dashes + wrong, [dashes + other for other in known])
    return [f"{call} has no option {dashes + wrong!r}{hint or '.'}", f"Help: {call} --help"]


def _required(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"(?:arguments are required|[Kk]ey \"[\w.]+\" is required)[^:\n]*:? ?([^\n]*)", message)
    if not match:
        return []
    names = [name.strip().rpartition(".")[2] for name in match[1].split(",") if name.strip()]
    if {"model", "data"} & set(names):
        needed = " and ".join(f"--{name}" for name in sorted(names, reverse=True))
        return [
            f"{call} needs {needed}, which a configuration can give.",
            f"Example: {call} --config sft/jsonl --config model/palm_tiny --data.train rows.jsonl",
            "Configurations: lightning-align configs",
        ]
    return [f"{call} needs {', '.join(names) or 'an argument'}.", f"Help: {call} --help"]


def _no_class(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    block = _block(message)
    signs = r"Expected a dot import path string|No module named|has no attribute|cannot import name|Import path"
    kinds = set(re.findall(r"Expected an? <class '([\w.]+)'>", block)) - {"NoneType"}
    given = _value(block)
    if given is None or kinds or not re.search(signs, block):
        return []
    keys = _keys(message)
    classes = _classes()
    others = [repr(classes[name]) for name in near(given.rpartition(".")[2], classes)]
    hint = f"; did you mean {' or '.join(others)}?" if others else "."
    return [
        f"no class {given!r} for --{'.'.join(keys)}{hint}" if keys else f"no class {given!r}{hint}",
        "Classes of lightning_align, torch.optim and Lightning need no module path. Give others as package.module.Class",
        f"Help: {call} --help",
    ]


def _no_choice(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    block = _block(message)
    choices = list(dict.fromkeys(re.findall(r"'([^']*)'", " ".join(re.findall(r"Literal\[(.*?)\]", block)))))
    value = _value(block)
    if not choices or value is None:
        return []
    keys = _keys(message)
    name = keys[-1] if keys else "value"
    others = [kind for kind, sign in (("a mapping", "<class 'dict'>"), ("a number", "'float'>")) if sign in block]
    either = "".join(f", or {kind}" for kind in others)
    return [
        f"no {name.rpartition('.')[2]} {value!r}{did_you_mean(value, choices) or '.'}",
        f"--{'.'.join(keys)} is one of: {', '.join(choices)}{either}",
        f"Help: {call} {_help_flag(message, _last_class(message))}",
    ]


def _wrong_type(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    block = _block(message)
    value = _value(block)
    kinds = list(dict.fromkeys(re.findall(r"Expected an? <class '([\w.]+)'>", block)))
    kinds = [{"NoneType": "null", "str": "text", "int": "an integer", "float": "a number"}.get(kind, kind) for kind in kinds]
    keys = _keys(message)
    if not kinds or value is None or not keys:
        return []
    # "null" stands for the absence of a value, and is last.
    kinds = sorted(set(kinds), key=lambda kind: (kind == "null", kinds.index(kind)))
    return [
        f"--{'.'.join(keys)} must be {' or '.join(kinds)}, but got {value!r}.",
        f"Help: {call} {_help_flag(message, _last_class(message))}",
    ]


# -- parts of a message


def _keys(message: str) -> list[str]:
    """Return the nested keys down to the innermost one, such as ``["model", "loss"]``."""
    return list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))


def _block(message: str) -> str:
    """Return what is said of the innermost key."""
    found = list(re.finditer(r'^( *)(?:- )?Parser key "', message, re.MULTILINE))
    if not found:
        return message
    first, *rest = message[found[-1].start() :].splitlines()
    indent = len(first) - len(first.lstrip())
    lines = [first]
    for line in rest:
        if line.strip() and len(line) - len(line.lstrip()) <= indent and indent:
            break
        lines.append(line)
    return "\n".join(lines)


def _value(block: str) -> str | None:
    match = re.search(r"(?:Got value|Given value): ([^\n]*?)(?:\. Got value: .*)?$", block, re.MULTILINE)
    if match is None:
        return None
    nested = re.search(r"NestedArg\(key='[^']*', val='([^']*)'\)", match[1])
    return str(nested[1] if nested else match[1].strip())


def _last_class(message: str) -> str:
    return str((re.findall(r"class_path '([^']+)'", message) or [""])[-1])


def _help_flag(message: str, path: str) -> str:
    keys = _keys(message)
    outer = (re.findall(r"class_path '([^']+)'", message) or [path])[0]
    return f"--{keys[0]}.help {_short(outer)}" if keys and outer else "--help"


def _short(path: str) -> str:
    """Return the name by which the command line knows a class."""
    return path.rpartition(".")[2]


def _innermost(message: str) -> list[str]:
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>", "Problem with given")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith((*noise, "Parser key")) and line != "-"]
    prefix = f"--{'.'.join(_keys(message))}: " if _keys(message) else ""
    return [prefix + kept[0], *kept[1:]] if kept else [message.splitlines()[0]]


def parameters(path: str) -> list[str]:
    """Return the arguments of a class by its import path. None if it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: dict[str, None] = {}
    for base in getattr(found, "__mro__", ()):
        if "__init__" not in vars(base):
            continue
        signature = inspect.signature(base.__init__).parameters.values()
        names |= dict.fromkeys(
            p.name for p in signature if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        )
        if all(p.kind != p.VAR_KEYWORD for p in signature):
            break
    return list(names)


def _classes() -> dict[str, str]:
    """Return the classes that need no module path: name -> what to write."""
    names: dict[str, str] = {}
    for module in ("torch.optim.lr_scheduler", "torch.optim", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"):
        found = import_module(module)
        public = [name for name, value in vars(found).items() if inspect.isclass(value) and not name.startswith("_")]
        names |= {name: f"{module}.{name}" if module.startswith("torch") else name for name in public}
    own = import_module("lightning_align")
    return names | {name: name for name in own.__all__ if name[0].isupper()}
